"""What pipelines of diffusers tell: all that denoises in them is known, or the pipeline is refused; swept over all that are installed."""

import ast
import collections
import dataclasses
import functools
import importlib
import inspect
import pkgutil
import re
import types
import typing
import warnings
from pathlib import Path

import diffusers.pipelines
import pytest
import torch
from denoisers import calls, denoiser, sampled
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    CacheMixin,
    Cosmos2TextToImagePipeline,
    CosmosTextToWorldPipeline,
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.hooks import FirstBlockCacheConfig, ModelHook, PyramidAttentionBroadcastConfig, apply_first_block_cache
from diffusers.modular_pipelines.modular_pipeline import BlockState
from peft import LoraConfig, get_peft_model_state_dict
from tolerances import all_equal

from hf_tokens import (
    AdapterError,
    ConfigError,
    ImportanceTokenMergeConfig,
    MethodConfig,
    ProfilingDiTConfig,
    ProSpectConfig,
    TeaCacheConfig,
    TokenMap,
    TokenReducer,
    UnsupportedError,
    aux_loss,
    calibrate,
    edit,
    get_token_model,
    load,
    measure,
    save_adapter,
    set_progress,
    unload,
)
from hf_tokens.diffusion.clock import Tick, falling, find_tick
from hf_tokens.diffusion.runs import DenoisingRun
from hf_tokens.diffusion.steps import DenoisingWorld
from hf_tokens.model import families
from hf_tokens.model.pipelines import (
    BESIDE_DENOISER,
    CACHE_HOOKS,
    DECIDES,
    GIVE_SHARES,
    PREDICTION,
    PREDICTIONS,
    PROMPTS,
    SHARED_CACHES,
    STEPPED,
    STORING,
    denoisers,
)
from hf_tokens.model.streams import PROMPT
from hf_tokens.roles import registry
from hf_tokens.testing import zoo
from hf_tokens.tools import loading
from hf_tokens.tools.surgeries import surgeries_of, surgery_of

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


PAIRS = {
    **dict.fromkeys(("WanPipeline", "WanImageToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline"), ["transformer", "transformer_2"]),
    "Ideogram4Pipeline": ["transformer", "unconditional_transformer"],
}
SEVERAL = {
    *("KandinskyCombinedPipeline", "KandinskyImg2ImgCombinedPipeline", "KandinskyInpaintCombinedPipeline", "StableCascadeCombinedPipeline"),
    *("KandinskyV22CombinedPipeline", "KandinskyV22Img2ImgCombinedPipeline", "KandinskyV22InpaintCombinedPipeline"),
    *("UnCLIPPipeline", "UnCLIPImageVariationPipeline", "VersatileDiffusionPipeline", "StableUnCLIPPipeline"),
    *("VersatileDiffusionTextToImagePipeline", "VersatileDiffusionDualGuidedPipeline"),
}


def test_several_denoisers_are_a_pair_of_a_class_or_refused_by_name():
    refused, pairs = set(), {}
    for name, cls in pipelines().items():
        parts = components(cls)
        looks_so = [k for k, v in parts.items() if isinstance(v, ModelMixin) and ("transformer" in k or "unet" in k or "prior" in k)]
        try:
            found = denoisers(name, parts)
        except UnsupportedError as error:
            refused.add(name)
            assert name in str(error) and "Pass each by itself" in str(error)
        else:
            pairs |= {name: [*found]} if len(found) > 1 else {}
            assert len([k for k in looks_so if not BESIDE_DENOISER.search(type(parts[k]).__name__)]) < 2 or name in pairs, name
    there = pipelines().keys()
    assert refused == SEVERAL & there and pairs == {name: names for name, names in PAIRS.items() if name in there}


def wan(seed):
    torch.manual_seed(seed)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16)
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, **sizes).eval()


def pipeline(**parts):
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, boundary_ratio=0.5, **parts)


def pair(second=None):
    pipe = pipeline(transformer=wan(1), transformer_2=wan(2) if second is None else second)
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(), vae=AutoencoderKLWan(**SMALL_VAE))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def filmed(pipe, guidance=4.0, steps=8, videos=1):
    torch.manual_seed(3)
    prompts = {"prompt_embeds": torch.randn(videos, 5, 8), "negative_prompt_embeds": torch.randn(videos, 5, 8)}
    sizes = dict(height=64, width=64, num_frames=1, num_inference_steps=steps, output_type="latent")
    return pipe(**prompts, **sizes, guidance_scale=guidance).frames


