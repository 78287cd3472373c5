"""Formats in which keys and values are stored: what packs rows of them, and reads them again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hf_tokens_kernels import Kept, Rounded, pack, pack_along, round_rows, unpack
from torch import Tensor
from torch.nn.functional import normalize


class Shared:
    """A tensor that the parts of several layers hold: what they all do to it is done once, and they go on sharing it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self._last: tuple[Tensor | torch.device, Shared | None, Shared] | None = None  # the last index or device, `more`, and the result

    def pick_rows(self, index: Tensor, more: Shared | None = None) -> Shared:
        """The rows of an index, in this one with `more` behind it."""
        if self._last is not None and self._last[1] is more and isinstance(self._last[0], Tensor) and torch.equal(self._last[0], index):
            return self._last[2]
        rows = self.tensor if more is None else torch.cat([self.tensor, more.tensor])
        self._last = index, more, Shared(rows[index])
        return self._last[2]

    def to(self, device: torch.device) -> Shared:
        """The same on a device."""
        if self._last is None or not isinstance(self._last[0], torch.device) or self._last[0] != device:
            self._last = device, None, Shared(self.tensor.to(device))
        return self._last[2]


Packed = tuple[Tensor | Shared, ...]


def pick_rows(x: Tensor | Shared, index: Tensor, more: Tensor | Shared | None = None) -> Tensor | Shared:
    """Rows of something packed, with `more` rows behind it, which lie in memory as its own do."""
    if isinstance(x, Shared):
        return x.pick_rows(index, more)
    if by_columns(x):
        return (x.mT if more is None else torch.cat([x.mT, more.mT], dim=1)).index_select(1, index).mT
    return x[index] if more is None else torch.cat([x, more])[index]


def spread_rows(x: Tensor, index: Tensor, into: Tensor, total: int) -> Tensor:
    """Rows of an index at other places among so many, which lie in memory as those of x do; the others are of no account."""
    rows = pick_rows(x, index)
    if by_columns(x):
        return x.new_empty(x.shape[1], total).index_copy_(1, into, rows.mT).mT
    return x.new_empty(total, *x.shape[1:]).index_copy_(0, into, rows)


def by_columns(x: Tensor) -> bool:
    """Whether the numbers of a column lie together in memory, as those of codes do."""
    return x.dim() == 2 and x.stride(0) == 1 < x.shape[1]


def raw(x: Tensor | Shared) -> Tensor:
    """The tensor behind something packed."""
    return x.tensor if isinstance(x, Shared) else x


@dataclass(frozen=True)
class Plain:
    """Rows as they are."""

    def pack(self, rows: Tensor) -> Packed:
        """Rows (r e) to what is stored of them, each tensor with a row for each."""
        return (rows,)

    def unpack(self, rows: Tensor) -> Tensor:
        """What is stored, as rows (r e)."""
        return rows

    def rounded(self, rows: Tensor) -> Kept:
        """What is stored as an attention reads it beside what is rounded."""
        return Kept(rows)


@dataclass(frozen=True)
class Quantized:
    """Rows rounded to integers of a few bits, with a scale and a least value for each group of channels.

    Attributes:
        bits: Bits of an integer, at most 8; several share a byte.
        width: Channels of a row.
        group: Channels of a group; the last one may be smaller.
    """

    bits: int
    width: int
    group: int

    def pack(self, rows: Tensor) -> Packed:
        """Rows (r e) to bytes (r m), scales and least values (r g)."""
        return pack(rows, self.bits, self.group)

    def unpack(self, packed: Tensor, scale: Tensor, low: Tensor) -> Tensor:
        """The rows, each within half a scale of what it was."""
        return unpack(packed, scale, low, self.bits, self.group, self.width)

    def rounded(self, packed: Tensor, scale: Tensor, low: Tensor) -> Rounded:
        """What is stored as an attention reads it."""
        return Rounded(packed, scale, low, self.bits, self.group, self.width)


