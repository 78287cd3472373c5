"""The torch reference: rows and heads of one length together, their cells in chunks, of which no more than one is unpacked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulated
from .bits import strips
from .forms import Packed, Rounded

CHUNK = 4096  # cells unpacked at a time
FEW_GROUPS = 4  # groups of channels up to which the scales are taken in behind the products


@dataclass(frozen=True)
class Cells:
    """Cells of some rows and heads: `count` of each, the first ones `stride` apart from `start` on."""

    start: int
    stride: int
    rows: int
    count: int

    def of(self, x: Tensor) -> Tensor:
        """Something of each cell (c ...), of these (r n ...), without a copy."""
        step = x.stride(0)
        where = (self.stride * step, step, *x.stride()[1:])
        return x.as_strided((self.rows, self.count, *x.shape[1:]), where, x.storage_offset() + self.start * step)

    def part(self, first: int, last: int) -> Cells:
        """The cells of each row and head from one to another, or its end."""
        return replace(self, start=self.start + first, count=min(last, self.count) - first)


def together(starts: list[int], lengths: list[int]) -> Iterator[tuple[slice, Cells]]:
    """Rows and heads that follow each other, have cells, as many each, and lie at equal distances; no more than a chunk of short ones."""
    first = 0
    while first < len(starts):
        n, last = lengths[first], first + 1
        step = starts[last] - starts[first] if last < len(starts) else 0
        while last < len(starts) and lengths[last] == n and starts[last] - starts[last - 1] == step > 0 and (last - first + 1) * n <= CHUNK:
            last += 1
        if n:
            yield slice(first, last), Cells(starts[first], max(step, 1), last - first, n)
        first = last


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
    read_keys, read_values = reader(keys), reader(values)
    for some, cells in together(starts.flatten().tolist(), lengths.flatten().tolist()):
        parts = [cells.part(first, first + CHUNK) for first in range(0, cells.count, CHUNK)]
        scores = torch.cat([read_keys.scores(rows[some], part) for part in parts], dim=2)  # r q n
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if sizes is None else scores + cells.of(sizes).to(scores.dtype).log()[:, None]
        if told is not None:
            cells.of(told.T).copy_(scores.mT)
        logs[some] = scores.logsumexp(dim=2)
        weights = scores.softmax(dim=2).split(CHUNK, dim=2)
        out[some] = sum(read_values.mean(weight, part) for weight, part in zip(weights, parts, strict=True))
    return out.to(q.dtype).view(b, h, m, -1), logs.view(b, h, m)


def reader(states: Packed) -> Whole | Grouped | Runs:
    """How products with packed states are computed."""
    if not isinstance(states, Rounded):
        return Whole(states)
    if states.index is not None and states.group == 1:
        return Runs(states)
    return Grouped(states) if states.index is None and states.scale.shape[1] <= FEW_GROUPS else Whole(states)


class Whole:
    """Rows are unpacked, then multiplied."""

    def __init__(self, states: Packed):
        self.states = states

    def rows(self, cells: Cells, dtype: torch.dtype) -> Tensor:
        """Cells as they are read, (r n e)."""
        s = self.states
        shared = ("scale", "low") if isinstance(s, Rounded) and s.index is None else ("index",) if isinstance(s, Rounded) else ()
        some = replace(s, **{name: cells.of(getattr(s, name)).flatten(0, 1) for name in ("codes", *shared)})
        return some.rows(slice(None)).to(dtype).unflatten(0, (cells.rows, cells.count))

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """Products of queries (r q e) with cells, (r q n)."""
        return q @ self.rows(cells, q.dtype).mT

    def mean(self, weights: Tensor, cells: Cells) -> Tensor:
        """The sum of cells, (r q f), with weights (r q n)."""
        return weights @ self.rows(cells, weights.dtype)


class Strips:
    """The codes of cells, in strips of channels (s r n w): products with them, of which no row of all channels is ever made."""

    def __init__(self, states: Rounded, cells: Cells, dtype: torch.dtype):
        codes, factors = strips(cells.of(states.codes).flatten(0, 1), states.bits, states.width)
        self.codes, self.width = codes.to(dtype).unflatten(1, (cells.rows, cells.count)), states.width
        self.shares = self.codes.new_tensor([1 / factor for factor in factors])[:, None, None, None]

    def split(self, x: Tensor) -> Tensor:
        """Something of each channel (r t e) by strips, (s r t w), filled up with zeros."""
        count, w = len(self.codes), self.codes.shape[3]
        x = x if count * w == self.width else pad(x, (0, count * w - self.width))
        return x.unflatten(2, (count, w)).movedim(2, 0)

    def scores(self, q: Tensor) -> Tensor:
        """Products of queries (r q e) with the codes, (r q n)."""
        return (self.split(q) * self.shares @ self.codes.mT).sum(dim=0)

    def mean(self, weights: Tensor) -> Tensor:
        """The sum of the codes with weights (r q n), (r q e)."""
        found = weights.expand(len(self.codes), *weights.shape) @ self.codes * self.shares
        return found.movedim(0, 2).flatten(2)[..., : self.width]


class Grouped:
    """Codes are multiplied, the products scaled: q (s c + l) = s (q c) + l sum q, in each group of channels."""

    def __init__(self, states: Rounded):
        self.states = states
        groups, channel = states.scale.shape[1], torch.arange(states.width, device=states.codes.device)
        self.member = channel // states.group == torch.arange(groups, device=channel.device)[:, None]  # g e

    def tables(self, cells: Cells, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales (r g 1 n) and least values (r n g) of cells."""
        scale, low = (cells.of(x).to(dtype) for x in (self.states.scale, self.states.low))
        return scale.mT.contiguous()[:, :, None], low  # products with what lies crosswise are slow

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        scale, low = self.tables(cells, q.dtype)
        apart = q[:, None] * self.member[:, None]  # r g q e
        products = Strips(self.states, cells, q.dtype).scores(apart.flatten(1, 2)).unflatten(1, apart.shape[1:3])
        return (products * scale).sum(dim=1) + apart.sum(dim=3).mT @ low.mT

    def mean(self, weights: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        scale, low = self.tables(cells, weights.dtype)
        scaled = weights[:, None] * scale  # r g q n
        products = Strips(self.states, cells, weights.dtype).mean(scaled.flatten(1, 2)).unflatten(1, scaled.shape[1:3])
        return (products * self.member[:, None]).sum(dim=1) + weights @ low @ self.member.to(low.dtype)


class Runs:
    """Cells that share their scales lie in runs: the codes of a run are scaled together, and products with least values are made once.

    What is no run of the length of the first one is read cell by cell.
    """

    def __init__(self, states: Rounded):
        self.states, self.whole = states, Whole(states)

    def runs(self, cells: Cells, dtype: torch.dtype) -> tuple[int, Strips | None, Tensor | None]:
        """How many cells of each row and head lie in runs of one length, their codes, scaled, and the least values of the runs (r t e)."""
        s = self.states
        number = cells.of(s.index)
        length = int((number[0] == number[0, 0]).sum())
        many = cells.count // length
        runs = number[:, : many * length].unflatten(1, (many, length))
        first = runs[:, :, 0].long()
        if not bool((runs == runs[:, :, :1]).all()):
            return 0, None, None
        codes = Strips(s, cells.part(0, many * length), dtype)
        codes.codes.unflatten(2, (many, length)).mul_(codes.split(s.scale[first].to(dtype))[:, :, :, None])
        return many * length, codes, s.low[first].to(dtype)

    def scores(self, q: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        end, codes, low = self.runs(cells, q.dtype)
        found = []
        if end:
            lows = q @ low.mT  # r q t
            found.append((codes.scores(q).unflatten(2, (lows.shape[2], -1)) + lows[..., None]).flatten(2))
        if end < cells.count:
            found.append(self.whole.scores(q, cells.part(end, cells.count)))
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def mean(self, weights: Tensor, cells: Cells) -> Tensor:
        """See `Whole`."""
        end, codes, low = self.runs(cells, weights.dtype)
        found = []
        if end:
            found.append(codes.mean(weights[..., :end]) + weights[..., :end].unflatten(2, (low.shape[1], -1)).sum(dim=3) @ low)
        if end < cells.count:
            found.append(self.whole.mean(weights[..., end:], cells.part(end, cells.count)))
        return sum(found)