SMALL_VAE = dict(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
CALL = dict(hidden_states=torch.ones(1, 4, 1, 4, 4), timestep=torch.tensor([500]), encoder_hidden_states=torch.ones(1, 5, 8))
DOORS = {
    "attach": lambda pipe, folder: get_token_model(pipe, "rece"),
    "load": lambda pipe, folder: load(folder, pipe),
    "save": lambda pipe, folder: save_adapter(pipe, folder / "new"),
    "edit": lambda pipe, folder: edit(pipe, {"erase": [CALL], "anchor": [CALL]}),
    "calibrate": lambda pipe, folder: calibrate(pipe, [CALL]),
    "unload": lambda pipe, folder: unload(pipe),
    "measure": lambda pipe, folder: measure(pipe, **CALL),
    "loss": lambda pipe, folder: aux_loss(pipe),
}


def unlike():
    """Two denoisers that are no pair: of two classes."""
    pipe = pair()
    pipe.transformer_2 = denoiser("sd3", torch.float32)
    return pipe


@pytest.mark.parametrize("door", DOORS)
@torch.no_grad()
def test_no_door_takes_half_of_two_denoisers_that_are_not_alike(door, tmp_path):
    pipe, one = unlike(), pipeline(transformer=wan(3), transformer_2=None)
    get_token_model(one, "rece")
    save_adapter(one, tmp_path)
    before, modules = pipe.transformer(**CALL).sample, [[*expert.modules()] for expert in (pipe.transformer, pipe.transformer_2)]
    with pytest.raises(UnsupportedError, match="a WanPipeline with transformer and transformer_2. Pass each by itself, `pipe.transformer`"):
        DOORS[door](pipe, tmp_path)
    all_equal([pipe.transformer(**CALL).sample], [before], "refused")
    assert [[*expert.modules()] for expert in (pipe.transformer, pipe.transformer_2)] == modules


@pytest.mark.parametrize("door", sorted(DOORS.keys() - {"attach", "load"}))
def test_a_surgery_in_one_expert_alone_is_not_taken_for_the_pipeline_s(door, tmp_path):
    pipe = pair()
    get_token_model(pipe.transformer_2, "rece")
    said = "One model is looked at" if door == "measure" else "in all of its denoisers, not in transformer_2 alone"
    with pytest.raises(UnsupportedError, match=f"{said}.* Pass each by itself, `pipe.transformer`, `pipe.transformer_2`"):
        DOORS[door](pipe, tmp_path)


LIVES = {
    "a bank": ProSpectConfig(stages=1, init_std=1.0, negative=True),
    "a reducer": "importance-token-merge",
    "a feature cache": ProfilingDiTConfig(background=(0, 1), start=0.0, intervals="steps"),
    "a stack": [LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False), ProSpectConfig(stages=2, init_std=1.0)],
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("life", LIVES)
def test_two_experts_have_one_surgery(life, guidance, tmp_path):
    """What each does by itself they do together: put in, drawn with, saved, switched off, loaded, taken out."""
    base, apart_ = filmed(pair(), guidance), pair()
    torch.manual_seed(0)
    for expert in (apart_.transformer, apart_.transformer_2):
        get_token_model(expert, LIVES[life])
    want = filmed(apart_, guidance)
    assert not torch.equal(want, base)
    pipe = pair()
    torch.manual_seed(0)
    get_token_model(pipe, LIVES[life])
    all_equal([filmed(pipe, guidance)], [want], "each by itself")
    save_adapter(pipe, tmp_path)
    files = [f"{name}/{file}" for name in PAIRS["WanPipeline"] for file in ("adapter_config.json", "adapter_model.safetensors")]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")) == ["README.md", *files, "use_it.py"]
    pipe.disable_lora()  # as diffusers calls it
    all_equal([filmed(pipe, guidance)], [base], "disabled")
    loaded = load(tmp_path, pair())
    all_equal([filmed(loaded, guidance)], [want], "loaded")
    unload(loaded)
    all_equal([filmed(loaded, guidance)], [base], "unloaded")
    assert not any("hf_tokens" in name for expert in (loaded.transformer, loaded.transformer_2) for name, _ in expert.named_modules())


def test_a_video_of_two_experts_is_the_same_in_a_batch():
    for life in ("a bank", "a feature cache"):
        pipe = get_token_model(pair(), LIVES[life])
        latents, prompts = torch.randn(2, 4, 1, 8, 8), torch.randn(2, 2, 5, 8)
        sizes = dict(height=64, width=64, num_frames=1, num_inference_steps=8, output_type="latent", guidance_scale=4.0)
        film = lambda rows, pipe=pipe, latents=latents, prompts=prompts, sizes=sizes: (
            pipe(prompt_embeds=prompts[0, rows], negative_prompt_embeds=prompts[1, rows], latents=latents[rows].clone(), **sizes).frames
        )
        torch.testing.assert_close(film(slice(2)), torch.cat([film(slice(1)), film(slice(1, 2))]), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("door", ["attach", "load"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
def test_what_does_not_fit_the_second_expert_does_not_stay_in_the_first(door, beside, tmp_path):
    save_adapter(get_token_model(pair(), ProSpectConfig(stages=1)), tmp_path)
    other = WanTransformer3DModel.from_config({**wan(2).config, "num_layers": 1})
    pipe = pair(other.eval())
    config = ProSpectConfig(stages=1)
    if door == "attach":
        get_token_model(pipe.transformer_2, config, adapter_name="mine")
    if beside:
        get_token_model(pipe.transformer, config, adapter_name="there")
    state = lambda: [(name, p.requires_grad) for name, p in pipe.transformer.named_parameters()]
    before, modules, names = pipe.transformer(**CALL).sample, state(), vars(pipe.transformer).get("peft_config", {}).keys() - {""}
    damage_second(tmp_path)
    with pytest.raises((ConfigError, AdapterError)):
        get_token_model(pipe, config, adapter_name="mine") if door == "attach" else load(tmp_path, pipe, adapter_name="mine")
    assert state() == modules and vars(pipe.transformer).get("peft_config", {}).keys() == names
    all_equal([pipe.transformer(**CALL).sample], [before], "refused")


def damage_second(folder):
    """Turn a bit in the file of the second expert, which is still one that can be read."""
    path = folder / "transformer_2" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))


def test_an_adapter_of_one_denoiser_is_not_loaded_as_one_of_two_nor_the_other_way_round(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    save_adapter(get_token_model(pipeline(transformer=wan(1), transformer_2=None), "rece"), one)
    save_adapter(get_token_model(pair(), "rece"), two)
    with pytest.raises(AdapterError, match="with transformer and transformer_2 has a folder for each, got .*one, the adapter of one model"):
        load(one, pair())
    for model in (pipeline(transformer=wan(1), transformer_2=None), wan(1), None):
        with pytest.raises(AdapterError, match="goes into a pipeline that has them, got .*two with transformer and transformer_2. Pass"):
            load(two, model)
    (two / "transformer_2" / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match="has a file adapter_config.json, got .*two/transformer_2 without it"):
        load(two, pair())


def test_a_save_that_is_killed_between_two_experts_leaves_no_mixture(tmp_path, monkeypatch):
    pipe = get_token_model(pair(), ProSpectConfig(stages=1, init_std=1.0))
    save_adapter(pipe, tmp_path)
    save = loading.save_into
    monkeypatch.setattr(
        loading, "save_into", lambda folder, *rest: exec("raise KeyboardInterrupt") if "_2" in str(folder) else save(folder, *rest)
    )
    with pytest.raises(KeyboardInterrupt):
        save_adapter(pipe, tmp_path)
    with pytest.raises(AdapterError, match="has a file adapter_config.json"):
        load(tmp_path, pair())


OTHER_CALL = {**CALL, "encoder_hidden_states": torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(1))}


@torch.no_grad()
def test_an_erasure_reaches_both_experts_or_none():
    pipe, apart_ = get_token_model(pair(), "rece"), pair()
    moved = edit(pipe, {"erase": iter([CALL]), "anchor": [OTHER_CALL]})
    assert [*moved] == ["transformer.default.0", "transformer_2.default.0"] and all(
        value > 0 for of in moved.values() for value in of.values()
    )
    experts = [get_token_model(expert, "rece") for expert in (apart_.transformer, apart_.transformer_2)]
    for expert in experts:
        edit(expert, {"erase": [CALL], "anchor": [OTHER_CALL]})
    erased = [expert(**CALL).sample for expert in (pipe.transformer, pipe.transformer_2)]
    all_equal(erased, [expert(**CALL).sample for expert in experts], "each by itself")
    handle = pipe.transformer_2.register_forward_pre_hook(lambda *_: exec("raise RuntimeError('out of memory')"))
    with pytest.raises(RuntimeError, match="out of memory"):
        edit(pipe, {"erase": [OTHER_CALL], "anchor": [CALL]})
    handle.remove()
    all_equal([expert(**CALL).sample for expert in (pipe.transformer, pipe.transformer_2)], erased, "none")


@torch.no_grad()
def test_knobs_of_two_experts_are_measured_in_one_run_of_their_pipeline(tmp_path):
    pipe = get_token_model(pair(), ProfilingDiTConfig())
    batch = dict(prompt_embeds=torch.ones(1, 5, 8), negative_prompt_embeds=torch.zeros(1, 5, 8), height=16, width=16, num_frames=1)
    found = calibrate(pipe, [{**batch, "num_inference_steps": 6, "output_type": "latent"}])
    assert [*found] == ["transformer.default.0", "transformer_2.default.0"]
    for name in PAIRS["WanPipeline"]:
        assert pipe.components[name].peft_config["default"].methods == [found[f"{name}.default.0"]]
    set_progress(pipe, 0.25)
    assert [surgery.progress for surgery in surgeries_of(pipe).values()] == [0.25, 0.25]


@torch.no_grad()
def test_each_of_two_experts_takes_an_edit_of_its_own():
    pipe = pipeline(transformer=wan(1), transformer_2=wan(2))
    for expert in (pipe.transformer, pipe.transformer_2):
        before = expert(**CALL).sample
        other = {**CALL, "encoder_hidden_states": torch.randn(1, 5, 8)}
        edit(get_token_model(expert, "rece"), {"erase": [CALL], "anchor": [other]})
        assert not torch.equal(expert(**CALL).sample, before)


# -- whose prompt a call is given ------------------------------------------------------------------------------------

DENOISER = re.compile(r"^(self\.(\w*unet|\w*transformer)|\w*transformer|\w*unet|current_model)$")
TOLD = re.compile(r"cache_context\((context_name|'cond'|'uncond')")
NEGATED = re.compile(r"neg|uncond|null|_tuple\[1\]|embeds\[0\]")
# Pipelines of which no row says whose prompt they give: one prompt of two in one, whose lengths its attention is told.
UNTOLD = {"VersatileDiffusionDualGuidedPipeline"}


@functools.cache
def classes_in(file):
    """The classes of a file, parsed."""
    return {node.name: node for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.ClassDef)}


@functools.cache
def functions_of(cls):
    """All nodes of each method of a class."""
    code = classes_in(importlib.import_module(cls.__module__).__file__)[cls.__name__]
    return [[*ast.walk(method)] for method in code.body if isinstance(method, ast.FunctionDef)]


@functools.cache
def calls_of(cls):
    """For each method of a pipeline that calls its denoiser, its nodes and these calls."""
    calls = ([n for n in nodes if isinstance(n, ast.Call) and DENOISER.match(ast.unparse(n.func))] for nodes in functions_of(cls))
    return [(nodes, found) for nodes, found in zip(functions_of(cls), calls, strict=True) if found]


def prompts(cls):
    """What a pipeline's code gives its denoiser as the prompt, in calls that no context names."""
    given = set()
    for nodes, found in calls_of(cls):
        contexts = (n for n in nodes if isinstance(n, ast.With) and any(TOLD.search(ast.unparse(item.context_expr)) for item in n.items))
        named = {id(node) for context in contexts for node in ast.walk(context)}
        given |= {ast.unparse(word.value) for call in found if id(call) not in named for word in call.keywords if word.arg == PROMPT}
    return given - {"None"}


PUT_TOGETHER = ("torch.cat", "torch.concat", "torch.stack")


def layouts(cls, name):
    """How a pipeline's code puts the prompts of a batch together under a name: which of the parts are negative."""
    found = set()
    for node in (node for nodes in functions_of(cls) for node in nodes):
        if not isinstance(node, ast.Assign) or name not in [ast.unparse(n) for target in node.targets for n in ast.walk(target)]:
            continue
        calls = [n for n in ast.walk(node.value) if isinstance(n, ast.Call)]
        lists = [n.args[0] for n in calls if ast.unparse(n.func) in PUT_TOGETHER and n.args]
        lists += [word.value for n in calls for word in n.keywords if word.arg == "prompts"]
        found |= {tuple(bool(NEGATED.search(ast.unparse(e))) for e in each.elts) for each in lists if isinstance(each, ast.List)}
    return {layout for layout in found if any(layout)}


N, P = True, False
OFF, ON = {DECIDES: False}, {DECIDES: True}
ABOVE_ONE = [({"guidance_scale": 1.0}, (P,)), ({"guidance_scale": 4.0}, (N, P))]
PIPELINE = types.SimpleNamespace(enabled_editing_prompts=2)
# Rows that are functions: what is said by which variables, and the lines of the source that say so.
BY_VARIABLES = {
    ("BriaFiboPipeline", "prompt_embeds"): (ABOVE_ONE, ["if guidance_scale > 1:", "cat([negative_prompt_embeds, prompt_embeds]"]),
    ("BriaFiboEditPipeline", "prompt_embeds"): (ABOVE_ONE, ["if guidance_scale > 1:", "cat([negative_prompt_embeds, prompt_embeds]"]),
    **{
        (name, "encoder_hidden_states"): (
            ABOVE_ONE,
            ["if guidance_scale > 1.0:", "torch.concat([negative_encoder_hidden_states, encoder_hidden_states])"],
        )
        for name in ("AmusedPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline")
    },
    ("LDMTextToImagePipeline", "context"): (
        [*ABOVE_ONE, ({"guidance_scale": 0.5}, (N, P))],
        ["if guidance_scale == 1.0:", "context = prompt_embeds", "context = torch.cat([negative_prompt_embeds, prompt_embeds])"],
    ),
    ("DreamLitePipeline", "prompt_embeds"): (
        [({"task": "generate"}, (N, P)), ({"task": "edit"}, (N, N, P))],
        ['if task == "generate":', "prompts=[negative_prompt, prompt_str],", "prompts=[negative_prompt, negative_prompt, prompt_str],"],
    ),
    ("StableDiffusionDiffEditPipeline", "prompt_embeds"): (
        [(OFF, (P,)), (ON, (N, P)), (OFF | {"target_prompt_embeds": 1}, (P, P)), (ON | {"target_prompt_embeds": 1}, (N, P, N, P))],
        [
            "target_prompt_embeds = torch.cat([target_negative_prompt_embeds, target_prompt_embeds])",
            "source_prompt_embeds = torch.cat([source_negative_prompt_embeds, source_prompt_embeds])",
            "prompt_embeds = torch.cat([source_prompt_embeds, target_prompt_embeds])",
            "prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])",
        ],
    ),
    ("StableDiffusionPanoramaPipeline", "prompt_embeds_input"): (
        [(OFF | {"vb_size": 2}, (P, P)), (ON | {"vb_size": 1}, (N, P)), (ON | {"vb_size": 2}, (N, P, N, P))],
        [
            "prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds])",
            "prompt_embeds_input = torch.cat([prompt_embeds] * vb_size)",
        ],
    ),
    ("StableDiffusionPipelineSafe", "prompt_embeds"): (
        [
            (OFF | {"enable_safety_guidance": False}, (P,)),
            (ON | {"enable_safety_guidance": False}, (N, P)),
            (ON | {"enable_safety_guidance": True}, (N, P, N)),
        ],
        ["cat([negative_prompt_embeds, prompt_embeds, safety_embeddings])", "cat([negative_prompt_embeds, prompt_embeds])"],
    ),
    ("SemanticStableDiffusionPipeline", "text_embeddings"): (
        [
            (OFF | {"enabled_editing_prompts": 2}, (P,)),
            (ON | {"enabled_editing_prompts": 0}, (N, P)),
            (ON | {"enabled_editing_prompts": 2}, (N, P, N, N)),
        ],
        ["cat([uncond_embeddings, text_embeddings, edit_concepts])", "cat([uncond_embeddings, text_embeddings])"],
    ),
    ("LEditsPPPipelineStableDiffusion", "text_embed_input"): (
        [({"self": PIPELINE}, (N, P, P))],
        ["cat([uncond_embeddings, edit_concepts])", "text_embed_input = text_embeddings", "[latents] * (1 + self.enabled_editing_prompts)"],
    ),
    ("LEditsPPPipelineStableDiffusionXL", "prompt_embeds"): (
        [({"self": PIPELINE}, (N, P, P))],
        ["negative_prompt_embeds,\n            edit_concepts_embeds,", "torch.cat([prompt_embeds, edit_prompt_embeds], dim=0)"],
    ),
    ("LEditsPPPipelineStableDiffusionXL", "negative_prompt_embeds"): (
        [(OFF, (N,)), (ON, (N, P))],
        ["negative_prompt_embeds = torch.cat([negative_prompt_embeds, prompt_embeds], dim=0)"],
    ),
}


def test_rows_that_are_functions_say_what_the_source_says():
    functions = {(name, given) for name, row in PROMPTS.items() for given, parts in row.items() if callable(parts)}
    assert functions == BY_VARIABLES.keys()
    for (name, given), (cases, lines) in BY_VARIABLES.items():
        cls = pipelines().get(name)
        if cls is None:
            continue
        calls = [nodes for nodes, found in calls_of(cls) if any(given in (ast.unparse(w.value) for w in call.keywords) for call in found)]
        assert all(line in inspect.getsource(cls) for line in lines), name
        for variables, parts in cases:
            assert PROMPTS[name][given](variables.get) == parts, (name, variables)
            used = ({n.id for n in nodes if isinstance(n, ast.Name)} for nodes in calls)
            assert any(variables.keys() <= names for names in used), (name, variables)


# Where the code has a prompt under another name when it puts it together with others.
MADE_AS = {"connector_prompt_embeds": "prompt_embeds", "prompt_embeds_edit": "prompt_embeds"}


def test_of_every_pipeline_it_is_known_whose_prompt_its_calls_are_given():
    known, refused = set(), set()
    for name, cls in pipelines().items():
        given = prompts(cls)
        if given and name in PROMPTS:
            known.add(name)
            assert given == PROMPTS[name].keys(), name
        elif given:
            refused.add(name)
    there = pipelines().keys()
    assert known == PROMPTS.keys() & there and refused == UNTOLD & there | {name for name in refused if name.startswith("Onnx")}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_parts_of_a_batch_are_put_together_as_the_row_says(name):
    if name not in pipelines():
        pytest.skip("un-skip when the installed diffusers has it")
    cls = pipelines()[name]
    for given, parts in PROMPTS[name].items():
        if callable(parts):
            continue
        variable = given.partition(".")[0]
        variable = MADE_AS.get(variable, variable)
        made = layouts(cls, variable)
        if len(parts) > 1 and not given.startswith("torch.cat"):
            assert made == {parts}, (given, made)
        elif len(parts) == 1:
            assert (not made or name.startswith("LEdits")) and (bool(NEGATED.search(given)) == parts[0] or "zeros_like" in given), (
                given,
                made,
            )
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


def flux(cls, layers=1):
    sizes = dict(in_channels=16, patch_size=1, num_layers=layers, num_single_layers=layers, num_attention_heads=2, attention_head_dim=8)
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
    return pipe(num_inference_steps=more.pop("steps", 2), output_type="latent", **embedded, **more).images


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


@pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated")  # of Chroma's own
def test_a_mask_over_prompt_and_picture_is_refused_where_the_prompt_grows():
    specimen = zoo.build("diffusers/ChromaTransformer2DModel")
    prompt, picture = specimen.inputs[PROMPT], specimen.inputs["hidden_states"]
    model = get_token_model(specimen.model, ProSpectConfig(stages=1))
    mask = torch.ones(len(prompt), prompt.shape[1] + picture.shape[1], dtype=torch.bool)
    with pytest.raises(UnsupportedError, match="described by masks named as .*, got `attention_mask`"):
        model(**specimen.inputs | {"attention_mask": mask})


@torch.no_grad()
def test_what_a_denoiser_put_out_is_not_given_to_blocks_whose_samples_are_frames():
    specimen = zoo.build("diffusers/UNetMotionModel")
    sample, prompt = specimen.inputs["sample"], specimen.inputs[PROMPT]
    half = {"sample": torch.cat([sample[:1]] * 2), PROMPT: prompt}
    model = get_token_model(specimen.model, "importance-token-merge")
    with pytest.raises(UnsupportedError, match="The signal 'contrast' has a row for each token of each sample, got 2 samples, of which"):
        for timestep in (900, 500):
            model(**specimen.inputs | half | {"timestep": torch.tensor(timestep)})


def test_perturbed_attention_reads_the_samples_together():
    given = OF_IMAGES | {"pag_scale": 3.0}
    pipe = get_token_model(stable(StableDiffusionPAGPipeline), ProSpectConfig(stages=1))
    with pytest.raises(UnsupportedError, match="got StableDiffusionPAGPipeline, whose perturbed attention joins them. Turn that off"):
        drawn(pipe, 1, False, **given)
    pipe = get_token_model(stable(StableDiffusionPAGPipeline), ProSpectConfig(stages=1, negative=True))
    assert bool(drawn(pipe, 1, False, **given).isfinite().all())


@pytest.mark.parametrize("config", [TeaCacheConfig(), ImportanceTokenMergeConfig()], ids=lambda config: config.method)
def test_a_pipeline_that_reads_a_block_s_attention_gets_that_of_all_tokens(config):
    given = OF_IMAGES | {"sag_scale": 0.75}
    pipe = get_token_model(stable(StableDiffusionSAGPipeline), config)
    with pytest.raises(UnsupportedError, match="no pipeline reads its attention, got .*'CrossAttnStoreProcessor'"):
        drawn(pipe, 1, False, **given)
    unload(pipe)
    assert bool(drawn(pipe, 1, False, **given).isfinite().all())


def test_every_processor_that_keeps_the_attention_for_its_pipeline_is_known():
    files = Path(diffusers.__file__).parent.rglob("pipeline_*.py")
    kept = re.compile(r"^class (\w+Processor)\b(?:(?!^class ).)*?self\.(?:attention_probs = attn|attnstore\()", re.DOTALL | re.MULTILINE)
    assert {name for file in files for name in kept.findall(file.read_text())} == STORING


def test_a_pipeline_that_is_not_known_is_refused_unless_a_context_tells():
    pipe = get_token_model(stable(OwnPipeline), ProSpectConfig(stages=1))
    with pytest.raises(UnsupportedError, match=r"test_pipelines.OwnPipeline, which gives prompt_embeds as the prompt. Call the denoiser"):
        pipe(torch.randn(1, 5, 6))
    with CacheMixin.cache_context(pipe.unet, "cond"):
        assert bool(pipe(torch.randn(1, 5, 6)).sample.isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize(("name", "taken"), [("pred_cond", True), ("pred_uncond", False), ("pred_cond_skip", True)])
def test_a_modular_pipeline_s_guider_tells_it(name, taken):
    model, call = get_token_model(denoiser("sd3"), ProSpectConfig(stages=1, init_std=1.0)), calls("sd3", 1)[0]

    def denoise(guider_state_batch):  # as the blocks of modular pipelines have it
        return model(**call).sample

    changed = denoise(BlockState(**{PREDICTION: name})) != denoiser("sd3")(**call).sample
    assert bool(changed.any()) == taken


@torch.no_grad()
@pytest.mark.parametrize(("scale", "there"), [(4.0, True), (1.0, False)])
def test_two_images_of_one_noise_have_no_guidance_where_the_pipeline_has_none(scale, there):
    pipe, heard = get_token_model(stable(StableDiffusionPipeline), "importance-token-merge"), []
    model = surgery_of(pipe)
    pipe.unet.conv_in.register_forward_pre_hook(lambda *_: heard.append(model.call.context.steps_of_denoiser.guidance(64) is not None))
    drawn(pipe, 2, False, **OF_IMAGES | {"guidance_scale": scale, "latents": torch.ones(2, 4, 8, 8)})
    assert heard == [False, there]


# -- how far it is -----------------------------------------------------------------------------------------------------
SHARE = re.compile(r"/ ?\(?(1000|num_train_timesteps|self\.scheduler\.config\.num_train_timesteps)")
RISES = re.compile(r"\b(1(\.0)?|1000) - (t\b|current_timestep|timestep)")
# Denoisers whose units are made by their scheduler and not by the code of their pipelines.
BY_SCHEDULER = {
    "OmniGenTransformer2DModel": (True, True),
    "MochiTransformer3DModel": (False, True),
    "AceStepTransformer1DModel": (True, False),
}
# Pipelines whose denoiser runs at timesteps that are not those of a loop over their scheduler's.
NO_LOOP = {
    *("AnyFlowFARPipeline", "AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedPipeline", "RFD4ProteinaPipeline"),
    *("SanaWMLTX2Refiner", "StableDiffusionAttendAndExcitePipeline", "StableDiffusionDiffEditPipeline", "UniDiffuserPipeline"),
}


def denoising_calls(cls):
    """What a pipeline gives its denoiser as the timestep, with what it makes that of."""
    for nodes, found in calls_of(cls):
        made = collections.defaultdict(list)
        for node in nodes:
            if isinstance(node, ast.Assign):
                made[ast.unparse(node.targets[0])].append(ast.unparse(node.value))
        for call in found:
            words = {word.arg: word.value for word in call.keywords}
            given = next((ast.unparse(words[name]) for name in families.TIMESTEPS if name in words), None)
            parts = [given or (ast.unparse(call.args[1]) if len(call.args) > 1 else "")]
            for _ in range(2):
                names = {name for part in parts for name in re.findall(r"\w+", part) if "step" in name or name.startswith(("t_", "curr_"))}
                parts += [value for name in names for value in made[name]]
            yield " ; ".join(parts)


def test_the_units_of_every_denoiser_are_those_of_its_pipelines():
    known = set()
    for name, cls in pipelines().items():
        for kind in {type(model).__name__ for part, model in components(cls).items() if part in ("transformer", "unet")}:
            for text in denoising_calls(cls):
                known.add(kind)
                want = BY_SCHEDULER.get(kind, (bool(SHARE.search(text)), bool(RISES.search(text))))
                assert (bool(families.UNIT_TIME.search(kind)), bool(families.RISING_TIME.search(kind))) == want, (name, kind, text)
    assert len(known) > 60


def test_a_pipeline_s_loop_says_at_which_timestep_of_its_scheduler_it_is():
    others = set()
    for name, cls in pipelines().items():
        for nodes, _ in calls_of(cls):
            loops = (node.target for node in nodes if isinstance(node, ast.For))
            if not {n.id for target in loops for n in ast.walk(target) if isinstance(n, ast.Name)} & set(STEPPED):
                others.add(name)
    assert others == NO_LOOP & pipelines().keys()


FLOW = [1000, 750.2, 500.5, 250.8, 1]


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of the schedulers' own
@pytest.mark.parametrize(
    ("scheduler", "given", "levels", "falls"),
    [
        (lambda: DDIMScheduler(steps_offset=1), {}, [801, 601, 401, 201, 1], True),
        (lambda: DDIMInverseScheduler(), {}, [0, 200, 400, 600, 800], False),
        (lambda: FlowMatchEulerDiscreteScheduler(), {}, FLOW, True),
        (lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), {}, FLOW, True),
        (lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), {"sigmas": [1.0, 0.5, 0.25]}, [1000, 500, 250], True),
        (lambda: EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), {}, [None] * 5, None),
        (lambda: EDMEulerScheduler(), {}, [993.8, 972.3, 834.2, 253.5, 4.0], None),
    ],
    ids=["falling", "inversion", "flow", "inverted", "unit", "continuous", "EDM"],
)
def test_a_scheduler_tells_how_much_noise_a_timestep_means(scheduler, given, levels, falls):
    scheduler = scheduler()
    scheduler.set_timesteps(**(given or {"num_inference_steps": 5}))
    ticks = [find_tick(scheduler, float(timestep)) for timestep in scheduler.timesteps]
    assert [tick.index for tick in ticks] == list(range(len(levels)))
    assert [tick.level if tick.level is None else round(tick.level, 1) for tick in ticks] == levels
    assert {tick.falls for tick in ticks} == {falls}


