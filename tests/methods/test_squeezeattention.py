"""SqueezeAttention against its paper: section 3 of arXiv:2404.04793 (cosine similarity of a layer, groups, budgets, policies inside)."""

import itertools
import math

import pytest
import torch
from by_hand import batch, decode, gpt2, greedy, places_held, prompt
from hf_tokens_adapters.cache_compressor.squeezeattention import top_group
from hypothesis import given
from hypothesis import strategies as st

from hf_tokens import SqueezeAttentionConfig, get_token_model, measure
from hf_tokens.testing import CACHE, zoo


def cosine(entered, attended):
    """How alike the tokens of one sample are before and behind the attention of a layer, (n d) each: mean over the tokens."""
    total = 0.0
    for a, b in zip(entered, attended, strict=True):
        total += float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
    return total / len(entered)


def spread(group):
    mean = sum(group) / len(group)
    return sum((x - mean) ** 2 for x in group)


def k_means(values, groups):
    """Indices of the group of the largest values, in the best of all clusterings: groups are intervals of the sorted values."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups = min(groups, len(values))
    best, least = None, math.inf
    for cuts in itertools.combinations(range(1, len(values)), groups - 1):
        bounds = [0, *cuts, len(values)]
        cost = sum(spread([values[i] for i in order[a:b]]) for a, b in itertools.pairwise(bounds))
        if cost < least - 1e-15:
            best, least = bounds[-2], cost
    return {i for i in order if values[i] >= values[order[best]]}


def naive(values, budget, p, groups=3, surplus="shared"):
    """The share of its tokens that each layer keeps, of the layers' cosine similarities: none above 1, and the others get what is above."""
    g3 = k_means(values, groups)
    if len(g3) == len(values):
        return [budget] * len(values)
    others = (len(values) * budget - len(g3) * budget * p) / (len(values) - len(g3))
    shares = [budget * p if i in g3 else others for i in range(len(values))]
    while surplus == "shared" and max(shares) > 1 + 1e-12:
        rest = sum(s for s in shares if s < 1)
        left = budget * len(values) - sum(s >= 1 for s in shares)
        shares = [1.0 if s >= 1 else s * left / rest for s in shares]
    return [min(1.0, s) for s in shares]


def policy(entries, keep, name, sinks=4, recent=0.5):
    """What one head keeps of its entries, in their order."""
    if name == "window":
        return entries[len(entries) - keep :]
    if name == "sinks":
        first = [e for e in entries if e.origin < sinks][:keep]
        rest = [e for e in entries if e.origin >= sinks]
        return first + rest[len(rest) - (keep - len(first)) :]
    last = math.floor(recent * keep + 1e-9)
    old, new = entries[: len(entries) - last], entries[len(entries) - last :]
    heavy = sorted(old, key=lambda e: -e.received)[: keep - last]
    return sorted(heavy + new, key=lambda e: e.origin)


VALUES = [
    pytest.param([0.2, 0.95, 0.94, 0.5, 0.96, 0.3], 3, id="three groups"),
    pytest.param([0.5, 0.9], 3, id="fewer layers than groups"),
    pytest.param([0.7], 3, id="one layer"),
    pytest.param([0.4, 0.4, 0.4, 0.4], 3, id="all alike"),
    pytest.param([0.1, 0.2, 0.3, 0.8, 0.81, 0.9, 0.99], 2, id="two groups"),
    pytest.param([0.9, 0.1, 0.5, 0.7, 0.72, 0.91, 0.05, 0.4, 0.41], 4, id="four groups"),
]


@pytest.mark.parametrize(("values", "groups"), VALUES)
def test_budgets_are_those_of_the_paper(values, groups):
    tensor = torch.tensor([values, values[::-1]], dtype=torch.float64)
    found = top_group(tensor, groups)
    assert {i for i in range(len(values)) if found[0, i]} == k_means(values, groups)
    model = get_token_model(gpt2(layers=1), SqueezeAttentionConfig(budget=0.4, p=0.3, groups=groups))
    method = model.base_model.model.transformer.h[0].hf_tokens.hf_tokens_methods["default"]["0"]
    shares = method.allot({}, {layer: tensor[:, layer] for layer in range(len(values))})
    assert float(torch.stack([*shares.values()]).mean()) == pytest.approx(0.4)
    for row, listed in enumerate((values, values[::-1])):
        assert [float(shares[layer][row]) for layer in range(len(values))] == pytest.approx(naive(listed, 0.4, 0.3, groups))


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.7])
@pytest.mark.parametrize("p", [0.1, 0.35, 0.9])
def test_the_bytes_are_those_of_the_budget(budget, p):
    model = get_token_model(gpt2(6), SqueezeAttentionConfig(budget=budget, p=p)).eval()
    ids, _ = batch((40,))
    lengths = [layer.length for layer in model(ids, use_cache=True).past_key_values.layers]
    assert budget - 1 / 40 <= sum(lengths) / (6 * 40) <= budget


def test_naive_keeps_the_total():
    shares = naive([0.2, 0.95, 0.94, 0.5, 0.96, 0.3], 0.4, 0.35)
    assert sum(shares) == pytest.approx(6 * 0.4) and shares[1] == shares[4] == pytest.approx(0.14)


