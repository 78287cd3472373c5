"""MiKV against its paper: section 3 of arXiv:2402.18096 (mixed precision, rounding in groups, the channel balancer)."""

import math

import pytest
import torch
from by_hand import batch, decode, gpt2, greedy, places_held

from hf_tokens import ConfigError, MiKVConfig, Quantized, get_token_model, measure
from hf_tokens.testing import zoo


def rounded(x, bits, groups):
    """One key or value (e) in so many bits, each group of channels with its own scale and least value."""
    size = math.ceil(len(x) / groups)
    out = []
    for start in range(0, len(x), size):
        group = [float(value) for value in x[start : start + size]]
        low, scale = min(group), (max(group) - min(group)) / (2**bits - 1)
        out += [low + scale * round((value - low) / scale) if scale else low for value in group]
    return torch.tensor(out, dtype=x.dtype)


def balancer(queries, entries):
    """Factor on each channel of the keys of one head: queries (n e) of the prompt, and its entries."""
    out = []
    for c in range(queries.shape[1]):
        q = max(abs(float(value)) for value in queries[:, c])
        k = max(abs(float(e.k[c])) for e in entries)
        out.append(math.sqrt(q / k) if q and k else 1.0)
    return torch.tensor(out, dtype=queries.dtype)


def naive(entries, low, high, keep, b, c):
    """Put what is beyond the important entries of one head into few bits; `low` and `high` are places that are rounded already."""
    whole = [e for e in entries if e.origin not in low]
    newest = math.floor(c.recent * keep + 1e-9)
    ages = {e.origin: len(entries) - 1 - i for i, e in enumerate(entries)}
    score = lambda e: math.inf if ages[e.origin] < newest else e.received
    important = {e.origin for e in sorted(whole, key=lambda e: -score(e))[:keep]}
    for e in whole:
        if e.origin in important and c.high_bits <= 8 and e.origin not in high:
            e.k, e.v = rounded(e.k, c.high_bits, c.groups), rounded(e.v, c.high_bits, c.groups)
            high.add(e.origin)
        elif e.origin not in important:
            e.k, e.v = rounded(e.k * b, c.bits, c.groups) / b, rounded(e.v, c.bits, c.groups)
            low.add(e.origin)


def by_paper(base, ids, steps, c):
    factors, low, high = {}, {}, {}

    def compress(held, seen, tokens):
        for layer, heads in enumerate(held):
            for h, entries in enumerate(heads):
                at = layer, h
                if seen is not None:
                    b = balancer(seen[layer].queries[h], entries)
                    factors[at], low[at], high[at] = b if c.balance else torch.ones_like(b), set(), set()
                keep = max(1, math.floor(c.importance * tokens + 1e-9))
                naive(entries, low[at], high[at], keep, factors[at], c)

    return decode(base, ids, steps, compress), low


MODELS = [
    pytest.param((12,), {}, id="two bits"),
    pytest.param((17, 9, 4), {"importance": 0.4, "bits": 3, "groups": 1}, id="three bits, padded"),
    pytest.param((11, 6, 1), {"high_bits": 8, "bits": 4, "groups": 4}, id="eight and four bits, padded to one token"),
    pytest.param((13, 7), {"balance": False, "bits": 1, "groups": 3, "recent": 0.0}, id="one bit without a balancer, odd groups"),
    pytest.param((1,), {}, id="one key"),
    pytest.param((9, 5), {"importance": 1.0}, id="nothing in few bits"),
    pytest.param((9, 5), {"importance": 0.01, "recent": 1.0}, id="one important key"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = MiKVConfig(**knobs)
    model = get_token_model(gpt2(), c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 9)
    for row, n in enumerate(lengths):
        (tokens, told, held), low = by_paper(gpt2(), ids[row, -n:], 9, c)
        first = ids.shape[1] - n
        assert places_held(cache, row, first) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        for index, layer in enumerate(cache.layers):
            beyond = layer.record.entries.get("beyond")
            for h in range(3):
                found = set() if beyond is None else {p - first for p in layer.origins[row][beyond[row, h].bool()].tolist()}
                assert found == low[index, h]
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("width", "groups"), [(8, 2), (7, 3), (1, 1), (64, 2)])
def test_rows_come_back_within_half_a_step(bits, width, groups):
    form = Quantized(bits, width, -(-width // groups))
    rows = torch.randn(5, width, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    packed = form.pack(rows)
    torch.testing.assert_close(form.unpack(*packed), torch.stack([rounded(row, bits, groups) for row in rows]), rtol=1e-12, atol=1e-12)
    assert packed[0].dtype == torch.uint8 and packed[0].shape[1] <= math.ceil(width * bits / 8) + (bits - 1 if 8 % bits else 0)


def test_few_bits_are_few_bytes():
    ids, _ = batch((32,))
    model = get_token_model(gpt2(), MiKVConfig(importance=0.25, balance=False)).eval()
    cost = measure(model, input_ids=ids, use_cache=True)
    low, high = 1 + 2 * 2 * 8, 4 * 8  # a byte for four codes, and a scale and a least value a group
    assert cost.kv_bytes == 4 * 3 * 2 * (24 * low + 8 * high)


def test_nothing_is_lost_where_bits_suffice():
    """Values of four levels a group survive two bits, so generation is the base's."""
    base = gpt2()
    with torch.no_grad():
        for block in base.transformer.h:
            block.attn.c_attn.weight[:, 12:] = 0
            block.attn.c_attn.bias[12:] = torch.tensor([-1.0, 0.0, 1.0, 2.0]).repeat(6)
    ids, mask = batch((12,))
    ours = greedy(get_token_model(base, MiKVConfig(groups=1, balance=False)).eval(), ids, mask, 6)[1]
    with torch.no_grad():
        torch.testing.assert_close(ours, greedy(base.eval(), ids, mask, 6)[1], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_grouped_heads_balance_by_their_largest_query():
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, MiKVConfig()).eval()
    cache = model(**specimen.inputs, use_cache=True).past_key_values
    assert [value.shape for (_, name), value in cache.layers[0].record.items() if name == "balance"] == [(2, 2, 8)]
    assert cache.layers[0].length == 16 and cache.layers[0].nbytes < 2 * 2 * 2 * 16 * 8 * 4


def test_high_bits_must_be_above_the_low_ones():
    with pytest.raises(ConfigError, match="must be above bits, which is 4, got 4"):
        get_token_model(gpt2(), MiKVConfig(bits=4, high_bits=4))
