"""H2O against its paper: section 4 of arXiv:2306.14048 (accumulated attention, heavy hitters beside the newest)."""

import pytest
from by_hand import batch, gpt2
from evicted import agree, allowed

from hf_tokens import H2OConfig, get_token_model, measure


def naive(entries, keep, recent, normalise, tokens):
    """Places that a head keeps of its entries."""
    n, newest = len(entries), int(recent * keep + 1e-9)
    if n <= keep:
        return list(range(n))
    score = [e.received / (tokens - e.origin if normalise else 1) for e in entries]
    heavy = sorted(range(n - newest), key=lambda j: -score[j])[: keep - newest]
    return sorted([*heavy, *range(n - newest, n)])


def keep(c):
    def kept(layer, heads, looks, tokens):
        return [naive(entries, allowed(tokens, len(entries), c), c.recent, c.normalise, tokens) for entries in heads]

    return kept


MODELS = [
    pytest.param((17,), {"capacity": 6}, id="half heavy, half recent"),
    pytest.param((15, 9, 4), {"capacity": 7, "recent": 0.3}, id="padded, above and below the capacity"),
    pytest.param((11, 6, 1), {"capacity": 1}, id="one entry, padded to one token"),
    pytest.param((13, 7), {"budget": 0.4, "recent": 0.9}, id="a share, most recent"),
    pytest.param((13, 7), {"capacity": 5, "recent": 0.0}, id="none recent"),
    pytest.param((13, 7), {"capacity": 5, "recent": 1.0}, id="a window"),
    pytest.param((16, 11), {"capacity": 6, "normalise": True}, id="mean over the queries that could look"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = H2OConfig(**knobs)
    agree(c, lengths, keep(c), steps=8)


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(gpt2(), H2OConfig(capacity=9)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 12 * 9 * 4 * 8  # 12 heads of width 4, in float64
