"""ProfilingDiT against slow loops over one sample, written from the equations of arXiv:2504.03140."""

import math

import pytest
import torch
from denoisers import KINDS, alone, blocks, calls, denoiser, half, sampled
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from hf_tokens_adapters.feature_cache.profilingdit import ProfilingDiT, foreground

from hf_tokens import ConfigError, ProfilingDiTConfig, UnsupportedError, calibrate, get_token_model, load, set_method
from hf_tokens.testing import zoo
from hf_tokens.tools.measure import TokenCounts


def naive_schedule(steps, start, longest, shortest, reference=None):
    """The steps that are computed: all up to s0, then every T_s, T_s = T_max - (T_max - T_min) (s - s0) / (S - s0).

    T_s is that of the last step that was computed; s0 = start * S. Where T is meant for `reference` steps, it grows with their number.
    """
    s0, computed = start * steps, [0]
    for s in range(1, steps):
        interval = longest - (longest - shortest) * min(1, max(0, (computed[-1] - s0) / (steps - s0))) if s0 < steps else 1
        interval *= 1 if reference is None else steps / reference
        if s <= s0 or s - computed[-1] >= math.floor(interval + 1e-9):
            computed.append(s)
    return computed


def naive(model, run, background, computed):
    """What a model puts out at every step if the blocks of the background add what they added at the last step that was computed."""
    added, outputs = {}, []

    def sequences(args, kwargs):
        given = [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dim() == 3]
        return given[:2]  # the tokens, then those of the second sequence

    def run_block(i, block, step, args, kwargs):
        given = sequences(args, kwargs)
        if i in background and step not in computed:
            out = [None if change is None else came + change for came, change in zip(given, added[i], strict=False)]
            return out[0] if len(out) == 1 else (out[1], out[0])
        out = type(block).forward(block, *args, **kwargs)
        new = [out] if torch.is_tensor(out) else [out[1], out[0]]
        added[i] = [None if one is None else one - came for one, came in zip(new, given, strict=False)]
        return out

    for step, call in enumerate(run):
        for i, block in enumerate(blocks(model)):
            block.forward = lambda *args, i=i, block=block, step=step, **kwargs: run_block(i, block, step, args, kwargs)
        outputs.append(sampled(model, [call])[0])
    return torch.stack(outputs)


def naive_focus(attention, inside, high):
    """R of one sample: a_i = mean_j A_ji over the queries j, attention (m n); the share of the foreground with a_i > high * mean a."""
    a = [sum(float(row[i]) for row in attention) / len(attention) for i in range(attention.shape[1])]
    bar = high * sum(a) / len(a)
    found = [i for i in range(len(a)) if inside[i]]
    return sum(a[i] > bar for i in found) / len(found) if found else 0.0


