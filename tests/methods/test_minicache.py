"""MiniCache against its paper: section 4 of arXiv:2405.14366 (one direction of two layers, two lengths, retained tokens)."""

import math

import pytest
import torch
from by_hand import batch, decode, gpt2, greedy, places_held

from hf_tokens import FTPConfig, MiniCacheConfig, get_token_model, measure
from hf_tokens.testing import zoo


def norm(x):
    return math.sqrt(float(x @ x))


def angle(a, b):
    return math.acos(max(-1.0, min(1.0, float(a @ b) / (norm(a) * norm(b)))))


def slerp(a, b, t):
    """States of the lower and the upper layer as both read them: one direction, each its own length."""
    w = angle(a, b)
    if math.sin(w) < 1e-6:
        e = (1 - t) * a / norm(a) + t * b / norm(b)
    else:
        e = math.sin((1 - t) * w) / math.sin(w) * a / norm(a) + math.sin(t * w) / math.sin(w) * b / norm(b)
    return norm(a) * e, norm(b) * e


def distance(a, b):
    return max(angle(a.k, b.k), angle(a.v, b.v)) / math.pi


def by_paper(base, ids, steps, c, pairs):
    """One row by hand, and the places that each pair and head merged."""
    thresholds, merged = {}, {}

    def compress(held, seen, tokens):
        for lower, upper in pairs:
            for h, (below, above) in enumerate(zip(held[lower], held[upper], strict=True)):
                apart = {b.origin: distance(a, b) for a, b in zip(below, above, strict=True)}
                at = upper, h
                if seen is not None:
                    high, low = max(apart.values()), min(apart.values())
                    thresholds[at], merged[at] = high - c.gamma * (high - low), set()
                for a, b in zip(below, above, strict=True):
                    if b.origin not in merged[at] and apart[b.origin] < thresholds[at] and c.gamma < 1:
                        a.k, b.k = slerp(a.k, b.k, c.t)
                        a.v, b.v = slerp(a.v, b.v, c.t)
                        merged[at].add(b.origin)

    return decode(base, ids, steps, compress), merged


MODELS = [
    pytest.param((12,), {}, [(2, 3)], id="from the middle on"),
    pytest.param((17, 9, 4), {"layers": (0, 1, 2, 3)}, [(0, 1), (2, 3)], id="two pairs, padded"),
    pytest.param((11, 6, 1), {"t": 0.0, "gamma": 0.4}, [(2, 3)], id="the lower direction, padded to one token"),
    pytest.param((13, 7), {"t": 1.0, "gamma": 0.0, "layers": (1, 2)}, [(1, 2)], id="the upper direction"),
    pytest.param((12, 5), {"layers": (0, 2, 3)}, [(0, 2)], id="an odd one stays alone"),
    pytest.param((1,), {}, [(2, 3)], id="one key"),
    pytest.param((9, 5), {"gamma": 1.0}, [(2, 3)], id="nothing to merge"),
]


@pytest.mark.parametrize(("lengths", "knobs", "pairs"), MODELS)
def test_model_is_the_loop(lengths, knobs, pairs):
    c = MiniCacheConfig(**knobs)
    model = get_token_model(gpt2(), c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 9)
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**given)[:, ids.shape[1] :], got)
    for row, n in enumerate(lengths):
        (tokens, told, held), merged = by_paper(gpt2(), ids[row, -n:], 9, c, pairs)
        first = ids.shape[1] - n
        assert places_held(cache, row, first) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        for (upper, h), places in merged.items():
            beyond = cache.layers[upper].record.entries.get("beyond")
            assert places == (
                set() if beyond is None else {p - first for p in cache.layers[upper].origins[row][beyond[row, h].bool()].tolist()}
            )
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("n", "gamma"), [(1, 0.5), (1, 0.05), (12, 0.0)])
@torch.no_grad()
def test_a_token_that_was_retained_stays_so(n, gamma):
    """The only token of a prompt is as far apart as the threshold, as the furthest is where gamma is 0: no rounding may merge it later."""
    specimen = zoo.build("gpt2", dtype=torch.float64)
    model = get_token_model(specimen.model, MiniCacheConfig(layers=(0, 1, 2, 3), gamma=gamma)).eval()
    for rows in (specimen.inputs["input_ids"], specimen.inputs["input_ids"][:1]):
        _, _, cache = greedy(model, rows[:, :n], torch.ones_like(rows[:, :n]), 6)
        for layer in cache.layers[1::2]:
            retained = layer.record.entries["beyond"][..., :n] == 0
            assert bool((retained.sum(dim=-1) == 1).all())


