"""The registered attention functions: they pass queries, keys and scores to a block's tap, and compute what the base model computes."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedError, explain
from .call import AttentionCall

TAPPED_PREFIX = "hf_tokens_"
BACKENDS = ("sdpa", "eager")
TAP = "_hf_tokens_tap"
STRANGE = ("sinks", "indices", "block_indices")  # arguments of attention functions that change the probabilities
OPEN: weakref.WeakSet[Tap] = weakref.WeakSet()  # the taps for whom the functions stand in the registries


class TappedName(str):
    """The name of a backend's tapped function: the registries look that up, and code that compares names still finds its backend. A copy is
    the backend's own name: a tap that was copied opens again."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.removeprefix(TAPPED_PREFIX),)

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.removeprefix(TAPPED_PREFIX)

    def __hash__(self) -> int:
        return hash(str(self))

    def __eq__(self, other: object) -> bool:
        return other in (str(self), self.removeprefix(TAPPED_PREFIX))

    def __ne__(self, other: object) -> bool:
        return not self == other


class Tap(Protocol):
    """What a block's surgery does with its attention call: it returns those in its place, each for some of the queries, in their order."""

    noting: bool  # whether the call that is under way is to be noted

    def note_call(self, call: AttentionCall) -> list[Callable[[], AttentionCall]]: ...

    def read_packed(self, call: AttentionCall) -> Tensor | None: ...

    def read_summed(self) -> Tensor | None: ...


def base_function(backend: str, module: nn.Module) -> Callable:
    """The attention function that the model would call itself."""
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    forward = inspect.unwrap(type(module).forward)
    for name in forward.__code__.co_names:
        if "eager" in name and inspect.isfunction(forward.__globals__.get(name)):
            return forward.__globals__[name]
    rule = "Eager attention scores need an attention that names its own eager function"
    raise UnsupportedError(explain(rule, type(module).__name__, "Load the model with sdpa."))


def tapped(backend: str) -> Callable:
    """The attention function of a backend with a tap in front."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any):
        base = base_function(backend, module)
        tap = vars(module).get(TAP, (None,))[0]
        if tap is None or not tap.noting:
            return base(module, query, key, value, attention_mask, **kwargs)
        scaling, causal = kwargs.get("scaling"), False if backend == "eager" else kwargs.get("is_causal")  # eager goes by the mask alone
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        causal = vars(module).get("is_causal", True) if causal is None else causal
        more = dict(bias=kwargs.pop("position_bias", None), softcap=kwargs.get("softcap"), sinks=kwargs.get("s_aux"))
        strange = tuple(name for name in STRANGE if kwargs.get(name) is not None)
        call = AttentionCall(query, key, value, attention_mask, scaling, causal, strange=strange, **more)

        def run(make: Callable[[], AttentionCall]) -> tuple[Tensor, Tensor | None]:
            part = make()
            biased = {} if part.bias is None else {"position_bias": part.bias}
            return base(module, part.q, part.k, part.v, part.mask, **biased, **kwargs)

        calls = tap.note_call(call)
        out = tap.read_packed(call)
        if out is None and base is sdpa_attention_forward and not kwargs.get("dropout"):
            out = tap.read_summed()
        if out is not None:
            return out, None
        if len(calls) == 1:
            return run(calls[0])
        again = torch.is_grad_enabled()  # the backward pass makes each again, so that no more than one part is held
        parts = [checkpoint(run, make, use_reentrant=False) if again else run(make) for make in calls]
        out, weights = zip(*parts, strict=True)
        return torch.cat(out, dim=1), None if weights[0] is None else torch.cat(weights, dim=2)

    return attention


def open_tap(attention: nn.Module, tap: Tap) -> str:
    """Route a self-attention module through the tapped function; returns the backend it had. A module that does not call the attention
    interface is refused, and a backend that gives no scores."""
    config = vars(attention).get("config")
    backend = None if config is None else config._attn_implementation
    if backend is None or backend.removeprefix(TAPPED_PREFIX) not in BACKENDS:
        rule = f"Queries, keys and scores need one of the attention backends {list(BACKENDS)}"
        remedy = "Call `model.set_attn_implementation('sdpa')`, or choose a method that does not look at attention."
        raise UnsupportedError(explain(rule, f"{type(attention).__name__} with {backend!r}", remedy))
    backend = backend.removeprefix(TAPPED_PREFIX)
    vars(attention)[TAP] = (tap,)
    OPEN.add(tap)
    config._attn_implementation_internal = tapped_name(backend)
    return backend


def tapped_name(backend: str) -> TappedName:
    """Name of a backend's tapped function, in the registries with its mask function."""
    name = TappedName(TAPPED_PREFIX + backend)
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(str(name), tapped(backend))
        ALL_MASK_ATTENTION_FUNCTIONS.register(str(name), ALL_MASK_ATTENTION_FUNCTIONS[backend])
    return name


def leave_registries(tap: Tap) -> None:
    """A tap is closed: the functions of the last one leave the registries."""
    OPEN.discard(tap)
    if not OPEN:
        for name in [TAPPED_PREFIX + backend for backend in BACKENDS if TAPPED_PREFIX + backend in ALL_ATTENTION_FUNCTIONS]:
            for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                del registry._global_mapping[name]  # what `register` writes; `del registry[name]` reaches another one


def tapped_now(attention: nn.Module) -> bool:
    """Whether the model's backend is still a tapped one."""
    return attention.config._attn_implementation.startswith(TAPPED_PREFIX)


def close_tap(attention: nn.Module, tap: Tap) -> None:
    """Give a self-attention module its own backend back."""
    vars(attention).pop(TAP, None)
    backend = attention.config._attn_implementation
    if backend is not None and backend.startswith(TAPPED_PREFIX):
        attention.config._attn_implementation_internal = backend.removeprefix(TAPPED_PREFIX)
    leave_registries(tap)