def naive_foreground(noise, grid):
    """Every split of the tokens along their first principal component; the one that leaves the least variance within its sides."""
    height, width = grid
    n = height * width
    centred = noise - noise.mean(0)
    along = (centred @ torch.linalg.svd(centred).Vh[0]).tolist()
    order = sorted(range(n), key=lambda i: along[i])
    spread = lambda group: sum((along[i] - sum(along[j] for j in group) / len(group)) ** 2 for i in group)
    cut = min(range(1, n), key=lambda k: spread(order[:k]) + spread(order[k:]))
    border = [i for i in range(n) if i // width in (0, height - 1) or i % width in (0, width - 1)]
    sides = sorted((order[:cut], order[cut:]), key=lambda side: (len(set(side) & set(border)), len(side), 0 in side))
    return set(sides[0])


# share computed whole, T_max, T_min, steps, the number that T is meant for -> steps that are computed
SCHEDULES = {
    "20 steps": (0.12, 12, 2, 20, 50, [0, 1, 2, 6, 9, 12, 14, 16, 17, 18, 19]),
    "20 steps as if they were 50": (0.12, 12, 2, 20, None, [0, 1, 2, 14, 19]),
    "100 steps": (0.12, 12, 2, 100, 50, [*range(13), 36, 54, 68, 79, 87, 93, 98]),
    "the authors' list, nearly": (0.12, 12, 2, 50, 50, [*range(7), 18, 27, 34, 39, 43, 46, 48]),
    "every step": (0.2, 1, 1, 6, None, [0, 1, 2, 3, 4, 5]),
    "never again": (0.0, 99, 99, 6, None, [0]),
    "all whole": (1.0, 12, 2, 6, None, [0, 1, 2, 3, 4, 5]),
    "the same interval": (0.25, 3, 3, 12, None, [0, 1, 2, 3, 6, 9]),
    "one step": (0.12, 12, 2, 1, None, [0]),
}


@pytest.mark.drawn
@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("told", [True, False], ids=["told", "by the timestep"])
def test_steps_that_are_computed(case, told):
    start, longest, shortest, steps, reference, want = SCHEDULES[case]
    assert naive_schedule(steps, start, longest, shortest, reference) == want
    knobs = dict(start=start, max_interval=longest, min_interval=shortest, intervals="of 50" if reference else "steps")
    model = get_token_model(denoiser("dit"), ProfilingDiTConfig(background=(1,), **knobs))
    call, inner, computed = calls("dit", 1)[0], model.base_model.model, []
    counts = TokenCounts()
    for step in range(steps):
        if told:
            _set_cache_context(inner, CacheContext("cond", step_index=step, num_inference_steps=steps))
        call = {**call, "timestep": torch.full((2,), 1000 * (1 - step / steps), dtype=torch.float64)}
        before = counts.tokens
        with blocks(inner)[0].hf_tokens.surgery.model.listening(counts):
            sampled(model, [call])
        computed += [step] * (counts.tokens - before == 3 * 2 * 16)
    _set_cache_context(inner, None)
    assert computed == want


@pytest.mark.parametrize("kind", KINDS)
def test_denoiser_is_the_loop(kind):
    run, count = calls(kind, 7), len(blocks(denoiser(kind)))
    background = (1, 2) if kind == "unet" else (0, 1, count - 1)
    knobs = ProfilingDiTConfig(background=background, start=0.2, max_interval=3, min_interval=2, intervals="steps")
    computed = [0, 1, 4, 6]
    assert [s for s in naive_schedule(8, 0.2, 3, 2) if s < 7] == computed
    model = get_token_model(denoiser(kind), knobs)
    run = [{**call, "timestep": call["timestep"] * 0 + (1000 - 125 * s)} for s, call in enumerate(run)]
    want = naive(denoiser(kind), run, background, computed)
    got = sampled(model, run)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got[2], sampled(denoiser(kind), run)[2])
    for i in range(2):
        one = sampled(model, [alone(call, i) for call in run])
        torch.testing.assert_close(one[:, 0], got[:, i], rtol=1e-9, atol=1e-9)


def test_uncalibrated_it_reuses_all_blocks_but_the_outer_ones():
    for kind in KINDS:
        run, count = calls(kind, 3), len(blocks(denoiser(kind)))
        named = ProfilingDiTConfig(background=tuple(range(1, count - 1)))
        assert torch.equal(
            sampled(get_token_model(denoiser(kind), "profilingdit"), run), sampled(get_token_model(denoiser(kind), named), run)
        )


GRIDS = {"square": (4, 4), "odd": (3, 5), "a row": (1, 6), "two tokens": (1, 2)}