INVERTED = dict(guidance_scale=4.0, height=8, width=8)


@pytest.mark.parametrize("method", ["toca", "profilingdit"])
def test_an_inversion_is_a_run_whose_noise_rises(method):
    """Its first step is computed whole, later ones are not: each is a step of one run, at its own noise."""
    pipe, heard = get_token_model(stable(StableDiffusionPipeline), method), []
    pipe.scheduler = DDIMInverseScheduler(clip_sample=False)
    model = surgery_of(pipe)
    pipe.unet.register_forward_pre_hook(lambda *_: heard.append(model.call.context))
    drawn(pipe, 1, False, **INVERTED | {"steps": 4})
    drawn(pipe, 1, False, **INVERTED | {"steps": 2})
    assert [(c.step, c.begins, c.elapsed) for c in heard] == [*((i, i == 0, i / 4) for i in range(4)), (0, True, 0.0), (1, False, 0.5)]
    assert [c.time.tolist() for c in heard[:4]] == [[t, t] for t in (1, 251, 501, 751)] or [c.time[0] for c in heard[:2]] == [0, 250]


def test_a_pipeline_that_copies_its_scheduler_s_table_at_each_step_is_in_one_run():
    """The views of a panorama have a scheduler each, by turns."""
    pipe, heard = get_token_model(stable(pipelines()["StableDiffusionPanoramaPipeline"]), "profilingdit"), []
    model = surgery_of(pipe)
    pipe.unet.register_forward_pre_hook(lambda *_: heard.append(model.call.context))
    for _ in range(2):
        drawn(pipe, 1, False, **INVERTED | {"steps": 4})
        assert [(c.step, c.begins, c.elapsed) for c in heard] == [(i, i == 0, heard[i].elapsed) for i in range(4)]
        assert [round(c.elapsed, 1) for c in heard] == [0.0, 0.3, 0.7, 1.0]
        heard.clear()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of the schedulers' own
