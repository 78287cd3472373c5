"""DuoAttention against its paper: section 2.3 of arXiv:2410.10819 (full and streaming heads), and its release (the quantile)."""

import math

import pytest
import torch
from by_hand import batch, decode, gpt2, greedy, places_held, positions, prompt
from hf_tokens_adapters.cache_compressor import duo_attention

from hf_tokens import DuoAttentionConfig, KIVIConfig, UnsupportedError, calibrate, get_token_model, measure
from hf_tokens.testing import zoo


def quantile(numbers, q):
    """Between the two numbers that it lies between, in proportion."""
    place, numbers = q * (len(numbers) - 1), sorted(numbers)
    low = math.floor(place)
    return numbers[low] + (place - low) * (numbers[min(low + 1, len(numbers) - 1)] - numbers[low])


def whole_heads(c, heads):
    """The heads, counted through the blocks, that keep all; gates apart from each other."""
    if c.sparsity == 0:
        return set(range(heads))
    if c.sparsity == 1 or not c.gates:
        return set()
    gates = [min(1.0, max(0.0, a)) for a in c.gates]
    return {i for i, a in enumerate(gates) if a >= quantile(gates, c.sparsity)}


def by_paper(base, ids, steps, c):
    whole = whole_heads(c, 12)

    def compress(held, seen, tokens):
        for layer, heads in enumerate(held):
            for h, entries in enumerate(heads):
                if layer * len(heads) + h not in whole:
                    near = {e.origin for e in entries[max(0, len(entries) - c.recent) :]}
                    heads[h] = [e for e in entries if e.origin < c.sinks or e.origin in near]

    return decode(base, ids, steps, compress)


GATES = tuple(math.sin(7 * i + 1) ** 2 for i in range(12))
MODELS = [
    pytest.param((12,), {"gates": GATES}, id="half of the heads"),
    pytest.param((17, 9, 4), {"gates": GATES, "sparsity": 0.8, "sinks": 1, "recent": 3}, id="a fifth, padded"),
    pytest.param((11, 6, 1), {"gates": GATES, "sparsity": 0.31, "sinks": 0, "recent": 1}, id="padded to one token, no sinks"),
    pytest.param((9, 5), {"sinks": 1, "recent": 2}, id="no gates"),
    pytest.param((9, 5), {"gates": GATES, "sparsity": 1.0, "recent": 2}, id="all stream"),
    pytest.param((9, 5), {"sparsity": 0.0}, id="none streams"),
    pytest.param((1,), {"gates": GATES}, id="one key"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = DuoAttentionConfig(**{"sinks": 2, "recent": 4, **knobs})
    model = get_token_model(gpt2(), c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 8)
    for row, n in enumerate(lengths):
        tokens, told, held = by_paper(gpt2(), ids[row, -n:], 8, c)
        assert places_held(cache, row, ids.shape[1] - n) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("sparsity", "whole"), [(0.0, 12), (0.01, 11), (0.25, 9), (0.5, 6), (0.99, 1), (1.0, 0)])
def test_equal_gates_are_told_apart(sparsity, whole):
    """As the release's noise does: the share of streaming heads is what it is for other gates."""
    ids, _ = batch((20,))
    model = get_token_model(gpt2(), DuoAttentionConfig(gates=(2.0,) * 12, sparsity=sparsity, sinks=2, recent=6)).eval()
    entries = 20 * whole + 8 * (12 - whole)
    assert measure(model, input_ids=ids, use_cache=True).kv_bytes == 2 * entries * 4 * 8


@pytest.mark.parametrize("together", [256, 3], ids=["all at once", "three queries at a time"])
def test_calibration_measures_what_a_streaming_head_would_lose(together, monkeypatch):
    monkeypatch.setattr(duo_attention, "AT_A_TIME", together)
    ids, mask = batch((14, 9))
    model = get_token_model(gpt2(), DuoAttentionConfig(sinks=2, recent=3))
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    found = calibrate(model, [inputs])["default.0"]["gates"]
    want = torch.zeros(12, dtype=torch.float64)
    for row, n in enumerate((14, 9)):
        for layer, seen in enumerate(prompt(gpt2(), ids[row, -n:])[0]):
            for h, attention in enumerate(seen.attention):
                lost = sum(float(attention[i, j]) for i in range(n) for j in range(n) if j >= 2 and i - j >= 3)
                want[layer * 3 + h] += lost / n / 2
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), want, rtol=1e-6, atol=1e-9)


def test_calibration_under_shared_key_heads():
    model = get_token_model(zoo.build("llama").model, DuoAttentionConfig(sinks=1, recent=4))
    ids = torch.randint(3, 90, (1, 16), generator=torch.Generator().manual_seed(0))
    assert len(calibrate(model, [{"input_ids": ids}])["default.0"]["gates"]) == 4 * 2
    assert measure(model, input_ids=ids, use_cache=True).kv_bytes == 2 * (4 * 16 + 4 * 5) * 8 * 4


@torch.no_grad()
@pytest.mark.parametrize("first", [False, True], ids=["behind it", "in front of it"])
def test_what_streaming_heads_keep_is_rounded_beside_the_other_heads(first):
    """Groups of tokens are those of each head, and every head holds as many entries as without KIVI."""
    ids, mask = batch((19, 12))
    c = DuoAttentionConfig(gates=GATES, sinks=2, recent=5)
    rounding = KIVIConfig(group=2, residual=4, key_bits=8, value_bits=8)
    alone, said, its = greedy(get_token_model(gpt2(), c).eval(), ids, mask, 6)
    both, logits, cache = greedy(get_token_model(gpt2(), [c, rounding] if first else [rounding, c]).eval(), ids, mask, 6)
    assert torch.equal(both, alone) and float((logits - said).norm() / said.norm()) < 0.02
    assert all(torch.equal(a.there.sum(dim=-1), b.there.sum(dim=-1)) for a, b in zip(cache.layers, its.layers, strict=True))


def test_what_cannot_be_is_refused():
    ids, mask = batch((8, 6))
    with pytest.raises(UnsupportedError, match="longer than its sinks and newest tokens, 384, got 8 tokens"):
        calibrate(get_token_model(gpt2(), DuoAttentionConfig()), [{"input_ids": ids, "attention_mask": mask}])
    with pytest.raises(UnsupportedError, match="one for each key head of each of its blocks, got 7 for 4 blocks of 3"):
        get_token_model(gpt2(), DuoAttentionConfig(gates=(0.5,) * 7)).eval()(ids, use_cache=True)