@pytest.mark.parametrize("case", GRIDS)
def test_foreground(case):
    grid = GRIDS[case]
    torch.manual_seed(3)
    noise = torch.randn(4, grid[0] * grid[1], 5, dtype=torch.float64)
    middle = [i for i in range(grid[0] * grid[1]) if 0 < i // grid[1] < grid[0] - 1 and 0 < i % grid[1] < grid[1] - 1]
    noise[0, middle] += 6
    found = foreground(noise, grid)
    for one, mask in zip(noise, found, strict=True):
        assert set(mask.nonzero()[:, 0].tolist()) == naive_foreground(one, grid)
    assert not middle or found[0].nonzero()[:, 0].tolist() == middle
    assert not foreground(noise[:, :1], (1, 1)).any()


def attention_of(model, call):
    """The attention of every block to its own tokens, (b m n), the mean of its heads, as torch's attention function computes it."""
    heard, attend = [], torch.nn.functional.scaled_dot_product_attention

    def listen(query, key, value, **kwargs):
        heard.append((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1).mean(1))
        return attend(query, key, value, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = listen
    try:
        sampled(model, [call])
    finally:
        torch.nn.functional.scaled_dot_product_attention = attend
    return heard


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_is_the_loop(kind):
    run, model = calls(kind, 4), denoiser(kind)
    out = sampled(model, run)[..., :4] if kind == "flux" else sampled(model, run)[:, :, :4]
    scores, changes = {}, []
    for step in (1, 2, 3):
        heard = attention_of(model, run[step])
        heard = heard[::2] if kind in ("unet", "pixart") else heard  # every other one looks at the text
        noise = out[step - 1]
        patches = {"flux": lambda x: x, "unet": lambda x: x.flatten(2).mT}
        cut = lambda x: torch.stack([x[:, :, i : i + 2, j : j + 2].flatten(1) for i in range(0, 8, 2) for j in range(0, 8, 2)], dim=1)
        tokens = patches.get(kind, cut)(noise)
        grid = {"flux": (1, 64), "unet": (8, 8)}.get(kind, (4, 4))
        for i, attention in enumerate(heard):
            if kind == "unet" and attention.shape[-1] == 16:  # the middle of the U
                own, shape = cut(noise), (4, 4)
            else:
                own, shape = tokens, grid
            n = own.shape[1]
            columns = attention[:, :, :n] if kind == "sd3" else attention[:, :, -n:]
            sides = [naive_foreground(x, shape) for x in own]
            focus = [naive_focus(a, [j in side for j in range(n)], 1.0) for a, side in zip(columns, sides, strict=True)]
            scores.setdefault(i, []).append(sum(focus) / 2)
        before = out[step - 2] if step > 1 else noise
        changes.append(float((noise - before).abs().mean() / before.abs().mean()))
    mean = {i: sum(values) / 3 for i, values in scores.items()}
    bar = sorted(mean.values())
    bar = (bar[(len(bar) - 1) // 2] + bar[len(bar) // 2]) / 2
    elapsed = [1 - float(run[s]["timestep"][0]) / float(run[0]["timestep"][0]) for s in (1, 2, 3)]
    settled = [e for e, change in zip(elapsed, changes, strict=True) if 0 < change <= 0.95 * max(changes)]
    surgery = get_token_model(denoiser(kind), ProfilingDiTConfig(stable=0.95))
    found = calibrate(surgery, run)["default.0"]
    assert found["background"] == tuple(i for i in sorted(mean) if mean[i] < bar)
    assert found.get("start", 0.12) == pytest.approx(settled[0] if settled else 0.12)
    given = ProfilingDiTConfig(**{k: v for k, v in found.items() if k not in ("method", "version")})
    assert torch.equal(sampled(surgery, run), sampled(get_token_model(denoiser(kind), given), run))


def test_calibration_takes_a_given_threshold():
    run = calls("dit", 3)
    every = calibrate(get_token_model(denoiser("dit"), ProfilingDiTConfig(threshold=1.0, high=99.0)), run)["default.0"]
    assert every["background"] == (0, 1, 2)
    assert calibrate(get_token_model(denoiser("dit"), ProfilingDiTConfig(threshold=0.0)), run)["default.0"]["background"] == ()


def test_runs_begin_anew_and_may_change_their_size():
    first, second, wide = calls("sd3", 4), calls("sd3", 3, seed=2), calls("sd3", 3, size=(8, 12), seed=3)
    config = ProfilingDiTConfig(background=(0, 1), start=0.0, max_interval=9, min_interval=9)
    fresh = lambda run: sampled(get_token_model(denoiser("sd3"), config), run)
    model = get_token_model(denoiser("sd3"), config)
    assert torch.equal(sampled(model, first + second)[4:], fresh(second))
    assert torch.equal(sampled(model, wide), fresh(wide)) and torch.equal(sampled(model, second), fresh(second))
    assert torch.equal(sampled(model, first[:2]), fresh(first)[:2]) and torch.equal(sampled(model, second), fresh(second))

    def fail(module, args):
        raise ArithmeticError

    inner = model.base_model.model
    sampled(model, first[:2])
    handle = inner.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        sampled(model, first[2:3])
    handle.remove()
    assert torch.equal(sampled(model, first[3:]), sampled(denoiser("sd3"), first[3:]))


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_guidance_by_one_call_and_by_two(kind):
    run = calls(kind, 4, guided=True)
    config = ProfilingDiTConfig(background=(1, 2), start=0.0, max_interval=2, min_interval=2)
    want = sampled(get_token_model(denoiser(kind), config), run)
    model = get_token_model(denoiser(kind), config)
    for named in (True, False):
        got = []
        for call in run:
            for which, name in enumerate(("cond", "uncond")):
                _set_cache_context(model.base_model.model, CacheContext(name) if named else None)
                got.append(sampled(model, [half(call, which)])[0])
        _set_cache_context(model.base_model.model, None)
        two = torch.stack([torch.cat(got[i : i + 2]) for i in range(0, 8, 2)])
        torch.testing.assert_close(two, want, rtol=1e-9, atol=1e-9)


def test_off_zero_and_out():
    run, model = calls("flux", 3), denoiser("flux")
    base, attributes = sampled(model, run), set(vars(model))
    assert torch.equal(sampled(get_token_model(denoiser("flux"), ProfilingDiTConfig().at_zero()), run), base)
    surgery = get_token_model(model, ProfilingDiTConfig(intervals="steps"))
    changed = sampled(surgery, run)
    assert not torch.allclose(changed, base)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, run), base)
    assert torch.equal(sampled(surgery, run), changed)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, run), base) and set(vars(plain)) == attributes
    assert all("forward" not in vars(module) for module in plain.modules())


