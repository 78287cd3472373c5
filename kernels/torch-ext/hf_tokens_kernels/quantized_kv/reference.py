"""The torch reference: rows and heads of one length together, their cells in chunks, of which no more than one is unpacked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulated
from ..ragged_attention.cells import Cells, together
from .bits import strip_factors, strip_masks, strip_width, strips
from .forms import Kept, Packed, Rounded

CHUNK = 8192  # cells unpacked at a time: of more, the codes leave the caches before they are read; of fewer, calls cost more than they do
FEW = 128  # cells of a row and head up to which rows are read whole: it takes fewer calls
MOST_PIECES = 16  # pieces of a row up to which the scales are taken in behind the products


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
    out, logs = rows.new_zeros(*rows.shape[:2], values.width), rows.new_full(rows.shape[:2], -torch.inf)
    many = lengths.flatten().tolist()
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
        logs[some], out[some] = (top + total.log())[..., 0], read_values.sums(weights, cells) / total
    return out.to(q.dtype).view(b, h, m, -1), logs.view(b, h, m)


def reader(states: Packed, dtype: torch.dtype, few: bool) -> Whole | Grouped | Runs:
    """How products with packed states are computed, of which each row and head may have but few cells."""
    if few or not isinstance(states, Rounded):
        return Whole(states, dtype)
    if states.index is not None:
        return Runs(states, dtype) if states.group == 1 else Whole(states, dtype)
    return Grouped(states, dtype) if piece_width(states) * MOST_PIECES >= states.width else Whole(states, dtype)


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


def piece_width(states: Rounded) -> int:
    """Channels that lie in one strip of bytes and in one group of channels."""
    return math.gcd(strip_width(states.width, states.bits), states.group)


class Pieces:
    """The codes of cells, in pieces of channels that lie one behind the other: products with them, of which no row of all channels is made.

    Args:
        states: The cells.
        width: Channels of a piece.
        dtype: Of the products.
    """

    def __init__(self, states: Rounded, width: int, dtype: torch.dtype):
        self.states, self.width, self.dtype = states, width, dtype
        strip, factors = strip_width(states.width, states.bits), strip_factors(states.bits)
        self.masks = strip_masks(states.bits, states.codes.device)
        self.count = len(factors) * strip // width
        each = [1 / factor for factor in factors for _ in range(strip // width)]
        self.shares = torch.tensor(each, dtype=dtype, device=states.codes.device)[:, None, None, None]
        self.room: Tensor | None = None

    def chunks(self, cells: Cells, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
        """Parts of cells, each as many times some, and their codes (p*r n w), as many times too high as their strip lies in the bytes.

        The codes of a part are there until the next is asked for.
        """
        packed = cells.of(self.states.codes)
        for part in cells.chunks(CHUNK, multiple):
            codes = strips(packed[:, part], self.states.bits, self.states.width, self.masks)  # s r n w
            if codes.shape[3] != self.width:
                codes = codes.unflatten(3, (-1, self.width)).movedim(3, 1).flatten(0, 1)
            yield part, self._widened(codes).view(-1, *codes.shape[2:])

    def _widened(self, codes: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # a backward pass may want them
            return codes.to(self.dtype, memory_format=torch.contiguous_format)
        if self.room is None or self.room.shape != codes.shape:
            self.room = torch.empty(codes.shape, dtype=self.dtype, device=codes.device)
        return self.room.copy_(codes)

    def split(self, x: Tensor) -> Tensor:
        """Something of each channel (r t e) by pieces, (p r t w), filled up with zeros."""
        lack = self.count * self.width - x.shape[2]
        return (pad(x, (0, lack)) if lack else x).view(*x.shape[:2], self.count, self.width).movedim(2, 0)

    def queries(self, q: Tensor) -> Tensor:
        """Queries (r q e) by pieces, (p*r q w), for products with the codes."""
        return (self.split(q) * self.shares).flatten(0, 1)

    def products(self, queries: Tensor, codes: Tensor) -> Tensor:
        """Products of queries (p*r q w) with codes, (p r q n)."""
        return torch.bmm(queries, codes.mT).view(self.count, -1, queries.shape[1], codes.shape[1])

    def blank(self, weights: Tensor) -> Tensor:
        """What sums of codes with weights (r q n) begin with, (p*r q w)."""
        return weights.new_zeros(self.count * len(weights), weights.shape[1], self.width)

    def whole(self, sums: Tensor) -> Tensor:
        """Sums of codes (p*r q w) of each channel, (r q e)."""
        found = sums.unflatten(0, (self.count, -1)) * self.shares
        return found.movedim(0, 2).flatten(2)[..., : self.states.width]


class Grouped:
    """Codes are multiplied, the products scaled: q (s c + l) = s (q c) + l sum q, in each group of channels."""

    def __init__(self, states: Rounded, dtype: torch.dtype):
        self.states, self.pieces = states, Pieces(states, piece_width(states), dtype)
        groups = states.scale.shape[1]
        owner = torch.arange(self.pieces.count, device=states.codes.device) * self.pieces.width // states.group
        self.owner, self.groups = owner.clamp(max=groups - 1), groups

    def scale(self, cells: Cells) -> Tensor:
        """The scales of cells in each group, (g r 1 n)."""
        return cells.of(self.states.scale).movedim(2, 0).to(self.pieces.dtype).contiguous()[:, :, None]

    def low(self, cells: Cells) -> Tensor:
        """The least values of cells, (r n g)."""
        return cells.of(self.states.low).to(self.pieces.dtype)

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        queries, scale, found = self.pieces.queries(q), self.scale(cells).index_select(0, self.owner), []
        for part, codes in self.pieces.chunks(cells):
            found.append((self.pieces.products(queries, codes) * scale[..., part]).sum(dim=0))
        sums = pad(q, (0, self.groups * self.states.group - q.shape[2])).unflatten(2, (self.groups, -1)).sum(dim=3)
        return joined(found) + sums @ self.low(cells).mT

    def sums(self, weights: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        scale, found = self.scale(cells).index_select(0, self.owner), self.pieces.blank(weights)
        for part, codes in self.pieces.chunks(cells):
            found.baddbmm_((weights[..., part] * scale[..., part]).flatten(0, 1), codes)  # p*r q n
        low = (weights @ self.low(cells)).repeat_interleave(self.states.group, dim=2)
        return self.pieces.whole(found) + low[..., : self.states.width]


class Runs:
    """Cells that share their scales lie in runs: the codes of a run are scaled together, and products with least values are made once.

    Where not all runs are as long as the first one, but for the last, each cell is scaled by itself.
    """

    def __init__(self, states: Rounded, dtype: torch.dtype):
        self.states, self.pieces = states, Pieces(states, strip_width(states.width, states.bits), dtype)

    def stretches(self, cells: Cells) -> Iterator[tuple[Cells, slice, int, Tensor, Tensor]]:
        """Stretches of cells, which of all they are, the length of their runs, and of these scales (p r t 1 w) and least values (r t e)."""
        number, s = cells.of(self.states.index), self.states
        for first, last, length in self.bounds(number, len(s.codes) - cells.start - (cells.rows - 1) * cells.stride):
            each = number[:, first:last:length].reshape(-1)
            scale, low = (x.index_select(0, each).to(self.pieces.dtype).view(cells.rows, -1, s.width) for x in (s.scale, s.low))
            yield cells.part(first, last), slice(first, last), length, self.pieces.split(scale)[:, :, :, None].contiguous(), low

    def bounds(self, number: Tensor, room: int) -> Iterator[tuple[int, int, int]]:
        """Where stretches begin and end, and the length of their runs, by the numbers of cells (r n).

        The last run is read to its end, whatever lies there, if the last row and head has room for so many cells.
        """
        count, most = number.shape[1], max(1, CHUNK // len(number))
        length = int((number[0] == number[0, 0]).sum())
        firsts = number[:, ::length]
        end = 0
        if length > 1 and bool((firsts.repeat_interleave(length, dim=1)[:, :count] == number).all()):
            end = firsts.shape[1] * length
            end = end if end <= room else count - count % length
            yield 0, end, next(part for part in range(min(length, most), 0, -1) if length % part == 0)
        for first in range(end, count, most):
            yield first, min(first + most, count), 1

    def chunks(self, cells: Cells, length: int, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Parts of cells in runs of a length, and their codes (p*r n w) times the scales (p r t 1 w)."""
        for part, codes in self.pieces.chunks(cells, length):
            codes.view(*scale.shape[:2], -1, length, codes.shape[2]).mul_(scale[:, :, part.start // length : part.stop // length])
            yield part, codes

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        queries, found = self.pieces.queries(q), []
        for some, _, length, scale, low in self.stretches(cells):
            parts = [self.pieces.products(queries, codes).sum(dim=0) for _, codes in self.chunks(some, length, scale)]
            lows = (q @ low.mT)[..., None]
            found.append((joined(parts).view(*lows.shape[:3], length) + lows).flatten(2))
        return joined(found)[..., : cells.count]

    def sums(self, weights: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        found, lows = self.pieces.blank(weights), 0
        for some, place, length, scale, low in self.stretches(cells):
            own = weights[..., place]
            own = own if own.shape[2] == some.count else pad(own, (0, some.count - own.shape[2]))
            for part, codes in self.chunks(some, length, scale):
                found.baddbmm_(own[..., part].repeat(len(scale), 1, 1), codes)
            lows = lows + own.unflatten(2, (-1, length)).sum(dim=3) @ low
        return self.pieces.whole(found) + lows
