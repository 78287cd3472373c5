"""PyramidKV against its paper: section 4 of arXiv:2406.02069 (budgets that fall from block to block, entries as in SnapKV)."""

import math
from fractions import Fraction

import pytest
import torch
from by_hand import batch, gpt2
from evicted import agree, allowed

from hf_tokens import ConfigError, PyramidKVConfig, get_token_model, measure


def sizes(total, n, window, beta, layers):
    """Entries of each block, the window among them: an arithmetic sequence of the given mean, rounded towards it."""
    mean = total - window
    if mean <= 0 or n < 2 * mean:
        return [min(n, total)] * layers
    low = mean // beta
    high = min(2 * mean - low, n - window)
    low = 2 * mean - high
    exact = [Fraction(high) - Fraction(layer * (high - low), max(1, layers - 1)) for layer in range(layers)]
    exact = exact if layers > 1 else [Fraction(mean)]
    return [window + (math.floor(x) if x > mean else math.ceil(x)) for x in exact]


def naive(attention, keep, window, kernel):
    """Places that a head keeps, of its attention (n n): by the greatest mean among neighbours, and the window."""
    n, recent = len(attention), min(window, keep)
    if n <= keep:
        return list(range(n))
    before = max(n - window, 0)
    got = [float(attention[before:, j].mean()) for j in range(before)]
    pooled = [max(got[max(0, j - kernel // 2) : j + kernel // 2 + 1]) for j in range(before)]
    return sorted([*sorted(range(before), key=lambda j: -pooled[j])[: keep - recent], *range(n - recent, n)])


def keep(c, layers=4):
    def kept(layer, heads, looks, tokens):
        if len(looks[0]) == 1 < tokens:
            return [range(len(entries)) for entries in heads]
        n = len(looks[0])
        size = sizes(allowed(tokens, n, c), n, c.window, c.beta, layers)[layer]
        return [naive(look, size, c.window, c.kernel) for look in looks]

    return kept


MODELS = [
    pytest.param((25,), {"capacity": 8, "window": 2, "kernel": 3}, id="a pyramid"),
    pytest.param((25, 14, 5), {"capacity": 9, "window": 3, "kernel": 3, "beta": 2}, id="padded: steep, capped, and all"),
    pytest.param((12, 9), {"capacity": 8, "window": 1, "kernel": 1}, id="shorter than twice the mean"),
    pytest.param((17, 9, 1), {"capacity": 4, "window": 4, "kernel": 3}, id="the window alone, padded to one token"),
    pytest.param((21, 16), {"budget": 0.4, "window": 2, "kernel": 5, "beta": 1}, id="a share, even blocks"),
    pytest.param((13, 6), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = PyramidKVConfig(**knobs)
    agree(c, lengths, keep(c), steps=4)


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [8, 13, 17, 40])
def test_all_blocks_together_keep_the_mean(layers, n):
    ids = torch.randint(3, 50, (1, n), generator=torch.Generator().manual_seed(0))
    config = PyramidKVConfig(capacity=7, window=2, layers=tuple(range(4 - layers, 4)))
    cache = get_token_model(gpt2(), config).eval()(ids, use_cache=True).past_key_values
    held = [layer.length for layer in cache.layers]
    assert held == [n] * (4 - layers) + sizes(min(n, 7), n, 2, 20, layers)
    assert sum(held[4 - layers :]) == layers * 7


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(gpt2(), PyramidKVConfig(capacity=9, window=2)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 12 * 9 * 4 * 8  # 12 heads of width 4, in float64


def test_a_capacity_below_the_window_is_refused():
    with pytest.raises(ConfigError, match=r"PyramidKVConfig.capacity must be at least what is always kept, 8 entries, got 7\. Raise it"):
        get_token_model(gpt2(), PyramidKVConfig(capacity=7))
