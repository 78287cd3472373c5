"""Diffusion-DPO against its paper: section 4, equation 14, in whole denoisers and in a training loop."""

import math

import pytest
import torch
from hf_tokens_adapters.objective.diffusion_dpo import DiffusionDPO
from peft import LoraConfig
from tolerances import close

from hf_tokens import DiffusionDPOConfig, UnsupportedError, get_token_model, objective_loss
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeInsertConfig


def naive(prediction, reference, target, beta):
    """The loss of one pair: rows 0 and 1 are winner and loser; beta is half of the paper's beta T w(t), for errors that are means."""
    error = lambda x, row: sum((a - b) ** 2 for a, b in zip(x[row].tolist(), target[row].tolist(), strict=True)) / len(target[row])
    gain = [error(prediction, row) - error(reference, row) for row in (0, 1)]
    inside = -beta * (gain[0] - gain[1])
    return math.log1p(math.exp(-abs(inside))) + max(0.0, -inside)


@pytest.mark.parametrize(("pairs", "shape", "beta"), [(2, (3, 5, 4), 5000.0), (1, (7, 2), 2000.0), (3, (1, 1, 1), 1.0), (1, (9,), 1e-3)])
def test_matches_the_paper(pairs, shape, beta):
    target, prediction, reference = (torch.randn(2 * pairs, *shape, dtype=torch.float64) / 50 for _ in range(3))
    flat = [t.flatten(1).view(2, pairs, -1) for t in (prediction, reference, target)]
    expected = sum(naive(*(t[:, i] for t in flat), beta / 2) for i in range(pairs)) / pairs
    value = DiffusionDPO(DiffusionDPOConfig(beta=beta), None).loss(prediction=prediction, target=target, reference=reference)
    close(value, torch.tensor(expected, dtype=torch.float64))


