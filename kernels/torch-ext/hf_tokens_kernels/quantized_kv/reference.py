"""The torch reference: a row and head at a time, its cells in chunks, of which no more than one is unpacked."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulated
from .bits import strips
from .forms import Packed, Rounded

CHUNK = 2048  # cells unpacked at a time
FEW_GROUPS = 4  # groups of channels up to which the scales are taken in behind the products


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
    for i, (start, length) in enumerate(zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True)):
        if not length:
            continue
        cells = [slice(first, min(first + CHUNK, start + length)) for first in range(start, start + length, CHUNK)]
        scores = torch.cat([read_keys.scores(rows[i], part) for part in cells], dim=1)  # q n
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if sizes is None else scores + sizes[start : start + length].to(scores.dtype).log()
        if told is not None:
            told[:, start : start + length] = scores
        logs[i] = scores.logsumexp(dim=1)
        weights = scores.softmax(dim=1).split(CHUNK, dim=1)
        out[i] = sum(read_values.mean(weight, part) for weight, part in zip(weights, cells, strict=True))
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

    def scores(self, q: Tensor, cells: slice) -> Tensor:
        """Products of queries (q e) with cells, (q n)."""
        return q @ self.states.rows(cells).to(q.dtype).T

    def mean(self, weights: Tensor, cells: slice) -> Tensor:
        """The sum of cells, (q f), with weights (q n)."""
        return weights @ self.states.rows(cells).to(weights.dtype)


class Strips:
    """The codes of cells, in strips of channels (s n w): products with them, of which no row of all channels is ever made."""

    def __init__(self, states: Rounded, cells: slice, dtype: torch.dtype):
        codes, factors = strips(states.codes[cells], states.bits, states.width)
        self.codes, self.width = codes.to(dtype), states.width
        self.shares = self.codes.new_tensor([1 / factor for factor in factors])[:, None, None]

    def split(self, x: Tensor) -> Tensor:
        """Something of each channel (r e) by strips, (s r w), filled up with zeros."""
        count, _, w = self.codes.shape
        return pad(x, (0, count * w - self.width)).unflatten(1, (count, w)).transpose(0, 1)

    def scores(self, q: Tensor) -> Tensor:
        """Products of queries (q e) with the codes, (q n)."""
        return torch.bmm(self.split(q) * self.shares, self.codes.mT).sum(dim=0)

    def mean(self, weights: Tensor) -> Tensor:
        """The sum of the codes with weights (q n), (q e)."""
        found = torch.bmm(weights.expand(len(self.codes), -1, -1), self.codes) * self.shares
        return found.transpose(0, 1).flatten(1)[:, : self.width]


class Grouped:
    """Codes are multiplied, the products scaled: q (s c + l) = s (q c) + l sum q, in each group of channels."""

    def __init__(self, states: Rounded):
        self.states = states
        groups, channel = states.scale.shape[1], torch.arange(states.width, device=states.codes.device)
        self.member = channel // states.group == torch.arange(groups, device=channel.device)[:, None]  # g e

    def tables(self, cells: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales (g 1 n) and least values (g n) of cells."""
        scale, low = (x[cells].to(dtype).T for x in (self.states.scale, self.states.low))
        return scale.contiguous()[:, None], low  # products with what lies crosswise are slow

    def scores(self, q: Tensor, cells: slice) -> Tensor:
        """See `Whole`."""
        scale, low = self.tables(cells, q.dtype)
        apart = q * self.member[:, None]  # g q e
        products = Strips(self.states, cells, q.dtype).scores(apart.flatten(0, 1)).view(*apart.shape[:2], -1)
        return (products * scale).sum(dim=0) + apart.sum(dim=-1).T @ low

    def mean(self, weights: Tensor, cells: slice) -> Tensor:
        """See `Whole`."""
        scale, low = self.tables(cells, weights.dtype)
        products = Strips(self.states, cells, weights.dtype).mean((weights * scale).flatten(0, 1)).view(len(scale), *weights.shape[:1], -1)
        return (products * self.member[:, None]).sum(dim=0) + weights @ low.T @ self.member.to(low.dtype)


class Runs:
    """Cells that share their scales lie in runs: the codes of a run are scaled together, and products with least values are made once."""

    def __init__(self, states: Rounded):
        self.states = states

    def runs(self, cells: slice, dtype: torch.dtype) -> tuple[Strips, Tensor, Tensor]:
        """Codes that are scaled, the least values of the runs (t e), and how long each of these is, (t)."""
        s = self.states
        number, lengths = s.index[cells].unique_consecutive(return_counts=True)
        number, codes = number.long(), Strips(s, cells, dtype)
        scale = codes.split(s.scale[number].to(dtype))  # s t w
        length = even(lengths)
        if length:
            codes.codes.unflatten(1, (-1, length)).mul_(scale[:, :, None])
        else:
            codes.codes.mul_(scale.repeat_interleave(lengths, dim=1))
        return codes, s.low[number].to(dtype), lengths

    def scores(self, q: Tensor, cells: slice) -> Tensor:
        """See `Whole`."""
        codes, low, lengths = self.runs(cells, q.dtype)
        products, lows, length = codes.scores(q), q @ low.T, even(lengths)
        if length:
            return (products.unflatten(1, (-1, length)) + lows[:, :, None]).flatten(1)
        return products + lows.repeat_interleave(lengths, dim=1)

    def mean(self, weights: Tensor, cells: slice) -> Tensor:
        """See `Whole`."""
        codes, low, lengths = self.runs(cells, weights.dtype)
        run = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return codes.mean(weights) + weights.new_zeros(len(weights), len(low)).index_add(1, run, weights) @ low


def even(lengths: Tensor) -> int:
    """How long all runs are; 0 where they differ."""
    return int(lengths[0]) if bool((lengths == lengths[0]).all()) else 0
