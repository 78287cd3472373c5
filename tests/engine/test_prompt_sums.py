"""What the keys of a prompt receive from all of its queries is summed where the attention is computed, and nowhere a second time."""

import pytest
import torch
from held import COMPRESSORS, decoded, texts
from own import method
from tolerances import close

from hf_tokens import CacheCompressor, get_token_model
from hf_tokens.attention import call
from hf_tokens.testing import zoo

SUMMED = ("prefixkv", "prefixkv online", "squeezeattention", "d2o", "mikv", "h2o")  # whose scores are sums over all queries of a prompt


@pytest.fixture
def summed(monkeypatch):
    """How often sums came with an attention, and how often apart from one, over more than one query."""
    counts = {"along": 0, "apart": 0}
    along, apart = call.attention_with_columns, call.attention_columns

    def with_columns(*args, **kwargs):
        counts["along"] += 1
        return along(*args, **kwargs)

    def columns(q, *args, **kwargs):
        counts["apart"] += q.shape[2] > 1
        return apart(q, *args, **kwargs)

    monkeypatch.setattr(call, "attention_with_columns", with_columns)
    monkeypatch.setattr(call, "attention_columns", columns)
    return counts


@pytest.mark.parametrize("name", SUMMED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sums_along_with_the_attention_are_those_apart_from_it(family, name, summed, monkeypatch):
    model = get_token_model(zoo.build(family).model, COMPRESSORS[name]).eval()
    answers, cache = decoded(model)
    assert summed["along"] and not summed["apart"]
    monkeypatch.setattr(call.AttentionCall, "sums_along", lambda call, real: False)
    before = summed["along"]
    expected, held = decoded(model)
    assert summed["apart"] and summed["along"] == before
    close(answers, expected, f"{family} {name}")
    for new, old in zip(cache.layers, held.layers, strict=True):
        assert torch.equal(new.origins, old.origins)
        if "received" in old.record.entries:
            close(new.record.entries["received"], old.record.entries["received"], f"{family} {name}")


def in_training(model, ids):
    model.train()(input_ids=ids, use_cache=True)


def under_autocast(model, ids):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, use_cache=True)


def with_eager(model, ids):
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(input_ids=ids, use_cache=True)


def in_bfloat16(model, ids):
    with torch.no_grad():
        model.bfloat16()(input_ids=ids, use_cache=True)


def with_a_gradient(model, ids):
    model(input_ids=ids, use_cache=True)


@pytest.mark.parametrize("run", [in_training, under_autocast, with_eager, in_bfloat16, with_a_gradient])
def test_where_the_attention_is_another_one_sums_are_made_apart(run, summed):
    run(get_token_model(zoo.build("llama").model, COMPRESSORS["h2o"]).eval(), texts()[0])
    assert summed["apart"] and not summed["along"]


@pytest.mark.parametrize("name", ["snapkv", "tova", "kivi", "random", "squeezeattention sinks"])
def test_nothing_is_summed_for_a_method_that_reads_no_sums(name, summed):
    decoded(get_token_model(zoo.build("llama").model, COMPRESSORS[name]).eval())
    assert not summed["along"]


def test_heads_of_known_sums_are_averaged_as_asked(summed):
    got = []

    def score(self, scores, positions):
        got.append({heads: scores.columns(heads=heads) for heads in ("query", "key", "mean")})
        return positions.double()

    with method(CacheCompressor, score=score, budget=lambda self, length, seen: 6, decodes=False, sums_scores=True) as config:
        decoded(get_token_model(zoo.build("llama").model, config()).eval())
    assert got and not summed["apart"]
    for sums in got:
        close(sums["key"], sums["query"].unflatten(1, (2, -1)).mean(dim=2))
        close(sums["mean"], sums["query"].mean(dim=1))
