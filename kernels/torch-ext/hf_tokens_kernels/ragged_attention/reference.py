"""The torch reference: a row and head at a time where it is long, those of like length together where they are short."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import accumulated

LONG = 256  # cells from which on a row and head is computed by itself
PADDING = 1.25  # rows and heads of like length: the longest of them by the shortest


def ragged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    sizes: Tensor | None,
    softcap: float | None,
    causal: bool,
    told: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What the queries read (b h m f), and the log of their sums of exponentials (b h m), -inf where there is nothing to read.

    The scores of the cells go to `told`, (h/g*m c).
    """
    b, h, m, _ = q.shape
    groups = h // starts.shape[1]
    rows = (q * scaling).reshape(b * starts.shape[1], groups * m, -1)
    later = torch.arange(m - 1, -1, -1, device=q.device).repeat(groups)  # last cells that each query does not see
    out, logs = rows.new_empty(*rows.shape[:2], values.shape[1]), rows.new_empty(rows.shape[:2], dtype=accumulated(q.dtype))
    for index, cells, there in blocks(starts, lengths):
        k, v, size = (None if x is None else x[cells] for x in (keys, values, sizes))  # r n ..., or n ... of a single row
        k, v = (x[None] if there is None else torch.where(there[..., None], x, 0) for x in (k, v))
        scores = torch.matmul(rows[index], k.mT).to(logs.dtype)  # r q n
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if size is None else scores + (size if there is None else size[:, None]).to(logs.dtype).log()
        if causal and m > 1:
            end = lengths.flatten()[index][:, None] - later  # r q
            scores = scores.masked_fill(torch.arange(k.shape[1], device=q.device) >= end[..., None], -torch.inf)
        scores = scores if there is None else scores.masked_fill(~there[:, None], -torch.inf)
        if told is not None:
            told[:, cells if there is None else cells[there]] = scores[0] if there is None else scores.transpose(0, 1)[:, there]
        log = scores.logsumexp(dim=-1)
        weights = (scores - torch.where(log == -torch.inf, 0, log)[..., None]).exp()
        out[index], logs[index] = torch.matmul(weights.to(v.dtype), v), log
    return out.view(b, h, m, -1), logs.view(b, h, m)


def buckets(lengths: list[int]) -> list[list[int]]:
    """Rows and heads that are computed together."""
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        first = lengths[out[-1][0]] if out else -1
        if 0 <= first and lengths[i] < LONG and lengths[i] <= max(first * PADDING, first + 4 if first else 0):
            out[-1].append(i)
        else:
            out.append([i])
    return out


def blocks(starts: Tensor, lengths: Tensor) -> Iterator[tuple[slice | list[int], slice | Tensor, Tensor | None]]:
    """What is computed together: rows and heads, their cells, and which of these there are, (r n); a single row's cells are a slice."""
    first, many = starts.flatten().tolist(), lengths.flatten().tolist()
    for index in buckets(many):
        if len(index) == 1:
            i = index[0]
            yield slice(i, i + 1), slice(first[i], first[i] + many[i]), None
            continue
        place = torch.arange(many[index[-1]], device=lengths.device)
        there = place < lengths.flatten()[index, None]
        yield index, torch.where(there, starts.flatten()[index, None] + place, 0), there
