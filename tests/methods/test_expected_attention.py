"""Expected attention against its paper: section 3 of arXiv:2510.00636, and what its release adds (sinks, the mean over heads, the norm)."""

import math

import pytest
import torch
from by_hand import batch, gpt2, greedy, llama, places_held, turned

from hf_tokens import AdaKVConfig, ExpectedAttentionConfig, UnsupportedError, get_token_model, measure


def expected(queries, c, n):
    """The mean of later queries and their covariance, of those of a prompt before their rotation, (n e)."""
    counted = [q for place, q in enumerate(queries) if place >= c.n_sink]
    e = queries.shape[1]
    mean = sum(counted, torch.zeros(e, dtype=queries.dtype)) / max(1, len(counted))
    spread = sum((torch.outer(q - mean, q - mean) for q in counted), torch.zeros(e, e, dtype=queries.dtype)) / max(1, len(counted))
    axes, later = torch.eye(e, dtype=queries.dtype), range(n, n + c.n_future_positions)
    turn = sum(torch.stack([turned(axis, place) for axis in axes], 1) for place in later) / len(later)
    return turn @ mean, turn @ spread @ turn.T


def naive(queries, keys, values, c):
    """The score of each entry of a key head, by the queries (g n e) of its query heads before their rotation; inf for the sinks."""
    n, e = keys.shape
    score = torch.zeros(n, dtype=keys.dtype)
    for own in queries:
        mean, spread = expected(own, c, n)
        z = {}
        for j in range(c.n_sink, n):
            k = turned(keys[j], j)
            z[j] = float(k @ mean) / math.sqrt(e) + (float(k @ spread @ k) / (2 * e) if c.use_covariance else 0.0)
        total = sum(math.exp(x) for x in z.values())
        for j, x in z.items():
            score[j] += math.exp(x) / total / len(queries)
    if c.use_vnorm:
        score = (score + c.epsilon) * values.norm(dim=1)
    score[: c.n_sink] = torch.inf
    return score


@torch.no_grad()
def kept(base, ids, c):
    """Places that each block and key head keeps of a prompt, which itself sees all."""
    x, out, n = base.model.embed_tokens(ids), [], len(ids)
    for block in base.model.layers:
        normed, attention = block.input_layernorm(x), block.self_attn
        q, k, v = (part(normed).view(n, -1, 4).transpose(0, 1) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
        heads = []
        for h in range(len(k)):
            score = naive(q[2 * h : 2 * h + 2], k[h], v[h], c)
            best = sorted(range(n), key=lambda j: (-float(score[j]), j))[: max(1, int(c.budget * n + 1e-9))]
            heads.append(sorted(best))
        out.append(heads)
        rotate = lambda t: torch.stack([torch.stack([turned(row, place) for place, row in enumerate(head)]) for head in t])
        logits = rotate(q) @ rotate(k).repeat_interleave(2, 0).mT / 2
        weights = logits.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
        x = x + attention.o_proj((weights @ v.repeat_interleave(2, 0)).transpose(0, 1).reshape(n, -1))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return out


def sharp(base):
    """The same model with queries that tell keys well apart."""
    for block in base.model.layers:
        torch.nn.init.normal_(block.self_attn.q_proj.weight, std=2.0)
    return base


CASES = [
    pytest.param((23,), {}, id="one row"),
    pytest.param((21, 13, 6), {"n_sink": 2}, id="padded"),
    pytest.param((17, 3, 1), {"budget": 0.3}, id="shorter than its sinks"),
    pytest.param((19, 12), {"use_covariance": False, "n_sink": 1}, id="the mean alone"),
    pytest.param((19, 12), {"use_vnorm": False, "n_sink": 0}, id="no norm, no sinks"),
    pytest.param((16, 11), {"epsilon": 0.01}, id="a little for each"),
    pytest.param((15, 9), {"n_future_positions": 1}, id="the next place alone"),
    pytest.param((9, 5), {"budget": 1.0}, id="everything"),
]


@pytest.mark.parametrize(("lengths", "knobs"), CASES)
def test_each_head_keeps_what_the_loop_keeps(lengths, knobs):
    c = ExpectedAttentionConfig(**{"budget": 0.5, "n_future_positions": 37, **knobs})
    ids, mask = batch(lengths)
    _, _, cache = greedy(get_token_model(sharp(llama()), c).eval(), ids, mask, 1)
    for row, n in enumerate(lengths):
        assert places_held(cache, row, ids.shape[1] - n) == kept(sharp(llama()), ids[row, -n:], c)


def test_a_generated_token_evicts_nothing():
    ids, mask = batch((16, 9))
    _, _, cache = greedy(get_token_model(llama(), ExpectedAttentionConfig(budget=0.5)).eval(), ids, mask, 6)
    assert [len(places) for places in places_held(cache, 0, 0)[0]] == [8 + 5] * 2


def test_where_rows_begin_does_not_matter():
    """A model that counts its padding too turns queries and keys by other places, of which the differences alone count."""
    ids, mask = batch((14, 9))
    model = get_token_model(sharp(llama()), ExpectedAttentionConfig(budget=0.5, n_sink=1)).eval()
    with torch.no_grad():
        counted = model(ids, attention_mask=mask, use_cache=True).past_key_values
        _, _, told = greedy(model, ids, mask, 1)
    assert places_held(counted, 1, 5) == places_held(told, 1, 5)


def test_a_head_with_more_to_read_gets_more_of_the_budget():
    ids, mask = batch((20,))
    stack = [ExpectedAttentionConfig(budget=0.5), AdaKVConfig(scorer="stack")]
    _, _, cache = greedy(get_token_model(sharp(llama()), stack).eval(), ids, mask, 1)
    counts = [[len(places) for places in heads] for heads in places_held(cache, 0, 0)]
    assert all(sum(heads) == 20 for heads in counts) and any(heads[0] != heads[1] for heads in counts)


def test_only_what_is_kept_takes_room():
    ids, _ = batch((32,))
    cost = measure(get_token_model(llama(), ExpectedAttentionConfig(budget=0.25)).eval(), input_ids=ids, use_cache=True)
    assert cost.kv_bytes == 2 * 2 * 2 * 8 * 4 * 8  # two blocks, two heads of width 4, in float64


def test_a_model_that_turns_no_queries_is_refused():
    with pytest.raises(UnsupportedError, match="keys that are turned by their places, by a table that the model hands to its attention"):
        get_token_model(gpt2(), ExpectedAttentionConfig())
