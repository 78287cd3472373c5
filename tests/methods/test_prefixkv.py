"""PrefixKV against its paper: section 3 of arXiv:2412.03409 (importance, priority sequence, global prefix configuration)."""

import math

import pytest
import torch


def importance(attention, mask):
    """Attention that every key receives, summed over the queries and averaged over the heads, as shares of the layer: h n n -> n."""
    heads, n = len(attention), len(mask)
    raw = [0.0] * n
    for head in range(heads):
        for query in range(n):
            for key in range(n):
                if mask[query] and mask[key]:
                    raw[key] += float(attention[head][query][key]) / heads
    total = sum(raw)
    return [r / total for r in raw]


def priority(shares, mask):
    """The real keys from the most to the least important; of two equal ones the earlier leads."""
    return sorted((i for i in range(len(shares)) if mask[i]), key=lambda i: (-shares[i], i))


def prefix(shares, order, p):
    """The smallest prefix of the priority sequence that holds at least the share p of the layer."""
    if p >= 1:
        return len(order)
    held = 0.0
    for size, key in enumerate(order, start=1):
        held += shares[key]
        if held >= p - 1e-12:
            return size
    return len(order)


def sizes(layers, mask, ratio):
    """Cache size of every layer: the largest p, the same in all layers, whose prefixes fit the budget ratio * layers * keys.

    Every p at which a size can change is tried; the paper's binary search ends at the same place.
    """
    orders = [priority(shares, mask) for shares in layers]
    keys = sum(mask)
    budget = max(len(layers), math.floor(ratio * len(layers) * keys + 1e-9))
    best = [1] * len(layers)
    thresholds = {1.0}
    for shares, order in zip(layers, orders, strict=True):
        held = 0.0
        for key in order:
            held += shares[key]
            thresholds.add(min(held, 1.0))
    for p in sorted(thresholds):
        found = [prefix(shares, order, p) for shares, order in zip(layers, orders, strict=True)]
        if sum(found) <= budget:
            best = found
    return best


def configuration(samples, ratio):
    """The offline estimate: retention ratio of every layer, averaged over samples of (layers, mask)."""
    per_sample = [[size / sum(mask) for size in sizes(layers, mask, ratio)] for layers, mask in samples]
    return [sum(column) / len(column) for column in zip(*per_sample, strict=True)]


def held_back(seen, ratio):
    """Entries that a layer may hold once it has seen so many tokens; never none."""
    return min(seen, max(1, math.floor(ratio * seen + 1e-9)))


def naive(layers, mask, ratios, steps=0, distance=25):
    """Positions held by every layer of one sample after prefill and `steps` decoded tokens, in their order in the sequence.

    layers: shares of importance, one list a layer; ratios: the configuration. While decoding, the entry at a fixed distance from the
    newest one goes whenever the layer outgrows its ratio.
    """
    held = []
    for shares, ratio in zip(layers, ratios, strict=True):
        seen = sum(mask)
        cache = sorted(priority(shares, mask)[: held_back(seen, ratio)])
        for step in range(steps):
            cache.append(len(mask) + step)
            seen += 1
            while len(cache) > held_back(seen, ratio):
                del cache[max(0, len(cache) - 1 - distance)]
        held.append(cache)
    return held


# layers, heads, keys, padding on the left, ratio of the budget, decoded tokens, distance
CASES = [
    pytest.param(3, 2, 12, 0, 0.5, 0, 25, id="the paper's half"),
    pytest.param(4, 3, 17, 0, 0.2, 9, 4, id="odd sizes"),
    pytest.param(2, 1, 1, 0, 0.5, 3, 1, id="one key"),
    pytest.param(3, 2, 9, 0, 1.0, 5, 2, id="nothing to evict"),
    pytest.param(3, 2, 9, 0, 0.01, 5, 2, id="one key a layer"),
    pytest.param(3, 2, 9, 8, 0.5, 4, 1, id="all padded but one"),
    pytest.param(3, 2, 11, 4, 0.4, 6, 3, id="padded"),
    pytest.param(1, 1, 7, 0, 0.5, 0, 25, id="one layer"),
]


