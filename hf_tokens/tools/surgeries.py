"""The surgery in a model or a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from peft import inject_adapter_in_model
from torch import nn

from ..engine.block import BlockSurgery
from ..engine.model import ModelSurgery
from ..errors import UnsupportedError, explain
from ..handlers.encoders import check_words, note_encoders
from ..handlers.words import word_of
from ..model.pipelines import apart, denoisers
from ..peft.config import HFTokensConfig
from ..peft.nested import take_off
from ..peft.tuner import names_of_ours
from ..roles.base import Method

Fill = Callable[[str], None]


def models_in(model: Any) -> dict[str, nn.Module]:
    """The models that have a surgery together: the denoisers of a diffusers pipeline by their names, or a plain model, without a name."""
    if isinstance(model, nn.Module):
        return {"": model}
    components = getattr(model, "components", None)
    if not isinstance(components, dict):
        rule = "A surgery needs a torch module or a diffusers pipeline"
        raise UnsupportedError(explain(rule, type(model).__name__, "Pass the model that holds the blocks."))
    found = denoisers(type(model).__name__, components)
    if not found:
        raise UnsupportedError(explain("A pipeline needs a `transformer` or a `unet`", sorted(components), "Pass the denoiser itself."))
    return found


def blocks_in(model: Any) -> list[BlockSurgery]:
    """The surgery of every block in a model or pipeline."""
    return [m for inner in models_in(model).values() for m in inner.modules() if isinstance(m, BlockSurgery)]


def surgeries_of(model: Any) -> dict[str, ModelSurgery]:
    """The surgery of each model by its name; refused where there is none, or none in some of a pipeline's denoisers."""
    models = models_in(model)
    blocks = {name: blocks_in(inner) for name, inner in models.items()}
    if not any(blocks.values()):
        raise UnsupportedError(explain("This needs a model with a surgery", type(model).__name__, "Call get_token_model first."))
    if not all(blocks.values()):
        have = " and ".join(name for name, found in blocks.items() if found)
        raise apart(f"The surgery of a pipeline is in all of its denoisers, not in {have} alone", type(model).__name__, models)
    return {name: found[0].surgery.model for name, found in blocks.items()}


def surgery_of(model: Any) -> ModelSurgery:
    """The surgery of a model; refused where there is none, and of a pipeline with several."""
    surgeries = surgeries_of(model)
    if len(surgeries) > 1:
        raise apart("This is said of one model and its last call", type(model).__name__, surgeries)
    return next(iter(surgeries.values()))


def take_out(model: nn.Module) -> None:
    """Take every surgery out of a model that is not inside a PeftModel."""
    surgery, configs = surgery_of(model), vars(model).get("peft_config", {})
    adapters = names_of_ours(configs)
    take_off(model, adapters)
    for block in blocks_in(model):
        block.detach()
    surgery.detach()
    for name in adapters:
        del configs[name]
    if not configs:  # another library's adapters keep theirs
        vars(model).pop("peft_config", None)
        vars(model).pop("_hf_peft_config_loaded", None)


def inject_all(pipeline: Any, configs: dict[str, HFTokensConfig], adapter_name: str, fill: Fill | None = None) -> None:
    """Put an adapter into each of a pipeline's denoisers, or into none.

    Args:
        pipeline: The pipeline, whose text encoders are noted where a method stands for a word of the prompt.
        configs: The config for each denoiser, by its name.
        adapter_name: Name of the adapter.
        fill: Called with the name of a model for what is to be done as soon as the adapter is in it.
    """
    models = models_in(pipeline)
    words = {word for config in configs.values() for method in config.stack() if (word := word_of(method)) is not None}
    encoders = check_words(pipeline, words) if words else None
    with contextlib.ExitStack() as undone:
        for name, model in models.items():
            undone.enter_context(as_before(model, adapter_name))
            inject_adapter_in_model(configs[name], model, adapter_name)
            if fill is not None:
                fill(name)
        if encoders is not None:
            for surgery in surgeries_of(pipeline).values():
                note_encoders(surgery, encoders)


@contextlib.contextmanager
def as_before(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """An adapter that came into a model meanwhile is taken out again after an error."""
    before = set(vars(model).get("peft_config", {}))
    active = next((block.active_adapters for block in blocks_in(model)), None)
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if adapter_name in set(vars(model).get("peft_config", {})) - before:
            if active is None:
                take_out(model)
            else:
                withdraw(model, adapter_name, active)
            for parameter, flag in trained:
                parameter.requires_grad = flag
        raise


def withdraw(model: nn.Module, adapter_name: str, active: list[str]) -> None:
    """Take one of several adapters out of a model, and switch to these."""
    take_off(model, {adapter_name})
    del vars(model)["peft_config"][adapter_name]
    for block in blocks_in(model):
        del block.hf_tokens_methods[adapter_name]
        block.set_adapter(active)


def instances(model: Any, adapter_name: str) -> list[Method]:
    """Every method of an adapter, in every block."""
    stacks = [block.hf_tokens_methods for block in blocks_in(model)]
    return [method for stack in stacks if adapter_name in stack for method in stack[adapter_name].values()]


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a moment."""
    training = [module for module in model.modules() if module.training]  # a PeftModel and its base need not agree
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
