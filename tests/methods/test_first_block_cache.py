"""First-block cache against a slow loop, written from ParaAttention's README and code, and beside the hook that diffusers has."""

import pytest
import torch
from denoisers import KINDS, blocks, calls, denoiser, half, sampled
from diffusers import FirstBlockCacheConfig as Theirs
from diffusers.hooks import apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from hf_tokens import FirstBlockCacheConfig, UnsupportedError, anatomy, get_token_model, measure
from hf_tokens.testing import zoo


def mean_size(x):
    """Mean of the absolute values."""
    values = x.flatten().tolist()
    return sum(abs(value) for value in values) / len(values)


def given(args, kwargs):
    """The tokens, then those of the second sequence."""
    return [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dim() == 3][:2]


def plus(xs, ys, sign=1):
    return [None if x is None else x if y is None else x + sign * y for x, y in zip(xs, ys, strict=False)]


class Naive:
    """A model whose first block runs at every step, and where what that adds is within `threshold` of what it added at the last step
    computed, relative in mean size, each stream adds what its other blocks added then."""

    def __init__(self, model, threshold, warmup=0, factor=1):
        self.model, self.threshold, self.warmup, self.factor = model, threshold, warmup, factor
        self.kept, self.reused, self.reuses, self.step = {}, [], False, 0
        self.places = [(s, i, len(stream.blocks)) for s, stream in enumerate(anatomy(model).streams) for i in range(len(stream.blocks))]

    def packed(self, xs, block):
        """Results in the form of the block: one sequence, or two, of which the last block of SD3 returns one."""
        form = self.kept[block]
        return xs[0] if form == "alone" else (xs[1] if form == "both" else None, xs[0])

    def similar(self, f):
        last = self.kept.get("f")
        if last is None or self.step < self.warmup:
            return False
        return mean_size(f - last) / mean_size(last) < self.threshold

    def compute(self, block, place, came, args, kwargs):
        stream, index, count = place
        out = type(block).forward(block, *args, **kwargs)
        new = [out] if torch.is_tensor(out) else [out[1], out[0]]
        self.kept[block] = "alone" if torch.is_tensor(out) else "both" if out[0] is not None else "one"
        if index == 0:
            self.kept["begun", stream] = new if stream == 0 else came
        if stream == index == 0:
            f = (new[0] - came[0])[..., :: self.factor]
            self.reuses = self.similar(f)
            if self.reuses:
                self.reused.append(self.step)
                return self.packed(plus(new, self.kept["R", 0]), block)
            self.kept["f"] = f
        if index == count - 1:
            self.kept["R", stream] = plus(new, self.kept["begun", stream], -1)
        return out

    def run_block(self, block, place, args, kwargs):
        came, (stream, index, _) = given(args, kwargs), place
        if place[:2] == (0, 0) or not self.reuses:
            return self.compute(block, place, came, args, kwargs)
        return self.packed(plus(came, self.kept["R", stream]) if index == 0 else came, block)

    def run(self, calls):
        outputs = []
        for self.step, call in enumerate(calls):
            for block, place in zip(blocks(self.model), self.places, strict=True):
                block.forward = lambda *args, block=block, place=place, **kwargs: self.run_block(block, place, args, kwargs)
            outputs.append(sampled(self.model, [call])[0])
        return torch.stack(outputs)


CASES = {
    "some": dict(threshold=0.9),
    "most": dict(threshold=1.3),
    "warm-up": dict(threshold=1.3, warmup_steps=3),
    "features": dict(threshold=1.0, downsample_factor=3),
}


@pytest.mark.drawn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_denoiser_is_the_loop(kind, case):
    knobs, run = CASES[case], calls(kind, 7)
    got = sampled(get_token_model(denoiser(kind), FirstBlockCacheConfig(**knobs)), run)
    naive = Naive(denoiser(kind), knobs["threshold"], knobs.get("warmup_steps", 0), knobs.get("downsample_factor", 1))
    torch.testing.assert_close(got, naive.run(run), rtol=1e-9, atol=1e-9)
    reused = naive.reused
    assert all(step >= knobs.get("warmup_steps", 1) for step in reused)
    assert case != "most" or reused and not torch.allclose(got, sampled(denoiser(kind), run))


@pytest.mark.drawn
@pytest.mark.parametrize("kind", ["flux", "pixart", "dit"])  # their hook fails where a last block drops the text, as in SD3
@pytest.mark.parametrize("threshold", [0.5, 0.9, 1.3, 9.0])
def test_it_is_the_hook_of_diffusers(kind, threshold):
    run, theirs = calls(kind, 7, guided=True), denoiser(kind)
    apply_first_block_cache(theirs, Theirs(threshold=threshold))
    _set_cache_context(theirs, CacheContext("cond_uncond"))
    ours = get_token_model(denoiser(kind), FirstBlockCacheConfig(threshold=threshold))
    torch.testing.assert_close(sampled(ours, run), sampled(theirs, run), rtol=1e-9, atol=1e-9)


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", ["unet", "sd3", "flux"])
def test_two_calls_of_guidance_keep_apart_what_they_reuse(kind):
    run = calls(kind, 5, guided=True)
    config = FirstBlockCacheConfig(threshold=1.2)
    want = [sampled(get_token_model(denoiser(kind), config), [half(call, which) for call in run]) for which in (0, 1)]
    model = get_token_model(denoiser(kind), config)
    for named in (True, False):
        got = ([], [])
        for call in run:
            for which, name in enumerate(("cond", "uncond")):
                _set_cache_context(model.base_model.model, CacheContext(name) if named else None)
                got[which].append(sampled(model, [half(call, which)])[0])
        _set_cache_context(model.base_model.model, None)
        for mine, alone in zip(got, want, strict=True):
            torch.testing.assert_close(torch.stack(mine), alone, rtol=1e-9, atol=1e-9)


def test_a_step_that_is_reused_costs_the_first_block():
    run = calls("dit", 2)
    model = get_token_model(denoiser("dit", layers=4), FirstBlockCacheConfig(threshold=9.0))
    costs = [measure(model, **call) for call in run]
    assert costs[0].tokens == 4 * costs[1].tokens and costs[0].flops > 3 * costs[1].flops


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_off_zero_and_out(kind):
    run, model = calls(kind, 4), denoiser(kind)
    base, attributes = sampled(model, run), set(vars(model))
    assert torch.equal(sampled(get_token_model(denoiser(kind), FirstBlockCacheConfig().at_zero()), run), base)
    surgery = get_token_model(model, FirstBlockCacheConfig(threshold=9.0))
    changed = sampled(surgery, run)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, run), base)
    assert torch.equal(sampled(surgery, run), changed) and not torch.allclose(changed, base)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, run), base) and set(vars(plain)) == attributes
    assert all("forward" not in vars(module) for module in plain.modules())


def test_runs_begin_anew_and_may_change_their_size():
    first, second, wide = calls("sd3", 4), calls("sd3", 3, seed=2), calls("sd3", 3, size=(8, 12), seed=3)
    fresh = lambda run: sampled(get_token_model(denoiser("sd3"), FirstBlockCacheConfig(threshold=9.0)), run)
    model = get_token_model(denoiser("sd3"), FirstBlockCacheConfig(threshold=9.0))
    assert torch.equal(sampled(model, first + second)[4:], fresh(second))
    assert torch.equal(sampled(model, wide), fresh(wide)) and torch.equal(sampled(model, second), fresh(second))


def test_other_streams_are_refused():
    with pytest.raises(UnsupportedError, match="Method 'first-block-cache' needs"):
        get_token_model(zoo.build("vit").model, "first-block-cache")
