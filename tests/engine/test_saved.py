"""Adapters that earlier releases saved, in `saved/`, load and answer as they did; equality to the bit is for benchmarks/digests.py."""

import json
from pathlib import Path

import pytest
import torch
from engine.saved.make import CASES, answer, base
from tolerances import all_close

import hf_tokens

SAVED = sorted(path.parent for path in (Path(__file__).parent / "saved").glob("*/*/answer.json"))


def check(found, then, what):
    all_close(found, [torch.tensor(numbers, dtype=t.dtype) for t, numbers in zip(found, then, strict=True)], what)


@pytest.mark.parametrize("folder", SAVED, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_an_adapter_saved_by_an_earlier_release_loads_and_answers_the_same(folder):
    then = json.loads((folder / "answer.json").read_text())
    asked, (model, _) = (then["family"], then["question"]), base(then["family"])
    check(answer(model, *asked), then["base"], "the base model, which the adapter has nothing to do with")
    check(answer(hf_tokens.load(folder, model.eval()).eval(), *asked), then["answer"], "the adapter")


def test_every_role_that_sits_in_a_model_is_saved():
    assert {folder.name for folder in SAVED} == {hf_tokens.method_info(case.config.method).role for case in CASES}
