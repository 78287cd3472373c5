"""SnapKV against its paper: section 4 of arXiv:2404.14469 (observation window, pooling, what each head keeps of a prompt)."""

import pytest
import torch
from by_hand import batch, gpt2, places_held
from evicted import agree, allowed, by_paper

from hf_tokens import ConfigError, SnapKVConfig, get_token_model, measure
from hf_tokens.testing import zoo


def pooled(scores, kernel, how):
    """Each of a list of scores with its neighbours; zeros stand beyond the ends."""
    out, half = [], kernel // 2
    for i in range(len(scores)):
        beside = scores[max(0, i - half) : i + (kernel - 1) // 2 + 1]
        out.append(max(beside) if how == "max" else sum(beside) / kernel)
    return out


def naive(attention, keep, window, kernel, how):
    """Places that a head keeps, of its attention (n n)."""
    n = len(attention)
    if n <= keep:
        return list(range(n))
    recent = min(window, keep)
    before = max(n - window, 0)
    looked = attention[before:, :before].mean(dim=0).tolist() if before else []
    scores = pooled(looked, kernel, how)
    best = sorted(range(before), key=lambda j: -scores[j])[: keep - recent]
    return sorted([*best, *range(n - recent, n)])


def keep(c):
    def kept(layer, heads, looks, tokens):
        places = [range(len(entries)) for entries in heads]
        if len(looks[0]) == 1 < tokens:
            return places  # nothing goes while it decodes
        return [naive(look, allowed(tokens, len(look), c), c.window, c.kernel, c.pooling) for look in looks]

    return kept


MODELS = [
    pytest.param((19,), {"capacity": 8, "window": 3, "kernel": 3}, id="max"),
    pytest.param((19, 12, 5), {"capacity": 9, "window": 4, "kernel": 5, "pooling": "average"}, id="average, padded"),
    pytest.param((17, 9, 1), {"capacity": 6, "window": 6, "kernel": 7}, id="the window alone, padded to one token"),
    pytest.param((11, 8), {"budget": 0.5, "window": 2, "kernel": 1}, id="a share, no pooling"),
    pytest.param((11, 7), {"budget": 0.25, "window": 8, "kernel": 3}, id="a share below the window"),
    pytest.param((12, 7), {"capacity": 20, "window": 16}, id="nothing above the capacity"),
    pytest.param((13, 6), {"budget": 1.0}, id="everything"),
    pytest.param((15,), {"capacity": 7, "window": 2, "kernel": 4, "pooling": "average"}, id="an even kernel"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs, side):
    c = SnapKVConfig(**knobs)
    if side == "right":
        ids, mask = batch(lengths, side)
        cache = get_token_model(gpt2(), c).eval()(ids, attention_mask=mask, use_cache=True).past_key_values
        for row, n in enumerate(lengths):
            found = [[[place for place in head if place < n] for head in layer] for layer in places_held(cache, row, 0)]
            assert found == [[[e.origin for e in head] for head in layer] for layer in by_paper(gpt2(), ids[row, :n], 1, keep(c))[2]]
        return
    agree(c, lengths, keep(c))


@pytest.mark.parametrize("how", ["max", "average"])
def test_heads_that_share_keys_look_together_before_the_pooling(how):
    base = zoo.build("llama").model.eval()
    base.set_attn_implementation("eager")
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    maps = base(ids, output_attentions=True).attentions
    base.set_attn_implementation("sdpa")
    c = SnapKVConfig(capacity=7, window=3, kernel=3, pooling=how)
    cache = get_token_model(base, c).eval()(ids, use_cache=True).past_key_values
    for row in range(2):
        looked = [m[row].unflatten(0, (layer.heads, -1)).mean(dim=1) for m, layer in zip(maps, cache.layers, strict=True)]
        assert places_held(cache, row, 0) == [[naive(head, 7, 3, 3, how) for head in layer] for layer in looked]


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(gpt2(), SnapKVConfig(capacity=9, window=4)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 12 * 9 * 4 * 8  # 12 heads of width 4, in float64


def test_a_capacity_below_the_window_is_refused():
    with pytest.raises(ConfigError, match=r"SnapKVConfig.capacity must be at least what is always kept, 8 entries, got 7\. Raise it"):
        get_token_model(gpt2(), SnapKVConfig(capacity=7, window=8))
