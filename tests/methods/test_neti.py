"""NeTI's mapper against a slow loop over one sample, written from sections 4.1 to 4.3 of arXiv:2305.15391."""

import math

import pytest
import torch
from denoisers import alone, blocks, calls, denoiser, own_prompts, within
from hf_tokens_adapters.token_bank.neti import NeTI
from tolerances import close
from torch import nn

from hf_tokens import ConfigError, Dims, NeTIConfig, UnsupportedError, get_token_model, set_method

D = 6
SIZES = dict(hidden=8, frequencies=5)
# per case: knobs, timestep of each sample, block, real tokens of each prompt
CASES = {
    "usual": ({}, (999.0, 3.5), 2, (4, 4)),
    "padded prompts": ({}, (500.0, 500.0, 0.0), 0, (4, 1, 0)),
    "one unit": ({"truncation": 1}, (700.0,), 1, (3,)),
    "more units than there are": ({"truncation": 99}, (700.0,), 1, (3,)),
    "two vectors, one anchor": ({"tokens": 2, "time_anchors": 1}, (20.0, 1000.0), 2, (2, 4)),
    "a fixed length": ({"norm": 3.0}, (20.0, 1000.0), 1, (2, 4)),
    "the concept alone has the length": ({"lengths": "apart"}, (20.0, 1000.0), 1, (2, 4)),
    "no bypass": ({"alpha": 0.0}, (20.0,), 1, (4,)),
    "one unit in each layer": ({"hidden": 1, "frequencies": 1}, (20.0,), 1, (4,)),
}


def naive(p, config, time, layer, prompt):
    """The vectors of one block and sample, given the real tokens of its prompt (n d)."""
    waves = [float(w[0]) * time + float(w[1]) * layer for w in p["frequency"]]
    encoded = [math.sin(wave) for wave in waves] + [math.cos(wave) for wave in waves]
    size = math.sqrt(sum(x * x for x in encoded))
    h = p["mapper.0.weight"] @ torch.tensor([x / size for x in encoded], dtype=torch.float64) + p["mapper.0.bias"]
    for linear, norm in ((1, 2), (4, 5)):
        h = p[f"mapper.{linear}.weight"] @ h + p[f"mapper.{linear}.bias"]
        h = (h - h.mean()) / torch.sqrt(((h - h.mean()) ** 2).mean() + 1e-5)
        h = h * p[f"mapper.{norm}.weight"] + p[f"mapper.{norm}.bias"]
        h = torch.stack([x if x > 0 else 0.01 * x for x in h])
    keep = len(h) if config.truncation is None else config.truncation
    h = torch.stack([x if i < keep else 0 * x for i, x in enumerate(h)])
    out = p["mapper.7.weight"] @ h + p["mapper.7.bias"]
    length = config.norm
    if length is None:
        length = sum(float(token.norm()) for token in prompt) / max(len(prompt), 1)
    vectors = []
    for k in range(config.tokens):
        u, v = out[k * D : (k + 1) * D], out[(config.tokens + k) * D : (config.tokens + k + 1) * D]
        whole = torch.cat([u, v]) if config.lengths == "joint" else u
        concept = length * u / whole.norm()
        vectors.append(concept + config.alpha * concept.norm() * v / v.norm())
    return torch.stack(vectors)


