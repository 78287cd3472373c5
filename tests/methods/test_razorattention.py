"""RazorAttention against its paper: section 3 of arXiv:2407.15891 (retrieval heads, sinks and window, the compensation token)."""

import math

import pytest
import torch
from by_hand import Entry, batch, decode, gpt2, greedy, places_held, prompt
from hf_tokens_adapters.cache_compressor import razorattention

from hf_tokens import RazorAttentionConfig, UnsupportedError, calibrate, get_token_model, load, measure
from hf_tokens.testing import zoo


def naive(entries, seen, c):
    """What a head that is no retrieval head keeps of its entries, in their order: sinks, one for all that was dropped, the window."""
    window = max(c.buffer, math.floor(seen / c.compression + 1e-9))
    first = [e for e in entries if e.origin < c.sinks]
    rest = [e for e in entries if e.origin >= c.sinks]
    if len(rest) <= window + 1 or len(entries) <= c.sinks + window + 1:
        return entries
    dropped, near = rest[: len(rest) - window], rest[len(rest) - window :]
    count = sum(e.size for e in dropped)
    key = sum(e.size * e.k for e in dropped) / count
    value = sum(e.size * e.v for e in dropped) / count
    return [*first, Entry(key, value, dropped[-1].origin, count), *near]


def by_paper(base, ids, steps, c):
    def compress(held, seen, tokens):
        for layer, heads in enumerate(held):
            for h, entries in enumerate(heads):
                if layer * len(heads) + h not in c.heads:
                    heads[h] = naive(entries, tokens, c)

    return decode(base, ids, steps, compress)


def head_scores(attention, period):
    """Echo and induction score of every head, of attention (h n n) over repeated tokens; read off the last repetition."""
    out = []
    for head in attention:
        n, echo, induction = len(head), 0.0, 0.0
        for t in range(n - period, n):
            for back in range(period, n, period):
                if t - back >= 0:
                    echo += float(head[t, t - back])
                    induction += float(head[t, t - back + 1])
        out.append((echo / period, induction / period))
    return out


def retrieval_heads(scores, echo, induction):
    """The heads of the highest scores, of the scores of all heads in the order of their numbers."""
    heads = range(len(scores))
    by_echo = sorted(heads, key=lambda i: -scores[i][0])[: round(echo * len(scores))]
    by_induction = sorted(heads, key=lambda i: -scores[i][1])[: round(induction * len(scores))]
    return sorted({*by_echo, *by_induction})


MODELS = [
    pytest.param((12,), {"sinks": 2}, id="window and sinks"),
    pytest.param((17, 9, 4), {"sinks": 1, "compression": 4.0, "heads": (0, 4, 11)}, id="retrieval heads, padded"),
    pytest.param((11, 6, 1), {"sinks": 0, "compression": 3.0, "heads": (2, 3, 4, 5)}, id="padded to one token"),
    pytest.param((13, 7), {"sinks": 3, "buffer": 5, "compression": 50.0}, id="a buffer"),
    pytest.param((1,), {"sinks": 0}, id="one key"),
    pytest.param((9, 5), {"compression": 1.0}, id="nothing to drop"),
    pytest.param((9, 5), {"sinks": 0, "compression": 100.0}, id="all in one"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = RazorAttentionConfig(**knobs)
    model = get_token_model(gpt2(), c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 9)
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**given)[:, ids.shape[1] :], got)
    for row, n in enumerate(lengths):
        tokens, told, held = by_paper(gpt2(), ids[row, -n:], 9, c)
        assert places_held(cache, row, ids.shape[1] - n) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


def test_the_sizes_sum_up_to_the_tokens_seen():
    model = get_token_model(zoo.build("llama").model, RazorAttentionConfig(sinks=2, heads=(1,))).eval()
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    out = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    for layer in out.past_key_values.layers:
        there = torch.ones_like(layer.sizes) if layer.filled is None else layer.filled.float()
        assert (layer.sizes * there).sum(dim=-1).tolist() == [[23.0, 23.0]] * 2


def test_only_what_is_kept_takes_room():
    """A retrieval head beside others: what they dropped is not stored as filler."""
    ids, _ = batch((32,))
    model = get_token_model(gpt2(), RazorAttentionConfig(sinks=2, compression=8.0, heads=(0,))).eval()
    cost = measure(model, input_ids=ids, use_cache=True)
    entries = 32 + 11 * (2 + 4 + 1)  # 12 heads of width 4, in float64
    assert cost.kv_bytes == 2 * entries * 4 * 8


@pytest.mark.parametrize("together", [256, 2], ids=["all at once", "two queries at a time"])
def test_calibration_finds_the_heads_of_the_loop(tmp_path, together, monkeypatch):
    monkeypatch.setattr(razorattention, "AT_A_TIME", together)
    base = gpt2()
    for layer, block in enumerate(base.transformer.h):
        torch.nn.init.normal_(block.attn.c_attn.weight, std=0.3 * (layer + 1))
    model = get_token_model(base, RazorAttentionConfig(echo=0.1, induction=0.3, repeats=3))
    draws = [torch.randint(3, 50, (5,), generator=torch.Generator().manual_seed(seed)).repeat(3) for seed in range(4)]
    found = calibrate(model, [{"input_ids": torch.stack(draws[:2])}, {"input_ids": torch.stack(draws[2:])}])["default.0"]["heads"]
    per_draw = [[score for s in prompt(base, ids)[0] for score in head_scores(s.attention, 5)] for ids in draws]
    mean = [tuple(sum(draw[i][j] for draw in per_draw) / 4 for j in (0, 1)) for i in range(12)]
    assert list(found) == retrieval_heads(mean, 0.1, 0.3) and 4 <= len(found) <= 6
    model.save_pretrained(tmp_path)
    assert tuple(load(tmp_path, gpt2()).peft_config["default"].methods[0]["heads"]) == tuple(found)


def test_calibration_under_shared_key_heads():
    model = get_token_model(zoo.build("llama").model, RazorAttentionConfig(induction=0.5))
    ids = torch.randint(3, 90, (1, 6), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    heads = calibrate(model, [{"input_ids": ids}])["default.0"]["heads"]
    assert 4 <= len(heads) <= 5 and max(heads) < 4 * 2


@pytest.mark.parametrize(("given", "words"), [({"input_ids": torch.arange(3, 12)[None]}, "9 tokens"), (None, "a batch with padding")])
def test_calibration_wants_repeated_tokens(given, words):
    model = get_token_model(gpt2(), RazorAttentionConfig(repeats=2))
    ids, mask = batch((8, 6))
    with pytest.raises(UnsupportedError, match=f"stand 2 times in each row, got {words}"):
        calibrate(model, [given or {"input_ids": ids, "attention_mask": mask}])


def test_a_window_of_the_model_is_respected():
    """What its own window hides of a sliding layer does not come back through the token that stands for the dropped ones."""
    specimen = zoo.build("mistral")
    model = get_token_model(specimen.model, RazorAttentionConfig(sinks=0, compression=20.0)).eval()
    ids = torch.randint(3, 90, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = model(ids, use_cache=True).past_key_values
    assert all(float(layer.sizes.sum(dim=-1).amax()) <= specimen.model.config.sliding_window for layer in cache.layers)
    assert model.generate(input_ids=ids, max_new_tokens=4, do_sample=False).shape == (2, 64)
