"""Which entries of the KV cache stay, and what becomes of the others."""

from __future__ import annotations

import abc
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..kv.storage import KVFormat
from .base import Method


class Folded(NamedTuple):
    """What becomes of the entries that take in those that go.

    Attributes:
        index: Entries that change, (b k r); -1 stands for none.
        keys, values: What they become, (b k r e).
        sizes: How many tokens each entry stands for, (b k n); None leaves that.
    """

    index: Tensor
    keys: Tensor
    values: Tensor
    sizes: Tensor | None = None


class Holding(NamedTuple):
    """How entries are stored that a cache compressor does not keep as they are.

    Attributes:
        keys, values: Formats of the entries beyond the budget.
        scale: Factor on each channel of the keys, (b k e), before they are packed; they are divided by it when they are read. Or None.
        kept: Formats of the keys and values that stay; None leaves them as they are.
    """

    keys: KVFormat
    values: KVFormat
    scale: Tensor | None = None
    kept: tuple[KVFormat, KVFormat] | None = None


class CacheCompressor(Method):
    """Which entries of the KV cache stay behind a prompt, and what becomes of the others.

    The others are dropped; before that, `fold` may let the ones that stay take them in. A method that defines `hold` drops none.
    """

    role, verb, causal, further, decodes = "CacheCompressor", "score", True, ("fold", "hold", "examine"), False

    @abc.abstractmethod
    def score(self, *signals: Any) -> Tensor:
        """The importance of each cached entry, (b n), or (b k n) for each key head; the highest stay."""

    @abc.abstractmethod
    def budget(self, length: int, seen: int) -> int | list[int] | None:
        """How many of `length` entries of a row stay in this block, once the block has seen so many of it, real or inserted.

        A list has a number for each key head; None leaves it to the scores: those above 0 stay.
        """

    def allot(self, scores: dict[int, Tensor], notes: dict[int, Tensor]) -> dict[int, Tensor]:
        """If `allots`: how many entries stay in each block behind a prompt, (b) by layer; each row keeps that share while it decodes.

        Integers count entries; floats are shares of the tokens that the row was given. Or of each key head, (b k).

        Args:
            scores: What `score` returned in each block, -inf where a row has no entry; empty if it names `budget`, and is called later.
            notes: What `observe` returned in each block.
        """
        raise UnsupportedError(explain("A cache compressor that sets `allots` says how", type(self).__name__, "Define its `allot`."))

    def lead(self, before: Tensor) -> Tensor:
        """If it `recites`: ids in front of a part of the prompt that is said again, (b p), given those of the prompt before it, (b n)."""
        return before[:, :0]

    def fold(self) -> Folded | tuple[Tensor, Tensor, Tensor | None] | None:
        """The entries that change as those that go join those that stay.

        Or all keys and values (b k n e), and how many tokens each stands for, (b k n) or None.
        """

    def hold(self) -> Holding | None:
        """How the entries beyond the budget are stored."""


def heavy_hitters(received: Tensor, newer: Tensor, budget: Tensor, recent: float) -> Tensor:
    """Scores that keep the most recent entries, in a part of the budget, and in the rest those that got the most attention, (b k n).

    Args:
        received, newer, budget: The signals of these names.
        recent: Part of the budget that goes to the most recent entries.
    """
    newer = newer if newer.dim() == 3 else newer[:, None]
    return torch.where(newer < (recent * budget[..., None] + 1e-9).floor(), torch.inf, received)


def share_out(weights: Tensor, mean: float) -> Tensor:
    """Shares of the blocks (b l) in proportion to their weights, none above 1, of which the mean is given."""
    layers = weights.shape[1]
    order = weights.sort(dim=1, descending=True).values
    rest = order.flip(1).cumsum(dim=1).flip(1)  # b l: this one and all below
    factor = (mean * layers - torch.arange(layers, dtype=weights.dtype, device=weights.device)).clamp(
        min=0
    ) / rest  # b l: where those above it have 1
    first = (factor * order <= 1 + 1e-9).long().argmax(dim=1, keepdim=True)
    return (factor.gather(1, first) * weights).clamp(max=1)
