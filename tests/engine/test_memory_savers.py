"""What diffusers does to hold less of a denoiser in memory leaves a surgery in it what it is."""

import pytest
import torch
from denoisers import calls, denoiser, sampled
from tolerances import close

from hf_tokens import get_token_model, list_methods

KIND, DEVICE = "unet", torch.device("cpu")
OFFLOADS = {
    "layer by layer": lambda model: model.enable_group_offload(DEVICE, DEVICE, "leaf_level"),
    "block by block": lambda model: model.enable_group_offload(DEVICE, DEVICE, "block_level", num_blocks_per_group=1),
}
PUBLISHED = [info for info in list_methods() if info.cls.__module__.startswith("hf_tokens_adapters.")]  # other tests make some too
METHODS = [info.name for info in PUBLISHED if "denoiser" in info.cls.kinds and info.role != "WeightEdit"]  # an edit is made before
STEPS = calls(KIND, 3, dtype=torch.float32)


def said(name, before=None, behind=None):
    """What a denoiser says with a method, that was changed before the method came or is from then on."""
    model = denoiser(KIND, torch.float32)
    if before is not None:
        before(model)
    torch.manual_seed(0)
    get_token_model(model, name)
    if behind is not None:
        behind(model)
    torch.manual_seed(0)
    return sampled(model, STEPS)


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", METHODS)
def test_weights_are_at_hand_where_they_are_kept_elsewhere(name, offload):
    want = said(name)
    close(said(name, before=OFFLOADS[offload]), want, "offloaded before")
    close(said(name, behind=OFFLOADS[offload]), want, "offloaded behind")


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_are_stored_in_half_precision_compute_in_single(name):
    store = lambda model: model.enable_layerwise_casting(torch.bfloat16, torch.float32)
    for got in (said(name, before=store), said(name, behind=store)):
        assert got.dtype == torch.float32 and bool(got.isfinite().all())
