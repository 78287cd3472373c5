"""ProSpect against a slow loop over one sample, written from arXiv:2305.16225: one prompt for each group of consecutive denoising steps."""

import pytest
import torch
from denoisers import alone, calls, denoiser, within
from hf_tokens_adapters.token_bank.prospect import ProSpect
from tolerances import all_equal, close

from hf_tokens import ConfigError, Dims, ProSpectConfig, UnsupportedError, get_token_model

# per case: stages, tokens of each, the timesteps of the samples
CASES = {
    "paper": (10, 1, (999, 950, 900, 899.9, 500, 100, 99, 1, 0)),
    "pure noise": (10, 2, (1000, 1000)),
    "one stage is textual inversion": (1, 3, (1000, 500, 0)),
    "stages of odd length": (7, 1, (1000, 858, 857, 714.2, 143, 142, 0)),
    "as many as steps": (1000, 1, (999, 998, 0)),
}
PROMPTED = ("unet", "sd3", "flux", "pixart")


def naive(bank, time):
    """The tokens of one sample: the prompt of the first group of steps, counted from pure noise, that has not ended at this timestep."""
    for stage in range(len(bank)):
        ends_at = 1000 * (len(bank) - 1 - stage) / len(bank)
        if time >= ends_at:
            return bank[stage]


def bank_of(**knobs):
    torch.manual_seed(0)
    bank = ProSpect(ProSpectConfig(init_std=1.0, **knobs), Dims(8, 2, 2, 4, 0, 3, "denoiser", False, prompt=6)).double()
    return bank.requires_grad_(False)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    stages, tokens, times = CASES[case]
    bank = bank_of(stages=stages, tokens=tokens)
    got = bank.tokens(time=torch.tensor(times))
    assert torch.equal(got, torch.stack([naive(bank.bank, float(time)) for time in times]))


def test_stages_in_which_it_acts():
    bank, times = bank_of(stages=4, acts=(0, 3)), torch.tensor([1000.0, 740.0, 260.0, 3.0])
    none = torch.zeros(4, dtype=torch.bool)
    assert bank.takes(time=times, negative=none).tolist() == [True, False, False, True]
    assert bank.takes(time=times, negative=~none).tolist() == [False] * 4
    both = bank_of(stages=4, negative=True)
    assert both.takes(time=times, negative=~none).tolist() == [True] * 4
    with pytest.raises(ConfigError, match="ProSpectConfig.acts must name stages below 4"):
        get_token_model(denoiser("sd3"), ProSpectConfig(stages=4, acts=(1, 4)))


def surgery(kind, **knobs):
    torch.manual_seed(0)
    model = get_token_model(denoiser(kind), ProSpectConfig(init_std=1.0, **knobs)).eval()
    method = next(module for module in model.modules() if isinstance(module, ProSpect))
    return model, method.bank.detach()


def by_hand(base, kind, call, tokens):
    """One sample of a call, its prompt written out with the tokens (k d) behind it."""
    call = {**call, "encoder_hidden_states": torch.cat([call["encoder_hidden_states"], tokens[None]], dim=1)}
    if kind == "flux":
        call["txt_ids"] = call["img_ids"].new_zeros(call["encoder_hidden_states"].shape[1], 3)
    return base(**call, return_dict=False)[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", PROMPTED)
def test_each_step_gets_the_prompt_of_its_stage(kind):
    (model, bank), base = surgery(kind, stages=4, tokens=3), denoiser(kind)
    for call in calls(kind, 5):
        time = float(call["timestep"][0]) * (1000 if kind == "flux" else 1)
        want = torch.cat([by_hand(base, kind, alone(call, i), naive(bank, time)) for i in range(2)])
        close(model(**call, return_dict=False)[0], want)


@torch.no_grad()
@pytest.mark.parametrize("kind", PROMPTED)
def test_samples_of_a_batch_may_stand_at_different_steps(kind):
    (model, bank), base, call = surgery(kind, stages=4), denoiser(kind), calls(kind, 1)[0]
    times = torch.tensor([0.9, 0.2]) if kind == "flux" else torch.tensor([900, 200])
    call["timestep"] = times
    want = [by_hand(base, kind, alone(call, i), naive(bank, (900, 200)[i])) for i in range(2)]
    close(model(**call, return_dict=False)[0], torch.cat(want))


@pytest.mark.parametrize("kind", PROMPTED)
def test_a_batch_in_training_may_hold_samples_of_other_stages(kind):
    (model, bank), base, call = surgery(kind, stages=4, acts=(3,)), denoiser(kind), calls(kind, 1)[0]
    call["timestep"] = torch.tensor([0.9, 0.2]) if kind == "flux" else torch.tensor([900, 200])
    got = model.train()(**call, return_dict=False)[0]
    want = [base(**alone(call, 0), return_dict=False)[0], by_hand(base, kind, alone(call, 1), bank[3])]
    close(got, torch.cat(want))
    got.square().sum().backward()
    grad = next(p.grad for name, p in model.named_parameters() if name.endswith("bank"))
    assert not grad[:3].any() and bool((grad[3] != 0).all())


@torch.no_grad()
@pytest.mark.parametrize("kind", PROMPTED)
def test_under_guidance_the_negative_prompt_stays_the_base_s(kind):
    (model, bank), base = surgery(kind, stages=4, tokens=2), denoiser(kind)
    for call in calls(kind, 3, guided=True):
        time = float(call["timestep"][0]) * (1000 if kind == "flux" else 1)
        want = [base(**alone(call, i, rows=4), return_dict=False)[0] for i in (0, 1)]
        want += [by_hand(base, kind, alone(call, i, rows=4), naive(bank, time)) for i in (2, 3)]
        with within(model):
            close(model(**call, return_dict=False)[0], torch.cat(want))


@torch.no_grad()
def test_in_its_other_stages_the_prompt_is_the_base_s():
    (model, _), base = surgery("pixart", stages=2, acts=(0,)), denoiser("pixart")
    first, *_, last = calls("pixart", 6)
    got, want = model(**last, return_dict=False), base(**last, return_dict=False)
    all_equal(got, want, "the second stage")
    assert not torch.allclose(model(**first, return_dict=False)[0], base(**first, return_dict=False)[0])


def test_a_denoiser_without_a_prompt_is_refused():
    with pytest.raises(UnsupportedError, match="a denoiser that is given a prompt"):
        get_token_model(denoiser("dit"), "prospect")
