"""D2O against its release (shares, split, what is merged how) and, for `rule="paper"`, arXiv:2406.13035, sections 3.2 and 3.3."""

import math

import pytest
import torch
from by_hand import Entry, batch, decode, gpt2, greedy, places_held

from hf_tokens import D2OConfig, UnsupportedError, calibrate, get_token_model, measure, share_out
from hf_tokens.testing import zoo


def variance(values, less=0):
    mean = sum(values) / len(values)
    return sum((r - mean) ** 2 for r in values) / max(1, len(values) - less)


def unevenness(heads, rule):
    """Of the attention that the keys of a layer got: over keys and heads, or over keys, scaled by the least and most of the heads."""
    received = [[e.received for e in entries] for entries in heads]
    if rule == "paper":
        return variance([r for head in received for r in head])
    found = [variance(head, 1) for head in received]
    return sum((f - min(found)) / (max(found) - min(found) + 1e-6) for f in found) / len(found)


def shares(uneven, budget, rule="paper"):
    """Share of its tokens that each layer keeps: by softmax of minus the variance, the mean given, none above 1."""
    mean = sum(uneven) / len(uneven) if rule == "paper" else 1.0
    weights = [math.exp(-v / mean) if mean else 1.0 for v in uneven]
    full = set()
    while True:
        rest = sum(w for i, w in enumerate(weights) if i not in full)
        left = budget * len(weights) - len(full)
        out = [1.0 if i in full else left * w / rest for i, w in enumerate(weights)]
        over = {i for i, s in enumerate(out) if s > 1 + 1e-9}
        if not over:
            return out
        full |= {max(over, key=lambda i: out[i])}


def cosine(a, b):
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def naive(entries, keep, c, tau):
    """One head: what it keeps of its entries, merged, and its threshold behind it; `tau` is None in front of the first eviction."""
    newest = math.floor(c.recent * keep + 1e-9)
    old, new = entries[: len(entries) - newest], entries[len(entries) - newest :]
    heavy = sorted(old, key=lambda e: (e.origin >= c.sinks, e.origin if e.origin < c.sinks else -e.received))[: keep - newest]
    kept = sorted(heavy + new, key=lambda e: e.origin)
    gone = [e for e in entries if all(e is not k for k in kept)]
    if not gone:
        return entries, tau
    found = []
    for e in gone:
        alike = [cosine(e.k, k.k) for k in kept]
        found.append((max(alike), alike.index(max(alike))))
    mean = sum(u for u, _ in found) / len(found)
    tau = mean if tau is None else c.beta * mean + (1 - c.beta) * tau
    out = []
    for j, k in enumerate(kept):
        joins = [(u, e) for (u, nearest), e in zip(found, gone, strict=True) if nearest == j and u >= tau - 1e-12]
        if c.rule == "release":
            own, joins, total = 1.0, joins, 1 + len(joins)
        else:
            own, joins = math.e, [(math.exp(u), e) for u, e in joins]
            total = math.e + sum(w for w, _ in joins)
        key = (own * k.k + sum(w * e.k for w, e in joins)) / total
        value = (own * k.v + sum(w * e.v for w, e in joins)) / total
        out.append(Entry(key, value, k.origin, 1.0, k.received))
    return out, tau


def by_paper(base, ids, steps, c):
    given, taus = {}, {}

    def compress(held, seen, tokens):
        acted = range(2, len(held) - 1) if c.spare and len(held) > 3 else range(len(held))
        if seen is not None:
            uneven = [unevenness(held[layer], c.rule) for layer in acted]
            given.update(zip(acted, shares(uneven, c.budget, c.rule), strict=True))
        for layer in acted:
            keep = max(1, math.floor(given[layer] * tokens + 1e-9))
            for h, entries in enumerate(held[layer]):
                if len(entries) > keep:
                    held[layer][h], taus[layer, h] = naive(entries, keep, c, taus.get((layer, h)))

    return decode(base, ids, steps, compress)


@pytest.mark.parametrize("budget", [0.1, 0.4, 0.75, 1.0])
@pytest.mark.parametrize("variances", [[3.0, 1.0, 0.2, 8.0], [1.0, 1.0], [5.0], [0.01, 9.0, 30.0], [0.0, 0.0, 0.0]])
def test_shares_are_those_of_the_paper(variances, budget):
    mean = sum(variances) / len(variances)
    weights = torch.tensor([[math.exp(-v / mean) if mean else 1.0 for v in variances]] * 2, dtype=torch.float64)
    found = share_out(weights, budget)
    assert found[1].tolist() == pytest.approx(shares(variances, budget))
    assert float(found[0].mean()) == pytest.approx(budget)


