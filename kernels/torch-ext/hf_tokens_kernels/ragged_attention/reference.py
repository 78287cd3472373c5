"""The torch reference: rows and heads that lie alike together; of the others the long ones one by one, the short ones of like length
together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..precision import accumulated
from .cells import Cells, placed, together

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
    groups, exact, found = h // starts.shape[1], accumulated(q.dtype), []
    rows = (q * scaling).reshape(b * starts.shape[1], groups * m, -1)
    for index, cells, there in blocks(starts, lengths):
        k, v, size = (None if x is None else cells.of(x) if there is None else x[cells] for x in (keys, values, sizes))  # r n ...
        k, v = (x if there is None else torch.where(there[..., None], x, 0) for x in (k, v))
        scores = torch.matmul(rows[index], k.mT).to(exact)  # r q n
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if size is None else scores + size[:, None].to(exact).log()
        if causal and m > 1:
            later = torch.arange(m - 1, -1, -1, device=q.device).repeat(groups)  # last cells that each query does not see
            end = lengths.flatten()[index][:, None] - later  # r q
            scores = scores.masked_fill(torch.arange(k.shape[1], device=q.device) >= end[..., None], -torch.inf)
        scores = scores if there is None else scores.masked_fill(~there[:, None], -torch.inf)
        if told is not None and there is None:
            cells.of(told.T).copy_(scores.mT)
        elif told is not None:
            told[:, cells[there]] = scores.transpose(0, 1)[:, there]
        top = scores.detach().amax(dim=2, keepdim=True)
        top = top if size is None else top.masked_fill(top == -torch.inf, 0)  # entries of no token
        weights = (scores - top).exp()
        total = weights.sum(dim=2, keepdim=True)
        shares = weights / (total if size is None else total.clamp(min=torch.finfo(exact).tiny))
        found.append((index, torch.matmul(shares.to(v.dtype), v), top + total.log()))
    out, logs = placed(found, rows.shape[:2], values[:0])
    return out.to(q.dtype).view(b, h, m, -1), logs.to(exact).view(b, h, m)


def buckets(rows: list[int], lengths: list[int]) -> list[list[int]]:
    """Which of some rows and heads are computed together, though they do not lie alike."""
    out: list[list[int]] = []
    for i in sorted(rows, key=lengths.__getitem__):
        first = lengths[out[-1][0]] if out else -1
        if 0 <= first and lengths[i] < LONG and lengths[i] <= max(first * PADDING, first + 4):
            out[-1].append(i)
        else:
            out.append([i])
    return out


def blocks(starts: Tensor, lengths: Tensor) -> Iterator[tuple[slice | list[int], Cells | Tensor, Tensor | None]]:
    """What is computed together: rows and heads that have cells, and these; or the numbers of these, and which there are, (r n)."""
    first, many = starts.flatten().tolist(), lengths.flatten().tolist()
    runs = [*together(first, many)]
    yield from ((some, cells, None) for some, cells in runs if cells.rows > 1)
    for index in buckets([some.start for some, cells in runs if cells.rows == 1], many):
        if len(index) == 1:
            i = index[0]
            yield slice(i, i + 1), Cells(first[i], 1, 1, many[i]), None
            continue
        place = torch.arange(many[index[-1]], device=lengths.device)
        there = place < lengths.flatten()[index, None]
        yield index, torch.where(there, starts.flatten()[index, None] + place, 0), there