def test_a_scheduler_with_other_units_counts_steps_but_tells_no_bank_how_much_noise_there_is():
    pipe, heard = get_token_model(stable(StableDiffusionPipeline), "profilingdit"), []
    pipe.scheduler, model = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), surgery_of(pipe)
    pipe.unet.register_forward_pre_hook(lambda *_: heard.append(model.call.context))
    drawn(pipe, 1, False, **INVERTED | {"steps": 4})
    assert [(c.step, c.elapsed, c.time) for c in heard] == [(i, i / 4, None) for i in range(4)]
    pipe = get_token_model(stable(StableDiffusionPipeline), "prospect")
    pipe.scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(UnsupportedError, match="how much noise a timestep means, got a timestep of UNet2DConditionModel in a unit"):
        drawn(pipe, 1, False, **INVERTED)


def test_the_unit_of_a_denoiser_that_has_none_of_its_own_is_its_pipeline_s():
    there = set()
    for name, cls in pipelines().items():
        kinds = [type(model).__name__ for part, model in components(cls).items() if part in ("transformer", "unet")]
        if any(families.UNKNOWN_TIME.search(kind) for kind in kinds):
            source = inspect.getsource(cls)
            share = "current_t = current_sigma / (current_sigma + 1)" in source and re.search(
                r"timestep = current_t\.(expand|view)\(", source
            )
            there |= {name} if share else set()
    assert there == set(GIVE_SHARES) & pipelines().keys()


