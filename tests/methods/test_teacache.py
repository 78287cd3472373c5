"""TeaCache against a slow loop, from arXiv:2411.19108 and what its code makes of it."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from denoisers import KINDS, blocks, calls, denoiser, half, sampled
from diffusers import AutoencoderKL, CogVideoXTransformer3DModel, DDIMScheduler, StableDiffusionPipeline
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from hf_tokens import TeaCacheConfig, UnsupportedError, anatomy, get_token_model, measure, set_method
from hf_tokens.model.changes import CHANGES
from hf_tokens.testing import zoo


def mean_size(x):
    """Mean of the absolute values."""
    values = x.flatten().tolist()
    return sum(abs(value) for value in values) / len(values)


def naive_steps(heard, threshold, polynomial=(1.0, 0.0), first=1, last=1):
    """The steps that are reused, given what was heard of each: a sum of p(relative change from the step before), 0 where all runs."""
    reused, total = [], 0.0
    for step, now in enumerate(heard):
        if step < first or step >= len(heard) - last:
            total = 0.0
            continue
        change = mean_size(now - heard[step - 1]) / mean_size(heard[step - 1])
        total += sum(c * change**power for power, c in enumerate(reversed(polynomial)))
        if total < threshold:
            reused.append(step)
        else:
            total = 0.0
    return reused


def given(args, kwargs):
    """The tokens, then those of the second sequence."""
    return [x for x in (*args, *kwargs.values()) if torch.is_tensor(x) and x.dim() == 3][:2]


class Naive:
    """A model whose streams of blocks add at the reused steps what they added at the last other one."""

    def __init__(self, model, reused):
        self.model, self.reused, self.kept, self.step = model, reused, {}, 0
        self.places = [(s, i, len(stream.blocks)) for s, stream in enumerate(anatomy(model).streams) for i in range(len(stream.blocks))]

    def run_block(self, block, place, args, kwargs):
        came, (stream, index, count) = given(args, kwargs), place
        if self.step in self.reused:
            if index == 0:
                came = [x if y is None else x + y for x, y in zip(came, self.kept[stream], strict=False)]
            form = self.kept[block]
            return came[0] if form == "alone" else (came[1] if form == "both" else None, came[0])
        out = type(block).forward(block, *args, **kwargs)
        new = [out] if torch.is_tensor(out) else [out[1], out[0]]
        self.kept[block] = "alone" if torch.is_tensor(out) else "both" if out[0] is not None else "one"
        if index == 0:
            self.kept["begun", stream] = came
        if index == count - 1:
            self.kept[stream] = [None if y is None else y - x for x, y in zip(self.kept["begun", stream], new, strict=False)]
        return out

    def run(self, calls):
        outputs = []
        for self.step, call in enumerate(calls):
            for block, place in zip(blocks(self.model), self.places, strict=True):
                block.forward = lambda *args, block=block, place=place, **kwargs: self.run_block(block, place, args, kwargs)
            outputs.append(sampled(self.model, [call])[0])
        return torch.stack(outputs)


def attention_inputs(kind, run):
    """What the first block's self-attention is given at each step."""
    model, heard = denoiser(kind), []
    attention = anatomy(model).streams[0].attention(0)
    note = lambda module, args, kwargs: heard.append(args[0] if args else kwargs["hidden_states"])
    attention.register_forward_pre_hook(note, with_kwargs=True)
    sampled(model, run)
    return heard


def told(model, run):
    """A run whose steps a context tells."""
    outputs = []
    for step, call in enumerate(run):
        _set_cache_context(model.base_model.model, CacheContext("cond_uncond", step_index=step, num_inference_steps=len(run)))
        outputs.append(sampled(model, [call])[0])
    _set_cache_context(model.base_model.model, None)
    return torch.stack(outputs)


def near(run, share=0.2):
    """The calls of a run, whose pictures are more alike."""
    name = "sample" if "sample" in run[0] else "hidden_states"
    return [{**call, name: run[0][name] + share * (call[name] - run[0][name])} for call in run]


CASES = {
    "some": dict(threshold=0.5, polynomial=(1.0, 0.0)),
    "a polynomial": dict(threshold=0.6, polynomial=(2.0, -0.5, 0.1)),
    "below nothing": dict(threshold=0.1, polynomial=(-1.0, 0.0)),
    "first and last": dict(threshold=9.0, polynomial=(1.0, 0.0), first=3, last=2),
    "the last too": dict(threshold=9.0, polynomial=(1.0, 0.0), last=0),
}


@pytest.mark.drawn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_denoiser_is_the_loop(kind, case):
    run = near(calls(kind, 7))
    reused = naive_steps(attention_inputs(kind, run), **CASES[case])
    got = told(get_token_model(denoiser(kind), TeaCacheConfig(**CASES[case])), run)
    torch.testing.assert_close(got, Naive(denoiser(kind), reused).run(run), rtol=1e-9, atol=1e-9)
    assert case in ("some", "a polynomial") or reused
    assert not reused or not torch.allclose(got, sampled(denoiser(kind), run))


def test_where_nobody_tells_the_last_step_is_as_the_others():
    run, config = near(calls("dit", 4)), TeaCacheConfig(threshold=9.0)
    model = get_token_model(denoiser("dit"), config)
    first, second = sampled(model, run), told(model, run)
    assert torch.equal(first[:3], second[:3]) and not torch.allclose(first[3], second[3])
    assert torch.equal(second[3], sampled(denoiser("dit"), run)[3])


