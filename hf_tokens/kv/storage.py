"""How entries of a cache are stored: formats that pack rows of keys or values, and the parts of a layer that are in such a format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hf_tokens_kernels import Rounded, merge_attention, pack, packed_attention, ragged_attention, unpack
from torch import Tensor
from torch.nn.functional import normalize, pad

Change = Callable[[Tensor], Tensor]
FEW = 4  # entries of a row whose places are filled up as they leave; where more do, the others close up
ROOM = 16  # cells of a row and key head that are kept free, at least


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
    """Rows of something packed, with `more` rows behind it."""
    if isinstance(x, Shared):
        return x.pick_rows(index, more)
    return x[index] if more is None else torch.cat([x, more])[index]


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


KVFormat = Plain | Quantized | Polar
KVFormats = tuple[KVFormat, KVFormat]
BOTH = 0, 1  # keys and values


@dataclass
class Part:
    """Entries of a layer whose keys are stored in one format, and whose values in one.

    The cells of a row and key head lie one behind the other, in any order, with room behind them, so that a new one needs no copy
    of the others. What layers share, or a gradient goes through, is never changed in place.

    Attributes:
        cells: Where each entry lies in what is packed, (b k n); -1 where it is in another part.
        forms: The formats of keys and values.
        packed: What is stored of keys and of values, each tensor with a row for each cell.
        starts, lengths, ends: Where the cells of a row and key head begin, how many there are, and where its room ends, (b k).
        count: How many cells there are in all.
        scale: Factor on each channel of the keys that were packed, (b k 1 e), or None.
    """

    cells: Tensor
    forms: KVFormats
    packed: tuple[Packed, Packed]
    starts: Tensor
    lengths: Tensor
    ends: Tensor
    count: int
    scale: Tensor | None = None

    @classmethod
    def of(cls, rows: tuple[Tensor, Tensor], where: Tensor, forms: KVFormats, scale: Tensor | None = None) -> Part:
        """Pack keys and values (r e) of the entries of `where` (b k n)."""
        return cls.tight(where, forms, pack_rows(rows, where, forms, scale), scale)

    @classmethod
    def tight(cls, where: Tensor, forms: KVFormats, packed: tuple[Packed, Packed], scale: Tensor | None = None) -> Part:
        """A part without room, its cells in the order of the entries of `where` (b k n)."""
        lengths = where.sum(dim=-1)
        ends = lengths.flatten().cumsum(0).view_as(lengths)
        cells = torch.full(where.shape, -1, dtype=torch.long, device=where.device)
        count = len(raw(packed[0][0]))
        cells[where] = torch.arange(count, device=where.device)
        return cls(cells, forms, packed, ends - lengths, lengths, ends, count, scale)

    @property
    def where(self) -> Tensor:
        """The entries of this part, (b k n) bool."""
        return self.cells >= 0

    @property
    def fixed(self) -> bool:
        """Whether it must not be changed in place."""
        return any(isinstance(x, Shared) or x.requires_grad for states in self.packed for x in states)

    def rows(self, which: int, cells: Tensor) -> Tensor:
        """Keys (0) or values (1) of cells (b k r) that are not -1, as they are read, (r e)."""
        where = cells >= 0
        index = cells[where]
        rows = self.forms[which].unpack(*(raw(x)[index] for x in self.packed[which]))
        if which or self.scale is None:
            return rows
        b, k, _ = where.nonzero(as_tuple=True)
        return rows / self.scale[b, k, 0]

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values (b k r e), in the part's own formats, in cells (b k r); -1 stands for none."""
        where = cells >= 0
        if not bool(where.any()):
            return
        packed = pack_rows((keys[where], values[where]), where, self.forms, self.scale)
        copy = torch.Tensor.index_copy if self.fixed or any(t.requires_grad for t in (keys, values)) else torch.Tensor.index_copy_
        both = zip(self.packed, packed, strict=True)
        self.packed = tuple(tuple(copy(x, 0, cells[where], new) for x, new in zip(*pair, strict=True)) for pair in both)

    def grow(self, m: int) -> None:
        """Count m entries more, which are in other parts."""
        self.cells = pad(self.cells, (0, m), value=-1)

    def settle(self, cells: Tensor) -> Part:
        """The part of other entries, each with one of its cells or -1, (b k n); cells that no entry has are freed."""
        lengths = (cells >= 0).sum(dim=-1)
        most = int((self.lengths - lengths).max()) if lengths.shape == self.lengths.shape and not self.fixed else FEW + 1
        if most <= FEW:
            used = torch.zeros(len(self.packed[0][0]) + 1, dtype=torch.bool, device=cells.device)
            used[cells.flatten()] = True  # the last one stands for -1
            gone = self.where & ~used[self.cells]
            if torch.equal(self.lengths - gone.sum(dim=-1), lengths):
                self._fill_up(cells, torch.where(gone, self.cells, used.numel()), most)
                self.count = int(self.lengths.sum())
                return self
        return self._picked(cells, self.scale)

    def _picked(self, cells: Tensor, scale: Tensor | None) -> Part:
        """A part without room of those of its cells that are not -1, (b k n)."""
        where = cells >= 0
        index = cells[where]
        return Part.tight(where, self.forms, tuple(tuple(pick_rows(x, index) for x in states) for states in self.packed), scale)

    def _fill_up(self, cells: Tensor, gone: Tensor, most: int) -> None:
        """Let the last cells of each row and key head move to where those lie that leave; the others stay where they are."""
        many = gone.shape[-1]
        holes = gone.topk(min(most, many), dim=-1, largest=False).values if most else gone[..., :0]
        for hole in range(holes.shape[-1]):
            moves = holes[..., hole] < len(self.packed[0][0]) + 1
            last = (self.starts + self.lengths - 1).clamp(min=0)
            into = torch.where(moves, holes[..., hole], last)
            for x in (x for states in self.packed for x in states):
                x.index_copy_(0, into[moves], x.index_select(0, last[moves]))
            self.lengths = self.lengths - moves.long()
            moves, last, into = moves[..., None], last[..., None], into[..., None]
            cells = torch.where(moves & (cells == last), into, cells)
            holes = torch.where(moves & (holes == last), into, holes)
        self.cells = cells

    @property
    def readable(self) -> bool:
        """Whether an attention can read it as it is packed."""
        return not self.fixed and all(isinstance(form, type(self.forms[0])) and not isinstance(form, Polar) for form in self.forms)

    def attend(self, q: Tensor, sizes: Tensor | None, **shape: Any) -> tuple[Tensor, ...]:
        """What queries (b h 1 e) read in this part, the log of their sums of exponentials, and by `scores` those of the cells (h/k c).

        Args:
            q: The queries.
            sizes: How many tokens each entry stands for, (b k n), or None.
            **shape: Other arguments of `ragged_attention`.
        """
        where = dict(starts=self.starts, lengths=self.lengths, **shape)
        cells = None if sizes is None else self._by_cell(sizes)
        if self.scale is not None:
            q = q / self.scale.repeat_interleave(q.shape[1] // self.scale.shape[1], dim=1)
        if isinstance(self.forms[0], Plain):
            return ragged_attention(q, self.packed[0][0], self.packed[1][0], sizes=cells, **where)
        packed = (Rounded(*x, form.bits, form.group, form.width) for x, form in zip(self.packed, self.forms, strict=True))
        return packed_attention(q, *packed, sizes=cells, **where)

    def _by_cell(self, x: Tensor) -> Tensor:
        """Something of each entry (b k n) for each cell, (c)."""
        many = len(self.packed[0][0])
        spots = torch.where(self.cells < 0, many, self.cells)  # one more for the entries of other parts
        return x.new_ones(many + 1).scatter_(0, spots.flatten(), x.flatten())[:many]

    def weights(self, scores: Tensor, log: Tensor) -> Tensor:
        """The probability of each entry, the mean of the queries of its head (b k n), by the scores of the cells and the log (b h 1)."""
        by_query = scores[:, self.cells.clamp(min=0)].movedim(0, 2) - log.unflatten(1, (self.cells.shape[1], -1))  # b k g n
        return by_query.exp().mean(dim=2).masked_fill(~self.where, 0)

    def change_rows(self, change: Change) -> Part:
        """The part behind a change of the batch."""
        return self._picked(change(self.cells), None if self.scale is None else change(self.scale))

    def join(self, other: Part) -> Part:
        """Both parts, which are stored in the same formats, as one."""
        new = other.where
        if self.fixed or other.fixed:
            cells = torch.where(new, other.cells + len(raw(self.packed[0][0])), self.cells)
            where = cells >= 0
            index = cells[where]
            both = zip(self.packed, other.packed, strict=True)
            packed = tuple(tuple(pick_rows(x, index, more) for x, more in zip(*pair, strict=True)) for pair in both)
            return Part.tight(where, self.forms, packed, self.scale)
        if bool((self.lengths + other.lengths > self.ends - self.starts).any()):
            self._make_room(self.lengths + other.lengths)
        spots = (self.starts + self.lengths)[..., None] + new.cumsum(dim=-1) - 1
        into, taken_from = spots[new], other.cells[new]
        for pair in zip(self.packed, other.packed, strict=True):
            for x, more in zip(*pair, strict=True):
                x.index_copy_(0, into, more.index_select(0, taken_from))
        self.cells, self.lengths = torch.where(new, spots, self.cells), self.lengths + other.lengths
        self.count += other.count
        return self

    def _make_room(self, needed: Tensor) -> None:
        room = needed + (needed // 8).clamp(min=ROOM)
        ends = room.flatten().cumsum(0).view_as(room)
        starts, where = ends - room, self.where
        cells = torch.where(where, self.cells + (starts - self.starts)[..., None], -1)
        old, new, total = self.cells[where], cells[where], int(ends.flatten()[-1])

        def move(x: Tensor) -> Tensor:
            return x.new_empty(total, *x.shape[1:]).index_copy_(0, new, x.index_select(0, old))

        self.packed = tuple(tuple(move(x) for x in states) for states in self.packed)
        self.cells, self.starts, self.ends = cells, starts, ends

    def to(self, device: torch.device) -> Part:
        """The part on a device."""
        packed = tuple(tuple(x.to(device) for x in states) for states in self.packed)
        where = (x.to(device) for x in (self.starts, self.lengths, self.ends))
        return Part(self.cells.to(device), self.forms, packed, *where, self.count, None if self.scale is None else self.scale.to(device))

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored, without the room."""
        yield from (x.tensor if isinstance(x, Shared) else x[: self.count] for states in self.packed for x in states)
        yield from () if self.scale is None else (self.scale,)


def pack_rows(rows: tuple[Tensor, Tensor], where: Tensor, forms: KVFormats, scale: Tensor | None) -> tuple[Packed, Packed]:
    """Keys, times a scale (b k 1 e) if there is one, and values (r e) of the entries of `where` (b k n), packed."""
    keys, values = rows
    if scale is not None:
        b, k, _ = where.nonzero(as_tuple=True)
        keys = keys * scale[b, k, 0]
    return forms[0].pack(keys), forms[1].pack(values)


def attend(
    parts: list[Part], q: Tensor, sizes: Tensor | None, sinks: Tensor | None, weighs: bool, **shape: Any
) -> tuple[Tensor, Tensor | None]:
    """What queries (b h 1 e) read of parts (b h 1 f), and if it `weighs` the probability of each entry, (b k n), where it lies."""
    read = [part.attend(q, sizes, scores=weighs, **shape) for part in parts]
    out = merge_attention([some[:2] for some in read], sinks)
    if not weighs:
        return out, None
    logs = torch.stack([log for _, log, _ in read])
    logs = logs if sinks is None else torch.cat([logs, sinks.to(logs).view(1, 1, -1, 1).expand_as(logs[:1])])
    log = logs.logsumexp(dim=0)
    return out, sum(part.weights(scores, log) for part, (_, _, scores) in zip(parts, read, strict=True))


def dense(parts: list[Part], which: int, width: int) -> Tensor:
    """The keys (0) or values (1) of parts, (b k n e); zeros where there is none."""
    shape = parts[0].cells.shape
    out: Tensor | None = None
    for part in parts:
        where, rows = part.where, part.rows(which, part.cells)
        if len(parts) == 1 and bool(where.all()):
            return rows.view(*shape, width)
        out = rows.new_zeros(*shape, width) if out is None else out
        out[where] = rows
    return out


def read(parts: list[Part], which: int, index: Tensor) -> Tensor:
    """Keys (0) or values (1) of entries (b k r) of parts, (b k r e)."""
    out: Tensor | None = None
    for part in parts:
        cells = part.cells.gather(-1, index)
        rows = part.rows(which, cells)
        out = rows.new_zeros(*index.shape, rows.shape[1]) if out is None else out
        out[cells >= 0] = rows
    return out


def put(parts: list[Part], part: Part) -> list[Part]:
    """Parts with the entries of one more, which leave the others."""
    out, same_format = [], None
    for old in parts:
        if old.forms == part.forms:
            same_format = old
        elif bool((old.where & part.where).any()):
            out.append(old.settle(old.cells.masked_fill(part.where, -1)))
        else:
            out.append(old)
    return filled_parts([*out, part if same_format is None else same_format.join(part)])


def filled_parts(parts: list[Part]) -> list[Part]:
    """The parts that hold entries, or the first if none does."""
    return [part for part in parts if part.count] or parts[:1]