FIRST_VERSION = {"rule": "paper", "spare": False, "sinks": 0, "recent": 0.25, "beta": 0.7}
MODELS = [
    pytest.param((19,), {}, id="the release's defaults"),
    pytest.param((17, 9, 4), {"budget": 0.6, "spare": False}, id="all blocks, padded"),
    pytest.param((17, 9, 4), {"budget": 0.3, "spare": False, "sinks": 1, "beta": 0.9}, id="one sink"),
    pytest.param((17, 9, 4), {"budget": 0.3, "spare": False, "sinks": 2, "rule": "paper"}, id="the paper's rule with sinks"),
    pytest.param((12,), FIRST_VERSION, id="version 1"),
    pytest.param((17, 9, 4), FIRST_VERSION | {"budget": 0.3}, id="version 1, padded"),
    pytest.param((11, 6, 1), {"budget": 0.6, "recent": 0.5, "beta": 0.2}, id="padded to one token"),
    pytest.param((13, 7), {"recent": 1.0}, id="only the newest"),
    pytest.param((13, 7), {"recent": 0.0, "beta": 0.0, "sinks": 0}, id="only the heaviest, a fixed threshold"),
    pytest.param((1,), {}, id="one key"),
    pytest.param((9, 5), {"budget": 1.0}, id="nothing to evict"),
    pytest.param((9, 5), {"budget": 0.01, "spare": False}, id="one key a layer"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    base = gpt2()
    for layer, block in enumerate(base.transformer.h):
        torch.nn.init.normal_(block.attn.c_attn.weight, std=0.3 * (layer + 1))
    c = D2OConfig(**knobs)
    model = get_token_model(base, c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 9)
    for row, n in enumerate(lengths):
        tokens, told, held = by_paper(base, ids[row, -n:], 9, c)
        assert places_held(cache, row, ids.shape[1] - n) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


def test_merging_changes_the_keys_that_stay():
    ids, mask = batch((14,))
    caches = [greedy(get_token_model(gpt2(), D2OConfig(budget=0.3, spare=False)).eval(), ids, mask, 1)[2], greedy(gpt2(), ids, mask, 1)[2]]
    moved = []
    for ours, theirs in zip(*(cache.layers for cache in caches), strict=True):
        origins = ours.origins if ours.origins.dim() == 3 else ours.origins[:, None].expand(-1, 3, -1)
        before = theirs.keys.gather(2, origins[..., None].expand(-1, -1, -1, 4))
        moved.append((ours.keys - before).abs().amax(dim=-1) > 1e-9)
    assert any(bool(m.any()) for m in moved) and not all(bool(m.all()) for m in moved)


def test_memory_is_freed():
    model = get_token_model(gpt2(), D2OConfig(budget=0.25, spare=False)).eval()
    ids, _ = batch((32,))
    cost = measure(model, input_ids=ids, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, input_ids=ids, use_cache=True)
    assert cost.kv_bytes <= whole.kv_bytes // 4


def test_grouped_heads_keep_apart():
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, D2OConfig(budget=0.4, spare=False, sinks=0)).eval()
    out = model.generate(**specimen.inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    layer = out.past_key_values.layers[1]
    assert layer.origins.shape[:2] == (2, 2) and not torch.equal(layer.origins[:, 0], layer.origins[:, 1])


def test_a_cache_is_not_cropped_behind_what_was_folded():
    model = get_token_model(gpt2(), D2OConfig(budget=0.5)).eval()
    ids, mask = batch((12,))
    cache = greedy(model, ids, mask, 3)[2]
    with pytest.raises(UnsupportedError, match="since which no older entry was dropped or changed, got 2 tokens"):
        cache.crop(-12)


def test_calibration_beside_it_leaves_it_as_it_is():
    model = get_token_model(gpt2(), D2OConfig())
    with pytest.raises(UnsupportedError, match="needs a method that measures knobs on data, got D2O"):
        calibrate(model, [{"input_ids": batch((9,))[0]}])


def test_the_first_two_blocks_and_the_last_keep_all():
    cache = greedy(get_token_model(gpt2(6), D2OConfig(budget=0.4)).eval(), *batch((20,)), 1)[2]
    assert [layer.length for layer in cache.layers] == [20, 20, *(la.length for la in cache.layers[2:5]), 20]
    assert all(layer.length < 20 for layer in cache.layers[2:5])
