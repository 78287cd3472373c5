"""Decode attention over caches whose rows and key heads have different lengths."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from ..precision import accumulated, of_autocast
from . import reference

WIDEST = 256  # features of a head
MOST_QUERIES = 64  # queries of a key head


def ragged_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    sizes: Tensor | None = None,
    softcap: float | None = None,
    causal: bool = False,
    longest: int | None = None,
    scores: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention of few queries over the cells of each row and key head, which lie one behind the other.

    A region of cells may have room behind its last one, so that a cache grows in place. `merge_attention` joins what is read of several
    such pools.

    Args:
        q: Queries, (b h m e).
        keys: Keys of all cells, (c e).
        values: Their values, (c f).
        starts: Where the cells of a row and key head begin, (b g), h a multiple of g.
        lengths: How many there are, (b g).
        scaling: Factor on the dot products.
        sizes: How many tokens each cell stands for, (c): their log is added to its scores.
        softcap: The scores become softcap * tanh(score / softcap), before that.
        causal: Whether the last m cells are those of the queries, each of which sees none behind its own.
        longest: Upper bound of the lengths, if it is known; a GPU is asked for it otherwise.
        scores: Whether to return the scores too.

    Returns:
        What is read (b h m f), zeros where there is no cell, and the log of the sum of exponentials (b h m), float32 at least.
        With `scores` also those of each cell before the softmax, (h/g*m c), -inf where a query does not look and in the room.

    Raises:
        ValueError: The shapes do not fit.
    """
    check(q, starts, lengths)
    if keys.dim() != 2 or values.dim() != 2 or len(keys) != len(values) or keys.shape[1] != q.shape[3]:
        came = f"{tuple(keys.shape)} and {tuple(values.shape)} for queries {tuple(q.shape)}"
        raise ValueError(f"keys must be (cells, e) with the e of the queries and values (cells, f), got {came}. Flatten the cells.")
    cast, apart = of_autocast(q.device)
    q, keys, values = map(cast, (q, keys, values))
    given = (q, keys, values, starts, lengths, *(() if sizes is None else (sizes,)))
    told = scores_of(q, starts, len(keys)) if scores else None
    with apart:
        if choose("ragged_attention", *given, refuses=refuses(q, starts, values.shape[1], keys, values)):
            from .twin import ragged_attention as twin

            out = twin(q, keys, values, starts, lengths, scaling, sizes, softcap, causal, longest, told)
        else:
            out = reference.ragged_attention(q, keys, values, starts, lengths, scaling, sizes, softcap, causal, told)
    return out if told is None else (*out, told)


def scores_of(q: Tensor, starts: Tensor, cells: int) -> Tensor:
    """Where the scores of cells are put, (h/g*m c)."""
    queries = q.shape[1] // starts.shape[1] * q.shape[2]
    return torch.full((queries, cells), -torch.inf, dtype=accumulated(q.dtype), device=q.device)


def check(q: Tensor, starts: Tensor, lengths: Tensor) -> None:
    """Refuse what is no ragged cache.

    Raises:
        ValueError: The shapes do not fit.
    """
    if q.dim() != 4 or starts.shape != lengths.shape or starts.dim() != 2 or len(starts) != len(q) or q.shape[1] % starts.shape[1]:
        came = f"{tuple(q.shape)}, {tuple(starts.shape)} and {tuple(lengths.shape)}"
        raise ValueError(f"queries (b, h, m, e) need starts and lengths (b, g), h a multiple of g, got {came}. Give each head its own.")


def refuses(q: Tensor, starts: Tensor, width: int, *states: Tensor) -> str | None:
    """What the twin cannot do of a call whose values have this width."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, *states)):
        return "a gradient"
    if max(q.shape[3], width) > WIDEST:
        return f"heads wider than {WIDEST}"
    if q.shape[1] // starts.shape[1] * q.shape[2] > MOST_QUERIES:
        return f"more than {MOST_QUERIES} queries of a key head"
    return None


def merge_attention(parts: list[tuple[Tensor, Tensor]], sinks: Tensor | None = None) -> Tensor:
    """What queries read of several pools of cells together.

    Args:
        parts: What they read of each (b h m f), and the log of their sums of exponentials there (b h m).
        sinks: The score of a key without a value, (h).

    Returns:
        (b h m f), zeros where there is nothing to read.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0][0]
    logs = torch.stack([log for _, log in parts])  # p b h m
    alone = logs if sinks is None else torch.cat([logs, sinks.to(logs).view(1, 1, -1, 1).expand_as(logs[:1])])
    total = alone.logsumexp(dim=0)
    weights = (logs - torch.where(total == -torch.inf, 0, total)).exp()
    out = (weights[..., None] * torch.stack([read for read, _ in parts])).sum(dim=0)
    return out.to(parts[0][0].dtype)
