"""Random eviction: the ends are protected, and what stays between them is a fair draw, of its own in each block and head."""

import pytest
import torch
from by_hand import batch, gpt2, places_held
from evicted import agree, allowed

from hf_tokens import ConfigError, RandomConfig, get_token_model, measure

LOW = 2**32 - 1


def mixed(x):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & LOW
    return x ^ (x >> 16)


def naive(entries, keep, c, layer, head):
    """Places that a head keeps of its entries."""
    n = len(entries)
    if n <= keep:
        return list(range(n))
    first = [j for j, e in enumerate(entries) if e.origin < c.sinks][:keep]
    newest = [j for j in range(n - max(0, min(c.window, keep - c.sinks)), n) if j not in first]
    own = mixed((mixed((mixed(head + 1) + layer + 1) & LOW) + c.seed) & LOW)
    drawn = sorted((j for j in range(n) if j not in first + newest), key=lambda j: -mixed(own ^ entries[j].origin))
    return sorted([*first, *newest, *drawn[: keep - len(first) - len(newest)]])


def keep(c):
    def kept(layer, heads, looks, tokens):
        return [naive(entries, allowed(tokens, len(entries), c), c, layer, h) for h, entries in enumerate(heads)]

    return kept


MODELS = [
    pytest.param((17,), {"capacity": 8, "sinks": 2, "window": 3}, id="both ends"),
    pytest.param((15, 9, 4), {"capacity": 5, "sinks": 0, "window": 0, "seed": 7}, id="nothing protected, padded"),
    pytest.param((11, 6, 1), {"budget": 0.3, "sinks": 1, "window": 8}, id="a share below what is protected, padded to one token"),
    pytest.param((12, 9), {"capacity": 4, "sinks": 4, "window": 0}, id="the first alone"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = RandomConfig(**knobs)
    agree(c, lengths, keep(c), steps=8)


def test_every_block_and_head_draws_for_itself():
    ids, _ = batch((40,))
    cache = get_token_model(gpt2(), RandomConfig(capacity=20, sinks=0, window=0)).eval()(ids, use_cache=True).past_key_values
    held = [tuple(head) for layer in places_held(cache, 0, 0) for head in layer]
    assert len(set(held)) == 12 and all(len(set(head)) == 20 for head in held)


def test_the_draw_is_fair():
    """Of 64 places each is kept about as often by 100 seeds in 12 heads: 600 times in the mean, within five deviations."""
    counts = torch.zeros(64)
    ids, _ = batch((64,))
    for seed in range(0, 100):
        model = get_token_model(gpt2(), RandomConfig(capacity=32, sinks=0, window=0, seed=seed)).eval()
        for head in (head for layer in places_held(model(ids, use_cache=True).past_key_values, 0, 0) for head in layer):
            counts[head] += 1
    assert (counts - 600).abs().max() < 5 * (1200 * 0.25) ** 0.5


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(gpt2(), RandomConfig(capacity=13)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 12 * 13 * 4 * 8  # 12 heads of width 4, in float64


def test_a_capacity_below_what_is_protected_is_refused():
    with pytest.raises(ConfigError, match=r"RandomConfig.capacity must be at least what is always kept, 12 entries, got 11\. Raise it"):
        get_token_model(gpt2(), RandomConfig(capacity=11))
