"""Importance-based token merging against a slow loop over one sample, from arXiv:2411.16720 and what its code makes of it."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from denoisers import KINDS, calls, denoiser, half, sampled
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hf_tokens_adapters.token_reducer.importance_token_merge import ImportanceTokenMerge

from hf_tokens import Dims, ImportanceTokenMergeConfig, UnsupportedError, anatomy, get_token_model, measure, unload
from hf_tokens.testing.probe import ProbeDropConfig


@dataclasses.dataclass(frozen=True)
class Knobs:
    ratio: float = 0.5
    targets: float = 0.25
    spread: float = 1.4
    by: str = "content"
    prune: int = 0
    pool: float = 0.75
    rule: str = "release"


def cells(height, width):
    """The 2 x 2 cells of a grid that are whole, as lists of tokens; of a line each four."""
    high, wide = (2, 2) if min(height, width) > 1 else (1, 4) if height == 1 else (4, 1)
    corner = lambda i, j: [(i * high + k) * width + j * wide + m for k in range(high) for m in range(wide)]
    every = [corner(i, j) for i in range(height // high) for j in range(width // wide)]
    return every or [list(range(height * width))]


def naive(features, importance, order, grid, knobs, step=99):
    """The groups of one sample's tokens, [tokens that run as one: the first is the target], features (n d).

    P: the spread * (1 - ratio) * n most important ones. D: the first of P in the random order, or the first in each cell where nothing
    tells them apart. Of the others, those outside P are merged first, then those of P that are most alike to a target; ratio * n in all,
    each into the target that it is most alike to.
    """
    n = len(features)
    merged = math.floor(knobs.ratio * n + 1e-9)
    if merged == 0 or n < 2:
        return [[i] for i in range(n)]
    by_cell = knobs.rule == "release" and (importance is None or knobs.by == "content" and step < knobs.prune)
    important = set(range(n))
    if by_cell:
        chosen = [min(cell, key=order.index) for cell in cells(*grid)]
        merged = min(merged, n - len(chosen))
    else:
        count = max(1, min(math.floor(knobs.targets * n), n - merged))
        size = min(n, max(math.floor(knobs.spread * (n - merged) + 1e-9), count))
        if knobs.rule == "abstract":
            size = max(math.floor(knobs.pool * n + 1e-9), n - merged)
        if importance is not None:
            important = set(sorted(range(n), key=lambda i: (-importance[i], i))[:size])
        chosen = [i for i in order if i in important][:count]
    if knobs.by == "place" and knobs.rule == "release":
        like = lambda i, j: -((i // grid[1] - j // grid[1]) ** 2) - (i % grid[1] - j % grid[1]) ** 2
        among = order.index
    else:
        like = lambda i, j: (
            float(features[i] @ features[j]) / math.sqrt(float(features[i] @ features[i]) * float(features[j] @ features[j]))
        )
        among = lambda i: i
    chosen = sorted(chosen) if by_cell else chosen
    best = {i: max((like(i, j), -chosen.index(j)) for j in chosen) for i in range(n) if i not in chosen}
    leaving = sorted(best, key=lambda i: (i in important, -best[i][0], among(i)))[:merged]
    groups = {i: [i] for i in range(n) if i not in leaving}
    for i in leaving:
        groups[chosen[-best[i][1]]].append(i)
    return [groups[i] for i in sorted(groups)]


def mean(x, group, pruned):
    """What a group runs as: the mean of its tokens, or its target."""
    return x[group[0]] if pruned else sum(x[j] for j in group) / len(group)


ABSTRACT = {"rule": "abstract"}
# grid, whether there is an importance, step, knobs
CASES = {
    "usual": ((4, 4), True, 2, Knobs()),
    "odd": ((1, 17), True, 2, Knobs(ratio=0.4, targets=0.3)),
    "no guidance": ((3, 5), False, 2, Knobs()),
    "no guidance, a line": ((1, 15), False, 2, Knobs()),
    "no guidance, a column": ((15, 1), False, 2, Knobs()),
    "first steps": ((4, 4), True, 1, Knobs(prune=2)),
    "more than the sources": ((5, 4), False, 2, Knobs(ratio=0.9)),
    "nothing merged": ((3, 4), True, 2, Knobs(ratio=0.0)),
    "too few to merge": ((1, 3), True, 2, Knobs(ratio=0.3)),
    "one token": ((1, 1), True, 2, Knobs()),
    "two tokens": ((1, 2), True, 2, Knobs()),
    "two tokens, no guidance": ((1, 2), False, 2, Knobs()),
    "all into one": ((3, 3), True, 2, Knobs(ratio=0.95)),
    "as many as stay": ((4, 4), True, 2, Knobs(spread=1.0)),
    "fewer than targets": ((4, 4), True, 2, Knobs(spread=0.1)),
    "all are important": ((4, 4), True, 2, Knobs(spread=2.0, targets=0.5)),
    "by place": ((4, 5), True, 2, Knobs(by="place", spread=1.0)),
    "by place, no guidance": ((6, 4), False, 2, Knobs(by="place")),
    "by place, first steps": ((4, 4), True, 0, Knobs(by="place", prune=4)),
    "abstract": ((4, 4), True, 2, Knobs(**ABSTRACT)),
    "abstract, no guidance": ((3, 5), False, 2, Knobs(**ABSTRACT)),
    "abstract, only the important stay": ((4, 4), True, 2, Knobs(pool=0.1, **ABSTRACT)),
    "abstract, more targets than are left": ((4, 4), True, 2, Knobs(ratio=0.8, pool=0.5, targets=0.9, **ABSTRACT)),
}


def method(**knobs):
    dims = Dims(width=8, heads=2, kv_heads=2, head_dim=4, layer=0, layers=1, kind="denoiser", causal=False)
    return ImportanceTokenMerge(ImportanceTokenMergeConfig(**knobs), dims)


@pytest.mark.parametrize("case", CASES)
def test_groups_are_the_loop(case):
    grid, guided, step, knobs = CASES[case]
    n, abstract = grid[0] * grid[1], knobs.rule == "abstract"
    torch.manual_seed(0)
    one = method(**dataclasses.asdict(knobs))
    x, apart = torch.randn(3, n, 8, dtype=torch.float64), torch.randn(3, n, 4, dtype=torch.float64)
    every = torch.ones(3, n, dtype=torch.bool)
    given = (x, None, apart.norm(dim=-1) if guided else None, None) if abstract else (None, x, None, apart if guided else None)
    tokens = one.assign(*given, every, ~every, grid, step)
    importance = apart.norm(dim=-1) if abstract else apart.abs().mean(dim=-1)
    for i in range(3):
        groups = naive(x[i], importance[i].tolist() if guided else None, one.draw(n, step).tolist(), grid, knobs, step)
        if tokens is None:
            assert all(len(group) == 1 for group in groups)
            continue
        found = [(tokens.slot[i] == k).nonzero()[:, 0].tolist() for k in range(tokens.m)]
        assert found == [sorted(group) for group in groups]
        assert tokens.source[i].tolist() == [group[0] for group in groups]
        want = torch.stack([mean(x[i], group, step < knobs.prune) for group in groups])
        torch.testing.assert_close(tokens.apply(x)[i], want)


def test_tokens_that_are_not_of_the_picture_stay_alone():
    torch.manual_seed(0)
    hidden, mask = torch.randn(1, 9, 8, dtype=torch.float64), torch.ones(1, 9, dtype=torch.bool)
    fresh = torch.tensor([[True, False, False, False, False, True, False, False, False]])
    mask[0, 8] = False
    tokens = method(ratio=0.5).assign(None, hidden, None, torch.rand(1, 9, 4), mask, fresh, (2, 3), step=2)
    sizes = torch.bincount(tokens.slot[0])
    assert tokens.m == 9 - 3 and all(sizes[tokens.slot[0, i]] == 1 for i in (0, 5, 8))


def token_magnitude(apart, n, kind):
    """The mean size of what belongs to each of n tokens in a difference of outputs (c h w), or (n c)."""
    if kind == "flux":
        return [float(row.abs().mean()) for row in apart]
    width = math.isqrt(n)
    p = apart.shape[-1] // width
    return [float(apart[:, i : i + p, j : j + p].abs().mean()) for i in range(0, width * p, p) for j in range(0, width * p, p)]


def hear(module, args, kwargs, held):
    """Keep what a block is given."""
    held["entered"] = args[0] if args else kwargs["hidden_states"]


def loop(kind, run, config):
    """A guided run of one picture, two rows a call, with every self-attention (and what else is asked for) on merged tokens, by hand."""
    model, now, outputs = denoiser(kind), {"step": 0, "apart": None}, []
    streams = anatomy(model).streams
    place = 0
    for stream in streams:
        for i, block in enumerate(stream.blocks):
            order = method(**{f: getattr(config, f) for f in ("seed",)})
            order.dims = Dims(width=8, heads=2, kv_heads=2, head_dim=4, layer=i, layers=1, kind="denoiser", causal=False, place=place)
            held = {}
            block.register_forward_pre_hook(partial(hear, held=held), with_kwargs=True)
            sites = [("attention", stream.attention(i))]
            sites += [("cross", block.attn2)] if config.cross_attention and getattr(block, "attn2", None) is not None else []
            sites += [("mlp", block.ff)] if config.mlp and hasattr(block, "ff") else []
            for part, module in sites:
                forward = lambda *a, part=part, module=module, order=order, held=held, **k: by_hand(part, module, order, held, a, k)
                module.forward = forward
            place += 1

    def by_hand(part, module, order, held, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        text = hidden.shape[1] - 64 if kind == "flux" and rest.get("encoder_hidden_states") is None and part == "attention" else 0
        results = []
        for row in range(len(hidden)):
            mine, n = hidden[row, text:], hidden.shape[1] - text
            if part == "attention":
                importance = None if now["apart"] is None else token_magnitude(now["apart"], n, kind)
                draw = order.draw(n, now["step"]).tolist()
                knobs = Knobs(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Knobs)})
                width = math.isqrt(n)
                grid = (1, n) if kind == "flux" else (n // width, width)
                entered = held["entered"][row]
                held[row] = naive(entered[len(entered) - n :], importance, draw, grid, knobs, now["step"])
            groups = held[row]
            means = torch.stack([mean(mine, group, now["step"] < config.prune) for group in groups])
            short = {k: v[row : row + 1] if torch.is_tensor(v) and len(v) == len(hidden) else v for k, v in rest.items()}
            if short.get("image_rotary_emb") is not None:
                lead = short["image_rotary_emb"][0].shape[0] - n
                keep = [*range(lead), *(lead + group[0] for group in groups)]
                short["image_rotary_emb"] = tuple(table[keep] for table in short["image_rotary_emb"])
            out = type(module).forward(module, torch.cat([hidden[row, :text], means])[None], **short)
            first, more = (out[0], out[1:]) if isinstance(out, tuple) else (out, ())
            slot = {j: text + k for k, group in enumerate(groups) for j in group}
            index = [*range(text), *(slot[j] for j in range(n))]
            results.append((first[:, index], *more))
        joined = [torch.cat(parts) for parts in zip(*results, strict=True)]
        return tuple(joined) if len(joined) > 1 else joined[0]

    for step, call in enumerate(run):
        now["step"] = step
        out = sampled(model, [call])[0]
        cut = out if kind == "flux" else out[:, :4]
        now["apart"] = cut[0] - cut[1]
        outputs.append(out)
    return torch.stack(outputs)


@pytest.mark.drawn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("more", [False, True], ids=["attention", "all"])
def test_denoiser_is_the_loop(kind, more):
    config = ImportanceTokenMergeConfig(ratio=0.5, cross_attention=more, mlp=more, seed=3, prune=1 + more)
    run = calls(kind, 3, batch=1, guided=True)
    model = get_token_model(denoiser(kind), config)
    got, want = sampled(model, run), loop(kind, run, config)
    tolerance = 1e-5 if kind == "flux" else 1e-9  # diffusers turns by the rotary tables of Flux in float32
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert not torch.allclose(got, sampled(denoiser(kind), run), rtol=1e-3, atol=1e-3)


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_by_one_call_and_by_two(kind):
    run = calls(kind, 3, guided=True)
    want = sampled(get_token_model(denoiser(kind), "importance-token-merge"), run)
    model = get_token_model(denoiser(kind), "importance-token-merge")
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


def test_without_guidance_all_are_alike_important():
    run = calls("dit", 3)
    got = sampled(get_token_model(denoiser("dit"), ImportanceTokenMergeConfig(spread=1.0)), run)
    assert torch.equal(got, sampled(get_token_model(denoiser("dit"), ImportanceTokenMergeConfig(spread=2.0)), run))
    guided = calls("dit", 3, guided=True)
    one, other = (sampled(get_token_model(denoiser("dit"), ImportanceTokenMergeConfig(spread=p)), guided) for p in (1.0, 2.0))
    assert torch.equal(one[:2], other[:2]) and not torch.allclose(one[2:], other[2:])


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_runs_begin_anew_and_may_change_their_size(kind):
    first, second, wide = (calls(kind, 3, guided=True, seed=s, size=z) for s, z in ((1, (8, 8)), (2, (8, 8)), (3, (8, 12))))
    fresh = [sampled(get_token_model(denoiser(kind), "importance-token-merge"), run) for run in (first, second, wide)]
    model = get_token_model(denoiser(kind), "importance-token-merge")
    for run, want in zip((first, second, wide, first), (*fresh, fresh[0]), strict=True):
        assert torch.equal(sampled(model, run), want)
    sampled(model, first[:2])
    assert torch.equal(sampled(model, second), fresh[1])

    def fail(module, args):
        raise ArithmeticError

    sampled(model, first[:2])
    module = anatomy(model.base_model.model).streams[-1].blocks[-1]
    handle = module.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        sampled(model, first[2:])
    handle.remove()
    assert torch.equal(sampled(model, first), fresh[0])


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_off_zero_and_out(kind):
    run, model = calls(kind, 2, guided=True), denoiser(kind)
    base, attributes = sampled(model, run), set(vars(model))
    assert torch.equal(sampled(get_token_model(denoiser(kind), ImportanceTokenMergeConfig().at_zero()), run), base)
    surgery = get_token_model(model, "importance-token-merge")
    changed = sampled(surgery, run)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, run), base)
    assert torch.equal(sampled(surgery, run), changed) and not torch.allclose(changed, base)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, run), base) and set(vars(plain)) == attributes
    assert all("forward" not in vars(module) for module in plain.modules())


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_it_saves_what_it_promises(kind):
    run = calls(kind, 1, size=(16, 16))
    base = measure(denoiser(kind), **run[0]).flops
    costs = [
        measure(get_token_model(denoiser(kind), ImportanceTokenMergeConfig(ratio=r, mlp=True)), **run[0]).flops for r in (0.25, 0.5, 0.75)
    ]
    assert base > costs[0] > costs[1] > costs[2]


def test_gradients_go_through_the_groups():
    call = calls("dit", 1)[0]
    model = get_token_model(denoiser("dit"), "importance-token-merge")
    picture = call["hidden_states"].requires_grad_()
    model(**{**call, "hidden_states": picture}).sample.square().sum().backward()
    assert picture.grad.isfinite().all() and bool((picture.grad != 0).all())


def test_pipeline():
    def pipeline():
        parts = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
        scheduler = DDIMScheduler(timestep_spacing="trailing", steps_offset=1, clip_sample=False)
        pipe = StableDiffusionPipeline(AutoencoderKL(), unet=denoiser("unet", torch.float32), scheduler=scheduler, **parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(pipe, guidance):
        torch.manual_seed(1)
        prompts = dict(prompt_embeds=torch.randn(1, 5, 6), negative_prompt_embeds=torch.randn(1, 5, 6), latents=torch.randn(1, 4, 8, 8))
        return pipe(height=8, width=8, num_inference_steps=4, guidance_scale=guidance, output_type="latent", **prompts).images

    pipe = pipeline()
    base = draw(pipe, 3.0)
    fast = get_token_model(pipe, ImportanceTokenMergeConfig(spread=1.0))
    heard = []
    surgery = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].hf_tokens.surgery
    handle = pipe.unet.register_forward_pre_hook(lambda *_: heard.append(surgery.call.context.steps_of_denoiser.guidance(64)))
    guided = draw(fast, 3.0)
    assert not torch.equal(guided, base) and torch.equal(draw(fast, 3.0), guided)
    assert [one is not None for one in heard[1:4]] == [True] * 3
    heard.clear()
    draw(fast, 1.0)
    assert heard[-1] is None
    handle.remove()
    assert torch.equal(draw(unload(fast), 3.0), base)


def test_beside_others_and_refused():
    run = calls("dit", 2)
    lone = sampled(get_token_model(denoiser("dit"), "importance-token-merge"), run)
    beside = sampled(get_token_model(denoiser("dit"), ["importance-token-merge", ProbeDropConfig()]), run)
    assert beside.shape == lone.shape and not torch.allclose(beside, lone)
    with pytest.raises(UnsupportedError, match="one reducer"):
        get_token_model(denoiser("dit"), ["importance-token-merge", "importance-token-merge"])
    with pytest.raises(UnsupportedError, match="stands alone"):
        get_token_model(denoiser("dit"), ["importance-token-merge", "toca"])