def test_a_pipeline_tells_the_last_step():
    parts = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    scheduler = DDIMScheduler(timestep_spacing="trailing", steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(AutoencoderKL(), unet=denoiser("unet", torch.float32), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    get_token_model(pipe, TeaCacheConfig(threshold=1e9, last=1))
    ran, torch_seed = [], torch.Generator().manual_seed(1)
    blocks(pipe.unet)[0].ff.register_forward_hook(lambda *_: ran.append(scheduler.timesteps.tolist().index(scheduler._now)))
    step = scheduler.scale_model_input
    scheduler.scale_model_input = lambda sample, timestep=None: (setattr(scheduler, "_now", int(timestep)), step(sample, timestep))[1]
    draw = lambda *shape: torch.randn(*shape, generator=torch_seed)
    prompts = dict(prompt_embeds=draw(1, 5, 6), negative_prompt_embeds=draw(1, 5, 6), latents=draw(1, 4, 8, 8))
    pipe(height=8, width=8, num_inference_steps=5, guidance_scale=3.0, output_type="latent", **prompts)
    assert ran == [0, 4]


def video(layers):
    torch.manual_seed(0)
    heads = dict(num_attention_heads=2, attention_head_dim=8, time_embed_dim=4, text_embed_dim=6, max_text_seq_length=5)
    sizes = dict(in_channels=4, out_channels=4, sample_width=8, sample_height=8, sample_frames=5, num_layers=layers)
    return CogVideoXTransformer3DModel(**heads, **sizes).double().eval().requires_grad_(False)


def test_a_known_model_has_what_was_fitted_for_it():
    torch.manual_seed(1)
    picture, prompt = torch.randn(2, 2, 4, 8, 8).double(), torch.randn(2, 5, 6).double()
    run = [
        dict(hidden_states=picture + 0.05 * i, encoder_hidden_states=prompt, timestep=torch.tensor([950 - 90 * i] * 2)) for i in range(8)
    ]
    model, heard = video(30), []
    model.time_embedding.register_forward_hook(lambda module, args, output: heard.append(output))
    sampled(model, run)
    fitted = (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434)
    for threshold in (None, 0.5):
        reused = naive_steps(heard, 0.1 if threshold is None else threshold, fitted)
        surgery, found = get_token_model(video(30), TeaCacheConfig(threshold=threshold)), []
        for step, call in enumerate(run):
            _set_cache_context(surgery.base_model.model, CacheContext("cond", step_index=step, num_inference_steps=len(run)))
            found += [step] * (measure(surgery, **call).tokens == 0)
        assert found == reused
        assert threshold is None or reused


def test_what_was_fitted_is_for_models_that_there_are():
    for name, row in CHANGES.items():
        config = SimpleNamespace(**dict.fromkeys(("patch_size_t", "ofs_embed_dim", "image_dim")), num_layers=30)
        assert name in dir(diffusers) and row(config).of in ("attention_input", "time_embedding") and len(row(config).polynomial) == 5
    unknown = dict(patch_size_t=None, ofs_embed_dim=None, image_dim=None, num_layers=2)
    sizes = {
        "CogVideoXTransformer3DModel": [
            {"num_layers": 30},
            {"num_layers": 42},
            {"patch_size_t": 2},
            {"patch_size_t": 2, "ofs_embed_dim": 8},
        ],
        "WanTransformer3DModel": [{"num_layers": 30}, {"num_layers": 40}],
    }
    for name, configs in sizes.items():
        known = {CHANGES[name](SimpleNamespace(**unknown | config)) for config in configs}
        assert len(known - {None}) == len(configs) and CHANGES[name](SimpleNamespace(**unknown)) is None


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", ["unet", "sd3", "flux"])
def test_two_calls_of_guidance_keep_apart_what_they_reuse(kind):
    run = near(calls(kind, 5, guided=True))
    config = TeaCacheConfig(threshold=1.0, polynomial=(1.0, 0.0))
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


@pytest.mark.drawn(most=2)
@pytest.mark.parametrize("kind", KINDS)
def test_off_zero_and_out(kind):
    run, model = near(calls(kind, 4)), denoiser(kind)
    base, attributes = sampled(model, run), set(vars(model))
    assert torch.equal(sampled(get_token_model(denoiser(kind), TeaCacheConfig().at_zero()), run), base)
    surgery = get_token_model(model, TeaCacheConfig(threshold=1e9))
    changed = sampled(surgery, run)
    with surgery.disable_adapter():
        assert torch.equal(sampled(surgery, run), base)
    assert torch.equal(sampled(surgery, run), changed) and not torch.allclose(changed, base)
    set_method(surgery, TeaCacheConfig(threshold=0.0))
    assert torch.equal(sampled(surgery, run), base)
    plain = surgery.unload()
    assert torch.equal(sampled(plain, run), base) and set(vars(plain)) == attributes
    assert all("forward" not in vars(module) for module in plain.modules())


def test_runs_begin_anew_and_may_change_their_size():
    first, second, wide = calls("sd3", 4), calls("sd3", 3, seed=2), calls("sd3", 3, size=(8, 12), seed=3)
    fresh = lambda run: sampled(get_token_model(denoiser("sd3"), TeaCacheConfig(threshold=2.0)), run)
    model = get_token_model(denoiser("sd3"), TeaCacheConfig(threshold=2.0))
    assert torch.equal(sampled(model, first + second)[4:], fresh(second))
    assert torch.equal(sampled(model, wide), fresh(wide)) and torch.equal(sampled(model, second), fresh(second))


def test_a_step_that_is_reused_costs_what_stands_around_the_blocks():
    run = near(calls("pixart", 2))
    model = get_token_model(denoiser("pixart"), TeaCacheConfig(threshold=9.0))
    costs = [measure(model, **call) for call in run]
    assert costs[0].tokens > costs[1].tokens == 0 and costs[1].flops < costs[0].flops / 2


def test_other_streams_are_refused():
    with pytest.raises(UnsupportedError, match="Method 'teacache' needs"):
        get_token_model(zoo.build("vit").model, "teacache")
