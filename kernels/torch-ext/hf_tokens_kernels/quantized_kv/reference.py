"""The torch reference: rows and heads of one length together, their cells in chunks, of which no more than one is unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulated
from ..ragged_attention.cells import Cells, placed, together
from .bits import MOST, strip_masks, strip_shares, unpack_bits
from .forms import Kept, Packed, Rounded

CHUNK = 6144  # cells unpacked at a time: of more, the codes leave the caches before they are read; of fewer, calls cost more than they do
FEW = 128  # cells of a row and head up to which rows are read whole: it takes fewer calls
MOST_GROUPS = 8  # groups of channels up to which the scales are taken in behind the products


def packed_attention(
    q: Tensor,
    keys: Packed,
    values: Packed,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    sizes: Tensor | None,
    softcap: float | None,
    told: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the queries read (b h m f), and the log of their sums of exponentials (b h m), -inf where there is nothing to read."""
    b, h, m, _ = q.shape
    rows = (q * scaling).reshape(starts.numel(), h // starts.shape[1] * m, -1).to(accumulated(q.dtype))
    many, found = lengths.flatten().tolist(), []
    read_keys, read_values = (reader(states, rows.dtype, few=max(many, default=0) <= FEW) for states in (keys, values))
    for some, cells in together(starts.flatten().tolist(), many):
        scores = read_keys.scores(rows[some], cells)  # r q n
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if sizes is None else scores + cells.of(sizes).to(scores.dtype).log()[:, None]
        if told is not None:
            cells.of(told.T).copy_(scores.mT)
        top = scores.detach().amax(dim=2, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(dim=2, keepdim=True)
        found.append((some, read_values.sums(weights, cells) / total, top + total.log()))
    out, logs = placed(found, rows.shape[:2], rows.new_empty(0, values.width))
    return out.to(q.dtype).view(b, h, m, -1), logs.view(b, h, m)


def reader(states: Packed, dtype: torch.dtype, few: bool) -> Whole | Grouped | Runs:
    """How products with packed states are computed, of which each row and head may have but few cells."""
    if few or not isinstance(states, Rounded):
        return Whole(states, dtype)
    if states.index is not None:
        return Runs(states, dtype) if states.group == 1 else Whole(states, dtype)
    return Grouped(states, dtype) if states.scale.shape[1] <= MOST_GROUPS else Whole(states, dtype)


class Whole:
    """Rows are read, then multiplied."""

    def __init__(self, states: Packed, dtype: torch.dtype):
        self.states, self.dtype = states, dtype

    def rows(self, cells: Cells) -> Tensor:
        """Cells as they are read, (r n e)."""
        s = self.states
        if isinstance(s, Kept):
            return cells.of(s.codes).to(self.dtype)
        shared = ("scale", "low") if isinstance(s, Rounded) and s.index is None else ("index",) if isinstance(s, Rounded) else ()
        some = replace(s, **{name: cells.of(getattr(s, name)).flatten(0, 1) for name in ("codes", *shared)})
        return some.rows(slice(None)).to(self.dtype).unflatten(0, (cells.rows, cells.count))

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """Products of queries (r q e) with cells, (r q n)."""
        return joined([q @ self.rows(cells.part(part.start, part.stop)).mT for part in cells.chunks(CHUNK)])

    def sums(self, weights: Tensor, cells: Cells) -> Tensor:
        """The sum of cells, (r q f), with weights (r q n)."""
        return sum(weights[..., part] @ self.rows(cells.part(part.start, part.stop)) for part in cells.chunks(CHUNK))


def joined(parts: list[Tensor]) -> Tensor:
    """Parts (r q n) of the products with some cells, as one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class Channels:
    """The codes of cells, channel by channel: what a product with few rows reads fastest.

    A channel is as many times too high as its codes stand high in their bytes; behind the last one there may be more, of no account.

    Args:
        states: The cells.
        dtype: Of the codes that are read.
        groups: Of channels, all as wide as the first: there are channels enough for all to be whole.
    """

    def __init__(self, states: Rounded, dtype: torch.dtype, groups: int = 1):
        self.states, self.dtype, self.groups, device = states, dtype, groups, states.codes.device
        self.masks, shares = strip_masks(states.bits, device), strip_shares(states.bits, states.width, dtype, device)
        self.count = groups * states.group if groups > 1 else len(shares)
        self.stored, self.known = len(shares), min(len(shares), self.count)
        self.shares = pad(shares, (0, self.count - self.stored)) if self.count != self.stored else shares
        self.rooms: tuple[Tensor, ...] | None = None

    def chunks(self, cells: Cells, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Parts of cells, each as many times some, and their codes (r*g c/g n), which are there until the next is asked for."""
        packed = cells.of(self.states.codes).mT
        packed = packed if self.masks is None else packed[:, None]
        for part in cells.chunks(CHUNK, multiple):
            yield part, self._read(packed[..., part], cells.rows)

    def _read(self, packed: Tensor, rows: int) -> Tensor:
        """Bytes (r w n), or (r 1 w n) where there are masks, as codes (r*g c/g n)."""
        s, cells = self.states, packed.shape[-1]
        if self.rooms is None or self.rooms[0].shape[::2] != (rows, cells) or torch.is_grad_enabled():  # a backward pass may want them
            self._make_rooms(packed, rows, cells)
        narrow, strips, wide, codes = self.rooms
        if self.masks is not None:
            torch.bitwise_and(packed, self.masks, out=strips)
            wide.copy_(narrow)
        elif s.bits == MOST:
            wide.copy_(packed[:, : self.known])
        else:
            wide.copy_(unpack_bits(packed.mT.flatten(0, 1), s.bits, s.width).unflatten(0, (rows, cells)).mT[:, : self.known])
        return codes

    def _make_rooms(self, packed: Tensor, rows: int, cells: int) -> None:
        narrow = torch.empty(rows, self.stored, cells, dtype=packed.dtype, device=packed.device)
        make = torch.empty if self.known == self.count else torch.zeros
        wide = make(rows, self.count, cells, dtype=self.dtype, device=packed.device)
        strips = narrow if self.masks is None else narrow.unflatten(1, (len(self.masks), -1))
        self.rooms = narrow[:, : self.known], strips, wide[:, : self.known], wide.view(rows * self.groups, -1, cells)

    def each(self, x: Tensor) -> Tensor:
        """Something of each channel (... e), by which codes are to be multiplied, (... c)."""
        lack = self.count - x.shape[-1]
        return (x if not lack else pad(x, (0, lack)) if lack > 0 else x[..., : self.count]) * self.shares


class Grouped:
    """Codes are multiplied, the products scaled: q (s c + l) = s (q c) + l sum q, in each group of channels."""

    def __init__(self, states: Rounded, dtype: torch.dtype):
        self.states, self.groups = states, states.scale.shape[1]
        self.channels = Channels(states, dtype, self.groups)

    def scale(self, cells: Cells) -> Tensor:
        """The scales of cells in each group, (r g 1 n)."""
        return cells.of(self.states.scale).mT.to(self.channels.dtype).contiguous()[:, :, None]

    def low(self, cells: Cells) -> Tensor:
        """The least values of cells, (r n g)."""
        return cells.of(self.states.low).to(self.channels.dtype)

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        lack = self.groups * self.states.group - q.shape[2]
        sums = (pad(q, (0, lack)) if lack else q).unflatten(2, (self.groups, -1)).sum(dim=3)
        queries = self.channels.each(q).unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(0, 1)  # r*g q e
        found = joined([torch.bmm(queries, codes) for _, codes in self.channels.chunks(cells)])
        scaled = found.unflatten(0, (-1, self.groups)) * self.scale(cells)
        return torch.baddbmm(scaled.sum(dim=1), sums, self.low(cells).mT)

    def sums(self, weights: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        scaled, found = (weights[:, None] * self.scale(cells)).flatten(0, 1), None  # r*g q n
        for part, codes in self.channels.chunks(cells):
            more = torch.bmm(scaled[..., part], codes.mT)
            found = more if found is None else found + more
        low = torch.bmm(weights, self.low(cells)).mT[..., None]  # r g q 1
        whole = found.unflatten(0, (-1, self.groups)) * self.channels.shares.view(self.groups, 1, -1) + low
        return whole.transpose(1, 2).flatten(2)[..., : self.states.width]


class Runs:
    """Cells that share their scales lie in runs: the codes of a run are scaled together, and products with least values are made once.

    Where not all runs are as long as the first one, but for the last, each cell is scaled by itself.
    """

    def __init__(self, states: Rounded, dtype: torch.dtype):
        self.states, self.channels = states, Channels(states, dtype)

    def stretches(self, cells: Cells) -> Iterator[tuple[Cells, slice, int, Tensor, Tensor]]:
        """Stretches of cells, which of all they are, the length of their runs, and of these scales (r c t 1) and least values (r t e)."""
        number, s = cells.of(self.states.index), self.states
        for first, last, length in self.bounds(number, len(s.codes) - cells.start - (cells.rows - 1) * cells.stride):
            each = number[:, first:last:length].reshape(-1)
            scale, low = (x.index_select(0, each).to(self.channels.dtype).view(cells.rows, -1, s.width) for x in (s.scale, s.low))
            yield cells.part(first, last), slice(first, last), length, self.channels.each(scale).mT.contiguous()[..., None], low

    def bounds(self, number: Tensor, room: int) -> Iterator[tuple[int, int, int]]:
        """Where stretches begin and end, and the length of their runs, by the numbers of cells (r n).

        The last run is read to its end, whatever lies there, if the last row and head has room for so many cells.
        """
        count, most = number.shape[1], max(1, CHUNK // len(number))
        length = int((number[0] == number[0, 0]).sum())
        even, end = count - count % length, 0
        runs, rest = number[:, :even].unflatten(1, (-1, length)), number[:, even:]
        alike = length > 1 and all(torch.equal(x, x[..., :1].expand_as(x)) for x in (runs, rest) if x.numel())
        if alike:
            end = count - count % -length
            end = end if end <= room else even
            yield 0, end, next(part for part in range(min(length, most), 0, -1) if length % part == 0)
        for first in range(end, count, most):
            yield first, min(first + most, count), 1

    def chunks(self, cells: Cells, length: int, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Parts of cells in runs of a length, and their codes (r c n) times the scales (r c t 1)."""
        for part, codes in self.channels.chunks(cells, length):
            codes.unflatten(2, (-1, length)).mul_(scale[:, :, part.start // length : part.stop // length])
            yield part, codes

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        queries, found = self.padded(q), []
        for some, _, length, scale, low in self.stretches(cells):
            parts = [torch.bmm(queries, codes) for _, codes in self.chunks(some, length, scale)]
            lows = (q @ low.mT)[..., None]
            found.append((joined(parts).unflatten(2, (-1, length)) + lows).flatten(2))
        return joined(found)[..., : cells.count]

    def sums(self, weights: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        found, lows = 0, 0
        for some, place, length, scale, low in self.stretches(cells):
            own = weights[..., place]
            own = own if own.shape[2] == some.count else pad(own, (0, some.count - own.shape[2]))
            for part, codes in self.chunks(some, length, scale):
                found = found + torch.bmm(own[..., part], codes.mT)
            lows = lows + own.unflatten(2, (-1, length)).sum(dim=3) @ low
        return found[..., : self.states.width] + lows

    def padded(self, q: Tensor) -> Tensor:
        """Queries (r q e) with zeros for channels of no account, (r q c)."""
        lack = self.channels.count - q.shape[2]
        return pad(q, (0, lack)) if lack else q
