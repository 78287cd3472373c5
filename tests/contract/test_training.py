"""Training: gradients reach all of the adapter and nothing of the base, the same ones under checkpointing; hidden states and compiling."""

import pytest
import torch
from contract.architectures import ARCHITECTURES
from contract.pairs import METHODS, PARTNER, Pair, adapter_parameters, base_parameters, lora, planned, refused
from tolerances import all_close, close

from hf_tokens import UnsupportedError, aux_loss


def gradients(pair, model):
    """The gradient of every parameter, from a loss that no output can hide from."""
    torch.manual_seed(0)
    call = pair.row.calls(pair.inputs)[-1]
    outputs = [t for t in pair.row.read(model(**call)) if t.requires_grad]
    generator = torch.Generator().manual_seed(2)
    loss = aux_loss(model) + sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs)
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_reach_the_adapter_and_not_the_base(pair):
    model = pair.attach(train=True)
    grads = gradients(pair, model)
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    assert not any(p.requires_grad for p in base_parameters(model).values())
    dead = [name for name in adapter_parameters(model) if grads[name] is None or not grads[name].any()]
    assert not dead, f"no gradient reaches {dead}"
    assert all(grads[name].isfinite().all() for name in adapter_parameters(model))
    assert not [name for name in base_parameters(model) if grads[name] is not None]


def test_gradients_reach_a_whole_stack(pair):
    model = pair.attach(PARTNER, lora(pair.streams()[0]), train=True)
    grads = gradients(pair, model)
    dead = [name for name in adapter_parameters(model) if grads[name] is None]
    assert not dead, f"no gradient reaches {dead}"


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_gradient_checkpointing(pair, reentrant):
    plain, model = pair.attach(PARTNER, train=True), pair.attach(PARTNER, train=True)
    if not checkpoint(pair, model, reentrant):
        return
    wanted = gradients(pair, plain)
    try:
        grads = gradients(pair, model)
    except UnsupportedError:
        assert reentrant, "non-reentrant checkpointing is supported"
        return
    for name in adapter_parameters(model):
        close(grads[name], wanted[name], name)


def checkpoint(pair, model, reentrant):
    """Turn checkpointing on; whether the architecture has it."""
    base = model.get_base_model()
    if pair.row.library == "diffusers":
        if base._supports_gradient_checkpointing and not reentrant:
            base.enable_gradient_checkpointing()
            return True
        return False
    if base.supports_gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
    return base.supports_gradient_checkpointing


def test_hidden_states_keep_their_lengths(pair):
    if pair.row.library == "diffusers":
        return
    with torch.no_grad():
        ours, base = (model(**pair.inputs, output_hidden_states=True) for model in (pair.attach(), pair.base()))
    names = [name for name in base if "hidden_states" in name]
    assert [name for name in ours if "hidden_states" in name] == names
    for name in names:
        assert shapes(ours[name]) == shapes(base[name]), name


def shapes(states):
    return [tuple(t.shape) for t in states] if isinstance(states, (tuple, list)) else tuple(states.shape)


def first_pairs():
    """Every method on the first architecture that takes it: compiling each pair would take too long."""
    firsts = (next((Pair(m, a) for a in ARCHITECTURES if planned(Pair(m, a)) is None and refused(Pair(m, a)) is None), None) for m in METHODS)
    return [pair for pair in firsts if pair is not None]


@pytest.mark.parametrize("method", METHODS)
def test_compiled_is_eager_or_refused(method):
    pair = next(pair for pair in first_pairs() if pair.method == method)
    model = pair.attach()
    call = pair.row.calls(pair.inputs)[0]
    torch.compiler.reset()
    with torch.no_grad():
        eager = pair.row.read(model(**call))
        try:
            compiled = pair.row.read(torch.compile(model, backend="aot_eager")(**call))
        except UnsupportedError:
            return
    all_close(compiled, eager, "compiled")
