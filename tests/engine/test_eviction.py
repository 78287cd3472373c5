"""How entries leave a cache while it decodes: one by one where they lie, several at once, and the same ones either way."""

from unittest.mock import patch

import pytest
import torch
from by_hand import batch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import all_equal

from hf_tokens import DuoAttentionConfig, RazorAttentionConfig, SqueezeAttentionConfig, StreamingLLMConfig, get_token_model
from hf_tokens.engine.rotation import TableCall
from hf_tokens.handlers import cache_compressor, eviction
from hf_tokens.kv import layer
from hf_tokens.kv.ranking import highest, lowest
from hf_tokens.testing import CACHE, zoo

LENGTHS = (21, 13)


@torch.no_grad()
def stepped(family, config, lengths=LENGTHS, chunks=(1,) * 12):
    """Logits of some tokens more behind a prompt, so many at a time, and what each head holds behind each."""
    model, (ids, mask) = get_token_model(zoo.build(family).model, config).eval(), batch(lengths)
    more = torch.randint(5, 60, (len(ids), sum(chunks)), generator=torch.Generator().manual_seed(1))
    cache, logits, held = model(input_ids=ids, attention_mask=mask, use_cache=True)[CACHE], [], []
    for some in more.split(list(chunks), dim=1):
        mask = torch.cat([mask, torch.ones_like(some)], dim=1)
        logits.append(model(input_ids=some, attention_mask=mask, use_cache=True, **{CACHE: cache}).logits)
        held.append([places(layer) for layer in cache.layers])
    return logits, held, cache


def places(layer):
    """The places of the tokens of which each row and head holds entries."""
    origins = layer.origins[:, None].expand_as(layer.there) if layer.origins.dim() == 2 else layer.origins
    return [[sorted(o[t].tolist()) for o, t in zip(*row, strict=True)] for row in zip(origins, layer.there, strict=True)]


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_lowest_is_the_one_that_would_go(seed):
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([-torch.inf, 0, 1, torch.finfo(torch.float64).max, torch.inf, torch.nan], dtype=torch.float64)
    score, real = values[torch.randint(6, (2, 3, 7), generator=g)], torch.rand(2, 3, 7, generator=g) < 0.6
    real[..., seed % 7] = True
    stays = highest(score.masked_fill(~real, -torch.inf), real.sum(dim=-1) - 1, real)
    assert torch.equal(real.scatter(-1, lowest(score, real), False), stays)


IN_EACH_HEAD = {
    "a head keeps all": RazorAttentionConfig(sinks=2, compression=4, heads=(0, 3)),
    "no head keeps all": RazorAttentionConfig(sinks=1, compression=4),
    "none is folded": DuoAttentionConfig(gates=(1.0, 0.0) * 4, sinks=1, recent=5),
}


@pytest.mark.parametrize("chunks", [(1,) * 12, (1, 1, 1, 3, 1, 1, 2, 1, 1)], ids=["one by one", "some together"])
@pytest.mark.parametrize("gaps", [2, 64], ids=["closed up soon", "late"])
@pytest.mark.parametrize("config", IN_EACH_HEAD.values(), ids=IN_EACH_HEAD)
def test_a_place_that_is_left_empty_is_as_if_the_others_had_closed_up(config, gaps, chunks, monkeypatch):
    monkeypatch.setattr("hf_tokens.engine.passage.GAPS", gaps)
    with patch.object(cache_compressor, "leave_place", side_effect=eviction.leave_place) as left:
        ours, held, _ = stepped("llama", config, chunks=chunks)
    with patch.object(cache_compressor, "leaves_places", return_value=False):
        theirs, closed, _ = stepped("llama", config, chunks=chunks)
    assert left.call_count and held == closed
    all_equal(ours, theirs, "logits")


def test_empty_places_do_not_grow_in_number():
    _, _, cache = stepped("llama", IN_EACH_HEAD["no head keeps all"], chunks=(1,) * (layer.GAPS + 30))
    assert all(one.length - int(one.there.sum(dim=-1).max()) <= layer.GAPS + 1 for one in cache.layers)


def test_heads_that_may_hold_as_many_are_as_rows_that_do():
    config = RazorAttentionConfig(sinks=1, compression=4)
    with patch.object(cache_compressor, "drop_entry", side_effect=eviction.drop_entry) as dropped:
        ours, held, _ = stepped("llama", config, (21,))
    with patch.object(cache_compressor, "surplus", return_value=None):
        theirs, closed, _ = stepped("llama", config, (21,))
    assert dropped.call_count and held == closed
    all_equal(ours, theirs, "logits")


SLACK = {
    "razorattention": (RazorAttentionConfig, {"sinks": 1, "compression": 40.0, "buffer": 5, "heads": (0, 3)}),
    "streaming-llm": (StreamingLLMConfig, {"capacity": 7, "sinks": 2}),
    "squeezeattention": (SqueezeAttentionConfig, {"budget": 0.2, "policy": "window"}),
    "duo-attention": (DuoAttentionConfig, {"gates": (1.0,) + (0.0,) * 7, "sinks": 1, "recent": 5}),
}


@pytest.mark.parametrize("lengths", [(21,), LENGTHS], ids=["one row", "padded"])
@pytest.mark.parametrize("name", SLACK)
def test_entries_above_the_budget_leave_at_once_and_the_same_ones_stay(name, lengths):
    made, knobs = SLACK[name]
    _, tight, _ = stepped("llama", made(**knobs), lengths)
    _, loose, _ = stepped("llama", made(**knobs, slack=4), lengths)
    over = [
        (len(more) - len(few), set(few) <= set(more))
        for a, b in zip(loose, tight, strict=True)
        for heads, others in zip(a, b, strict=True)
        for row, other in zip(heads, others, strict=True)
        for more, few in zip(row, other, strict=True)
    ]
    assert all(within for _, within in over) and {many for many, _ in over} >= {0, 1, 4} and max(many for many, _ in over) == 4


def test_the_angles_of_a_step_are_made_once_for_all_blocks():
    config = StreamingLLMConfig(capacity=7, sinks=2)
    stepped("llama", config)  # what is found at the first call of a model is found
    with patch.object(TableCall, "table", autospec=True, side_effect=TableCall.table) as made:
        _, held, _ = stepped("llama", config, chunks=())
        found = made.call_count
    with patch.object(TableCall, "table", autospec=True, side_effect=TableCall.table) as made:
        stepped("llama", config, chunks=(1,) * 5)
    assert made.call_count == found + 5
