"""The torch reference: a row and head at a time where it is long, those of like length together where they are short."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

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
) -> tuple[Tensor, Tensor]:
    """What the queries read (b h m f), and the log of their sums of exponentials (b h m), -inf where there is nothing to read."""
    b, h, m, _ = q.shape
    groups = h // starts.shape[1]
    rows = q.reshape(b * starts.shape[1], groups * m, -1)
    if causal and m > 1:
        later = torch.arange(m - 1, -1, -1, device=q.device).repeat(groups)  # last cells that each query does not see
    else:
        later = None
    out, logs = rows.new_empty(*rows.shape[:2], values.shape[1]), rows.new_empty(rows.shape[:2], dtype=accumulated(q))

    def attend(index: list[int] | slice, k: Tensor, v: Tensor, size: Tensor | None, there: Tensor | None, ends: Tensor) -> None:
        scores = torch.matmul(rows[index] * scaling, k.mT).to(logs.dtype)  # r q n
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if size is None else scores + size.to(logs.dtype).log()[:, None]
        if later is not None:
            hidden = torch.arange(k.shape[1], device=q.device) >= (ends[:, None] - later)[..., None]  # r q n
            scores = scores.masked_fill(hidden, -torch.inf)
        scores = scores if there is None else scores.masked_fill(~there[:, None], -torch.inf)
        log = scores.logsumexp(dim=-1)
        weights = (scores - torch.where(log == -torch.inf, 0, log)[..., None]).exp()
        out[index], logs[index] = torch.matmul(weights.to(v.dtype), v), log

    over_buckets(starts, lengths, attend, keys, values, sizes)
    return out.view(b, h, m, -1), logs.view(b, h, m)


def accumulated(x: Tensor) -> torch.dtype:
    """The dtype in which a softmax is computed."""
    return torch.promote_types(x.dtype, torch.float32)


def buckets(lengths: list[int]) -> list[list[int]]:
    """Rows and heads that are computed together."""
    out: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        first = lengths[out[-1][0]] if out else 0
        joins = out and lengths[i] < LONG and lengths[i] <= max(first * PADDING, first + 4) and (first > 0 or lengths[i] == 0)
        if joins:
            out[-1].append(i)
        else:
            out.append([i])
    return out


def over_buckets(starts: Tensor, lengths: Tensor, attend: Callable, keys: Tensor, values: Tensor, sizes: Tensor | None) -> None:
    """Call a function for each bucket with its cells, (r n ...)."""
    first, ends = starts.flatten().tolist(), lengths.flatten()
    many = ends.tolist()
    for index in buckets(many):
        end = ends[index]
        if len(index) == 1:
            cells = slice(first[index[0]], first[index[0]] + many[index[0]])
            attend(
                slice(index[0], index[0] + 1),
                keys[None, cells],
                values[None, cells],
                None if sizes is None else sizes[None, cells],
                None,
                end,
            )
            continue
        place = torch.arange(max(many[i] for i in index), device=ends.device)
        there = place < end[:, None]
        cells = torch.where(there, starts.flatten()[index, None] + place, 0).flatten()
        k, v = (torch.where(there[..., None], x.index_select(0, cells).unflatten(0, there.shape), 0) for x in (keys, values))
        size = None if sizes is None else torch.where(there, sizes[cells].view_as(there), 1)
        attend(index, k, v, size, there, end)
