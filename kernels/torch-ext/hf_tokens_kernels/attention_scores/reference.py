"""The torch reference: queries in chunks, so that memory grows with n and not with n squared."""

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # probabilities held at a time
CAUSAL_CHUNK = 128  # queries of a chunk that looks back only


def probabilities(
    q: Tensor,
    k: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    visible: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scaling + mask): q (b h c e), k (b g n e), mask (b|1 h|1 c n) bool or additive, visible (b h|1 c n) bool."""
    groups = q.shape[1] // k.shape[1]
    b, h, c, e = q.shape
    scores = torch.matmul((q * scaling).reshape(b, k.shape[1], groups * c, e), k.transpose(-1, -2)).view(b, h, c, -1)
    scores = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(1, h, 1, 1).expand(b, h, c, 1)], dim=-1)
    p = torch.softmax(scores, dim=-1)[..., : k.shape[2]]
    return p if mask is None else p.nan_to_num(0.0)  # a query that sees nothing gives nothing


def causal_probabilities(q: Tensor, k: Tensor, scaling: float, **shape: Any) -> Tensor:
    """The same where the last query stands at the last key and sees what is before: q (b h c e), k (b g n e)."""
    c, n = q.shape[2], k.shape[2]
    visible = torch.ones(c, n, dtype=torch.bool, device=q.device).tril(n - c)
    return probabilities(q, k, scaling, visible=visible, **shape)


def attention_columns(
    q: Tensor,
    k: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    weights: Tensor | None = None,
    reduce: str = "sum",
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """What every key receives from the queries, per query head.

    Args:
        q: Queries, (b h m e).
        k: Keys, (b g n e), h a multiple of g.
        scaling: Factor on the dot products.
        mask: Bool (True is seen) or additive mask, (b|1 h|1 m n).
        causal: Without a mask, whether query i sees only the keys up to its own place; the last query stands at the last key.
        weights: How much each query counts, (b m); 0 leaves it out.
        reduce: `sum` over queries or `max`.
        softcap: The scores become softcap * tanh(score / softcap), before the mask.
        sinks: The score of a key that every query sees and that is not returned, (h).

    Returns:
        (b h n), float32 at least.
    """
    b, h, m, _ = q.shape
    n = k.shape[2]
    skips = causal and mask is None
    step = max(1, min(m, CHUNK_ELEMENTS // max(1, b * h * n), CAUSAL_CHUNK if skips else m))
    out: Tensor | None = None
    for first in range(0, m, step):
        rows = q[:, :, first : first + step]
        c = rows.shape[2]
        if skips:  # no query of the chunk sees a key behind its last one
            end = n - m + first + c
            p = causal_probabilities(rows, k[:, :, :end], scaling, softcap=softcap, sinks=sinks)
        else:
            end = n
            seen = mask if mask is None or mask.shape[2] == 1 else mask[:, :, first : first + step]
            p = probabilities(rows, k, scaling, seen, softcap=softcap, sinks=sinks)
        if weights is not None:
            p = p * weights[:, None, first : first + step, None].to(p.dtype)
        part = torch.nn.functional.pad(p.sum(dim=2) if reduce == "sum" else p.amax(dim=2), (0, n - end))
        if out is None:
            out = part
        else:
            out = out + part if reduce == "sum" else torch.maximum(out, part)
    return out


def attention_rows(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The probabilities of chosen queries: index (b r) into q (b h m e), to (b h r n); the rest as in `attention_columns`."""
    b, h, m, e = q.shape
    wide = index[:, None, :, None]
    rows = q.gather(2, wide.expand(b, h, -1, e))
    n = k.shape[2]
    seen = visible = None
    if mask is not None:
        seen = mask.expand(b, mask.shape[1], m, n).gather(2, wide.expand(b, mask.shape[1], -1, n))
    elif causal:
        visible = (torch.arange(n, device=q.device) <= index[..., None] + (n - m))[:, None]
    return probabilities(rows, k, scaling, seen, visible, softcap, sinks)


def attention_entropy(q: Tensor, k: Tensor, *, scaling: float, mask: Tensor | None = None, pooled: bool = False) -> Tensor:
    """How undecided every query is: the entropy of its probabilities in nats, q (b h m e) and k (b g n e) to (b h m).

    With `pooled` it is that of the mean of the heads' probabilities, (b m).
    """
    b, h, m, _ = q.shape
    n = k.shape[2]
    step = max(1, min(m, CHUNK_ELEMENTS // max(1, b * h * n)))
    parts = []
    for first in range(0, m, step):
        part = slice(first, min(first + step, m))
        seen = None if mask is None else (mask[:, :, part] if mask.shape[2] > 1 else mask)
        p = probabilities(q[:, :, part], k, scaling, seen)
        p = p.mean(dim=1) if pooled else p
        parts.append(-torch.xlogy(p, p).sum(dim=-1))
    return torch.cat(parts, dim=-1)