def within(cls, method, steps, inner, by):
    """What a pipeline makes, and what it makes within two steps of that, `by` its callback or by its scheduler: (inner, None) for none."""
    pipe, made, at = get_token_model(stable(cls), method), [], iter(range(2 * steps))
    run = lambda steps, **more: drawn(pipe, 1, False, **INVERTED | {"steps": steps}, **more)

    def begin(*_):
        if inner and not made and next(at) == 2:
            made.append(None)
            made.append(run(inner))
        return {}

    if by == "scheduler":
        step = pipe.scheduler.step
        pipe.scheduler.step = lambda *args, **kwargs: (begin(), step(*args, **kwargs))[1]
        return run(steps), *made[1:]
    return run(steps, callback_on_step_end=begin), *made[1:]


KEEPING = ("importance-token-merge", "tomesd", "toca", "teacache", "profilingdit", "first-block-cache", "prospect")


@pytest.mark.parametrize("by", ["callback", "scheduler"])
@pytest.mark.parametrize("method", KEEPING)
def test_a_run_within_a_step_of_another_has_steps_and_features_of_its_own(method, by):
    (want,) = within(StableDiffusionPipeline, method, 5, None, by)
    outer, inner = within(StableDiffusionPipeline, method, 5, 5, by)
    assert torch.equal(outer, want) and torch.equal(inner, want)


