"""What pipelines of diffusers tell: all that denoises in them is known, or the pipeline is refused; swept over all that are installed."""

import functools
import importlib
import pkgutil
import typing
import warnings

import diffusers.pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin, WanPipeline, WanTransformer3DModel
from tolerances import all_equal

from hf_tokens import UnsupportedError, calibrate, edit, get_token_model, load, measure, save_adapter, unload
from hf_tokens.model.pipelines import BESIDE_DENOISER, denoising

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
