"""One operation at one size: what it is given, what a user would call instead, and what it cannot do without."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """An operation at one size.

    Attributes:
        name: Name of the operation, and of its form.
        inputs: What it is given, by name.
        call: Ours, which takes the inputs by name and returns floating numbers: those that it chose, where it returns an index.
        peer: What a user would call instead, with the same inputs and the same numbers; None where that needs too much memory.
        bytes: Bytes that must be read and written at least.
        flops: Multiplications and additions that must be done at least.
        backward: Whether training needs its gradient too.
        yardstick: What the time is told in besides, such as a fused attention on the same tensors; it returns other numbers.
    """

    name: str
    inputs: dict[str, Tensor]
    call: Call
    peer: Call | None
    bytes: int
    flops: int
    backward: bool = False
    yardstick: Call | None = None


def nbytes(*tensors: Tensor) -> int:
    """Bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def every(n: int, device: torch.device, dtype: torch.dtype, only: str = "") -> Iterator[Case]:
    """All operations at one size, by the files beside this one; `only` those with this in their name."""
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path != Path(__file__) and only in path.stem:
            yield from importlib.import_module(f"operations.{path.stem}").cases(n, device, dtype)