def test_a_run_within_a_step_of_another_that_sets_its_scheduler_anew_is_refused():
    with pytest.raises(UnsupportedError, match="must leave the other's scheduler its timesteps, got one that set them anew. Give the pip"):
        within(StableDiffusionPipeline, "tomesd", 5, 3, "callback")


class Harmless(torch.nn.Module):
    """Stands for the safety checker, which is another package's."""

    device, dtype = torch.device("cpu"), torch.float32

    def to(self, *_, **__):
        return self


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of the schedulers' own
@torch.no_grad()
def test_cosmos_2_tells_how_much_noise_there_is_and_cosmos_1_counts_in_logarithms_of_it():
    specimen = zoo.build("diffusers/CosmosTransformer3DModel")
    sizes = dict(height=16, width=16, num_inference_steps=4, output_type="latent", prompt_embeds=torch.randn(1, 5, 32), guidance_scale=1.0)
    parts = dict(text_encoder=None, tokenizer=None, vae=AutoencoderKLWan(**SMALL_VAE), safety_checker=Harmless())
    said = []
    pipe = Cosmos2TextToImagePipeline(
        transformer=specimen.model, scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), **parts
    )
    get_token_model(pipe, ProSpectConfig(stages=4, init_std=1.0))
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: said.append(surgery_of(pipe).call.context))
    pipe.set_progress_bar_config(disable=True)
    pipe(**sizes)
    handle.remove()
    sigmas = pipe.scheduler.sigmas[:4]
    torch.testing.assert_close(torch.cat([c.time for c in said]), (1000 * sigmas / (1 + sigmas)).float(), rtol=1e-3, atol=1e-3)
    assert [c.step for c in said] == [0, 1, 2, 3]
    model = unload(pipe).transformer
    for data in (0.5, 1.0):
        scheduler = EDMEulerScheduler(sigma_data=data)
        one = CosmosTextToWorldPipeline(transformer=model, scheduler=scheduler, **parts | {"vae": None})
        one.set_progress_bar_config(disable=True)
        get_token_model(one, ProSpectConfig(stages=4, init_std=1.0))
        said.clear()
        handle = model.register_forward_pre_hook(lambda *_: said.append(surgery_of(model).call.context))
        for guidance in (1.0, 7.0):
            one(**sizes | {"guidance_scale": guidance, "negative_prompt_embeds": torch.randn(1, 5, 32)}, num_frames=1)
            sigmas = (4 * scheduler.timesteps.double()).exp().repeat_interleave(1 if guidance == 1 else 2)
            torch.testing.assert_close(torch.cat([c.time for c in said]), (1000 * sigmas / (data + sigmas)).float(), rtol=1e-4, atol=1e-3)
            assert [c.elapsed for c in said] == [i / 4 for i in range(4) for _ in range(1 if guidance == 1 else 2)]
            said.clear()
        handle.remove()
        unload(one)


