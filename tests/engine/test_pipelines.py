"""What pipelines of diffusers tell: all that denoises in them is known, or the pipeline is refused; swept over all that are installed."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import textwrap
import typing
import warnings

import diffusers.pipelines
import pytest
import torch
from denoisers import denoiser
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tolerances import all_equal

from hf_tokens import ProSpectConfig, UnsupportedError, calibrate, edit, get_token_model, load, measure, save_adapter, unload
from hf_tokens.diffusion.steps import DenoisingWorld
from hf_tokens.model.pipelines import BESIDE_DENOISER, DECIDES, PREDICTION, PREDICTIONS, PROMPTS, denoising
from hf_tokens.model.streams import PROMPT

NEED_MORE = ("cv2", "note-seq", "PyAV", "flax", "onnx")  # modules that another package would have to be installed for


@functools.cache
def pipelines():
    """Every pipeline class of the installed diffusers."""
    found = {}
    for info in pkgutil.walk_packages(diffusers.pipelines.__path__, "diffusers.pipelines."):
        try:
            with warnings.catch_warnings(action="ignore"):  # of what the libraries use
                module = importlib.import_module(info.name)
        except ImportError as error:
            assert any(name in str(error) for name in NEED_MORE), error
            continue
        classes = (c for c in vars(module).values() if isinstance(c, type) and issubclass(c, DiffusionPipeline))
        found |= {cls.__name__: cls for cls in classes if cls.__module__ == info.name and cls is not DiffusionPipeline}
    assert len(found) > 250
    return found


def components(cls):
    """A pipeline's components, without their weights: of the first class that each may be of."""
    hints = typing.get_type_hints(cls.__init__, vars(importlib.import_module(cls.__module__)))
    kinds = {name: [kind for kind in (typing.get_args(hint) or (hint,)) if isinstance(kind, type)] for name, hint in hints.items()}
    return {name: kind[0].__new__(kind[0]) for name, kind in kinds.items() if kind and issubclass(kind[0], torch.nn.Module)}


SEVERAL = {
    *("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline", "Ideogram4Pipeline", "StableUnCLIPPipeline"),
    *("KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline", "KandinskyInpaintCombinedPipeline", "StableCascadeCombinedPipeline"),
    *("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline", "KandinskyV22InpaintCombinedPipeline"),
    *("UnCLIPPipeline", "UnCLIPImageVariationPipeline", "VersatileDiffusionPipeline"),
    *("VersatileDiffusionTextToImagePipeline", "VersatileDiffusionDualGuidedPipeline"),
}


def test_a_pipeline_with_several_denoisers_is_refused_by_name():
    refused = set()
    for name, cls in pipelines().items():
        parts = components(cls)
        looks_so = [k for k, v in parts.items() if isinstance(v, ModelMixin) and ("transformer" in k or "unet" in k or "prior" in k)]
        try:
            denoising(name, parts)
        except UnsupportedError as error:
            refused.add(name)
            assert name in str(error) and "Pass each by itself" in str(error)
        else:
            assert len([k for k in looks_so if not BESIDE_DENOISER.search(type(parts[k]).__name__)]) < 2, name
    assert refused == SEVERAL


def wan(seed):
    torch.manual_seed(seed)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16)
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, **sizes).eval()


def pipeline(**parts):
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, boundary_ratio=0.5, **parts)


CALL = dict(hidden_states=torch.ones(1, 4, 1, 4, 4), timestep=torch.tensor([500]), encoder_hidden_states=torch.ones(1, 5, 8))
DOORS = {
    "attach": lambda pipe, folder: get_token_model(pipe, "rece"),
    "load": lambda pipe, folder: load(folder, pipe),
    "save": lambda pipe, folder: save_adapter(pipe, folder / "new"),
    "edit": lambda pipe, folder: edit(pipe, {"erase": [CALL], "anchor": [CALL]}),
    "calibrate": lambda pipe, folder: calibrate(pipe, [CALL]),
    "unload": lambda pipe, folder: unload(pipe),
    "measure": lambda pipe, folder: measure(pipe, **CALL),
}


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_no_door_takes_half_of_two_experts(door, tmp_path):
    pipe, one = pipeline(transformer=wan(1), transformer_2=wan(2)), pipeline(transformer=wan(3), transformer_2=None)
    get_token_model(one, "rece")
    save_adapter(one, tmp_path)
    both = (pipe.transformer, pipe.transformer_2)
    before, modules = [expert(**CALL).sample for expert in both], [[*expert.modules()] for expert in both]
    with pytest.raises(UnsupportedError, match="a WanPipeline with transformer and transformer_2. Pass each by itself, `pipe.transformer`"):
        DOORS[door](pipe, tmp_path)
    all_equal([expert(**CALL).sample for expert in both], before, "refused")
    assert [[*expert.modules()] for expert in both] == modules


