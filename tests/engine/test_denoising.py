"""What a denoiser put out at the step before, told for each token; and how far it is."""

import pytest
import torch
from denoisers import calls, denoiser, half, sampled
from diffusers.hooks.hooks import CacheContext, _set_cache_context

from hf_tokens import get_token_model, measure
from hf_tokens.diffusion.steps import DenoisingWorld
from hf_tokens.model.pictures import grid, over_tokens
from hf_tokens.testing import zoo


def test_each_token_has_its_patch():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    out = over_tokens(x, 6)
    assert out.shape == (2, 6, 12) and grid(6, (4, 6)) == (2, 3)
    for i in range(6):
        row, column = divmod(i, 3)
        assert torch.equal(out[:, i], x[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1))
    assert torch.equal(over_tokens(x, 24), x.flatten(2).mT)


def test_what_lies_in_other_ways():
    tokens, video, odd = torch.randn(2, 5, 3), torch.randn(2, 3, 4, 2, 2), torch.randn(1, 2, 5, 7)
    assert over_tokens(tokens, 5) is tokens and over_tokens(tokens, 6) is None and over_tokens(tokens[0], 5) is None
    assert torch.equal(over_tokens(video, 16), video.flatten(2).mT)
    assert torch.equal(over_tokens(video, 4)[1, 2], video[1, :, 2].flatten())
    assert over_tokens(video, 6) is None
    assert over_tokens(odd, 12).shape == (1, 12, 2)


def spoken(kind, run, names=None, told=False):
    """Noise and guidance that the first block's tokens were told at every call."""
    model = get_token_model(denoiser(kind), "importance-token-merge")
    inner, heard = model.base_model.model, []
    surgery = next(m.hf_tokens.surgery for m in inner.modules() if "hf_tokens" in m._modules)
    n = 16 if kind != "flux" else 64
    inner.register_forward_pre_hook(
        lambda *_: heard.append((context().steps_of_denoiser.noise(n), context().steps_of_denoiser.guidance(n), context().elapsed))
    )
    context = lambda: surgery.call.context
    out = []
    for i, call in enumerate(run):
        name = names[i % len(names)] if names else None
        more = {"step_index": i // len(names), "num_inference_steps": 4} if told else {}
        _set_cache_context(inner, CacheContext(name, **more) if name else None)
        out.append(sampled(model, [call])[0])
    _set_cache_context(inner, None)
    return heard, out


def test_noise_is_the_output_of_the_step_before_without_its_variance():
    run = calls("dit", 3)
    heard, out = spoken("dit", run)
    assert heard[0][0] is None and out[0].shape[1] == 8
    for step in (1, 2):
        assert torch.equal(heard[step][0], over_tokens(out[step - 1][:, :4], 16))
    assert spoken("dit", run + run)[0][3][0] is None


def test_guidance_of_two_halves():
    heard, out = spoken("pixart", calls("pixart", 2, guided=True))
    apart = over_tokens(out[0][:2, :4] - out[0][2:, :4], 16).norm(dim=-1)
    assert heard[0][1] is None and torch.equal(heard[1][1], torch.cat([apart, apart]))
    assert spoken("pixart", calls("pixart", 2, batch=4))[0][1][1] is None


@pytest.mark.parametrize("names", [("cond", "uncond"), (None, None), ("uncond", "cond", "perturbed"), ("a", "b", "c")])
def test_guidance_of_several_calls(names):
    run = [half(call, i % 2) for call in calls("sd3", 2, guided=True) for i in range(len(names))]
    heard, out = spoken("sd3", run, names if names[0] else None)
    apart = over_tokens(out[0] - out[1], 16).norm(dim=-1)
    for noise, guidance, _ in heard[len(names) :]:
        assert noise is not None
        if names[0] == "a":
            assert guidance is None
        else:
            assert torch.equal(guidance, apart)


def test_calls_of_different_pictures_are_no_guidance():
    one, other = calls("sd3", 2), calls("sd3", 2, seed=5)
    heard, _ = spoken("sd3", [one[0], other[0], one[1], other[1]])
    assert [guidance for _, guidance, _ in heard] == [None] * 4 and heard[3][0] is not None


@pytest.mark.parametrize("kind", ["unet", "pixart", "sd3"])
def test_where_guidance_ends_or_the_samples_change_a_step_has_none_before_it(kind):
    run = [half(call, 1) if i in (2, 3) else call for i, call in enumerate(calls(kind, 5, guided=True))]
    run.append(calls(kind, 6, size=(4, 16), guided=True)[5])  # as many tokens in another picture
    heard, _ = spoken(kind, run)
    assert [noise is not None for noise, *_ in heard] == [False, True, False, True, False, False]
    assert [guidance is not None for _, guidance, _ in heard] == [False, True, False, False, False, False]


@pytest.mark.parametrize("method", ["importance-token-merge", "toca", "cat-pruning", "profilingdit"])
@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_methods_of_denoisers_run_on_where_guidance_ends_and_begins(kind, method):
    run = [half(call, 1) if i in (2, 3) else call for i, call in enumerate(calls(kind, 6, guided=True))]
    model = get_token_model(denoiser(kind), method).eval()
    for call in run:
        assert bool(sampled(model, [call]).isfinite().all())


def test_how_far_the_denoising_is():
    run = calls("dit", 3)
    heard, _ = spoken("dit", run)
    assert [elapsed for *_, elapsed in heard] == pytest.approx([1 - float(c["timestep"][0]) / 990 for c in run])
    heard, _ = spoken("dit", run, ("cond",), told=True)
    assert [elapsed for *_, elapsed in heard] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("kind", "timestep", "want"),
    [
        ("sd3", torch.tensor([900, 25]), [900, 25]),
        ("sd3", torch.tensor(0.5), [0.5, 0.5]),
        ("sd3", torch.tensor([[3.0, 0.0, 3.0], [7.0, 7.0, 7.0]]), [3, 7]),
        ("flux", torch.tensor([0.9, 1.0]), [900, 1000]),
        ("flux", 0.25, [250, 250]),
        ("lumina2", torch.tensor([0.25, 1.0]), [750, 0]),  # its time rises
        ("sd3", None, None),
    ],
)
def test_the_timestep_on_one_schedule(kind, timestep, want):
    model = zoo.build("diffusers/Lumina2Transformer2DModel").model if kind == "lumina2" else denoiser(kind)
    time = DenoisingWorld(model).time(timestep, torch.zeros(2, 4, 8, 8))
    assert (time if time is None else time.tolist()) == want


def test_attention_counts_on_a_cpu_as_elsewhere():
    call, model = calls("dit", 1, dtype=torch.float32)[0], denoiser("dit", torch.float32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = measure(model, **call).flops
    assert measure(model, **call).flops == want
