"""Which form of an operation runs, its torch reference or its Triton twin, and why."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")
GPUS = ("cuda", "xpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_wanted: ContextVar[str] = ContextVar("hf_tokens_kernels_backend", default="auto")
_listeners: ContextVar[tuple[list[Choice], ...]] = ContextVar("hf_tokens_kernels_listeners", default=())


@dataclass(frozen=True)
class Choice:
    """What was picked for a call.

    Attributes:
        operation: Name of the operation.
        backend: `torch` or `triton`.
        why: The reason, in words.
    """

    operation: str
    backend: str
    why: str


def choose(operation: str, *tensors: Tensor, refuses: str | None = None, small: bool = False) -> bool:
    """Whether the Triton twin runs.

    Args:
        operation: Name of the operation.
        *tensors: What it computes with.
        refuses: What the twin cannot do of this call, in words; None if it can do all.
        small: Whether the reference is the faster one at this size.

    Raises:
        ValueError: `backend("triton")` is set, and the twin cannot run.
    """
    if torch.compiler.is_compiling():  # what is asked for cannot be traced
        return not (small or interpreted() or _lack(tensors) or refuses)
    wanted, listeners = _wanted.get(), _listeners.get()
    if wanted == "auto" and not listeners and tensors[0].is_cpu:
        return False  # interpreted or not, and nobody asks why
    if wanted == "torch":
        backend, why = "torch", "asked for"
    elif lack := _lack(tensors) or refuses:
        if wanted == "triton":
            raise ValueError(f'Under backend("triton") {operation} must run in Triton, got {lack}. Leave the backend at "auto".')
        backend, why = "torch", lack
    elif wanted == "triton":
        backend, why = "triton", "asked for"
    elif interpreted():
        backend, why = "torch", "Triton would be interpreted"
    elif small:
        backend, why = "torch", "a small size"
    else:
        backend, why = "triton", f"{tensors[0].device.type}, {tensors[0].dtype}".replace("torch.", "")
    for heard in listeners:
        heard.append(Choice(operation, backend, why))
    return backend == "triton"


def interpreted() -> bool:
    """Whether Triton interprets its kernels, on the CPU, to test them."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _lack(tensors: tuple[Tensor, ...]) -> str | None:
    """Why no kernel can run on these tensors; None if one can."""
    device = tensors[0].device.type
    if any(t.device.type != device for t in tensors):
        return f"tensors on {' and '.join(sorted({t.device.type for t in tensors}))}"
    if device not in GPUS and not interpreted():
        return f"tensors on {device}"
    strange = [t.dtype for t in tensors if t.is_floating_point() and t.dtype not in DTYPES]
    if strange:
        return f"tensors of {strange[0]}".replace("torch.", "")
    return None if installed() else "an installation without triton"


@functools.cache
def installed() -> bool:
    """Whether there is a Triton."""
    return importlib.util.find_spec("triton") is not None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run operations so: `torch`, `triton`, or `auto`, which goes by device, dtype and size.

    Raises:
        ValueError: There is no such backend.

    >>> import torch
    >>> from hf_tokens_kernels import attention_columns, backend, picks
    >>> with backend("torch"), picks() as picked:
    ...     columns = attention_columns(torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), scaling=0.5)
    >>> picked[0].backend, picked[0].why
    ('torch', 'asked for')
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}. Choose one of them.")
    token = _wanted.set(name)
    try:
        yield
    finally:
        _wanted.reset(token)


@contextlib.contextmanager
def picks() -> Iterator[list[Choice]]:
    """Listen to what is picked: a list that grows with every call of an operation, in its order."""
    heard: list[Choice] = []
    token = _listeners.set((*_listeners.get(), heard))
    try:
        yield heard
    finally:
        _listeners.reset(token)
