"""ToMe for Stable Diffusion against a slow loop over one sample, from arXiv:2303.17604 and what its code makes of it."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from denoisers import KINDS, calls, denoiser, half, sampled
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hf_tokens_adapters.token_reducer.tomesd import ToMeSD

from hf_tokens import Dims, ToMeSDConfig, UnsupportedError, anatomy, get_token_model, measure
from hf_tokens.testing import zoo


def naive(features, drawn, grid, ratio=0.5, sx=2, sy=2):
    """The groups of one sample's tokens, [tokens that run as one: the first is the target], features (n d), drawn: one place a cell.

    Targets: the drawn token of each whole cell. Of the others the int(ratio * n) that are most alike to a target join it.
    """
    (height, width), n = grid, len(features)
    if height == 1 or width == 1:
        sx, sy = (sx * sy, 1) if height == 1 else (1, sx * sy)
    cells = [(i, j) for i in range(height // sy) for j in range(width // sx)]
    targets = []
    for (i, j), place in zip(cells, drawn, strict=True):
        targets.append((i * sy + place // sx) * width + j * sx + place % sx)
    targets.sort()
    if not targets:
        return [[i] for i in range(n)]
    unit = [x / math.sqrt(float(x @ x)) for x in features]
    best = {i: max((float(unit[i] @ unit[j]), -j) for j in targets) for i in range(n) if i not in targets}
    leaving = sorted(best, key=lambda i: (-best[i][0], i))[: int(ratio * n)]
    groups = {i: [i] for i in range(n) if i not in leaving}
    for i in leaving:
        groups[-best[i][1]].append(i)
    return [groups[i] for i in sorted(groups)]


# grid, knobs
CASES = {
    "usual": ((4, 4), {}),
    "odd": ((5, 7), {}),
    "more than the sources": ((4, 6), {"ratio": 0.9}),
    "few": ((4, 4), {"ratio": 0.1}),
    "nothing merged": ((3, 4), {"ratio": 0.0}),
    "too few to merge": ((1, 3), {"ratio": 0.3}),
    "other cells": ((7, 8), {"sx": 3, "sy": 2}),
    "a cell is the picture": ((2, 2), {}),
    "no whole cell": ((2, 2), {"sx": 3}),
    "a line": ((1, 15), {}),
    "a column": ((15, 1), {}),
    "all are targets": ((3, 3), {"sx": 1, "sy": 1}),
    "one token": ((1, 1), {}),
    "not drawn": ((4, 5), {"use_rand": False}),
}


def method(place=0, **knobs):
    dims = Dims(width=8, heads=2, kv_heads=2, head_dim=4, layer=0, layers=1, kind="denoiser", causal=False, place=place)
    return ToMeSD(ToMeSDConfig(**knobs), dims)


def cells_of(grid, sx=2, sy=2):
    """How many whole cells a grid has."""
    return (grid[0] * grid[1]) // (sx * sy) if 1 in grid else (grid[0] // sy) * (grid[1] // sx)


@pytest.mark.parametrize("case", CASES)
def test_groups_are_the_loop(case):
    grid, knobs = CASES[case]
    n, one = grid[0] * grid[1], method(**knobs)
    sides = {name: knobs[name] for name in ("sx", "sy") if name in knobs}
    torch.manual_seed(0)
    x, every = torch.randn(3, n, 8, dtype=torch.float64), torch.ones(3, n, dtype=torch.bool)
    tokens = one.assign(x, every, ~every, grid, 1, 2)
    drawn = one.draw(cells_of(grid, **sides), 2).tolist()
    assert knobs.get("use_rand", True) or not any(drawn)
    for i in range(3):
        groups = naive(x[i], drawn, grid, knobs.get("ratio", 0.5), **sides)
        if tokens is None:
            assert all(len(group) == 1 for group in groups)
            continue
        found = [(tokens.slot[i] == k).nonzero()[:, 0].tolist() for k in range(tokens.m)]
        assert found == [sorted(group) for group in groups]
        assert tokens.source[i].tolist() == [group[0] for group in groups]
        torch.testing.assert_close(tokens.apply(x)[i], torch.stack([x[i, group].mean(dim=0) for group in groups]))


def test_the_draw_is_another_one_in_each_block_and_step_and_of_each_seed():
    draws = {tuple(method(place, seed=seed).draw(64, step).tolist()) for place in (0, 1) for seed in (0, 1) for step in (0, 1)}
    assert len(draws) == 8 and {place for draw in draws for place in draw} == {0, 1, 2, 3}
    before = torch.random.get_rng_state()
    method().draw(64, 0)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tokens_that_are_not_of_the_picture_stay_alone():
    torch.manual_seed(0)
    hidden, mask = torch.randn(1, 11, 8, dtype=torch.float64), torch.ones(1, 11, dtype=torch.bool)
    fresh = torch.zeros(1, 11, dtype=torch.bool)
    fresh[0, [0, 5]] = True
    mask[0, 10] = False
    tokens = method().assign(hidden, mask, fresh, (2, 4), 1, 2)
    sizes = torch.bincount(tokens.slot[0])
    assert tokens.m == 11 - 4 and all(sizes[tokens.slot[0, i]] == 1 for i in (0, 5, 10))


def hear(module, args, kwargs, held):
    """Keep what a block is given."""
    held["entered"] = args[0] if args else kwargs["hidden_states"]


def loop(kind, run, config, coarse):
    """A run with every self-attention (and what else is asked for) of the finest blocks on merged tokens, by hand."""
    model, now = denoiser(kind), {"step": 0}
    place = 0
    for stream in anatomy(model).streams:
        for i, block in enumerate(stream.blocks):
            held, order = {}, method(place, seed=config.seed)
            block.register_forward_pre_hook(partial(hear, held=held), with_kwargs=True)
            sites = [("attention", stream.attention(i))]
            sites += [("cross", block.attn2)] if config.cross_attention and getattr(block, "attn2", None) is not None else []
            sites += [("mlp", block.ff)] if config.mlp and hasattr(block, "ff") else []
            for part, module in sites:
                module.forward = lambda *a, part=part, module=module, order=order, held=held, **k: by_hand(part, module, order, held, a, k)
            place += 1

    def by_hand(part, module, order, held, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if kind == "unet" and hidden.shape[1] < 64 and not coarse:
            return type(module).forward(module, hidden, **rest)
        text = hidden.shape[1] - 64 if kind == "flux" and rest.get("encoder_hidden_states") is None and part == "attention" else 0
        results = []
        for row in range(len(hidden)):
            mine, n = hidden[row, text:], hidden.shape[1] - text
            width = math.isqrt(n)
            grid = (1, n) if kind == "flux" else (n // width, width)
            entered = held["entered"][row]
            groups = naive(entered[len(entered) - n :], order.draw(n // 4, now["step"]).tolist(), grid, config.ratio)
            means = torch.stack([mine[group].mean(dim=0) for group in groups])
            short = {k: v[row : row + 1] if torch.is_tensor(v) and len(v) == len(hidden) else v for k, v in rest.items()}
            if short.get("image_rotary_emb") is not None:
                lead = short["image_rotary_emb"][0].shape[0] - n
                keep = [*range(lead), *(lead + group[0] for group in groups)]
                short["image_rotary_emb"] = tuple(table[keep] for table in short["image_rotary_emb"])
            out = type(module).forward(module, torch.cat([hidden[row, :text], means])[None], **short)
            first, more = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
            slot = {j: text + k for k, group in enumerate(groups) for j in group}
            results.append((first[:, [*range(text), *(slot[j] for j in range(n))]], *more))
        joined = [torch.cat(parts) for parts in zip(*results, strict=True)]
        return tuple(joined) if len(joined) > 1 else joined[0]

    outputs = []
    for step, call in enumerate(run):
        now["step"] = step
        outputs.append(sampled(model, [call])[0])
    return torch.stack(outputs)


@pytest.mark.drawn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [False, True], ids=["attention", "all"])
def test_denoiser_is_the_loop(kind, more):
    config = ToMeSDConfig(ratio=0.6 if more else 0.5, cross_attention=more, mlp=more, seed=3, max_downsample=1 + more)
    run = calls(kind, 2)
    got, want = sampled(get_token_model(denoiser(kind), config), run), loop(kind, run, config, coarse=more)
    tolerance = 1e-5 if kind == "flux" else 1e-9  # diffusers turns by the rotary tables of Flux in float32
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(got, sampled(denoiser(kind), run), rtol=1e-3, atol=1e-3)


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_by_one_call_and_by_two(kind):
    run = calls(kind, 2, batch=1, guided=True)
    want = sampled(get_token_model(denoiser(kind), "tomesd"), run)
    model = get_token_model(denoiser(kind), "tomesd")
    for named in (True, False):
        got = []
        for call in run:
            pair = []
            for which, name in enumerate(("cond", "uncond")):
                _set_cache_context(model.base_model.model, CacheContext(name) if named else None)
                pair.append(sampled(model, [half(call, which)])[0])
            got.append(torch.cat(pair))
        _set_cache_context(model.base_model.model, None)
        torch.testing.assert_close(torch.stack(got), want, rtol=1e-6, atol=1e-6)


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_off_zero_and_out(kind):
    run, model = calls(kind, 2), denoiser(kind)
    base, attributes = sampled(model, run), set(vars(model))
    assert torch.equal(sampled(get_token_model(denoiser(kind), ToMeSDConfig().at_zero()), run), base)
    surgery = get_token_model(model, "tomesd")
    changed = sampled(surgery, run)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, run), base)
    assert torch.equal(sampled(surgery, run), changed) and not torch.allclose(changed, base)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, run), base) and set(vars(plain)) == attributes


def test_runs_begin_anew_and_may_change_their_size():
    first, wide = calls("unet", 3), calls("unet", 3, size=(8, 12), seed=3)
    fresh = lambda run: sampled(get_token_model(denoiser("unet"), "tomesd"), run)
    model = get_token_model(denoiser("unet"), "tomesd")
    for run in (first, wide, first):
        assert torch.equal(sampled(model, run), fresh(run))


def test_it_saves_what_it_promises():
    run = calls("unet", 1, size=(16, 16))
    base = measure(denoiser("unet"), **run[0]).flops
    cost = lambda **knobs: measure(get_token_model(denoiser("unet"), ToMeSDConfig(mlp=True, **knobs)), **run[0]).flops
    costs = [base, cost(ratio=0.25), cost(ratio=0.5), cost(ratio=0.5, max_downsample=2), cost(ratio=0.75, max_downsample=2)]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 5


def test_gradients_go_through_the_groups():
    call = calls("dit", 1)[0]
    model = get_token_model(denoiser("dit"), "tomesd")
    picture = call["hidden_states"].requires_grad_()
    model(**{**call, "hidden_states": picture}).sample.square().sum().backward()
    assert picture.grad.isfinite().all() and bool((picture.grad != 0).all())


def test_other_streams_are_refused():
    with pytest.raises(UnsupportedError, match="Method 'tomesd' needs"):
        get_token_model(zoo.build("vit").model, "tomesd")
    assert dataclasses.asdict(ToMeSDConfig().at_zero())["ratio"] == 0.0