def by_paper(base, ids, steps, c):
    """One row by hand: shares from the prompt, then the policy inside of each layer's share."""
    shares = []

    def compress(held, seen, tokens):
        if seen is not None:
            shares.extend(naive([cosine(s.entered, s.attended) for s in seen], c.budget, c.p, c.groups, c.surplus))
        for layer, heads in enumerate(held):
            keep = max(1, math.floor(shares[layer] * tokens + 1e-9))
            for h, entries in enumerate(heads):
                if len(entries) > keep:
                    heads[h] = policy(entries, keep, c.policy, c.sinks, c.recent)

    return decode(base, ids, steps, compress)


FIRST_VERSION = {"policy": "heavy_hitters", "surplus": "lost"}
MODELS = [
    pytest.param((19,), {}, id="the release's policy"),
    pytest.param((12,), FIRST_VERSION, id="version 1"),
    pytest.param((17, 9, 4), FIRST_VERSION | {"budget": 0.7, "p": 0.1}, id="version 1, a share above 1"),
    pytest.param((17, 9, 4), {"budget": 0.7, "p": 0.1}, id="a share above 1"),
    pytest.param((17, 9, 4), {"policy": "window", "budget": 0.3}, id="window, padded"),
    pytest.param((11, 6, 1), {"policy": "sinks", "sinks": 2}, id="sinks, padded to one token"),
    pytest.param((13, 7), {"budget": 0.6, "p": 0.2, "recent": 0.25, "policy": "heavy_hitters"}, id="heavy hitters, padded"),
    pytest.param((1,), {}, id="one key"),
    pytest.param((9, 5), {"budget": 1.0, "p": 1.0}, id="nothing to evict"),
    pytest.param((9, 5), {"budget": 0.01}, id="one key a layer"),
]


@pytest.mark.parametrize(("lengths", "knobs"), MODELS)
def test_model_is_the_loop(lengths, knobs):
    base = gpt2()
    for layer, block in enumerate(base.transformer.h):
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.1 * (layer + 1) ** 2)
    c = SqueezeAttentionConfig(**knobs)
    model = get_token_model(base, c).eval()
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 9)
    given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    assert torch.equal(model.generate(**given)[:, ids.shape[1] :], got)
    for row, n in enumerate(lengths):
        tokens, told, held = by_paper(base, ids[row, -n:], 9, c)
        assert places_held(cache, row, ids.shape[1] - n) == [[[e.origin for e in entries] for entries in heads] for heads in held]
        assert got[row].tolist() == tokens
        torch.testing.assert_close(logits[row], told, rtol=1e-9, atol=1e-9)


def test_the_residual_is_read_where_a_norm_follows_the_attention():
    """Gemma norms what the attention adds, T5 and Whisper have a cross-attention behind it: a hook on the right module tells."""
    for family, path in (("gemma3", "pre_feedforward_layernorm"), ("t5", "layer.1.layer_norm"), ("llama", "post_attention_layernorm")):
        specimen = zoo.build(family)
        model = get_token_model(specimen.model, SqueezeAttentionConfig(budget=0.5))
        side = next(m for n, m in model.named_modules() if n.endswith("hf_tokens") and m.hf_tokens_methods and m.surgery.stream.causal)
        method, heard = side.hf_tokens_methods["default"]["0"], []
        ask = method.observe
        method.observe = lambda entered, attended, real, ask=ask, heard=heard: (
            heard.append((entered, attended)) or ask(entered, attended, real)
        )
        kept = []
        handle = side.module.get_submodule(path).register_forward_pre_hook(lambda m, args, kept=kept: kept.append(args[0]))
        with torch.no_grad():
            model(**specimen.inputs, use_cache=True)
        handle.remove()
        assert torch.equal(heard[0][1], kept[0]) and not torch.equal(heard[0][0], kept[0])


def test_memory_is_freed():
    model = get_token_model(gpt2(), SqueezeAttentionConfig(budget=0.25, policy="window")).eval()
    ids, _ = batch((32,))
    cost = measure(model, input_ids=ids, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, input_ids=ids, use_cache=True)
    assert cost.kv_bytes <= whole.kv_bytes // 4


def test_prompt_of_the_second_turn_shares_anew():
    model = get_token_model(gpt2(), SqueezeAttentionConfig(budget=0.5)).eval()
    ids, _ = batch((13,))
    cache = None
    with torch.no_grad():
        for part in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
            cache = model(part, **{CACHE: cache}, use_cache=True).past_key_values
    assert cache.get_seq_length() == 13
    assert all(1 <= layer.length <= 13 for layer in cache.layers)


def test_the_policies_that_look_at_no_attention_take_a_model_without_scores():
    specimen = zoo.build("bloom")
    model = get_token_model(specimen.model, SqueezeAttentionConfig(policy="sinks"))
    model(**specimen.inputs, use_cache=True)


def test_prompt_by_hand_is_the_model():
    base = gpt2()
    ids, _ = batch((9,))
    torch.testing.assert_close(prompt(base, ids[0])[2], base(ids).logits[0, -1], rtol=1e-9, atol=1e-9)


@given(st.lists(st.sampled_from([1.0, 0.75, -0.5]), min_size=1, max_size=9), st.integers(2, 4), st.randoms(use_true_random=False))
def test_what_differs_by_rounding_alone_makes_no_group(values, groups, random):
    noisy = [value + random.uniform(-2e-7, 2e-7) for value in values]
    assert torch.equal(top_group(torch.tensor([noisy]).double(), groups), top_group(torch.tensor([values]).double(), groups))
