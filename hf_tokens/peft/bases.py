"""The base that an adapter was made for, and the one that it is put into."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ..errors import AdapterError, explain
from .config import HFTokensConfig

Streams = dict[str, list]  # by name of a stream: how many blocks it has, how wide they are, and where


def type_of(model: nn.Module) -> str:
    """What a model is: the type that its config names, whatever its head; elsewhere its class."""
    return model.config.model_type if isinstance(model, PreTrainedModel) else type(model).__name__


def check_base(model: nn.Module, config: HFTokensConfig, now: Streams) -> None:
    """Compare the base that an adapter was made for with this one."""
    if config.base is not None and config.base != now:
        text = lambda streams: ", ".join(f"{name}: {n} blocks of width {width} at {path}" for name, (n, width, path) in streams.items())
        try:
            made_for = text(config.base)
        except (AttributeError, TypeError, ValueError):
            made_for = repr(config.base)
        rule = f"This adapter was made for a base with {made_for}"
        raise AdapterError(explain(rule, text(now), "Load the base model that its card names."))
    kind = type_of(model)
    if config.base_type not in (None, kind):
        remedy = "Load the base model that its card names; or delete `base_type` from its config if you mean it."
        raise AdapterError(explain(f"This adapter was made for a model of type {config.base_type!r}", repr(kind), remedy))
    config.note_base(now, kind)