def shared_bytes(cache):
    """Bytes that layers would count twice if each were asked alone."""
    return sum(layer.nbytes for layer in cache.layers) - sum(t.numel() * t.element_size() for t in every_tensor(cache))


def every_tensor(cache):
    return {id(t): t for layer in cache.layers for t in layer.tensors()}.values()


def test_two_layers_hold_one_direction_through_all_that_happens_to_a_cache():
    model = get_token_model(gpt2(), MiniCacheConfig(gamma=0.0)).eval()
    ids, mask = batch((16, 16))
    cost = measure(model, input_ids=ids, use_cache=True)
    whole = 2 * 2 * 3 * 16 * 4 * 8  # keys and values of a layer, 2 rows, 3 heads of width 4 in float64
    one = 2 * 3 * 15  # cells of a layer that are merged: all but the one farthest apart of each head
    saved = 2 * one * 4 * 8 - 2 * 2 * one * 8  # a direction less for keys and values, a length more for each layer's
    assert cost.kv_bytes == 4 * whole - saved
    cache = greedy(model, ids, mask, 4)[2]
    before = shared_bytes(cache)
    merged = lambda: 2 * 4 * 8 * int(cache.layers[3].record.entries["beyond"].sum())  # keys and values of what is merged, width 4
    assert before == merged() > 0
    cache.reorder_cache(torch.tensor([1, 0]))
    assert shared_bytes(cache) == before
    cache.batch_repeat_interleave(2)
    assert shared_bytes(cache) == 2 * before
    cache.batch_select_indices(torch.tensor([0, 3]))
    assert shared_bytes(cache) == before
    for layer in cache.layers:
        layer.device = torch.device("meta")
        layer.prefetch()
    assert all(t.is_meta for t in every_tensor(cache)) and shared_bytes(cache) == before
    cache = greedy(model, ids, mask, 4)[2]
    cache.crop(-3)
    assert shared_bytes(cache) == merged() < before


def test_a_sliding_layer_shares_with_a_sliding_one():
    specimen = zoo.build("gemma3")
    model = get_token_model(specimen.model, MiniCacheConfig(layers=(0, 1, 2, 3))).eval()
    out = model.generate(**specimen.inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    layers = out.past_key_values.layers
    held = [list(layer.tensors()) for layer in layers]
    shared = [{id(t) for t in tensors} for tensors in held]
    assert shared[0] & shared[2] and shared[1] & shared[3] and not shared[0] & shared[1]


def test_blocks_share_the_tokens_that_both_have():
    """A router lets each block keep keys of its own choice of tokens; a padded row is that row alone."""
    model = get_token_model(gpt2(), [FTPConfig(sparsities=(0.2, 0.8, 0.5, 0.3), strict=True), MiniCacheConfig(gamma=0.0)]).eval()
    ids, mask = batch((12, 7))
    got, logits, cache = greedy(model, ids, mask, 6)
    assert shared_bytes(cache) > 0
    ours, theirs = ({i for i in layer.origins[0].tolist()} for layer in cache.layers[2:])
    assert int(cache.layers[3].record.entries["beyond"][0, 0].sum()) <= len(ours & theirs) < len(ours | theirs)
    for row, n in enumerate((12, 7)):
        alone, told, _ = greedy(model, ids[row : row + 1, -n:], mask[row : row + 1, -n:], 6)
        assert torch.equal(got[row], alone[0])
        torch.testing.assert_close(logits[row], told[0], rtol=1e-9, atol=1e-9)
