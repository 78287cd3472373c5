"""Where entries of a cache lie: the parts of a layer, each with keys in one format and values in one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hf_tokens_kernels import packed_attention, ragged_attention
from torch import Tensor
from torch.nn.functional import pad

from .formats import GroupTable, KVFormat, Packed, Plain, Polar, Shared, pick_rows, raw, spread_rows

Change = Callable[[Tensor], Tensor]
FEW = 4  # entries of a row whose places are filled up as they leave; where more do, the others close up
ROOM = 16  # cells of a row and key head that are kept free, at least

KVFormats = tuple[KVFormat, KVFormat]
Tables = tuple[GroupTable | None, GroupTable | None]
Spots = tuple[Tensor, ...]  # the row, head and place of each of some entries, in their order
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
        tables: Scales of groups of keys and of values, where a format packs several rows together; all parts of a layer share them.
    """

    cells: Tensor
    forms: KVFormats
    packed: tuple[Packed, Packed]
    starts: Tensor
    lengths: Tensor
    ends: Tensor
    count: int
    scale: Tensor | None = None
    tables: Tables = (None, None)

    @classmethod
    def of(
        cls, rows: tuple[Tensor, Tensor], where: Tensor, forms: KVFormats, scale: Tensor | None = None, tables: Tables = (None, None)
    ) -> Part:
        """Pack keys and values (r e) of the entries of `where` (b k n)."""
        packed = pack_both(rows, where, where.nonzero(as_tuple=True), forms, scale, tables)
        return cls.tight(where, forms, packed, scale, tables)

    @classmethod
    def tight(
        cls,
        where: Tensor,
        forms: KVFormats,
        packed: tuple[Packed, Packed],
        scale: Tensor | None = None,
        tables: Tables = (None, None),
    ) -> Part:
        """A part without room, its cells in the order of the entries of `where` (b k n)."""
        lengths = where.sum(dim=-1)
        ends = lengths.flatten().cumsum(0).view_as(lengths)
        cells = torch.full(where.shape, -1, dtype=torch.long, device=where.device)
        count = len(raw(packed[0][0]))
        cells[where] = torch.arange(count, device=where.device)
        return cls(cells, forms, packed, ends - lengths, lengths, ends, count, scale, tables)

    @property
    def where(self) -> Tensor:
        """The entries of this part, (b k n) bool."""
        return self.cells >= 0

    @property
    def fixed(self) -> bool:
        """Whether it must not be changed in place."""
        shared = any(isinstance(x, Shared) or x.requires_grad for states in self.packed for x in states)
        return shared or any(table is not None and table.fixed for table in self.tables)

    def read(self, which: int, cells: Tensor, spots: Spots) -> Tensor:
        """Keys (0) or values (1) in cells (r), which belong to these rows and heads, (r e)."""
        table = self.tables[which]
        rows = self.forms[which].unpack(*(raw(x)[cells] for x in self.packed[which]), *(() if table is None else (table,)))
        return rows if which or self.scale is None else rows / self.scale[spots[0], spots[1], 0]

    def write(self, cells: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values (b k r e), in the part's own formats, in cells (b k r); -1 stands for none."""
        where = cells >= 0
        if not bool(where.any()):
            return
        states = scaled(keys[where], where.nonzero(as_tuple=True), self.scale), values[where]
        packed = tuple(self._packed_again(which, rows, cells[where]) for which, rows in enumerate(states))
        copy = torch.Tensor.index_copy if self.fixed or any(t.requires_grad for t in (keys, values)) else torch.Tensor.index_copy_
        both = zip(self.packed, packed, strict=True)
        self.packed = tuple(tuple(copy(x, 0, cells[where], new) for x, new in zip(*pair, strict=True)) for pair in both)

    def _packed_again(self, which: int, rows: Tensor, cells: Tensor) -> Packed:
        """Other keys (0) or values (1) (r e) of cells (r), packed; those of a group keep its scale."""
        form, table = self.forms[which], self.tables[which]
        return form.pack(rows) if table is None else form.repack(rows, self.packed[which][1][cells], table)

    def moved(self, spots: Spots, where: Tensor, forms: KVFormats, tables: Tables) -> tuple[Packed, Packed]:
        """Some of its entries, those of `where` (b k n), in other formats; what is in them already is not packed again."""
        cells = self.cells[spots]
        return tuple(
            tuple(pick_rows(x, cells) for x in self.packed[which])
            if forms[which] == self.forms[which]
            else pack_rows(forms[which], self.read(which, cells, spots), where, tables[which])
            for which in BOTH
        )

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
                none = len(self.packed[0][0]) + 1
                holes = torch.where(gone, self.cells, none)
                few = min(most, holes.shape[-1])
                return self._fill_up(cells, holes.amin(dim=-1, keepdim=True) if few == 1 else holes.topk(few, dim=-1, largest=False).values)
        return self._picked(cells, self.scale)

    def without(self, spots: Spots) -> Part:
        """The part without some of its entries, whose cells are freed."""
        cells = self.cells.index_put(spots, self.cells.new_tensor(-1))
        line, many, rank = ranks(spots, self.lengths)
        most = int(many.max())
        if most > FEW or self.fixed:
            return self._picked(cells, self.scale)
        holes = cells.new_full((len(many), most), len(self.packed[0][0]) + 1)
        holes[line, rank] = self.cells[spots]
        return self._fill_up(cells, holes.view(*self.lengths.shape, most))

    def vacate(self, place: Tensor, leaves: Tensor) -> Part:
        """The part without the entries at a place of each row and key head, (b k 1), where they leave, (b k 1) bool: no other moves."""
        if not self.count:
            return self
        cell, last = self.cells.gather(-1, place), (self.starts + self.lengths - 1).clamp(min=0)[..., None]
        leaves = leaves & (cell >= 0)
        into = torch.where(leaves, cell, last)
        for x in (x for states in self.packed for x in states):
            x.index_copy_(0, into.flatten(), x.index_select(0, last.flatten()))
        cells = self.cells.scatter(-1, place, cell.masked_fill(leaves, -1))
        self.cells = torch.where(cells == last, into, cells)
        self.lengths, self.count = self.lengths - leaves[..., 0].long(), self.count - int(leaves.sum())
        return self

    def _picked(self, cells: Tensor, scale: Tensor | None) -> Part:
        """A part without room of those of its cells that are not -1, (b k n)."""
        where = cells >= 0
        index = cells[where]
        return Part.tight(
            where, self.forms, tuple(tuple(pick_rows(x, index) for x in states) for states in self.packed), scale, self.tables
        )

    def _fill_up(self, cells: Tensor, holes: Tensor) -> Part:
        """Free cells (b k h), beyond the last one where there are fewer: the last entries of a row and head move there, the others stay."""
        none = len(self.packed[0][0]) + 1
        for i in range(holes.shape[-1]):
            into, last = holes[..., i : i + 1], (self.starts + self.lengths - 1).clamp(min=0)[..., None]
            moves = into < none
            spots = into[moves], last[moves]
            for x in (x for states in self.packed for x in states):
                x.index_copy_(0, spots[0], x.index_select(0, spots[1]))
            self.lengths, self.count = self.lengths - moves[..., 0].long(), self.count - len(spots[0])
            last, into = last.masked_fill(~moves, none), into.masked_fill(~moves, none)
            cells = torch.where(cells == last, into, cells)
            holes = torch.where(holes == last, into, holes) if i + 1 < holes.shape[-1] else holes
        self.cells = cells
        return self

    @property
    def readable(self) -> bool:
        """Whether an attention can read it as it is packed."""
        return not self.fixed and not any(isinstance(form, Polar) for form in self.forms)

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
        if self.forms == (Plain(), Plain()):
            return ragged_attention(q, self.packed[0][0], self.packed[1][0], sizes=cells, **where)
        both = zip(self.packed, self.forms, self.tables, strict=True)
        packed = (form.rounded(*x) if table is None else form.rounded(*x, table) for x, form, table in both)
        return packed_attention(q, *packed, sizes=cells, **where)

    def _by_cell(self, x: Tensor) -> Tensor:
        """Something of each entry (b k n) for each cell, (c)."""
        many = len(self.packed[0][0])
        spots = torch.where(self.cells < 0, many, self.cells)  # one more for the entries of other parts
        return x.new_ones(many + 1).scatter_(0, spots.flatten(), x.flatten())[:many]

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
            return Part.tight(where, self.forms, packed, self.scale, self.tables)
        spots = new.nonzero(as_tuple=True)
        cells = other.cells[spots]
        return self.take_in(spots, tuple(tuple(x.index_select(0, cells) for x in states) for states in other.packed))

    def take_in(self, spots: Spots, packed: tuple[Packed, Packed]) -> Part:
        """The part with entries more, whose keys and values are packed in its formats."""
        line, many, rank = ranks(spots, self.lengths)
        lengths = self.lengths + many.view_as(self.lengths)
        if bool((lengths > self.ends - self.starts).any()):
            self._make_room(lengths)
        into = (self.starts + self.lengths).flatten()[line] + rank
        for pair in zip(self.packed, packed, strict=True):
            for x, more in zip(*pair, strict=True):
                x.index_copy_(0, into, more)
        self.cells, self.lengths, self.count = self.cells.index_put(spots, into), lengths, self.count + len(line)
        return self

    def extend(self, rows: tuple[Tensor, Tensor]) -> None:
        """Store one entry more of each row and key head as it comes, (b k 1 e), in plain formats."""
        if bool((self.lengths >= self.ends - self.starts).any()):
            self._make_room(self.lengths + 1)
        into = self.starts + self.lengths
        at = into.flatten()
        for (x,), new in zip(self.packed, rows, strict=True):
            x.index_copy_(0, at, new.flatten(0, 2))
        self.cells, self.lengths, self.count = torch.cat([self.cells, into[..., None]], dim=-1), self.lengths + 1, self.count + into.numel()

    def takes_each(self, other: Part) -> bool:
        """Whether `take_each` can take entries of another part in."""
        both = zip(self.forms, other.forms, self.tables, other.tables, strict=True)
        grouped = any(new != old and (its is not None or table is not None) for new, old, its, table in both)
        scales = self.scale is not None or other.scale is not None
        kept = any(new == old for new, old in zip(self.forms, other.forms, strict=True))
        return not (self.fixed or other.fixed or grouped or scales and (kept or other.scale is not None))

    def take_each(self, other: Part, place: Tensor) -> None:
        """Take the entry at a place of each row and key head, (b k 1), over from another part, in place; what is packed alike stays so."""
        if bool((self.lengths >= self.ends - self.starts).any()):
            self._make_room(self.lengths + 1)
        cell, into = other.cells.gather(-1, place), self.starts + self.lengths
        at, to = cell.flatten(), into.flatten()
        for which in BOTH:
            rows = [x.index_select(0, at) for x in other.packed[which]]
            if self.forms[which] != other.forms[which]:
                read = other.forms[which].unpack(*rows)
                rows = self.forms[which].pack(read if which or self.scale is None else read * self.scale.flatten(0, 2))
            for x, new in zip(self.packed[which], rows, strict=True):
                x.index_copy_(0, to, new)
        self.cells.scatter_(-1, place, into[..., None])
        self.lengths, self.count = self.lengths + 1, self.count + into.numel()
        other.give_each(place, cell)

    def give_each(self, place: Tensor, cell: Tensor) -> None:
        """Let the entry at a place of each row and key head go, (b k 1), which lies in this cell: the last one moves there."""
        last = (self.starts + self.lengths - 1)[..., None]
        at, ends = cell.flatten(), last.flatten()
        for x in (x for states in self.packed for x in states):
            x.index_copy_(0, at, x.index_select(0, ends))
        cells = torch.where(self.cells == last, cell, self.cells)
        self.cells, self.lengths = cells.scatter_(-1, place, -1), self.lengths - 1
        self.count -= cell.numel()

    def _make_room(self, needed: Tensor) -> None:
        room = needed + (needed // 8).clamp(min=ROOM)
        ends = room.flatten().cumsum(0).view_as(room)
        starts, where = ends - room, self.where
        cells = torch.where(where, self.cells + (starts - self.starts)[..., None], -1)
        old, new, total = self.cells[where], cells[where], int(ends.flatten()[-1])
        self.packed = tuple(tuple(spread_rows(x, old, new, total) for x in states) for states in self.packed)
        self.cells, self.starts, self.ends = cells, starts, ends

    def to(self, device: torch.device) -> Part:
        """The part on a device."""
        packed = tuple(tuple(x.to(device) for x in states) for states in self.packed)
        where = (x.to(device) for x in (self.starts, self.lengths, self.ends))
        scale = None if self.scale is None else self.scale.to(device)
        for table in self._tables():
            table.move(device)
        return Part(self.cells.to(device), self.forms, packed, *where, self.count, scale, self.tables)

    def _tables(self) -> list[GroupTable]:
        return [table for table in self.tables if table is not None]

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored, without the room."""
        yield from (x.tensor if isinstance(x, Shared) else x[: self.count] for states in self.packed for x in states)
        yield from () if self.scale is None else (self.scale,)
        yield from (t for table in self._tables() for t in (table.scale, table.low))


def scaled(keys: Tensor, spots: Spots, scale: Tensor | None) -> Tensor:
    """Keys (r e) of entries, times a scale (b k 1 e) if there is one."""
    return keys if scale is None else keys * scale[spots[0], spots[1], 0]


def pack_rows(form: KVFormat, rows: Tensor, where: Tensor, table: GroupTable | None) -> Packed:
    """Keys or values (r e) of the entries of `where` (b k n), packed."""
    return form.pack(rows) if table is None else form.pack(rows, where, table)


def pack_both(
    rows: tuple[Tensor, Tensor], where: Tensor, spots: Spots, forms: KVFormats, scale: Tensor | None, tables: Tables
) -> tuple[Packed, Packed]:
    """Keys and values (r e) of the entries of `where` (b k n), packed, the keys times a scale (b k 1 e) if there is one."""
    states = scaled(rows[0], spots, scale), rows[1]
    return tuple(pack_rows(form, x, where, table) for form, x, table in zip(forms, states, tables, strict=True))


def ranks(spots: Spots, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of entries the number of their row and head, like (b k), how many there are of each, and which of these each is."""
    line = spots[0] * like.shape[1] + spots[1]
    many = torch.bincount(line, minlength=like.numel())
    return line, many, torch.arange(len(line), device=line.device) - (many.cumsum(0) - many)[line]
