"""What the signature and the source of a block's forward show: its parameters, and which of them are its hidden states."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, explain
from .classes import known_class

Read = TypeVar("Read")


def read_once(read: Callable[..., Read]) -> Callable[..., Read]:
    """Remember what a function reads off a class, or makes of names; a compiler takes it for the constant that it is."""
    remembered = cache(read)

    @wraps(read)
    def constant(*args: Any) -> Read:
        return remembered(*args)

    return torch.compiler.assume_constant_result(constant)


@dataclass(frozen=True)
class HiddenIndex:
    """Where a block's hidden states enter its forward, and which element they are when it returns a tuple."""

    name: str
    position: int
    returned: int

    def pick(self, args: tuple, kwargs: dict) -> Any:
        """Them, among the arguments of a call."""
        return kwargs[self.name] if self.name in kwargs else args[self.position]


@read_once
def positional(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional parameters of a block's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(cls.forward).parameters.items() if p.kind in kinds)[1:]


@read_once
def parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the parameters of a module's forward."""
    return tuple(inspect.signature(cls.forward).parameters)[1:]


@read_once
def required(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of those that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    given = inspect.signature(cls.forward).parameters.values()
    return tuple(p.name for p in given if p.default is p.empty and p.kind in named)[1:]


def bound_arguments(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(positional(type(model)), args, strict=False)), **kwargs}


CACHES = ("cache", "past_key_values")  # how a model calls its cache, the newest name first
STATES = ("state", "past_buckets_states")  # and what it goes on from that is none: it tells not how many tokens it has read


def cache_argument(function: Callable[..., Any]) -> str:
    """The name under which a model, or what prepares its inputs, takes a cache; one that takes none is refused."""
    names = inspect.signature(function).parameters
    for name in CACHES:
        if name in names:
            return name
    rule = f"A model that decodes token by token takes a cache as one of {CACHES}"
    raise UnsupportedError(explain(rule, sorted(names), "Choose another model."))


SHIFTS = "prepare_decoder_input_ids_from_labels"  # what a model of Transformers makes of labels that come without ids of the decoder


def decoder_ids(model: nn.Module, labels: Tensor, ignored: int) -> Tensor:
    """What the decoder of a model reads where it is given labels alone, (b n).

    Raises:
        UnsupportedError: Neither the model nor its config says it.
    """
    if SHIFTS in dir(type(model)):
        return getattr(model, SHIFTS)(labels=labels)
    start, pad = (getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None or pad is None:
        rule = "What a decoder reads of labels is known where its config names the token that it begins with, and the one for padding"
        raise UnsupportedError(explain(rule, f"{type(model).__name__} with labels alone", "Pass `decoder_input_ids`."))
    return torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1].masked_fill(labels[:, :-1] == ignored, pad)], dim=1)


@read_once
def hidden_index(cls: type[nn.Module]) -> HiddenIndex:
    """Where the hidden states of a block are."""
    names, known = parameters(cls), _registered(cls)
    name = known.hidden_states_argument_name if known else "hidden_states"
    name = name if name in names else names[0]
    returned = _returned(cls, name)
    if returned is None and known:
        returned = known.return_hidden_states_index
    return HiddenIndex(name, names.index(name), returned or 0)


@read_once
def context_index(cls: type[nn.Module]) -> HiddenIndex | None:
    """The same of the second sequence that a joint block carries along; None where there is none."""
    names, known = parameters(cls), _registered(cls)
    name = known.encoder_hidden_states_argument_name if known else "encoder_hidden_states"
    returned = _returned(cls, name)
    if returned is None and known:
        returned = known.return_encoder_hidden_states_index
    return HiddenIndex(name, names.index(name), returned) if returned is not None and name in names else None


def _registered(cls: type[nn.Module]) -> Any:
    """Diffusers' own note on a block class: which argument and which result are its hidden states."""
    if "diffusers" not in sys.modules or not known_class(cls).__module__.startswith("diffusers."):
        return None
    from diffusers.hooks._helpers import TransformerBlockRegistry

    TransformerBlockRegistry._register()
    return TransformerBlockRegistry._registry.get(known_class(cls))


def forward_tree(cls: type[nn.Module]) -> ast.Module | None:
    """The forward of a class as it is written; None for one that was written at a prompt."""
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except OSError:
        return None
    return ast.parse(textwrap.dedent(source))


def _returned(cls: type[nn.Module], name: str) -> int | None:
    """The place of a variable in the tuple that a forward returns; None where it returns no such tuple.

    Read from the source, which holds for every class; Diffusers' notes cover a few, and one of them (Bria's) swaps the two."""
    tree = forward_tree(cls)  # without one, what comes first is the hidden states, as it is nearly everywhere
    for node in () if tree is None else ast.walk(tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
            names = [item.id if isinstance(item, ast.Name) else None for item in node.value.elts]
            if name in names:
                return names.index(name)
    return None