@torch.no_grad()
def test_each_of_two_experts_takes_an_edit_of_its_own():
    pipe = pipeline(transformer=wan(1), transformer_2=wan(2))
    for expert in (pipe.transformer, pipe.transformer_2):
        before = expert(**CALL).sample
        other = {**CALL, "encoder_hidden_states": torch.randn(1, 5, 8)}
        edit(get_token_model(expert, "rece"), {"erase": [CALL], "anchor": [other]})
        assert not torch.equal(expert(**CALL).sample, before)


# -- whose prompt a call is given ------------------------------------------------------------------------------------

DENOISER = re.compile(r"^(self\.(\w*unet|transformer)|\w*transformer|\w*unet|current_model)$")
TOLD = re.compile(r"cache_context\((context_name|'cond'|'uncond')")
NEGATED = re.compile(r"neg|uncond|null")
# Pipelines of which no row says whose prompt they give: they count them in ways of their own.
UNTOLD = {
    *(
        "DreamLitePipeline",
        "DreamLiteMobilePipeline",
        "LDMTextToImagePipeline",
        "CycleDiffusionPipeline",
        "SemanticStableDiffusionPipeline",
    ),
    *("StableDiffusionPipelineSafe", "LEditsPPPipelineStableDiffusion", "LEditsPPPipelineStableDiffusionXL", "TextToVideoZeroPipeline"),
    *("StableDiffusionDiffEditPipeline", "StableDiffusionPix2PixZeroPipeline", "StableDiffusionPanoramaPipeline", "Ideogram4Pipeline"),
    *("TextToVideoZeroSDXLPipeline", "BriaFiboPipeline", "BriaFiboEditPipeline", "VersatileDiffusionTextToImagePipeline"),
    *("VersatileDiffusionDualGuidedPipeline", "VersatileDiffusionImageVariationPipeline", "AmusedPipeline", "AmusedImg2ImgPipeline"),
    *("AmusedInpaintPipeline", "VQDiffusionPipeline"),
}


@functools.cache
def code_of(cls):
    return ast.parse(textwrap.dedent(inspect.getsource(cls)))


def prompts(cls):
    """What a pipeline's code gives its denoiser as the prompt, in calls that no context names."""
    named = {
        id(n)
        for w in ast.walk(code_of(cls))
        if isinstance(w, ast.With) and any(TOLD.search(ast.unparse(item.context_expr)) for item in w.items)
        for n in ast.walk(w)
    }
    calls = (n for n in ast.walk(code_of(cls)) if isinstance(n, ast.Call) and id(n) not in named and DENOISER.match(ast.unparse(n.func)))
    given = (ast.unparse(word.value) for call in calls for word in call.keywords if word.arg == PROMPT)
    return {value for value in given if value != "None"}


def layouts(cls, name):
    """How a pipeline's code puts the prompts of a batch together under a name: which of the parts are negative."""
    found = set()
    for node in ast.walk(code_of(cls)):
        if isinstance(node, ast.Assign) and name in [ast.unparse(target) for target in node.targets]:
            cats = (n.args[0] for n in ast.walk(node.value) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.cat" and n.args)
            found |= {tuple(bool(NEGATED.search(ast.unparse(e))) for e in cat.elts) for cat in cats if isinstance(cat, ast.List)}
    return {layout for layout in found if any(layout)}


def test_of_every_pipeline_it_is_known_whose_prompt_its_calls_are_given():
    known, refused = set(), set()
    for name, cls in pipelines().items():
        given = prompts(cls)
        if given and name in PROMPTS:
            known.add(name)
            assert given == PROMPTS[name].keys(), name
        elif given:
            refused.add(name)
    assert known == PROMPTS.keys() and refused == UNTOLD | {name for name in refused if name.startswith("Onnx")}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_parts_of_a_batch_are_put_together_as_the_row_says(name):
    cls = pipelines()[name]
    for given, parts in PROMPTS[name].items():
        variable = {"connector_prompt_embeds": "prompt_embeds"}.get(given, given.partition(".")[0])
        made = layouts(cls, variable)
        if len(parts) > 1 and not given.startswith("torch.cat"):
            assert made == {parts}, (given, made)
        elif len(parts) == 1:
            assert not made and (bool(NEGATED.search(given)) == parts[0] or "zeros_like" in given), (given, made)
        decides = inspect.unwrap(cls.__call__).__code__.co_varnames
        assert len(parts) == 1 or DECIDES in decides or isinstance(inspect.getattr_static(cls, DECIDES, None), property)


def test_a_guider_s_predictions_are_known_by_name():
    guiders = [cls for cls in vars(importlib.import_module("diffusers.guiders")).values() if isinstance(cls, type)]
    named = {name for cls in guiders for name in vars(cls).get("_input_predictions") or ()}
    assert named == PREDICTIONS.keys()
    assert importlib.import_module("diffusers.guiders.guider_utils").BaseGuidance._identifier_key == PREDICTION


PARTS = dict(text_encoder=None, tokenizer=None)
SAFE = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16, shift_factor=0.0)


def stable(cls, channels=4):
    unet = UNet2DConditionModel.from_config(denoiser("unet", torch.float32).config, in_channels=channels)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return cls(vae=vae(), unet=unet.eval(), scheduler=scheduler, **PARTS, **SAFE)


