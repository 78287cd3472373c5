"""Ada-KV against its paper: section 3 of arXiv:2407.11550 (the heads of a block share its cache by their scores)."""

import math

import pytest
from by_hand import batch, gpt2, places_held, positions
from evicted import agree, allowed, by_paper

from hf_tokens import AdaKVConfig, ConfigError, H2OConfig, SnapKVConfig, StreamingLLMConfig, get_token_model, measure


def pooled(attention, window, kernel):
    """Scores of the entries in front of the window, of attention (n n)."""
    before = max(len(attention) - window, 0)
    got = [float(attention[before:, j].mean()) for j in range(before)]
    return [max(got[max(0, j - kernel // 2) : j + kernel // 2 + 1]) for j in range(before)]


def naive(looks, size, window, kernel, alpha):
    """Places that each head of a block keeps, of their attention (n n) each."""
    n, recent = len(looks[0]), min(window, size)
    if n <= size:
        return [list(range(n))] * len(looks)
    even, scores = size - recent, [pooled(look, window, kernel) for look in looks]
    everything = sorted((-s, h, j) for h, head in enumerate(scores) for j, s in enumerate(head))
    best = [sum(h == head for _, h, _ in everything[: even * len(looks)]) for head in range(len(looks))]
    shares = [alpha * even + (1 - alpha) * m for m in best]
    counts = [math.floor(x + 1e-9) for x in shares]
    for head in sorted(range(len(looks)), key=lambda h: counts[h] - shares[h])[: even * len(looks) - sum(counts)]:
        counts[head] += 1
    order = [sorted(range(len(head)), key=lambda j, head=head: -head[j])[:count] for head, count in zip(scores, counts, strict=True)]
    return [sorted([*head, *range(n - recent, n)]) for head in order]


def keep(c):
    def kept(layer, heads, looks, tokens):
        if len(looks[0]) == 1 < tokens:
            return [range(len(entries)) for entries in heads]
        return naive(looks, allowed(tokens, len(looks[0]), c), c.window, c.kernel, c.alpha)

    return kept


MODELS = [
    pytest.param((19,), {"capacity": 8, "window": 2, "kernel": 1}, id="alpha as it is"),
    pytest.param((19, 12, 5), {"capacity": 9, "window": 3, "kernel": 3, "alpha": 0.0}, id="by scores alone, padded"),
    pytest.param((17, 9, 1), {"capacity": 6, "window": 2, "kernel": 3, "alpha": 1.0}, id="even heads, padded to one token"),
    pytest.param((21, 14), {"budget": 0.4, "window": 2, "kernel": 5, "alpha": 0.37}, id="a share"),
    pytest.param((17, 9), {"capacity": 4, "window": 4, "kernel": 3}, id="the window alone"),
    pytest.param((11, 7), {"budget": 0.25, "window": 8}, id="a share below the window"),
    pytest.param((13, 6), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = AdaKVConfig(**knobs)
    agree(c, lengths, keep(c), steps=4)


def test_a_block_keeps_as_much_as_with_even_heads_and_only_that_takes_room():
    ids, _ = batch((32,))
    model = get_token_model(gpt2(), AdaKVConfig(capacity=9, window=2, kernel=3)).eval()
    cache = model(ids, use_cache=True).past_key_values
    counts = [[len(head) for head in layer] for layer in places_held(cache, 0, 0)]
    assert all(sum(layer) == 3 * 9 for layer in counts) and any(len(set(layer)) > 1 for layer in counts)
    assert measure(model, input_ids=ids, use_cache=True).kv_bytes == 2 * 12 * 9 * 4 * 8  # 12 heads of width 4, in float64


def test_rows_are_divided_each_for_itself():
    c, lengths = AdaKVConfig(capacity=7, window=2, kernel=3), (18, 13)
    ids, mask = batch(lengths)
    cache = get_token_model(gpt2(), c).eval()(ids, attention_mask=mask, position_ids=positions(mask), use_cache=True).past_key_values
    held = [places_held(cache, row, ids.shape[1] - n) for row, n in enumerate(lengths)]
    for row, n in enumerate(lengths):
        assert held[row] == [[[e.origin for e in head] for head in layer] for layer in by_paper(gpt2(), ids[row, -n:], 1, keep(c))[2]]
    assert [list(map(len, layer)) for layer in held[0]] != [list(map(len, layer)) for layer in held[1]]


def test_a_capacity_below_the_window_is_refused():
    with pytest.raises(ConfigError, match=r"AdaKVConfig.capacity must be at least what is always kept, 32 entries, got 31\. Raise it"):
        get_token_model(gpt2(), AdaKVConfig(capacity=31))


@pytest.mark.parametrize("first", [True, False], ids=["in front", "behind"])
def test_over_the_scores_of_another_it_is_what_it_is_over_the_same_of_its_own(first):
    ids, mask = batch((21, 14))
    given = {"attention_mask": mask, "position_ids": positions(mask), "use_cache": True}
    own = AdaKVConfig(capacity=8, window=2, kernel=3)
    stack = [AdaKVConfig(scorer="stack"), SnapKVConfig(capacity=8, window=2, kernel=3)]
    models = [get_token_model(gpt2(), config).eval() for config in (own, stack if first else stack[::-1])]
    caches = [model(ids, **given).past_key_values for model in models]
    assert all(places_held(caches[0], row, 0) == places_held(caches[1], row, 0) for row in (0, 1))


def received(looks, heads, tokens, size, alpha):
    """Heavy hitters, half of them the newest, divided among the heads of a block."""
    n = [len(entries) for entries in heads]
    keep = [min(size, m) for m in n]
    newest = [int(0.5 * k + 1e-9) for k in keep]
    total = sum(k - r for k, r in zip(keep, newest, strict=True))
    older = [[(-e.received, h, j) for j, e in enumerate(entries[: n[h] - newest[h]])] for h, entries in enumerate(heads)]
    best = sorted(entry for head in older for entry in head)[:total]
    shares = [alpha * (keep[h] - newest[h]) + (1 - alpha) * sum(entry[1] == h for entry in best) for h in range(len(heads))]
    counts = [math.floor(x + 1e-9) for x in shares]
    for h in sorted(range(len(heads)), key=lambda h: counts[h] - shares[h])[: total - sum(counts)]:
        counts[h] += 1
    return [[*(j for _, _, j in sorted(older[h])[: counts[h]]), *range(n[h] - newest[h], n[h])] for h in range(len(heads))]


@pytest.mark.parametrize("lengths", [(17,), (18, 11, 4)])
def test_over_a_method_that_decodes_it_divides_behind_each_token(lengths):
    def kept(layer, heads, looks, tokens):
        if sum(map(len, heads)) <= 3 * 6:
            return [range(len(entries)) for entries in heads]
        return received(looks, heads, tokens, 6, 0.2)

    agree([H2OConfig(capacity=6), AdaKVConfig(scorer="stack")], lengths, kept, steps=5)


def test_heads_that_are_scored_alike_stay_even():
    ids, _ = batch((20,))
    stack = [StreamingLLMConfig(capacity=7, sinks=2, shift=False), AdaKVConfig(scorer="stack")]
    cache = get_token_model(gpt2(), stack).eval()(ids, use_cache=True).past_key_values
    assert places_held(cache, 0, 0) == [[[0, 1, 15, 16, 17, 18, 19]] * 3] * 4