@dataclass(frozen=True)
class QuantizedTokens:
    """Rows rounded to integers of a few bits, with a scale and a least value for each channel of a group of rows, packed together.

    Attributes:
        bits: Bits of an integer, at most 8; several share a byte.
        width: Channels of a row.
        group: Rows of a group, one behind the other in a row of the batch and a head; the last of those packed at once may be smaller.
    """

    bits: int
    width: int
    group: int

    def pack(self, rows: Tensor, where: Tensor, table: GroupTable) -> Packed:
        """Rows (r e) of the entries of `where` (b k n) to bytes (r w) and the numbers (r 1) of their groups, which join the table."""
        lengths = where.sum(dim=-1).flatten()
        many = (lengths + self.group - 1) // self.group
        line = torch.repeat_interleave(torch.arange(len(lengths), device=rows.device), lengths)
        rank = torch.arange(len(rows), device=rows.device) - (lengths.cumsum(0) - lengths)[line]
        index = (many.cumsum(0) - many)[line] + rank // self.group
        codes, scale, low = pack_along(rows, index, self.bits)
        return codes, (index + table.add(scale, low)).int()[:, None]

    def repack(self, rows: Tensor, number: Tensor, table: GroupTable) -> Packed:
        """Other rows (r e) in the groups of these numbers (r 1), whose scales and least values stay."""
        at = number[:, 0]
        return round_rows(rows, table.scale[at], table.low[at], self.bits, 1), number

    def unpack(self, codes: Tensor, number: Tensor, table: GroupTable) -> Tensor:
        """The rows."""
        return self.rounded(codes, number, table).rows(slice(None))

    def rounded(self, codes: Tensor, number: Tensor, table: GroupTable) -> Rounded:
        """What is stored as an attention reads it."""
        return Rounded(codes, table.scale, table.low, self.bits, 1, self.width, number[:, 0])


class GroupTable:
    """Scales and least values (t e) of groups of rows, to which the cells of all parts of a layer refer by number."""

    def __init__(self, like: Tensor, width: int):
        self.scale = self.low = like.new_empty(0, width)

    @property
    def fixed(self) -> bool:
        """Whether a gradient goes through it."""
        return self.scale.requires_grad

    def add(self, scale: Tensor, low: Tensor) -> int:
        """Groups join; returns the number of the first of them."""
        first = len(self.scale)
        self.scale, self.low = torch.cat([self.scale, scale]), torch.cat([self.low, low])
        return first

    def keep(self, stays: Tensor) -> None:
        """Keep some groups, (t) bool."""
        self.scale, self.low = self.scale[stays], self.low[stays]

    def move(self, device: torch.device) -> None:
        """Lie on a device."""
        self.scale, self.low = self.scale.to(device), self.low.to(device)


@dataclass(frozen=True)
class Polar:
    """Rows of two layers as one direction for both, on the great circle between theirs, and a norm for each.

    Attributes:
        toward: Where on the way from the lower layer's direction to the upper one's, in [0, 1].
    """

    toward: float

    def pack_pair(self, lower: Tensor, upper: Tensor) -> tuple[Packed, Packed]:
        """Rows (r e) of both layers to what is stored in each."""
        a, b = normalize(lower, dim=-1), normalize(upper, dim=-1)
        angle = angle_between(a, b)[..., None]
        sine, t = angle.sin(), self.toward
        straight = sine < 1e-6  # alike, or opposite: there is no one great circle
        safe = torch.where(straight, 1, sine)
        mixed = torch.where(straight, (1 - t) * a + t * b, (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / safe)
        shared = Shared(mixed)
        return (shared, lower.norm(dim=-1, keepdim=True)), (shared, upper.norm(dim=-1, keepdim=True))

    def unpack(self, direction: Tensor, norm: Tensor) -> Tensor:
        """The rows of one layer."""
        return direction * norm


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """The angle of unit vectors (... e), exact also where it is small."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


KVFormat = Plain | Quantized | QuantizedTokens | Polar