def sample(layers, heads, keys, padding, seed=0, sharpness=3.0):
    """Causal attention of one left-padded sample, sharper from layer to layer: importance of every layer, and the mask."""
    draw = torch.Generator().manual_seed(seed)
    mask = [i >= padding for i in range(keys)]
    shares = []
    for layer in range(layers):
        logits = torch.randn(heads, keys, keys, generator=draw, dtype=torch.float64) * sharpness * layer
        seen = torch.ones(keys, keys).tril().bool() & torch.tensor(mask)
        attention = logits.masked_fill(~seen, -1e30).softmax(-1)
        shares.append(importance(attention, mask))
    return shares, mask


@pytest.mark.parametrize(("layers", "heads", "keys", "padding", "ratio", "steps", "distance"), CASES)
def test_naive_keeps_to_the_budget(layers, heads, keys, padding, ratio, steps, distance):
    shares, mask = sample(layers, heads, keys, padding)
    found = sizes(shares, mask, ratio)
    real = keys - padding
    assert all(1 <= size <= real for size in found)
    assert sum(found) <= max(layers, math.floor(ratio * layers * real + 1e-9))
    ratios = configuration([(shares, mask)], ratio)
    held = naive(shares, mask, ratios, steps, distance)
    for shares_of, cache, size, share in zip(shares, naive(shares, mask, ratios), found, ratios, strict=True):
        assert len(cache) == size
        assert all(mask[i] for i in cache)
        assert not any(shares_of[i] < shares_of[j] for i in cache for j in range(keys) if mask[j] and j not in cache)
        assert share == pytest.approx(size / real)
    for cache, share in zip(held, ratios, strict=True):
        assert cache == sorted(set(cache))
        assert len(cache) == held_back(real + steps, share)
        assert not steps or cache[-1] == keys + steps - 1


def test_naive_gives_the_even_layer_more_than_the_peaked_one():
    even, peaked = [0.1] * 10, [0.91] + [0.01] * 9
    assert sizes([even, peaked], [True] * 10, 0.5) == [9, 1]


def test_naive_holds_the_same_share_in_every_layer():
    shares, mask = sample(5, 2, 24, 0)
    found = sizes(shares, mask, 0.4)
    held = [sum(sorted(layer, reverse=True)[:size]) for layer, size in zip(shares, found, strict=True)]
    short = [sum(sorted(layer, reverse=True)[: size - 1]) for layer, size in zip(shares, found, strict=True)]
    assert max(short) < min(held) + 1e-12


def test_naive_finds_what_a_binary_search_finds():
    shares, mask = sample(4, 2, 19, 3)
    orders = [priority(layer, mask) for layer in shares]
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        over = sum(prefix(*pair, p) for pair in zip(shares, orders, strict=True)) > math.floor(0.3 * 4 * 16 + 1e-9)
        low, high = (low, p) if over else (p, high)
    assert [prefix(*pair, low) for pair in zip(shares, orders, strict=True)] == sizes(shares, mask, 0.3)


def test_naive_full_budget_is_the_full_cache():
    shares, mask = sample(3, 2, 8, 2)
    assert naive(shares, mask, configuration([(shares, mask)], 1.0), steps=3) == [list(range(2, 11))] * 3


def test_naive_averages_configurations():
    samples = [sample(3, 2, 16, 0, seed) for seed in range(4)]
    ratios = configuration(samples, 0.5)
    assert 0.5 - 3 / 48 <= sum(ratios) / 3 <= 0.5


def test_naive_drops_at_the_distance():
    assert naive([[0.25] * 4], [True] * 4, [0.5], steps=4, distance=1) == [[0, 4, 6, 7]]
