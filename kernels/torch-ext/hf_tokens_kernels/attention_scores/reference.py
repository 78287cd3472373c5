"""The torch reference: queries in chunks, so that memory grows with n and not with n squared, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulated
from .look import Look

CHUNK_ELEMENTS = 1 << 19  # probabilities held at a time: what a core's cache holds
FEWEST, MOST = 16, 128  # queries of a chunk


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in float32 at least, in which sums are right, and laid out once for all products."""
    return tuple(t.to(accumulated(t.dtype)).contiguous() for t in tensors)


def chunks(b: int, h: int, m: int, n: int) -> Iterator[slice]:
    """Queries that are looked at together."""
    step = min(m, MOST, max(FEWEST, CHUNK_ELEMENTS // max(1, b * h * n)))
    return (slice(first, min(first + step, m)) for first in range(0, m, step))


def heads_together(b: int, h: int, g: int, m: int, n: int) -> Iterator[tuple[slice, slice]]:
    """Query heads and their key heads that are looked at together: all, or as many as fit with the fewest queries of a chunk."""
    step = min(g, max(1, CHUNK_ELEMENTS // max(1, b * (h // g) * min(m, FEWEST) * n)))
    return ((slice(first * (h // g), min(first + step, g) * (h // g)), slice(first, min(first + step, g))) for first in range(0, g, step))


def scores(q: Tensor, k: Tensor, look: Look, part: slice, end: int) -> tuple[Tensor, Tensor | None]:
    """Scores of some queries and the first keys, -inf where they are hidden, (b h c end); and what a soft cap leaves of their slope."""
    (b, h, _, e), g = q.shape, k.shape[1]
    rows = q[:, :, part]
    c = rows.shape[2]
    s = torch.matmul((rows * look.scaling).reshape(b, g, h // g * c, e), k[:, :, :end].transpose(-1, -2)).view(b, h, c, end)
    slope = None
    if look.softcap is not None:
        bent = torch.tanh(s / look.softcap)
        s, slope = bent * look.softcap, 1 - bent.square()
    if look.mask is not None:
        mask = look.mask if look.mask.shape[2] == 1 else look.mask[:, :, part]
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if look.query_positions is not None:
        keys = look.key_positions
        keys = keys if keys.shape[1] == 1 else keys.repeat_interleave(h // g, dim=1)
        s = s.masked_fill(keys[:, :, None] > look.query_positions[:, None, part, None], -torch.inf)
    elif look.skips():
        own = torch.arange(end - c, end, device=q.device)
        s[..., end - c :].masked_fill_(own > own[:, None], -torch.inf)  # what a chunk's queries see alike stands in front of these
    return s, slope


def log_sum_exp(s: Tensor, look: Look) -> Tensor:
    """Over the keys and the sink, (b h c); inf where a query sees nothing, so that it gives nothing."""
    lse = s.logsumexp(dim=-1)
    if look.sinks is not None:
        lse = torch.logaddexp(lse, look.sinks.to(lse).view(1, -1, 1).expand_as(lse))
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def probabilities(q: Tensor, k: Tensor, look: Look, part: slice, end: int, lse: Tensor | None = None) -> Tensor:
    """What some queries give to the first keys, (b h c end)."""
    s, _ = scores(q, k, look, part, end)
    if lse is not None:
        return s.sub_(lse[:, :, part, None]).exp_()
    if look.sinks is not None:
        h = q.shape[1]
        sinks = look.sinks.to(s).view(1, h, 1, 1).expand(*s.shape[:3], 1)
        s = torch.cat([s, sinks], dim=-1)
    p = torch.softmax(s, dim=-1)[..., :end]
    if look.mask is None and look.query_positions is None:
        return p
    return p.masked_fill(s.amax(dim=-1, keepdim=True) == -torch.inf, 0)  # a query that sees nothing gives nothing


def lse(q: Tensor, k: Tensor, look: Look) -> Tensor:
    """The log-sum-exp of every query's scores, (b h m)."""
    (b, h, m, _), n = q.shape, k.shape[2]
    q, k = widen(q, k)
    parts = [log_sum_exp(scores(q, k, look, part, look.reach(part.stop, m, n))[0], look) for part in chunks(b, h, m, n)]
    return torch.cat(parts, dim=-1)


def columns(
    q: Tensor, k: Tensor, look: Look, weights: Tensor | None, reduce: str, lse: Tensor | None, choice: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What every key receives, (b h n), and for `max` with `choice` from which query."""
    q, k = widen(q, k)
    (b, h, m, _), (_, g, n, _) = q.shape, k.shape
    parts = [
        columns_together(q[:, own], k[:, keys], look.heads(own, keys), weights, reduce, None if lse is None else lse[:, own], choice)
        for own, keys in heads_together(b, h, g, m, n)
    ]
    if len(parts) == 1:
        return parts[0]
    out, best = zip(*parts, strict=True)
    return torch.cat(out, dim=1), None if best[0] is None else torch.cat(best, dim=1)


def columns_together(
    q: Tensor, k: Tensor, look: Look, weights: Tensor | None, reduce: str, lse: Tensor | None, choice: bool
) -> tuple[Tensor, Tensor | None]:
    """The columns of heads that are looked at together."""
    (b, h, m, _), n = q.shape, k.shape[2]
    out, best = q.new_zeros(b, h, n), None
    if reduce == "max" and choice:
        best = torch.zeros(b, h, n, dtype=torch.long, device=q.device)
    for part in chunks(b, h, m, n):
        end = look.reach(part.stop, m, n)
        p = probabilities(q, k, look, part, end, lse)
        if weights is not None:
            p = p * weights[:, None, part, None].to(p.dtype)
        received = p.sum(dim=2) if reduce == "sum" else p.amax(dim=2)
        if best is not None:
            where = p.argmax(dim=2) + part.start
            best[..., :end] = torch.where(received > out[..., :end], where, best[..., :end])
        if reduce == "sum":
            out[..., :end] += received
        else:
            out = torch.maximum(out, pad(received, (0, n - end)))
    return out, best


def columns_backward(
    grad: Tensor, q: Tensor, k: Tensor, look: Look, weights: Tensor | None, lse: Tensor, best: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and, where each query counts w_i, of w, (b h m): with P = exp(S - lse),

    dP_ij = w_i g_j, or that of the chosen query alone, and dS = P (dP - sum_j P dP).
    """
    (b, h, m, e), (_, g, n, _) = q.shape, k.shape
    q, k = widen(q, k)
    dq, dk, dw = torch.zeros_like(q), torch.zeros_like(k), q.new_zeros(b, h, m)
    for part in chunks(b, h, m, n):
        end = look.reach(part.stop, m, n)
        s, slope = scores(q, k, look, part, end)
        p = s.sub_(lse[:, :, part, None]).exp_()
        reach = grad[:, :, None, :end]
        if best is not None:
            here = torch.arange(part.start, part.stop, device=q.device)[:, None]
            reach = torch.where(best[:, :, None, :end] == here, reach, 0)
        given = (p * reach).sum(dim=-1, keepdim=True)
        dw[:, :, part] = given[..., 0]
        ds = p * (reach - given) * look.scaling
        ds = ds if weights is None else ds * weights[:, None, part, None].to(ds.dtype)
        ds = ds if slope is None else ds * slope
        ds = ds.reshape(b, g, -1, end)
        dq[:, :, part] = (ds @ k[:, :, :end]).view(b, h, -1, e)
        dk[:, :, :end] += ds.transpose(-1, -2) @ q[:, :, part].reshape(b, g, -1, e)
    return dq, dk, dw


def rows(q: Tensor, k: Tensor, index: Tensor, look: Look) -> Tensor:
    """The probabilities of chosen queries, index (b r) to (b h r n)."""
    (b, h, m, e), n = q.shape, k.shape[2]
    q, k = widen(q, k)
    picked = q.gather(2, index[:, None, :, None].expand(b, h, -1, e))
    return probabilities(picked, k, look.rows(index, m, n), slice(0, index.shape[1]), n)


def entropy(q: Tensor, k: Tensor, look: Look, pooled: bool) -> Tensor:
    """The entropy of each query's probabilities, (b h m), or of their mean over heads, (b m)."""
    (b, h, m, _), n = q.shape, k.shape[2]
    q, k = widen(q, k)
    parts = []
    for part in chunks(b, h, m, n):
        p = probabilities(q, k, look, part, n)
        p = p.mean(dim=1) if pooled else p
        parts.append(-torch.xlogy(p, p).sum(dim=-1))
    return torch.cat(parts, dim=-1)