def test_training_computes_everything():
    run = calls("dit", 2)
    model = denoiser("dit").requires_grad_()
    want = torch.autograd.grad(sum(model(**call).sample.square().sum() for call in run), list(model.parameters()))
    surgery = get_token_model(denoiser("dit"), ProfilingDiTConfig(start=0.0))
    inner = surgery.base_model.model.requires_grad_()
    got = torch.autograd.grad(sum(surgery(**call).sample.square().sum() for call in run), list(inner.parameters()))
    torch.testing.assert_close(got, want)


def test_what_was_calibrated_is_saved(tmp_path):
    run, model = calls("flux", 4), get_token_model(denoiser("flux"), "profilingdit")
    calibrate(model, run)
    want = sampled(model, run)
    model.save_pretrained(tmp_path)
    assert torch.equal(sampled(load(tmp_path, denoiser("flux")), run), want)
    set_method(model, ProfilingDiTConfig(background=()))
    assert torch.equal(sampled(model, run), sampled(denoiser("flux"), run))


def test_uses_that_are_refused():
    with pytest.raises(ConfigError, match=r"min_interval must be at most max_interval, got 5 and 4"):
        ProfilingDiTConfig(max_interval=4, min_interval=5)
    with pytest.raises(ConfigError, match=r"background must lie in \[0, 2\], its blocks over all streams, got \[3\]"):
        get_token_model(denoiser("dit"), ProfilingDiTConfig(background=(1, 3)))
    with pytest.raises(UnsupportedError, match="stands alone"):
        get_token_model(denoiser("dit"), ["profilingdit", "toca"])
    with pytest.raises(UnsupportedError, match="Method 'profilingdit' needs"):
        get_token_model(zoo.build("vit").model, "profilingdit")
    assert ProfilingDiT.site == "block"
