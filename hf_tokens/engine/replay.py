"""Blocks that a checkpoint runs again in the backward pass: what they need is held as long as the tensor that they were given."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain

if TYPE_CHECKING:
    from .block import BlockSurgery

Held = TypeVar("Held")


def in_backward() -> bool:
    """Whether the code runs for a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Replays(Generic[Held]):
    """For each block and tensor that it was given, what it needs to be run again. What a graph no longer holds will not come again."""

    def __init__(self):
        self._held: dict[int, list[tuple[weakref.ref, Held]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}

    def hold(self, block: BlockSurgery, hidden: Tensor, make: Callable[[], Held]) -> None:
        """Hold it where the model checkpoints the block as a whole."""
        if torch.is_grad_enabled() and block.checkpointed_outside:
            live = [(ref, value) for ref, value in self._held.get(block.index, ()) if ref() is not None]
            self._held[block.index] = [*live, (weakref.ref(hidden), make())]

    def known(self, block: BlockSurgery) -> bool:
        """Whether anything is held for a block."""
        return block.index in self._held

    def find(self, block: BlockSurgery, hidden: Tensor) -> Held | None:
        """What was held first for this tensor; None if nothing was."""
        return next((value for ref, value in self._held.get(block.index, ()) if ref() is hidden), None)

    def find_last(self, block: BlockSurgery, hidden: Tensor) -> Held:
        """What was held last for it.

        Raises:
            UnsupportedError: Nothing was.
        """
        values = [value for ref, value in self._held.get(block.index, ()) if ref() is hidden]
        if not values:
            raise other_tensors(block)
        return values[-1]

    @property
    def counts(self) -> dict[int, int]:
        """How much is held for each block, by its index."""
        return {index: len(values) for index, values in self._held.items()}


def other_tensors(block: BlockSurgery) -> UnsupportedError:
    """The error for a block that is run again on tensors that it was not given."""
    rule = "Gradient checkpointing of whole blocks must hand the block the same tensors again"
    return UnsupportedError(explain(rule, f"other ones at {block.path}", "Use non-reentrant checkpointing."))
