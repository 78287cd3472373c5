"""StreamingLLM against its paper: section 3 of arXiv:2309.17453 (attention sinks and a rolling window)."""

import pytest
from by_hand import batch, gpt2
from evicted import agree, allowed

from hf_tokens import ConfigError, StreamingLLMConfig, get_token_model, measure


def naive(entries, keep, sinks):
    """Places that a head keeps of its entries."""
    first = [j for j, e in enumerate(entries) if e.origin < sinks][:keep]
    rest = [j for j in range(len(entries)) if j not in first]
    return [*first, *rest[len(rest) - (keep - len(first)) :]]


def keep(c):
    return lambda layer, heads, looks, tokens: [naive(e, allowed(tokens, len(e), c), c.sinks) for e in heads]


MODELS = [
    pytest.param((17,), {"capacity": 8, "sinks": 2}, id="sinks and window"),
    pytest.param((15, 9, 4), {"capacity": 7, "sinks": 4}, id="padded, above and below the capacity"),
    pytest.param((11, 6, 1), {"budget": 0.3, "sinks": 2}, id="a share, padded to one token"),
    pytest.param((12, 9), {"capacity": 5, "sinks": 0}, id="a window alone"),
    pytest.param((12, 9), {"capacity": 3, "sinks": 3}, id="sinks alone"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = StreamingLLMConfig(**knobs)
    agree(c, lengths, keep(c), steps=9)


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(gpt2(), StreamingLLMConfig(capacity=9)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 12 * 9 * 4 * 8  # 12 heads of width 4, in float64


def test_a_capacity_below_the_sinks_is_refused():
    with pytest.raises(ConfigError, match=r"StreamingLLMConfig.capacity must be at least what is always kept, 4 entries, got 3\. Raise it"):
        get_token_model(gpt2(), StreamingLLMConfig(capacity=3))
