"""Training: gradients reach all of the adapter and nothing of the base, the same ones under checkpointing; hidden states and compiling."""

import copy
from functools import cache

import pytest
import torch
from peft import PeftModel

from hf_tokens.api import aux_loss
from hf_tokens.errors import UnsupportedError
from hf_tokens.testing.tolerances import all_close, close

from ..architectures import ARCHITECTURES, built
from ..cases import drawn
from ..pairs import ContractPair, found
from ..parameters import adapter_parameters, base_parameters, lora


def gradients(pair, model):
    """The gradient of every parameter, from a loss that no output can hide from; an objective has its own."""
    torch.manual_seed(0)
    if pair.info.role == "Objective":
        loss = pair.loss(model)
        if loss.requires_grad:
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}
    call = pair.row.calls(pair.inputs)[-1]
    if isinstance(model, PeftModel) and (targets := labels(pair, call)) is not None:
        call = {**call, "hf_tokens_targets": targets}
    outputs = [t for t in pair.row.read(model(**call)) if t.requires_grad]
    generator = torch.Generator().manual_seed(2)
    loss = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs)
    loss = loss + aux_loss(model) if isinstance(model, PeftModel) else loss
    if torch.is_tensor(loss) and loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def labels(pair, call):
    """Labels for a method that learns from them alone; None for the others."""
    if pair.info.role == "ModelRouter":
        return call["input_ids"] % 2
    return torch.arange(len(call["input_ids"])) % 2 if "targets" in pair.info.cls.words.get("conclude", ()) else None


@cache
def heard(architecture):
    """Blocks whose parameters the loss hears of: a LLaVA reads no further than the last block but one."""
    row, (model, _) = ARCHITECTURES[architecture], built(architecture)
    grads = gradients(ContractPair("probe-drop", row.name), copy.deepcopy(model).train().requires_grad_())
    paths = [path for stream in found(row.name).streams for path in stream.paths]
    return {path for path in paths if any(grad is not None for name, grad in grads.items() if name.startswith(f"{path}."))}


def dead(pair, model, grads):
    """Adapter parameters that got no gradient, though their block did."""
    alive = heard(pair.architecture)
    ours = [name for name in adapter_parameters(model) if any(f".{path}." in f".{name}" for path in alive)]
    hear = {name for name in ours if grads[name] is not None and grads[name].any()}
    # an expert that no token took hears nothing, nor what a norm behind it undoes; but their like in other blocks do
    if pair.info.cls.site == "mlp" or pair.info.role == "AttentionEdit":
        known = {name.rpartition(".")[2] for name in hear}
        hear |= {name for name in ours if name.rpartition(".")[2] in known}
    return [name for name in ours if name not in hear]


def test_gradients_reach_the_adapter_and_not_the_base(pair):
    model = pair.attach(config=pair.config, train=True)
    grads = gradients(pair, model)
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    assert not any(p.requires_grad for p in base_parameters(model).values())
    assert not dead(pair, model, grads)
    assert all(grad.isfinite().all() for grad in grads.values() if grad is not None)
    assert not [name for name in base_parameters(model) if grads[name] is not None]
    assert not adapter_parameters(model) or not pair.info.needs or pair.info.need == "training", "what has parameters says so on its card"


FAR = {"AttentionEdit": 1.0}  # where nothing scales what they add, products of a few of them leave float32


@drawn
def test_gradients_are_finite_far_from_the_start(pair):
    model = pair.attach(config=pair.config, train=True, size=FAR.get(pair.info.role, 3.0))
    assert all(grad.isfinite().all() for grad in gradients(pair, model).values() if grad is not None)


def test_gradients_reach_a_whole_stack(pair):
    start = {"stirred": False} if pair.info.role == "Objective" else {}  # far from its start a preference is settled
    model = pair.stack(lora(pair.streams()[0]), config=pair.config, train=True, **start)
    grads = gradients(pair, model)
    assert not [name for name in dead(pair, model, grads) if ".hf_tokens_methods.default.0." in name]
    assert any(grad.any() for name, grad in grads.items() if "lora_" in name and grad is not None)


@drawn
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a teacher's pass is checkpointed too, for nothing
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_gradient_checkpointing(pair, reentrant):
    model = pair.stack(train=True)
    if not checkpoint(pair, model, reentrant):
        return
    wanted = plain_gradients(pair)
    try:
        grads = gradients(pair, model)
    except UnsupportedError:
        assert reentrant, "non-reentrant checkpointing is supported"
        return
    for name in adapter_parameters(model):
        assert (grads[name] is None) == (wanted[name] is None), name
        if wanted[name] is not None:
            close(grads[name], wanted[name], name)


@cache
def plain_gradients(pair):
    return gradients(pair, pair.stack(train=True))


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
        assert shapes_of(ours[name]) == shapes_of(base[name]), name


def shapes_of(states):
    return [tuple(t.shape) for t in states] if isinstance(states, (tuple, list)) else tuple(states.shape)


@pytest.mark.filterwarnings("ignore")  # torch.compile tells of its graph breaks by warnings
def test_compiled_is_eager_or_refused(one):
    model = one.attach()
    call = one.row.calls(one.inputs)[0]
    torch.compiler.reset()
    with torch.no_grad():
        eager = one.row.read(model(**call))
        try:
            compiled = one.row.read(torch.compile(model, backend="aot_eager")(**call))
        except UnsupportedError:
            return
    all_close(compiled, eager, "compiled")
