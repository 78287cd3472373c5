"""The registered attention functions: they hand queries, keys and scores to whoever asks, and compute what the base model computes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from hf_tokens_kernels import attention_columns, attention_rows
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import UnsupportedError, explain

PREFIX = "hf_tokens_"
BACKENDS = ("sdpa", "eager")
TAP = "_hf_tokens_tap"


@dataclass
class Scores:
    """Attention probabilities of one block, computed in chunks when asked, never as a matrix.

    Attributes:
        q, k: Queries (b h m e) and keys (b g n e) of the call; the last m keys belong to the queries.
        mask: The mask of the call, (b|1 h|1 m n), or None.
        real: Queries that are real tokens, (b m) bool.
        back: Brings what the call's keys received back to the tokens of the stream.
        known: Sums over all real queries that some method has asked for already.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool
    real: Tensor | None = None
    back: Callable[[Tensor, int], Tensor] | None = None
    known: dict[tuple[str, bool], Tensor] = field(default_factory=dict, repr=False)

    def columns(self, weights: Tensor | None = None, reduce: str = "sum") -> Tensor:
        """What each key receives: (b h n), over all real queries or those with a weight, (b m)."""
        key = reduce, torch.is_grad_enabled()
        out = self.known.get(key) if weights is None else None
        if out is None:
            real = None if self.real is None else self.real.to(self.q.dtype)
            heed = real if weights is None else weights if real is None else weights * real
            causal = self.causal and self.q.shape[2] > 1
            out = attention_columns(self.q, self.k, scaling=self.scaling, mask=self.mask, causal=causal, weights=heed, reduce=reduce)
            if weights is None:
                self.known[key] = out
        return out if self.back is None else self.back(out, 2)

    def rows(self, index: Tensor) -> Tensor:
        """The probabilities of chosen queries: index (b r) to (b h r n)."""
        causal = self.causal and self.q.shape[2] > 1
        out = attention_rows(self.q, self.k, index, scaling=self.scaling, mask=self.mask, causal=causal)
        return out if self.back is None else self.back(out, 3)


class Tap(Protocol):
    """What a block's surgery may do at its attention call."""

    def before(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...

    def seen(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, causal: bool) -> None: ...


def base_function(backend: str, module: nn.Module) -> Callable:
    """The attention function that the model would call itself."""
    if backend != "eager":
        return ALL_ATTENTION_FUNCTIONS[backend]
    for cls in type(module).__mro__:
        own = vars(sys.modules[cls.__module__]).get("eager_attention_forward")
        if own is not None:
            return own
    raise UnsupportedError(
        explain("Eager attention scores need the model's own `eager_attention_forward`", type(module).__name__, "Load the model with sdpa.")
    )


def tapped(backend: str) -> Callable:
    """The attention function of a backend with a tap in front."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any):
        base = base_function(backend, module)
        held = vars(module).get(TAP)
        if held is None or not held[0].listening:
            return base(module, query, key, value, attention_mask, **kwargs)
        tap = held[0]
        query, key, value, attention_mask = tap.before(query, key, value, attention_mask)
        scaling = kwargs.get("scaling")
        causal = kwargs.get("is_causal")
        causal = vars(module).get("is_causal", True) if causal is None else causal
        tap.seen(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling, causal)
        return base(module, query, key, value, attention_mask, **kwargs)

    return attention


def open_tap(attention: nn.Module, tap: Tap) -> str:
    """Route a self-attention module through the tapped function; returns the backend it had.

    Raises:
        UnsupportedError: The module does not call the attention interface, or its backend gives no scores.
    """
    config = vars(attention).get("config")
    backend = None if config is None else config._attn_implementation
    if backend is None or backend.removeprefix(PREFIX) not in BACKENDS:
        raise UnsupportedError(
            explain(
                f"Queries, keys and scores need one of the attention backends {list(BACKENDS)}",
                f"{type(attention).__name__} with {backend!r}",
                "Call `model.set_attn_implementation('sdpa')`, or choose a method that does not look at attention.",
            )
        )
    backend = backend.removeprefix(PREFIX)
    name = PREFIX + backend
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, tapped(backend))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[backend])
    vars(attention)[TAP] = (tap,)
    config._attn_implementation_internal = name
    return backend


def tapped_now(attention: nn.Module) -> bool:
    """Whether the model's backend is still a tapped one."""
    return attention.config._attn_implementation.startswith(PREFIX)


def close_tap(attention: nn.Module) -> None:
    """Give a self-attention module its own backend back."""
    vars(attention).pop(TAP, None)
    backend = attention.config._attn_implementation
    if backend is not None and backend.startswith(PREFIX):
        attention.config._attn_implementation_internal = backend.removeprefix(PREFIX)
