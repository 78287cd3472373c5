"""StreamingLLM against its paper: section 3 of arXiv:2309.17453 (attention sinks and a rolling window)."""

import math

import pytest
import torch
from by_hand import batch, gpt2, greedy, llama, turned
from evicted import agree, allowed

from hf_tokens import ConfigError, StreamingLLMConfig, UnsupportedError, get_token_model, measure


def naive(entries, keep, sinks):
    """Places that a head keeps of its entries."""
    first = [j for j, e in enumerate(entries) if e.origin < sinks][:keep]
    rest = [j for j in range(len(entries)) if j not in first]
    return [*first, *rest[len(rest) - (keep - len(first)) :]]


def keep(c):
    return lambda layer, heads, looks, tokens: [naive(e, allowed(tokens, len(e), c), c.sinks) for e in heads]


MODELS = [
    pytest.param((17,), {"capacity": 8, "sinks": 2}, id="sinks and window"),
    pytest.param((15, 9, 4), {"capacity": 7, "sinks": 4}, id="padded, above and below the capacity"),
    pytest.param((11, 6, 1), {"budget": 0.3, "sinks": 2}, id="a share, padded to one token"),
    pytest.param((12, 9), {"capacity": 5, "sinks": 0}, id="a window alone"),
    pytest.param((12, 9), {"capacity": 3, "sinks": 3}, id="sinks alone"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    c = StreamingLLMConfig(**knobs, shift=False)
    agree(c, lengths, keep(c), steps=9)


def attended(block, x, origin, entries):
    """What the attention of a block adds to the token x, whose key and value join the entries: these are turned by their places here."""
    attention = block.self_attn
    q = attention.q_proj(x).view(-1, 4)
    for head, (k, v) in enumerate(zip(attention.k_proj(x).view(-1, 4), attention.v_proj(x).view(-1, 4), strict=True)):
        entries[head].append((k, v, origin))
    out = []
    for h in range(len(q)):
        mine = entries[h // 2]
        query = turned(q[h], len(mine) - 1)
        weights = torch.stack([query @ turned(k, place) / math.sqrt(4) for place, (k, _, _) in enumerate(mine)]).softmax(0)
        out.append(sum(weight * v for weight, (_, v, _) in zip(weights, mine, strict=True)))
    return attention.o_proj(torch.cat(out))


@torch.no_grad()
def rolling(base, ids, c, steps):
    """Greedy tokens and their logits, where entries are held as they are before their rotation; the prompt sees all of itself."""
    held, logits, tokens, seen = [[[], []] for _ in base.model.layers], [], [], 0
    for step in range(steps):
        for token in ids if step == 0 else tokens[-1:]:
            x = base.model.embed_tokens(torch.tensor(int(token)))
            for block, entries in zip(base.model.layers, held, strict=True):
                x = x + attended(block, block.input_layernorm(x), seen, entries)
                x = x + block.mlp(block.post_attention_layernorm(x))
            seen += 1
        for entries in held:
            for head in entries:
                stay = allowed(seen, len(head), c)
                first = [entry for entry in head if entry[2] < c.sinks][:stay]
                rest = [entry for entry in head if all(entry is not one for one in first)]
                head[:] = [*first, *rest[len(rest) - (stay - len(first)) :]]
        logits.append(base.lm_head(base.model.norm(x)))
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


SHIFTED = [
    pytest.param((17,), {"capacity": 8, "sinks": 2}, id="sinks and window"),
    pytest.param((15, 9, 4), {"capacity": 7, "sinks": 4}, id="padded, above and below the capacity"),
    pytest.param((11, 6, 1), {"budget": 0.3, "sinks": 2}, id="a share, padded to one token"),
    pytest.param((12, 9), {"capacity": 5, "sinks": 0}, id="a window alone"),
    pytest.param((12, 9), {"capacity": 3, "sinks": 3}, id="sinks alone"),
    pytest.param((13, 5), {"budget": 0.3, "sinks": 4}, id="a share below the sinks at first"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), SHIFTED)
def test_keys_are_turned_by_their_places_in_the_cache(lengths, knobs):
    c = StreamingLLMConfig(**knobs)
    ids, mask = batch(lengths)
    got, logits, _ = greedy(get_token_model(llama(), c).eval(), ids, mask, 12)
    for row, n in enumerate(lengths):
        tokens, told = rolling(llama(), ids[row, -n:], c, 12)
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-5, atol=1e-5)  # the model's tables are in single precision


def test_roundings_do_not_add_up():
    ids, mask = batch((9,))
    c = StreamingLLMConfig(capacity=6, sinks=2)
    _, _, cache = greedy(get_token_model(llama().bfloat16(), c).eval(), ids, mask, 200)
    _, _, exact = greedy(get_token_model(llama().bfloat16(), StreamingLLMConfig(capacity=300)).eval(), ids, mask, 1)
    for layer, other in zip(cache.layers, exact.layers, strict=True):
        norm = lambda keys: keys[:, :, :2].float().norm(dim=-1)
        torch.testing.assert_close(norm(layer.keys), norm(other.keys), rtol=0.01, atol=0)


def test_a_model_that_turns_no_keys_is_refused_until_they_stay():
    with pytest.raises(UnsupportedError, match="keys that are turned by their places, by a table that the model hands to its attention"):
        get_token_model(gpt2(), StreamingLLMConfig())


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(gpt2(), StreamingLLMConfig(capacity=9, shift=False)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 12 * 9 * 4 * 8  # 12 heads of width 4, in float64


def test_a_capacity_below_the_sinks_is_refused():
    with pytest.raises(ConfigError, match=r"StreamingLLMConfig.capacity must be at least what is always kept, 4 entries, got 3\. Raise it"):
        get_token_model(gpt2(), StreamingLLMConfig(capacity=3))