DENOISERS = ["UNet2DConditionModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "PixArtTransformer2DModel"]


def denoiser(name, *methods):
    specimen = zoo.build(f"diffusers/{name}")
    lora = LoraConfig(r=2, target_modules=["to_q", "to_v"])
    torch.manual_seed(0)
    return get_token_model(specimen.model, [lora, *methods]).train(), specimen.inputs


@torch.no_grad()
def move(model, size=0.05):
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ".hf_tokens_methods." in name:
            parameter.normal_(std=size)


def noise_like(prediction, name):
    noise = torch.randn(prediction.shape, generator=torch.Generator().manual_seed(5))
    return noise.chunk(2, dim=1)[0] if name == "PixArtTransformer2DModel" else noise


@pytest.mark.drawn
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("bank", [False, True], ids=["lora", "lora-and-tokens"])
def test_the_reference_is_the_model_without_the_adapter(name, bank):
    model, inputs = denoiser(name, *([ProbeInsertConfig(tokens=2)] if bank else []), DiffusionDPOConfig(beta=20.0))
    move(model)
    prediction = model(**inputs)[0]
    target = noise_like(prediction, name)
    loss = objective_loss(model, target)
    with torch.no_grad(), model.disable_adapter():
        reference = model(**inputs)[0]
    half = lambda t: t[:, : target.shape[1]].flatten(1).double()
    assert not torch.equal(prediction, reference)
    close(loss, torch.tensor(naive(half(prediction), half(reference), target.flatten(1), 10.0)))
    loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


DROPPING = {"labels": "DiTTransformer2DModel", "features": "UNet2DConditionModel"}


def dropping(kind, **lora):
    """A denoiser that drops something in train mode, with a LoRA at its start."""
    specimen = zoo.build(f"diffusers/{DROPPING[kind]}")
    for module in specimen.model.modules() if kind == "features" else ():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.2
    methods = [LoraConfig(r=2, target_modules=["to_q", "to_v"], **lora), DiffusionDPOConfig()]
    return get_token_model(specimen.model, methods).train(), specimen.inputs


@pytest.mark.drawn
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", DROPPING)
def test_the_reference_drops_what_the_model_dropped(kind, checkpointed):
    model, inputs = dropping(kind)
    if checkpointed:
        model.base_model.model.enable_gradient_checkpointing()
    predictions, losses, after = [], [], []
    for seed in range(4):
        torch.manual_seed(seed)
        predictions.append(model(**inputs)[0])
        losses.append(objective_loss(model, torch.zeros(2, 4, 8, 8)))
        after.append(torch.rand(1))
        losses[-1].backward()
        torch.manual_seed(seed)
        model(**inputs)
        assert torch.equal(torch.rand(1), after[-1])  # the reference leaves no trace
    assert not torch.equal(*predictions[:2])  # it drops
    close(torch.stack(losses), torch.full((4,), math.log(2)))


@pytest.mark.parametrize("kind", DROPPING)
def test_an_adapter_that_draws_between_the_model_s_draws_is_refused(kind):
    model, inputs = dropping(kind, lora_dropout=0.1)
    model(**inputs)
    with pytest.raises(UnsupportedError, match="draws no more random numbers than without its adapter, got others between them"):
        objective_loss(model, torch.zeros(2, 4, 8, 8))


def test_a_training_loop():
    """Winner and loser of a pair share the noise and the timestep; a few steps make the winner's error fall against the loser's."""
    model, inputs = denoiser("SD3Transformer2DModel", DiffusionDPOConfig(beta=50.0))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    one = {key: value[:1].repeat(2, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    noised, noise = (
        torch.randn(2, *inputs["hidden_states"].shape[1:]),
        torch.randn(1, *inputs["hidden_states"].shape[1:]).repeat(2, 1, 1, 1),
    )
    losses = []
    for _ in range(8):
        model(**{**one, "hidden_states": noised})
        loss = objective_loss(model, noise - noised)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    close(torch.tensor(losses[0]), torch.tensor(math.log(2)), "a LoRA at its start is the reference")
    assert losses[-1] < losses[0] - 0.05


def test_a_reader_takes_the_prediction_of_both():
    model, inputs = denoiser("SD3Transformer2DModel", DiffusionDPOConfig(beta=20.0))
    move(model)
    prediction = model(**inputs, return_dict=False)[0]
    target = torch.randn(prediction.shape)
    velocity = lambda output: inputs["hidden_states"] - 0.5 * output[0]
    loss = objective_loss(model, target, velocity)
    with torch.no_grad(), model.disable_adapter():
        reference = velocity(model(**inputs, return_dict=False))
    flat = [t.detach().flatten(1) for t in (velocity((prediction,)), reference, target)]
    close(loss, torch.tensor(naive(*flat, 10.0)))


def test_the_reference_has_the_precision_of_the_prediction():
    model, inputs = denoiser("SD3Transformer2DModel", DiffusionDPOConfig(beta=1e6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = model(**inputs).sample
    loss = objective_loss(model, torch.randn(prediction.shape))
    close(loss, torch.tensor(math.log(2)), "a LoRA at its start is the reference to the bit")


def test_words():
    model, inputs = denoiser("SD3Transformer2DModel", DiffusionDPOConfig())
    with pytest.raises(
        UnsupportedError, match="`objective_loss` speaks of the denoiser's last call, once, got none since. Attach an objective"
    ):
        objective_loss(model, torch.zeros(()))
    prediction = model(**inputs).sample
    with pytest.raises(UnsupportedError, match="What a denoiser predicts and what it is to predict have one shape, got"):
        objective_loss(model, prediction[:, :1])
    one = {key: value[:1] for key, value in inputs.items()}
    prediction = model(**one).sample
    with pytest.raises(UnsupportedError, match="needs the winners and, behind them, as many losers, got a batch of 1. Give whole pairs"):
        objective_loss(model, prediction)
    with pytest.raises(UnsupportedError, match="needs a model with a surgery"):
        objective_loss(torch.nn.Linear(1, 1), torch.zeros(()))
