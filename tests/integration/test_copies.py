"""Copies of an operated model, by `deepcopy`, by pickle and by averaging: each answers as the first did, and is a model of its own."""

import copy
import io
import pickle

import pytest
import torch
from contract.pairs import one_of_each_role
from denoisers import calls, denoiser
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from tolerances import all_equal
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_tokens import get_token_model
from hf_tokens.diffusion.steps import DenoisingWorld
from hf_tokens.testing import zoo
from hf_tokens.tools.surgeries import surgery_of


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        average.update_parameters(model)
    return average.module


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_torch,
    "an average": averaged,
}


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("one", one_of_each_role(), ids=lambda one: f"{one.info.role}-{one.method}-{one.architecture}")
def test_a_copy_answers_as_the_first_did_whatever_becomes_of_that(one, made):
    model = one.attach()
    want = one.run(model)
    twin = made(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    all_equal(one.run(twin), want, "the copy")


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_copy_knows_how_its_blocks_turn_their_keys(made):
    """What was found by trying, in the first generation, goes with the copy."""
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, "expected-attention").eval()
    said = lambda one: one.generate(**specimen.inputs, max_new_tokens=8, do_sample=False)
    want = said(model)
    assert torch.equal(said(made(model)), want)


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_the_run_of_a_copied_denoiser_is_its_own(made):
    model = get_token_model(denoiser("flux"), "importance-token-merge")
    twin, worlds = made(model), []
    for one in (model, twin):
        inner = one.base_model.model
        _set_cache_context(inner, CacheContext("cond"))
        with torch.no_grad():
            inner(**calls("flux", 1)[0])
        worlds.append(next(world for world in surgery_of(one).worlds if isinstance(world, DenoisingWorld)))
    assert worlds[0] is not worlds[1] and all(world.run.place is not None for world in worlds)
    twin.base_model.model._reset_stateful_cache()
    assert worlds[0].run.place is not None and worlds[1].run.place is None
