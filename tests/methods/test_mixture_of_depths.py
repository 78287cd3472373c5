"""Mixture-of-Depths against its paper: sections 3.3 to 3.5 of arXiv:2404.02258 (expert choice over tokens, weights, sampling)."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, lm_head, positions

from hf_tokens import MixtureOfDepths, MixtureOfDepthsConfig, aux_loss, get_token_model, measure, set_progress


def chosen(r, capacity):
    """The tokens with the highest r, as many as the capacity gives, of equal ones the earlier; at least one."""
    k = max(1, math.floor(capacity * len(r) + 1e-9))
    return sorted(sorted(range(len(r)), key=lambda i: (-r[i], i))[:k])


def dot(weight, row, bias):
    return sum(float(w) * float(v) for w, v in zip(weight, row, strict=True)) + float(bias)


def predicted(row, p):
    """A token's logit by the predictor: one hidden layer with SiLU."""
    inner = [dot(line, row, b) for line, b in zip(p["w1"], p["b1"], strict=True)]
    return dot(p["w2"][0], [v / (1 + math.exp(-v)) for v in inner], p["b2"][0])


def naive(x, blocks, routers, capacity, training):
    """One sample through all blocks, x (n d): what leaves the last one, which tokens ran each, and the loss of each routed one."""
    routes, losses = [], []
    for block, p in zip(blocks, routers, strict=True):
        r, index = [1.0] * len(x), list(range(len(x)))
        if p is not None and capacity < 1:
            r = [dot(p["w"][0], row, p["b"][0]) for row in x]
            z = [predicted(row, p) for row in x] if "w1" in p else r
            best = chosen(r, capacity)
            index = best if training else [i for i in index if 1 / (1 + math.exp(-z[i])) > 0.5]
            chance = [1 / (1 + math.exp(-v)) for v in z]
            losses.append(-sum(math.log(c if i in best else 1 - c) for i, c in enumerate(chance)) / len(x))
        if index:
            update, out = block(x[index])[0] - x[index], x.clone()
            for slot, i in enumerate(index):
                out[i] = x[i] + r[i] * update[slot]
            x = out
        routes.append(index)
    return x, routes, losses


def routed(seed=0, layers=4, **knobs):
    """A model with routers far enough from their start that tokens differ, and their parameters by block."""
    model = get_token_model(gpt2(layers), MixtureOfDepthsConfig(**knobs)).eval()
    draw, found = torch.Generator().manual_seed(seed + 1), {}
    for method in (m for m in model.modules() if isinstance(m, MixtureOfDepths)):
        for name, parameter in method.named_parameters():
            start = 0.2 if name in ("b", "b2") else 0.0
            parameter.data = start + 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        found[method.dims.layer] = {name: p.detach() for name, p in method.named_parameters()}
    return model, [found.get(i) for i in range(layers)]


@torch.no_grad()
def rows(model, routers, ids, mask, capacity, training):
    base = model.get_base_model()
    each = [embed(base, row[real], torch.arange(int(real.sum()))) for row, real in zip(ids, mask, strict=True)]
    return [naive(x, blocks(base), routers, capacity, training) for x in each]


CLOSE = {"rtol": 1e-9, "atol": 1e-9}
CASES = [
    pytest.param((16,), {}, "left", id="the paper's eighth"),
    pytest.param((17, 12, 5), {"capacity": 0.4}, "left", id="odd sizes, padded"),
    pytest.param((5, 17), {"capacity": 0.4, "sampling": "router"}, "right", id="the router's own logit, padded on the right"),
    pytest.param((11, 1), {"capacity": 0.3, "every": 1}, "left", id="each block, one token"),
    pytest.param((7,), {"capacity": 0.01, "every": 3}, "left", id="less than a token is one"),
    pytest.param((9, 4), {"capacity": 1.0}, "left", id="nothing to skip"),
    pytest.param((6,), {"capacity": 0.5, "every": 9}, "left", id="fewer blocks than `every`"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("lengths", "knobs", "side"), CASES)
def test_model_is_the_loop(lengths, knobs, side, training):
    model, routers = routed(**knobs)
    ids, mask = batch(lengths, side)
    out = model.train(training)(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, labels=ids)
    want = rows(model, routers, ids, mask, knobs.get("capacity", 0.125), training)
    for row, (hidden, _, _) in enumerate(want):
        torch.testing.assert_close(out.logits[row][mask[row]], lm_head(model.get_base_model(), hidden), **CLOSE)
    losses = [loss for _, _, per_block in want for loss in per_block]
    if training and losses:
        assert aux_loss(model).item() == pytest.approx(sum(losses) / len(losses), abs=1e-9)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("sampling", ["predictor", "router"])
def test_generation_is_causal_and_skipped_tokens_leave_no_entry(sampling):
    model, routers = routed(seed=2, sampling=sampling)
    ids, mask = batch((13, 6))
    tokens, logits, cache = greedy(model, ids, mask, 5)
    whole, real = torch.cat([ids, tokens[:, :-1]], dim=1), torch.cat([mask, torch.ones(2, 4, dtype=torch.bool)], dim=1)
    skipped = 0
    for row, (hidden, routes, _) in enumerate(rows(model, routers, whole, real, 0.125, False)):
        torch.testing.assert_close(logits[row], lm_head(model.get_base_model(), hidden)[-5:], **CLOSE)
        for layer in (1, 3):
            kept = cache.layers[layer]
            assert (int(kept.filled[row].sum()) if kept.filled is not None else kept.length) == len(routes[layer])
            skipped += len(hidden) - len(routes[layer])
    assert skipped


def test_training_spares_what_is_skipped():
    model, _ = routed(capacity=0.25)
    assert measure(model.train(), input_ids=batch((16,))[0]).tokens == 16 + 4 + 16 + 4


@pytest.mark.parametrize("sampling", ["predictor", "router"])
def test_an_untrained_router_is_the_base_to_the_bit_outside_of_training(sampling):
    model = get_token_model(gpt2(), MixtureOfDepthsConfig(sampling=sampling)).eval()
    ids, mask = batch((16, 7))
    assert torch.equal(model(ids[:1]).logits, gpt2()(ids[:1]).logits)
    assert measure(model, input_ids=ids[:1]).tokens == 4 * 16
    padded = {"attention_mask": mask, "position_ids": positions(mask)}
    torch.testing.assert_close(model(ids, **padded).logits[mask], gpt2()(ids, **padded).logits[mask], **CLOSE)


def test_the_capacity_falls_while_it_warms_up():
    model, _ = routed(capacity=0.25, warmup=0.5)
    ids, _ = batch((16,))
    for progress, runs in ((0.0, 16), (0.25, 10), (0.5, 4), (1.0, 4)):
        set_progress(model, progress)
        assert measure(model.train(), input_ids=ids).tokens == 2 * 16 + 2 * runs


def test_the_predictor_has_no_say_in_what_the_model_learns():
    model, _ = routed(weight=0.0)
    ids, _ = batch((16,))
    model.train()(ids, labels=ids).loss.backward()
    with_grad = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert with_grad == {"w", "b"}


def test_capacity_of_one_is_the_base():
    model = get_token_model(gpt2(), MixtureOfDepthsConfig().at_zero()).train()
    ids, mask = batch((9, 4))
    assert torch.equal(model(ids, attention_mask=mask).logits, gpt2().train()(ids, attention_mask=mask).logits)
    assert not any("hf_tokens" in name for name, _ in model.named_parameters())