def pair(config, layer, places=3):
    """The instance in the first block, which holds the mapper, and the one in a later block."""
    torch.manual_seed(0)
    first, own = (NeTI(config, Dims(D, 2, 2, 3, i, places, "denoiser", False, place=i, places=places, prompt=D)) for i in (0, layer))
    for one in (first, own):
        one.put_in_place("default.0", first, first)
    return first.double().eval(), own.double().eval()


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    knobs, times, layer, real = CASES[case]
    config = NeTIConfig(**{**SIZES, **knobs})
    first, own = pair(config, layer)
    for name, parameter in first.named_parameters():
        if name != "mapper.0.weight":
            nn.init.normal_(parameter)
    prompt = torch.randn(len(times), 4, D, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor(real)[:, None]
    got = own.tokens(time=torch.tensor(times), hidden=prompt, mask=mask)
    p = {**dict(first.named_parameters()), **dict(first.named_buffers())}
    for i, time in enumerate(times):
        torch.testing.assert_close(got[i], naive(p, config, time, layer, prompt[i, : real[i]]))


@torch.no_grad()
def test_each_anchor_answers_to_its_own_timestep_and_block():
    """A row of A is the encoding of an anchor, of unit length: there, it answers 1, and nowhere more."""
    first, _ = pair(NeTIConfig(hidden=8), 1)
    places = torch.tensor([[time, layer] for time in range(0, 1000, 100) for layer in range(3)])
    answers = first.encode(places.float()) @ first.mapper[0].weight.mT
    torch.testing.assert_close(answers.diagonal(), torch.ones(30, dtype=torch.float64))
    assert bool((answers.argmax(dim=1) == torch.arange(30)).all())


@torch.no_grad()
def test_nested_dropout_drops_the_units_behind_a_random_one():
    first, _ = pair(NeTIConfig(nested_dropout=0.5, **SIZES), 1)
    torch.manual_seed(0)
    left = first.train().units(torch.ones(4000, 8)).long()
    assert bool((left[:, 1:] <= left[:, :-1]).all()), "a unit that stays has all before it"
    whole = (left.sum(dim=1) == 8).float().mean()
    assert 0.46 < whole < 0.54
    counts = torch.bincount(left.sum(dim=1), minlength=9)[:8].float() / 2000
    assert bool(((counts - 1 / 8).abs() < 0.03).all()), "each of them may be the first to go"
    assert bool((first.eval().units(torch.ones(3, 8)) == 1).all())


def surgery(kind, **knobs):
    torch.manual_seed(0)
    return get_token_model(denoiser(kind), NeTIConfig(**SIZES, **knobs)).eval()


def vectors(model, call, i, kind):
    """What each block of the model is told for one sample of a call."""
    banks = sorted((module for module in model.modules() if isinstance(module, NeTI)), key=lambda bank: bank.dims.place)
    prompt, time = call["encoder_hidden_states"][i : i + 1], call["timestep"][i : i + 1].double() * (1000 if kind == "flux" else 1)
    time = time.round(decimals=3).float()
    return [bank.tokens(time=time, hidden=prompt, mask=torch.ones(prompt.shape[:2], dtype=torch.bool))[0].double() for bank in banks]


@pytest.mark.drawn
@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("kind", ("unet", "sd3", "flux", "pixart"))
def test_each_block_reads_its_own_vectors(kind, guided):
    model, base = surgery(kind, tokens=2), denoiser(kind)
    assert sum(isinstance(module, NeTI) for module in model.modules()) == len(blocks(base))
    for call in calls(kind, 2, guided=guided):
        want = []
        with within(model, "cond_uncond" if guided else "cond"):
            got = model(**call, return_dict=False)[0]
        for i in range(len(got)):
            told = vectors(model, call, i, kind)
            assert not torch.allclose(told[0], told[1])
            rows = alone(call, i, rows=len(got))
            if guided and i < 2:
                want.append(base(**rows, return_dict=False)[0])
                continue
            with own_prompts(base, kind, told):
                want.append(base(**rows, return_dict=False)[0])
        close(got, torch.cat(want))


@torch.no_grad()
def test_truncation_is_a_knob_of_a_trained_concept():
    model, call = surgery("pixart"), calls("pixart", 1)[0]
    whole = model(**call).sample
    set_method(model, NeTIConfig(**SIZES, truncation=2))
    assert not torch.allclose(model(**call).sample, whole)
    set_method(model, NeTIConfig(**SIZES))
    assert torch.equal(model(**call).sample, whole)


def test_it_acts_in_all_that_reads_the_prompt():
    with pytest.raises(UnsupportedError, match="it acts in all that reads the prompt"):
        get_token_model(denoiser("unet"), NeTIConfig(stream="denoiser.2"))
    with pytest.raises(ConfigError, match="NeTIConfig.truncation"):
        NeTIConfig(truncation=0)
