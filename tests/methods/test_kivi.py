"""KIVI against its paper: section 3 of arXiv:2402.02750 (keys rounded by channel, values by token, a residual in full precision)."""

import pytest
import torch
from by_hand import batch, decode, gpt2, greedy, places_held

from hf_tokens import ConfigError, KIVIConfig, SnapKVConfig, UnsupportedError, get_token_model, measure


def rounded(numbers, bits):
    """A group of numbers, each at the nearest of 2^bits steps from the least to the greatest."""
    low, step = min(numbers), (max(numbers) - min(numbers)) / (2**bits - 1)
    return [low + step * round((x - low) / step) if step else low for x in numbers]


def round_keys(entries, bits):
    """One group of tokens: each channel by itself."""
    for channel in range(len(entries[0].k)):
        for e, x in zip(entries, rounded([float(e.k[channel]) for e in entries], bits), strict=True):
            e.k[channel] = x


def round_value(entry, bits, group):
    """One token: each group of channels by itself."""
    for first in range(0, len(entry.v), group):
        entry.v[first : first + group] = torch.tensor(rounded(entry.v[first : first + group].tolist(), bits), dtype=entry.v.dtype)


def naive(entries, keys, values, c):
    """Round what no longer waits in one head; `keys` and `values` are places that are rounded already."""
    waiting = [e for e in entries if e.origin not in keys]
    for first in range(0, len(waiting) - len(waiting) % c.residual if c.key_bits <= 8 else 0, c.group):
        round_keys(waiting[first : first + c.group], c.key_bits)
        keys.update(e.origin for e in waiting[first : first + c.group])
    for e in entries[: max(0, len(entries) - c.residual)]:
        if e.origin not in values and c.value_bits <= 8:
            round_value(e, c.value_bits, c.group)
            values.add(e.origin)


def by_paper(base, ids, steps, c):
    done = {}

    def compress(held, seen, tokens):
        for layer, heads in enumerate(held):
            for h, entries in enumerate(heads):
                if seen is not None:
                    done[layer, h] = set(), set()
                    for e in entries:
                        e.k, e.v = e.k.clone(), e.v.clone()
                naive(entries, *done[layer, h], c)

    return decode(base, ids, steps, compress), done


def held_as(cache, layer, row, head, first):
    """Places whose keys are rounded, and those whose values are."""
    origins, found = cache.layers[layer].origins[row], (set(), set())
    for part in cache.layers[layer].kv.parts or ():
        for which in (0, 1):
            if hasattr(part.forms[which], "bits"):
                found[which].update((origins[part.where[row, head]] - first).tolist())
    return found


MODELS = [
    pytest.param((12,), {"group": 2, "residual": 4}, 10, id="several flushes, a prompt that fills the window"),
    pytest.param((17, 9, 3), {"group": 3, "residual": 6, "key_bits": 3}, 8, id="padded, three bits, one row below the window"),
    pytest.param((11, 6, 1), {"group": 4, "residual": 4, "value_bits": 4}, 9, id="padded to one token, one group a channel"),
    pytest.param((7, 5), {"group": 1, "residual": 1, "key_bits": 1, "value_bits": 8}, 6, id="nothing stays"),
    pytest.param((1,), {"group": 5, "residual": 5}, 12, id="one key"),
    pytest.param((9, 5), {}, 6, id="nothing leaves the window"),
    pytest.param((9, 5), {"group": 2, "residual": 2, "key_bits": 16}, 6, id="values alone"),
    pytest.param((9, 5), {"group": 2, "residual": 2, "value_bits": 16}, 6, id="keys alone"),
]


@pytest.mark.parametrize(("lengths", "knobs", "steps"), MODELS)
def test_model_is_the_loop(lengths, knobs, steps):
    c = KIVIConfig(**knobs)
    model = get_token_model(gpt2(), c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, steps)
    for row, n in enumerate(lengths):
        (tokens, told, held), done = by_paper(gpt2(), ids[row, -n:], steps, c)
        first = ids.shape[1] - n
        assert places_held(cache, row, first) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        for (layer, h), places in done.items():
            assert held_as(cache, layer, row, h, first) == places
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("n", "keys", "values"), [(24, 24, 16), (27, 24, 19), (7, 0, 0), (8, 8, 0)])
def test_bytes_count_scales_and_least_values(n, keys, values):
    ids, _ = batch((n,))
    cost = measure(get_token_model(gpt2(), KIVIConfig(group=4, residual=8)).eval(), input_ids=ids, use_cache=True)
    key = keys * (1 + 4) + keys // 4 * 2 * 4 * 8 + (n - keys) * 4 * 8  # a byte of codes and the number of a group; scales of a group
    value = values * (1 + 2 * 8) + (n - values) * 4 * 8
    assert cost.kv_bytes == 4 * 3 * (key + value)


def test_the_residual_is_a_multiple_of_the_group():
    with pytest.raises(ConfigError, match="must be a multiple of group, which is 32, got 40"):
        get_token_model(gpt2(), KIVIConfig(residual=40))


@torch.no_grad()
def test_what_another_evicted_is_in_no_group():
    """SnapKV first: the groups are those of the entries that it kept."""
    ids, mask = batch((24, 15))
    stack = [SnapKVConfig(capacity=12, window=4), KIVIConfig(group=2, residual=4)]
    alone = get_token_model(gpt2(), stack[:1]).eval()(ids, attention_mask=mask, use_cache=True).past_key_values
    both = get_token_model(gpt2(), stack).eval()(ids, attention_mask=mask, use_cache=True).past_key_values
    for plain, layer in zip(alone.layers, both.layers, strict=True):
        want = plain.keys.unflatten(2, (6, 2))
        low, high = want.amin(dim=3, keepdim=True), want.amax(dim=3, keepdim=True)
        step = (high - low) / 3
        torch.testing.assert_close(layer.keys, (low + step * ((want - low) / step).round()).flatten(2, 3))
        torch.testing.assert_close(layer.values[:, :, 8:], plain.values[:, :, 8:])


@torch.no_grad()
def test_a_crop_behind_a_flush_is_refused():
    ids, mask = batch((9,))
    model = get_token_model(gpt2(), KIVIConfig(group=2, residual=4)).eval()
    _, _, cache = greedy(model, ids, mask, 4)
    with pytest.raises(UnsupportedError, match="cropped to a length since which no older entry was dropped or changed"):
        cache.crop(-2)
