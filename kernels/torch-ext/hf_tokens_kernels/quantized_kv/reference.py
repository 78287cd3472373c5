"""The torch reference: a row and head at a time, its cells in chunks, of which no more than one is unpacked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..precision import accumulated
from .bits import unpack_bits
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
        weights = (scores - logs[i, :, None]).exp().split(CHUNK, dim=1)
        out[i] = sum(read_values.mean(weight, part) for weight, part in zip(weights, cells, strict=True))
    return out.to(q.dtype).view(b, h, m, -1), logs.view(b, h, m)


def reader(states: Packed) -> Whole | Grouped:
    """How products with packed states are computed."""
    grouped = isinstance(states, Rounded) and states.index is None and states.scale.shape[1] <= FEW_GROUPS
    return Grouped(states) if grouped else Whole(states)


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


class Grouped:
    """Codes are multiplied, the products scaled: q (s c + l) = s (q c) + l sum q, in each group of channels."""

    def __init__(self, states: Rounded):
        self.states = states
        groups, channel = states.scale.shape[1], torch.arange(states.width, device=states.codes.device)
        self.member = channel // states.group == torch.arange(groups, device=channel.device)[:, None]  # g e

    def codes(self, cells: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Codes (n e), scales and least values (g 1 n) of cells."""
        s = self.states
        codes = unpack_bits(s.codes[cells], s.bits, s.width).to(dtype)
        return codes, *(x[cells].to(dtype).T[:, None] for x in (s.scale, s.low))

    def scores(self, q: Tensor, cells: slice) -> Tensor:
        """See `Whole`."""
        codes, scale, low = self.codes(cells, q.dtype)
        apart = q * self.member[:, None]  # g q e
        products = (apart.flatten(0, 1) @ codes.T).view(*apart.shape[:2], -1)
        return torch.addcmul(low * apart.sum(dim=-1, keepdim=True), products, scale).sum(dim=0)

    def mean(self, weights: Tensor, cells: slice) -> Tensor:
        """See `Whole`."""
        codes, scale, low = self.codes(cells, weights.dtype)
        products = ((weights * scale).flatten(0, 1) @ codes).view(len(scale), *weights.shape[:1], -1)  # g q f
        lows = (weights * low).sum(dim=-1)[..., None]
        return ((products + lows) * self.member[:, None]).sum(dim=0)