@torch.no_grad()
def test_a_second_expert_goes_on_where_the_first_has_stopped():
    pipe, heard = get_token_model(pair(), ProfilingDiTConfig()), []
    for name, model in surgeries_of(pipe).items():
        hear = lambda *_, model=model: heard.append(model.call.context)
        pipe.components[name].patch_embedding.register_forward_pre_hook(hear)
    for _ in range(2):
        filmed(pipe, guidance=1.0, steps=4)
        want = [(0, 0.0, True), (1, 0.25, False), (2, 0.5, True), (3, 0.75, False)]  # Wan's context tells it; each keeps what is its own
        assert [(c.step, c.elapsed, c.begins) for c in heard] == want
        heard.clear()


@pytest.mark.parametrize(("begin", "origin", "first"), [(0, 1000.0, 0), (2, 500.0, 2), (None, 500.0, 2)])
def test_a_run_whose_first_steps_another_denoiser_made_began_with_them(begin, origin, first):
    """The scheduler says at which of its timesteps the pipeline began; one that does not is taken to begin here."""
    table = torch.tensor([1000.0, 750.0, 500.0, 250.0])
    steps = DenoisingRun()
    steps.step("default", None, Tick(table, 0, 2, 500.0, True, begin, 1000.0 if begin == 0 else 500.0), 500.0)
    assert (steps.index, steps.begins, steps.origin, steps.first) == (0, True, origin, first)


def falling_run(kind, steps=6):
    """Timesteps of a denoiser's own run, in the units of its class."""
    unit = 1 if families.UNIT_TIME.search(kind) else 1000
    shares = [0.9 - 0.15 * i for i in range(steps)]
    return [unit * (1 - share if families.RISING_TIME.search(kind) else share) for share in shares]


DENOISERS = [family.partition("/")[2] for family in zoo.families("diffusers")]


@pytest.mark.parametrize("kind", DENOISERS)
def test_every_denoiser_alone_counts_the_steps_of_its_run(kind):
    steps = DenoisingRun()
    for _ in range(2):
        for i, value in enumerate(falling_run(kind)):
            steps.step("default", None, None, falling(kind, torch.tensor([value] * 2)))
            assert (steps.index, steps.begins) == (i, i == 0)


def test_steps_that_go_back_one_after_the_other_are_refused_where_something_is_kept():
    call = calls("sd3", 1)[0]
    for method in ("toca", "profilingdit", "importance-token-merge"):
        model = get_token_model(denoiser("sd3"), method).eval()
        run = lambda *times, model=model: [sampled(model, [{**call, "timestep": torch.full((2,), time)}]) for time in times]
        run(900, 500, 900, 500, 700)
        with pytest.raises(UnsupportedError, match="steps whose noise falls.* Call the denoiser within `CacheMixin.cache_context"):
            run(100, 300, 500, 700)
    model = get_token_model(denoiser("sd3"), "prospect").eval()
    assert len([model(**{**call, "timestep": torch.full((2,), time)}) for time in (100, 300, 500)]) == 3


# -- caches of diffusers' own ------------------------------------------------------------------------------------------


def test_every_cache_of_diffusers_is_known_by_its_hooks():
    caches, shared = set(), set()
    for info in pkgutil.iter_modules(importlib.import_module("diffusers.hooks").__path__, "diffusers.hooks."):
        module = importlib.import_module(info.name)
        hooks = {
            name for name, cls in vars(module).items() if isinstance(cls, type) and issubclass(cls, ModelHook) and cls is not ModelHook
        }
        hooks = {name for name in hooks if vars(module)[name].__module__ == info.name}
        if hooks and ("cache" in info.name or "broadcast" in info.name):
            caches |= hooks
            shared |= set() if "StateManager" in vars(module) else hooks
        else:
            assert not any(CACHE_HOOKS.search(name) for name in hooks), info.name
    assert caches and all(CACHE_HOOKS.search(name) for name in caches)
    assert {name for name in caches if SHARED_CACHES.search(name)} == shared


