"""The books of cached entries: where each stands in the sequence, which are there, and how to pick some of them."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass

import torch
from hf_tokens_kernels.lazily import lazy
from torch import Tensor


@dataclass
class Arrival:
    """The tokens that the next `update` of a layer will bring.

    Attributes:
        origins: Place of each token in the sequence that the model was given, (b m).
        filled: Tokens that are there at all, (b m) bool; None if all are.
        fresh: Tokens that a surgery inserted, (b m) bool; None if none is.
        total: Length of the given sequence once this chunk is in.
        sizes: How many tokens each stands for, (b m), where a key counts by its size; None for one each.
    """

    origins: Tensor
    filled: Tensor | None
    fresh: Tensor | None
    total: int
    sizes: Tensor | None = None


class Stored:
    """The books of the entries that a layer held at one time, in the order in which they lay, which is computed when it is read.

    Attributes:
        length: How many there were, filler included.
    """

    def __init__(
        self, origins: Tensor, filled: Tensor | None = None, entries: dict[str, Tensor] | None = None, slots: Tensor | None = None
    ):
        self.length = origins.shape[-1]
        self._origins, self._filled, self._entries, self._slots = origins, filled, entries or {}, slots

    @lazy
    def origins(self) -> Tensor:
        """Place of each in the sequence that the model was given, (b n) or (b k n)."""
        return self._as_it_lay(self._origins)

    @lazy
    def filled(self) -> Tensor | None:
        """Which of them are there at all, (b n) or (b k n); None if all are."""
        return self._as_it_lay(self._filled)

    @lazy
    def sizes(self) -> Tensor | None:
        """How many tokens each stands for, (b n) or (b k n); None if one each."""
        return self.entries("sizes")

    def entries(self, name: str) -> Tensor | None:
        """What was remembered of each of them, (b n) or (b k n); None if nothing."""
        return self._as_it_lay(self._entries.get(name))

    def _as_it_lay(self, x: Tensor | None) -> Tensor | None:
        if x is None or self._slots is None:
            return x
        slots, x = alike(self._slots, x)
        return torch.empty_like(x).scatter_(-1, slots, x)


class Record(dict):
    """What methods remember of the rows of one cache layer: tensors (b ...), which follow the rows, by a method's key and a name.

    `entries` holds (b n) or (b k n) tensors that follow the entries; a new one has zero in them, but for a size, which is one.
    """

    def __init__(self):
        super().__init__()
        self.entries: dict[str, Tensor] = {}

    def own(self, key: str) -> OwnRecord:
        """What one method remembers."""
        return OwnRecord(self, key)


class OwnRecord(MutableMapping):
    """The part of a record that is a method's own, by names alone; `entries` are those of all."""

    def __init__(self, record: Record, key: str):
        self.record, self.key = record, key

    @property
    def entries(self) -> dict[str, Tensor]:
        return self.record.entries

    def __getitem__(self, name: str) -> Tensor:
        return self.record[self.key, name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.record[self.key, name] = value

    def __delitem__(self, name: str) -> None:
        del self.record[self.key, name]

    def __iter__(self) -> Iterator[str]:
        return (name for key, name in self.record if key == self.key)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def append(old: Tensor, new: Tensor) -> Tensor:
    """Something of each entry, (b n) or (b k n), and behind it that of new tokens, (b m)."""
    return torch.cat([old, cells_of(new, old.shape[1]) if old.dim() == 3 else new], dim=-1)


def stretch(old: Tensor, new: Tensor) -> Tensor:
    """Something of each entry, (b n) or (b k n), and of the tokens behind them (b m), (b 1|k n+m)."""
    return append(old[:, None] if old.dim() == 2 else old, new)


def cells_of(x: Tensor, heads: int) -> Tensor:
    """Something of each entry, (b n) or (b k n), as (b k n)."""
    return x if x.dim() == 3 else x[:, None].expand(-1, heads, -1)


def alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Two things of each entry, (b n) or (b k n), both as (b n) or both as (b k n)."""
    heads = max(x.shape[1] if x.dim() == 3 else 0, y.shape[1] if y.dim() == 3 else 0)
    return (cells_of(x, heads), cells_of(y, heads)) if heads else (x, y)


def bring(x: Tensor, places: Tensor, dim: int) -> Tensor:
    """What lies at the places of entries, (b n) or (b k n), along an axis of x (b h ...)."""
    places = places[:, None] if places.dim() == 2 else places.repeat_interleave(x.shape[1] // places.shape[1], dim=1)
    places = places.view(*places.shape[:2], *[1] * (dim - 2), -1, *[1] * (x.dim() - dim - 1))
    return x.gather(dim, places.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))


def pick_entries(x: Tensor, index: Tensor) -> Tensor:
    """Of something of each entry, (b n) or (b k n), that of some entries, (b r) or (b k r)."""
    x, index = alike(x, index)
    return x.gather(-1, index)
