"""Where the keys and values of a cache layer lie: in buffers that grow in place, or in parts of several formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..tokens.entries import cells_of, pick_entries
from .formats import Plain
from .parts import Packing, attend, common_tables, dense, filled_parts, put, read, sweep
from .storage import BOTH, FEW, Change, KVFormats, Part, pack_both

FIRST_CAPACITY = 64
Pair = tuple[Tensor, Tensor]


class KVStates:
    """Keys and values of the entries of one layer, (b k n e). What the entries are is known to the layer alone.

    They lie in one tensor each, until some are stored in another format or by some heads only: from then on all lie in parts.

    Attributes:
        parts: Where all entries lie, or None.
    """

    def __init__(self):
        self.parts: list[Part] | None = None
        self._slots: Tensor | None = None  # where in the one tensor each entry lies, (b n) or (b k n); None if in order
        self._holes: Tensor | None = None  # places among these that a few entries have left, (b h) or (b k h): as many new ones take them
        self._pair: Pair | None = None  # all keys and values; none, of their shape, where there are parts
        self._buffers: Pair | None = None  # what the pair is a view of, with room behind it
        self._begin = 0  # where in the buffers the pair begins
        self._unpacked: Pair | None = None  # the entries of the parts, while a block runs

    @property
    def slots(self) -> Tensor | None:
        """Where in the one tensor each entry lies, (b n) or (b k n); None if in order."""
        self._close()
        return self._slots

    @property
    def heads(self) -> int:
        """Key heads."""
        return self._pair[0].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Key heads, and the width of a key and of a value."""
        return self.heads, *(t.shape[3] for t in self._pair)

    @property
    def length(self) -> int:
        """Entries, filler included."""
        if self.parts is not None:
            return self.parts[0].cells.shape[-1]
        return self._pair[0].shape[2] - (0 if self._holes is None else self._holes.shape[-1])

    @property
    def readable(self) -> bool:
        """Whether an attention can read the entries as they lie, filler apart."""
        return not self._pair[0].requires_grad if self.parts is None else all(part.readable for part in self.parts)

    def tensors(self) -> list[Tensor]:
        """All that is stored."""
        self._close()
        return [*(t for part in self.parts or () for t in part.tensors()), *(self._pair or ())]

    def unpack(self) -> Pair:
        """All keys and values as they lie, unpacked."""
        self._close()
        if self.parts is None or self._unpacked is not None:
            return self._unpacked or self._pair
        return tuple(dense(self.parts, which, self._pair[which].shape[3]) for which in BOTH)

    def ordered(self) -> Pair:
        """All keys and values in the order of the entries, unpacked."""
        slots = self.slots
        return self.unpack() if slots is None else self._gather(torch.arange(slots.shape[-1], device=slots.device).expand_as(slots))

    def pick(self, index: Tensor) -> Pair:
        """Keys and values of the entries of an index (b k r), unpacked."""
        if self.parts is not None and self._unpacked is None:
            plain = self._all_plain(index)
            if plain is not None:
                return plain
            b, k = (torch.arange(n, device=index.device) for n in index.shape[:2])
            spots = torch.broadcast_tensors(b[:, None, None], k[:, None], index)
            spots = tuple(x.flatten() for x in spots)
            return tuple(read(self.parts, which, spots).view(*index.shape, -1) for which in BOTH)
        return self._gather(index)

    def _all_plain(self, index: Tensor) -> Pair | None:
        """Keys and values of the entries of an index (b k r), where all of them lie as they came in one part."""
        plain = next((part for part in self.parts if part.forms == (Plain(), Plain())), None)
        cells = None if plain is None else plain.cells.gather(-1, index)
        if cells is None or not bool((cells >= 0).all()):
            return None
        return tuple(x.index_select(0, cells.flatten()).view(*index.shape, -1) for (x,) in plain.packed)

    def hand_out(self, blank: bool) -> Pair:
        """All keys and values for the block that runs; a blank in their place if it reads the entries as they lie."""
        if blank:
            return tuple(t.new_full((), torch.nan).expand(*t.shape[:2], self.length, t.shape[3]) for t in self._pair)
        pair = self.unpack()
        self._unpacked = None if self.parts is None else pair
        return pair

    def release(self) -> None:
        """Forget the unpacked entries: the block that read them is done."""
        self._unpacked = None

    def attend(self, q: Tensor, sizes: Tensor | None, sinks: Tensor | None, weighs: bool, **shape: Any) -> tuple[Tensor, Tensor | None]:
        """What queries (b h 1 e) read of entries as they lie, and if `weighs` the probability of each, the mean of its head, (b k n)."""
        return attend(self.parts or [self._as_part()], q, sizes, sinks, weighs, **shape)

    def _as_part(self) -> Part:
        self._close()
        b, k, n, _ = self._pair[0].shape
        buffers, begin = self._where()
        room, device = buffers[0].shape[2], buffers[0].device
        starts = begin + room * torch.arange(b * k, device=device).view(b, k)
        slots = torch.arange(n, device=device).expand(b, n) if self._slots is None else self._slots
        packed = tuple((t.flatten(0, 2),) for t in buffers)
        cells, lengths = starts[..., None] + cells_of(slots, k), torch.full_like(starts, n)
        return Part(cells, (Plain(), Plain()), packed, starts, lengths, starts + room, b * k * n)

    def _gather(self, index: Tensor) -> Pair:
        """Keys and values of entries (b r) or (b k r) that lie in one tensor, or are unpacked."""
        slots = self.slots
        places = cells_of(index if slots is None else pick_entries(slots, index), self.heads)
        b, k, r = places.shape
        buffers, begin = self._where()
        if self._unpacked is not None or not all(t.is_contiguous() for t in buffers):
            return tuple(t.gather(2, places[..., None].expand(-1, -1, -1, t.shape[3])) for t in self._unpacked or self._pair)
        starts = begin + buffers[0].shape[2] * torch.arange(b * k, device=places.device).view(b, k, 1)
        rows = (starts + places).flatten()
        return tuple(t.flatten(0, 2).index_select(0, rows).view(b, k, r, -1) for t in buffers)

    def _where(self) -> tuple[Pair, int]:
        """The tensors in which the pair lies, and the place of its first entry."""
        return (self._pair, 0) if self._buffers is None else (self._buffers, self._begin)

    def append(self, k: Tensor, v: Tensor, filled: Tensor | None) -> None:
        """Store new entries (b k m e); `filled` marks those that count among all entries, theirs behind the old ones."""
        self._unpacked, m = None, k.shape[2]
        plain = self._extended(k, v, filled) if self.parts is not None and m == 1 else None
        if plain is not None:
            others = [part for part in self.parts if part is not plain]
            for part in others:
                part.grow(m)
            plain.extend((k, v))
            self.parts = filled_parts([*others, plain])
        elif self.parts is not None:
            new = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
            new = new if filled is None else new & cells_of(filled[..., -m:], self.heads)
            spots = new.nonzero(as_tuple=True)
            where, there = pad(new, (self.length, 0)), (*spots[:2], spots[2] + self.length)
            for part in self.parts:
                part.grow(m)
            self.parts = Packing(there, ((k[spots],), (v[spots],)), where, (Plain(), Plain())).join(self.parts, [])
        elif self._pair is None:
            self._pair = k, v
        elif torch.is_grad_enabled() and (k.requires_grad or self._pair[0].requires_grad):
            self._pair = tuple(torch.cat(pair, dim=2) for pair in zip(self.ordered(), (k, v), strict=True))
            self._buffers = self._slots = None
        elif self._holes is not None and self._holes.shape[-1] == m:
            self._take_holes(k, v)
        else:
            self._close()
            self._grow(k, v)

    def _extended(self, k: Tensor, v: Tensor, filled: Tensor | None) -> Part | None:
        """The part of those that lie as they came, if a new one of each row and head may lie behind them in place."""
        plain = next((part for part in self.parts if part.forms == (Plain(), Plain())), None)
        fixed = plain is None or plain.fixed or k.requires_grad or v.requires_grad
        return None if fixed or filled is not None and not bool(filled[..., -1].all()) else plain

    def _take_holes(self, k: Tensor, v: Tensor) -> None:
        place = cells_of(self._holes, self.heads)[..., None]
        for states, new in zip(self._pair, (k, v), strict=True):
            states.scatter_(2, place.expand_as(new), new.to(states.dtype))
        self._slots, self._holes = torch.cat([self._slots, self._holes], dim=-1), None

    def _grow(self, k: Tensor, v: Tensor) -> None:
        old, m = self._pair[0].shape[2], k.shape[2]
        new = old + m
        if self._slots is not None:
            new_slots = torch.arange(old, new, device=self._slots.device)
            self._slots = torch.cat([self._slots, new_slots.expand(*self._slots.shape[:-1], -1)], dim=-1)
        if self._buffers is None or self._buffers[0].shape[2] < self._begin + new:
            capacity = max(FIRST_CAPACITY, new + new // 2)
            buffers = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (k, v))
            for buffer, states in zip(buffers, self._pair, strict=True):
                buffer[:, :, :old] = states
            self._buffers, self._begin = buffers, 0
        for buffer, states in zip(self._buffers, (k, v), strict=True):
            buffer.narrow(2, self._begin + old, m).copy_(states)
        self._pair = tuple(buffer.narrow(2, self._begin, new) for buffer in self._buffers)

    def keep_slice(self, place: slice) -> None:
        """Keep a slice of the entries."""
        self._unpacked = None
        if self.parts is not None:
            self.parts = filled_parts([part.settle(part.cells[..., place]) for part in self.parts])
            sweep(self.parts)
        else:
            self._pair, self._buffers, self._slots = tuple(t[:, :, place].clone() for t in self.ordered()), None, None

    def drop_first(self, count: int) -> None:
        """Drop the first entries; where there are buffers, nothing is copied."""
        if self._buffers is None or self.slots is not None:
            self.keep_slice(slice(count, None))
        else:
            self._pair, self._begin = tuple(t[:, :, count:] for t in self._pair), self._begin + count

    def keep(self, index: Tensor, filled: Tensor | None, gone: Tensor | None, in_place: bool) -> None:
        """Keep the entries of an index, (b r) or (b k r); `filled` marks those that count among them.

        Args:
            index: The entries.
            filled: Flags like the index, or None.
            gone: The entries that are not in the index, where they are known.
            in_place: Whether those that stay may go on lying where they are, if few leave.
        """
        self._unpacked = None
        if self.parts is not None:
            filler = None if filled is None else ~filled if filled.dim() == 3 else ~filled[:, None]
            picked = [pick_entries(part.cells, index) for part in self.parts]
            picked = picked if filler is None else [cells.masked_fill(filler, -1) for cells in picked]
            self.parts = filled_parts([part.settle(cells) for part, cells in zip(self.parts, picked, strict=True)])
            sweep(self.parts)
        elif in_place and self._buffers is not None and self.length - index.shape[-1] <= FEW:
            gone, slots = others(index, self.length) if gone is None else gone, self.slots
            slots = torch.arange(self.length, device=index.device).expand(len(index), -1) if slots is None else slots
            self._slots, self._holes = pick_entries(slots, index), pick_entries(slots, gone)
        else:
            self._pair, self._buffers, self._slots = self._gather(index), None, None

    def vacate(self, place: Tensor, leaves: Tensor) -> None:
        """Let the entries at a place of each row and key head go, (b k 1), where they leave, (b k 1) bool; they lie in parts."""
        self._unpacked = None
        self.parts = filled_parts([part.vacate(place, leaves) for part in self.parts])
        sweep(self.parts)

    def _close(self) -> None:
        """Let the last states move to where entries have left: the others stay where they are."""
        if self._holes is None:
            return
        slots, holes, n, few = self._slots, self._holes, self._pair[0].shape[2], self._holes.shape[-1]
        for i, last in enumerate(range(n - 1, n - 1 - few, -1)):
            hole = holes[..., i : i + 1]
            place = cells_of(hole, self.heads)[..., None]
            for states in self._pair:
                states.scatter_(2, place.expand(-1, -1, -1, states.shape[3]), states[:, :, last : last + 1].clone())
            slots = torch.where(slots == last, hole, slots)
            holes = torch.where(holes == last, hole, holes) if i + 1 < few else holes
        self._slots, self._holes, self._pair = slots, None, tuple(t[:, :, : n - few] for t in self._pair)

    def write(self, index: Tensor, keys: Tensor, values: Tensor | None) -> None:
        """Put other keys and values (b k r e) in the places of some entries, (b k r); -1 stands for none, None leaves the values."""
        chosen, index = index >= 0, index.clamp(min=0)
        values = self.pick(index)[1] if values is None and self.parts is not None else values
        self._unpacked = None  # an autocast tells the dtypes of keys and values apart
        keys, values = keys.to(self._pair[0].dtype), None if values is None else values.to(self._pair[1].dtype)
        if self.parts is not None:
            for part in self.parts:
                part.write(part.cells.gather(-1, index).masked_fill(~chosen, -1), keys, values)
            return
        slots, new = self.slots, (keys, values)
        places = index if slots is None else pick_entries(slots, index)
        copied = self._buffers is None or any(x is not None and x.requires_grad for x in new)
        if not copied and bool(chosen.all()):
            for states, x in zip(self._pair, new, strict=True):
                _ = x is None or states.scatter_(2, places[..., None].expand_as(x), x)
            return
        where = (*chosen.nonzero(as_tuple=True)[:2], places[chosen])
        store = torch.Tensor.index_put if copied else torch.Tensor.index_put_
        self._pair = tuple(t if x is None else store(t, where, x[chosen]) for t, x in zip(self._pair, new, strict=True))
        self._buffers = None if copied else self._buffers

    def rewrite(self, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values (b k n e) in the places of all."""
        self._unpacked = self._buffers = self._slots = self._holes = self.parts = None
        self._pair = keys, values

    def split(self, filled: Tensor | None) -> None:
        """Store the entries in parts from now on; `filled` marks those that count."""
        if self.parts is not None:
            return
        keys, values = self.ordered()
        where = torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
        where = where if filled is None else where & cells_of(filled, self.heads)
        self.parts = [Part.of((keys[where], values[where]), where, (Plain(), Plain()))]
        self._pair, self._buffers, self._slots = tuple(t.new_empty(*t.shape[:2], 0, t.shape[3]) for t in self._pair), None, None

    def add_part(self, part: Part, filled: Tensor | None) -> None:
        """Store some entries in a part; `filled` marks those that count among all."""
        self._unpacked = None
        self.split(filled)
        self.parts = put(self.parts, part)

    def convert(self, where: Tensor, formats: KVFormats, scale: Tensor | None, filled: Tensor | None) -> None:
        """Store the entries of `where` (b k n) in other formats, their keys times a scale (b k 1 e); the first scale of a format stays."""
        known = next((part for part in self.parts or () if part.forms == formats), None)
        if known is not None:
            where, scale = where & ~known.where, known.scale
        tables = common_tables(self.parts or [], formats, self._pair)
        for part in self.parts or ():
            if scale is None and part.scale is None and shares(part.forms, formats):
                moved = where & part.where
                spots = moved.nonzero(as_tuple=True)
                where = where & ~moved
                self._store(Packing(spots, part.moved(spots, moved, formats, tables), moved, formats, None, tables), [part])
        spots = where.nonzero(as_tuple=True)
        if len(spots[0]):
            self.split(filled)
            rows = read(self.parts, 0, spots), read(self.parts, 1, spots)
            packed = pack_both(rows, where, spots, formats, scale, tables)
            self._store(Packing(spots, packed, where, formats, scale, tables), [part for part in self.parts if part.forms != formats])

    def convert_each(self, place: Tensor, formats: KVFormats) -> bool:
        """Store the entry at a place of each row and key head, (b k 1), in formats that a part has already.

        Returns whether that could be done in place: they lie in one part, and are packed without a look at others.
        """
        into = next((part for part in self.parts or () if part.forms == formats), None)
        others = [part for part in self.parts or () if part is not into]
        source = None if into is None else next((part for part in others if bool((part.cells.gather(-1, place) >= 0).all())), None)
        if source is None or not into.takes_each(source):
            return False
        self._unpacked = None
        into.take_each(source, place)
        self.parts = filled_parts([*others, into])
        return True

    def _store(self, new: Packing, leaving: list[Part]) -> None:
        if len(new.spots[0]):
            self._unpacked = None
            self.parts = new.join(self.parts, leaving)

    def map_rows(self, change: Change) -> None:
        """Change the batch by a function of any tensor (b ...)."""
        self._close()
        self._unpacked = None
        self._pair, self._buffers = tuple(change(t) for t in self._pair), None
        self._slots = None if self._slots is None else change(self._slots)
        self.parts = None if self.parts is None else [part.change_rows(change) for part in self.parts]
        sweep(self.parts or [])

    def move(self, device: torch.device) -> None:
        """Lie on a device."""
        if self._pair is None or self._pair[0].device == device:
            return
        self._close()
        self._pair = tuple(t.to(device, non_blocking=True) for t in self._pair)
        self._slots = None if self._slots is None else self._slots.to(device)
        self.parts = None if self.parts is None else [part.to(device) for part in self.parts]
        self._buffers = self._unpacked = None


def shares(old: KVFormats, new: KVFormats) -> bool:
    """Whether the keys or the values alone are packed in both alike, and are not packed again."""
    return old != new and any(a == b and not isinstance(a, Plain) for a, b in zip(old, new, strict=True))


def others(index: Tensor, n: int) -> Tensor:
    """The entries of n that are not in an index, (b r) or (b k r)."""
    leaves = torch.ones(*index.shape[:-1], n, dtype=torch.bool, device=index.device).scatter_(-1, index, False)
    return leaves.nonzero()[:, -1].view(*index.shape[:-1], n - index.shape[-1])