CACHES = {
    "first block": lambda model: apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.05)),
    "broadcast": lambda model: model.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=lambda: 500
        )
    ),
}
GUIDED_FLUX = dict(height=16, width=16, true_cfg_scale=4.0, guidance_scale=1.0, steps=4)


AROUND, BESIDE, BOTH = "must be in a denoiser before a cache", "without a cache of diffusers' own", "gives its tokens to both"
# method -> what is said where the cache was there first, where it came behind, and beside one that is shared by both prompts
SAID = {
    "apt": (None, None, None),
    "prospect": (None, None, BOTH),
    "importance-token-merge": (AROUND, None, None),
    "profilingdit": (AROUND, BESIDE, BESIDE),
}


def both(method, cache, theirs_first):
    """What a pipeline draws with a surgery and a cache, put in in this order."""
    pipe = flux(FluxPipeline)
    if theirs_first:
        CACHES[cache](pipe.transformer)
    torch.manual_seed(0)
    get_token_model(pipe, method)
    if not theirs_first:
        CACHES[cache](pipe.transformer)
    return drawn(pipe, 1, False, **GUIDED_FLUX)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("method", SAID)
def test_a_cache_of_diffusers_beside_a_surgery_gives_the_same_in_both_orders_or_is_refused(method, cache):
    before, behind, shared = SAID[method]
    drawings = []
    for theirs_first, said in ((True, before), (False, behind)):
        said = shared if cache == "broadcast" and said is None else said
        if said is None:
            drawings.append(both(method, cache, theirs_first))
            continue
        with pytest.raises(UnsupportedError, match=said):
            both(method, cache, theirs_first)
    all_equal(drawings[1:], drawings[:-1], "the other order")


@dataclasses.dataclass(frozen=True)
class NeighboursConfig(MethodConfig):
    pass


class Neighbours(TokenReducer):
    """Each second token joins the one behind it."""

    site = "before"

    def assign(self, mask):
        return TokenMap.merge(mask.shape[1], *(torch.arange(i, mask.shape[1] - 1 + i, 2).expand(len(mask), -1) for i in (0, 1)))


@pytest.fixture
def neighbours(monkeypatch):
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    registry.register("neighbours", NeighboursConfig)(Neighbours)
    return "neighbours"


@pytest.mark.parametrize("stream", ["denoiser.1", "denoiser.2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_first_block_cache_over_blocks_with_fewer_tokens_is_right(neighbours, stream, layer):
    """Where it skips nothing, nothing changes; where it skips, the first block's output and what the others added then is what there is."""

    def cached(threshold):
        pipe, read, first = flux(FluxPipeline, layers=3), [], []
        get_token_model(pipe, {"method": neighbours, "layers": [layer], "stream": stream})
        if threshold is not None:
            apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=threshold))
        pipe.transformer.transformer_blocks[0].register_forward_hook(lambda module, args, output: first.append(output[1]))
        pipe.transformer.norm_out.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        return drawn(pipe, 1, False, **GUIDED_FLUX), read, first

    plain, never, (skipped, read, first) = cached(None)[0], cached(0.0)[0], cached(1e9)
    all_equal([never], [plain], "nothing is skipped")
    assert not torch.equal(skipped, plain)
    all_equal(read[2:], first[2:], "all behind the first block is skipped")


def test_what_shortens_a_block_is_refused_beside_a_cache_of_its_parts(neighbours):
    pipe = get_token_model(flux(FluxPipeline), neighbours)
    CACHES["broadcast"](pipe.transformer)
    with pytest.raises(UnsupportedError, match=r"got \['Neighbours', 'PyramidAttentionBroadcastHook'\]. Enable FirstBlockCacheConfig"):
        drawn(pipe, 1, False, **GUIDED_FLUX)


# -- LoRAs of diffusers ------------------------------------------------------------------------------------------------


def lora_weights(seed):
    """The weights of a LoRA for the UNet of `stable`, as a pipeline loads them."""
    torch.manual_seed(seed)
    unet = stable(StableDiffusionPipeline).unet
    unet.add_adapter(LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False))
    return {f"unet.{name}": value for name, value in get_peft_model_state_dict(unet).items()}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # so it is
@pytest.mark.parametrize("unload_loras", ["unload_lora_weights", "unload_lora"])
def test_where_diffusers_unloads_its_loras_ours_stays_and_is_listed(unload_loras):
    weights, config = lora_weights(1), ProSpectConfig(stages=1, init_std=1.0)
    pipe = stable(StableDiffusionPipeline)
    base = drawn(pipe, 1, False, **OF_IMAGES)
    torch.manual_seed(0)
    get_token_model(pipe, config, adapter_name="ours")
    ours = drawn(pipe, 1, False, **OF_IMAGES)
    pipe.load_lora_weights(dict(weights), adapter_name="a")
    pipe.set_adapters(["ours", "a"])
    both = drawn(pipe, 1, False, **OF_IMAGES)
    getattr(pipe if unload_loras == "unload_lora_weights" else pipe.unet, unload_loras)()
    assert pipe.get_list_adapters() == {"unet": ["ours"]} and not any("lora" in name for name, _ in pipe.unet.named_modules())
    all_equal([drawn(pipe, 1, False, **OF_IMAGES)], [ours], "the LoRA is out")
    pipe.load_lora_weights(dict(weights), adapter_name="a")
    pipe.set_adapters(["ours", "a"])
    all_equal([drawn(pipe, 1, False, **OF_IMAGES)], [both], "the LoRA is in again")
    pipe.unload_lora_weights()
    unload(pipe)
    all_equal([drawn(pipe, 1, False, **OF_IMAGES)], [base], "all is out")
    assert "unload_lora" not in vars(pipe.unet) and "peft_config" not in vars(pipe.unet)


def test_a_stack_with_a_lora_is_not_unloaded_by_half():
    torch.manual_seed(0)
    stack = [LoraConfig(target_modules=["to_q"], r=2, init_lora_weights=False), ProSpectConfig(stages=1, init_std=1.0)]
    pipe = get_token_model(stable(StableDiffusionPipeline), stack, adapter_name="ours")
    before = drawn(pipe, 1, False, **OF_IMAGES)
    with pytest.raises(UnsupportedError, match=r"is taken out as a whole, got \['ours'\]. Call `hf_tokens.unload`"):
        pipe.unload_lora_weights()
    all_equal([drawn(pipe, 1, False, **OF_IMAGES)], [before], "refused")