def flux(cls):
    sizes = dict(in_channels=16, patch_size=1, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=8)
    torch.manual_seed(0)
    model = FluxTransformer2DModel(joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4), **sizes).eval()
    beside = dict(text_encoder_2=None, tokenizer_2=None, image_encoder=None, feature_extractor=None)
    return cls(scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae(), transformer=model, **PARTS, **beside)


def drawn(pipe, images, same, **more):
    """What a pipeline makes of embedded prompts; same: the negative prompts are those prompts."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(3)
    embedded = {"prompt_embeds": torch.randn(images, 5, 6)}
    if "transformer" in pipe.components:
        embedded["pooled_prompt_embeds"] = torch.randn(images, 6)
    embedded |= {f"negative_{name}": value.clone() if same else torch.randn_like(value) for name, value in embedded.items()}
    return pipe(num_inference_steps=2, output_type="latent", **embedded, **more).images


class OwnPipeline(StableDiffusionPipeline):
    @torch.no_grad()
    def __call__(self, prompt_embeds, **_):
        return self.unet(torch.ones(1, 4, 8, 8), 5, encoder_hidden_states=prompt_embeds)


class InheritingPipeline(StableDiffusionPipeline):
    pass


IMAGE = dict(image=torch.rand(1, 3, 16, 16), true_cfg_scale=4.0, guidance_scale=1.0)
OF_IMAGES = dict(height=8, width=8, guidance_scale=4.0)
TWO_CALLS = [[False], [True]]
RUNS = {
    "a batch": (lambda: stable(StableDiffusionPipeline), OF_IMAGES, [[True, False]]),
    "a class of the user's": (lambda: stable(InheritingPipeline), OF_IMAGES, [[True, False]]),
    "no guidance": (lambda: stable(StableDiffusionPipeline), OF_IMAGES | {"guidance_scale": 1.0}, [[False]]),
    "two images": (lambda: stable(StableDiffusionPipeline), OF_IMAGES | {"num_images_per_prompt": 2}, [[True, True, False, False]]),
    "InstructPix2Pix": (
        lambda: stable(StableDiffusionInstructPix2PixPipeline, 8),
        dict(image=torch.rand(1, 3, 8, 8), guidance_scale=4.0, image_guidance_scale=1.5),
        [[False, True, True]],
    ),
    "PAG alone": (lambda: stable(StableDiffusionPAGPipeline), OF_IMAGES | {"guidance_scale": 0.0, "pag_scale": 3.0}, [[False, False]]),
    "PAG off": (lambda: stable(StableDiffusionPAGPipeline), OF_IMAGES | {"pag_scale": 0.0}, [[True, False]]),
    "Flux": (lambda: flux(FluxPipeline), dict(height=16, width=16, true_cfg_scale=4.0, guidance_scale=1.0), TWO_CALLS),
    "Flux img2img": (lambda: flux(FluxImg2ImgPipeline), dict(height=16, width=16, strength=1.0, **IMAGE), TWO_CALLS),
    "Flux Kontext": (
        lambda: flux(FluxKontextPipeline),
        dict(height=16, width=16, _auto_resize=False, max_area=256, **IMAGE),
        TWO_CALLS,
    ),
}


@pytest.mark.parametrize("same", [False, True], ids=["two prompts", "equal prompts"])
@pytest.mark.parametrize("name", RUNS)
def test_a_pipeline_tells_which_samples_are_of_the_negative_prompt(name, same, monkeypatch):
    build, given, want = RUNS[name]
    heard, negative = [], DenoisingWorld.negative
    monkeypatch.setattr(DenoisingWorld, "negative", lambda self, call: heard.append(negative(self, call)) or heard[-1])
    pipe = get_token_model(build(), ProSpectConfig(stages=1, init_std=1.0))
    assert bool(drawn(pipe, 1, same, **given).isfinite().all())
    assert [rows.tolist() for rows in heard] == want * 2


def test_perturbed_attention_reads_the_samples_together():
    given = OF_IMAGES | {"pag_scale": 3.0}
    pipe = get_token_model(stable(StableDiffusionPAGPipeline), ProSpectConfig(stages=1))
    with pytest.raises(UnsupportedError, match="got StableDiffusionPAGPipeline, whose perturbed attention joins them. Turn that off"):
        drawn(pipe, 1, False, **given)
    pipe = get_token_model(stable(StableDiffusionPAGPipeline), ProSpectConfig(stages=1, negative=True))
    assert bool(drawn(pipe, 1, False, **given).isfinite().all())


def test_a_pipeline_that_is_not_known_is_refused_unless_a_context_tells():
    pipe = get_token_model(stable(OwnPipeline), ProSpectConfig(stages=1))
    with pytest.raises(UnsupportedError, match=r"test_pipelines.OwnPipeline, which gives prompt_embeds as the prompt. Call the denoiser"):
        pipe(torch.randn(1, 5, 6))
    with CacheMixin.cache_context(pipe.unet, "cond"):
        assert bool(pipe(torch.randn(1, 5, 6)).sample.isfinite().all())
