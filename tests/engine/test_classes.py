"""A model, a scheduler or a pipeline of somebody's own classes is read as those of the library that it is made from."""

import re

import pytest
from diffusers import DDIMScheduler, StableDiffusionPipeline
from lots import ALL, lot
from torch import nn

from hf_tokens import UnsupportedError, anatomy
from hf_tokens.model.blocks import BlockFacts
from hf_tokens.model.classes import LIBRARIES, class_name
from hf_tokens.testing import zoo

UNBUILT = {"apertus1p5", "inkling2_loop"}  # the library refuses their configs at the zoo's sizes
FAMILIES = sorted(set(zoo.families()) - zoo.unbuildable().keys() - UNBUILT, key=lot)
TOLD_BY_ROWS = ["clip", "aimv2", "bloom", "clvp", "big_bird", "longt5", "chmv2", "blip", "diffusers/UNet2DConditionModel"]


def read(model):
    """What is read off a model, or why nothing is, with the names that its classes have in the library."""
    named = {type(module).__name__: class_name(module) for module in model.modules()}
    plain = lambda text: re.sub(rf"\b({'|'.join(named)})\b", lambda m: named[m.group()], text)
    try:
        found = anatomy(model)
    except UnsupportedError as error:
        return plain(str(error)), []
    facts = [{**vars(BlockFacts.of(block)), "bias_maker": None} for stream in found.streams for block in stream.blocks]
    return plain(str(found)), facts


def own(model):
    """The model, each class of the library in it replaced by one that is made from it, under a name that tells nothing."""
    made = {}
    for module in model.modules():
        cls = type(module)
        if cls.__module__.partition(".")[0] in LIBRARIES:
            module.__class__ = made.setdefault(cls, type(f"Own{len(made)}", (cls,), {"__module__": __name__}))
    return model


@pytest.mark.filterwarnings("ignore")  # the libraries' own, of models that are built
@pytest.mark.parametrize("family", FAMILIES if ALL else [*TOLD_BY_ROWS, *FAMILIES[:40]])
def test_a_model_of_own_classes_is_read_as_what_it_is_made_from(family):
    model, other = (zoo.build(family).model for _ in range(2))
    if type(model).forward is not nn.Module.forward:  # else it is called by none of its own name
        assert read(own(model)) == read(other)


@pytest.mark.parametrize("cls", [DDIMScheduler, StableDiffusionPipeline])
def test_so_are_a_scheduler_and_a_pipeline(cls):
    assert class_name(object.__new__(type("Own", (cls,), {"__module__": __name__}))) == cls.__name__


def test_a_class_of_nobody_else_s_has_its_own_name():
    assert class_name(type("Own", (nn.LayerNorm,), {})(2)) == "Own"
