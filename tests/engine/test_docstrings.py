"""What the author of a method meets has an example, which runs."""

import doctest
import importlib

import pytest
import torch

import hf_tokens
from hf_tokens import roles
from hf_tokens.roles import signals

CLASSES = [name for name in roles.__all__ if isinstance(vars(roles)[name], type)]
MET = [*CLASSES, "Attending", "MethodConfig", "TokenMap", "option"]
DIMS = hf_tokens.Dims(width=4, heads=2, kv_heads=2, head_dim=2, layer=1, layers=4, kind="text", causal=True)


def examples(thing, name):
    """The examples of a docstring, run with the public names at hand, and `dims`."""
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs={"torch": torch, "dims": DIMS})
    home = importlib.import_module(thing.__module__) if name != "SIGNALS" else thing
    found.globs.update({key: getattr(hf_tokens, key) for key in hf_tokens.MODULES} | vars(home) | found.globs)
    return found


@pytest.mark.parametrize("name", MET)
def test_what_an_author_meets_has_an_example_that_runs(name):
    test = examples(getattr(hf_tokens, name), name)
    assert test.examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_signals_have_an_example_that_runs():
    assert examples(signals, "SIGNALS").examples and doctest.testmod(signals).failed == 0
