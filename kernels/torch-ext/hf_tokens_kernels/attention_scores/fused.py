"""Attention and its columns in one go: the probabilities of some queries are made once, for the values and for the sums."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..precision import accumulated
from .look import Look

ROWS = 192  # queries of all heads on a key head that are looked at together: what keeps a product of matrices busy
FEWEST = 32
ELEMENTS = 1 << 21  # probabilities held at a time, where that leaves the fewest queries
TOGETHER = 1 << 19  # those up to which several key heads share a product


def attend(q: Tensor, k: Tensor, v: Tensor, look: Look, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the queries read, (b m h f), and what every key receives, (b h n)."""
    dtype, wide = q.dtype, accumulated(q.dtype)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    (b, h, m, _), (_, g, n, f) = q.shape, v.shape
    r = h // g
    out, columns = q.new_empty(b, m, h, f, dtype=dtype), q.new_zeros(b, h, n)
    step = max(1, max(FEWEST, min(ROWS, ELEMENTS // max(1, n))) // r)
    some = max(1, min(g, TOGETHER // max(1, min(step, m) * r * n)))
    held = q.new_empty(some * r * min(step, m) * n)
    for first in range(0, m, step):
        part = slice(first, min(first + step, m))
        end = last_seen(look, part, m, n)
        for row in range(b):
            for head in range(0, g, some):
                keys = slice(head, min(head + some, g))
                own = slice(keys.start * r, keys.stop * r)
                p, total = exponentials(q[row, own, part], k[row, keys, :end], look, row, own, part, held)
                read = torch.bmm(p, v[row, keys, :end])  # g r*c f
                share = total.clamp_(min=1).reciprocal_()  # a query that sees a key has a sum of 1 at least; another reads nothing
                out[row, part, own] = read.mul_(share).view(-1, part.stop - first, f).transpose(0, 1).to(dtype)
                share = share.view(-1, 1, part.stop - first)
                share = share if weights is None else share * weights[row, part].to(share)
                columns[row, own, None, :end].baddbmm_(share, p.view(share.shape[0], -1, end))
    return out, columns


def last_seen(look: Look, part: slice, m: int, n: int) -> int:
    """Keys behind which these queries see none."""
    if look.mask is None:
        return look.reach(part.stop, m, n)
    mask = look.mask if look.mask.shape[2] == 1 else look.mask[:, :, part]
    return n - int(mask.flatten(0, 2).any(dim=0).flip(0).int().argmax())


def exponentials(q: Tensor, k: Tensor, look: Look, row: int, own: slice, part: slice, held: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries (h c e) and keys (g n e) exp(score - the query's highest), (g r*c n) in the memory held, and their sums (g r*c 1)."""
    (h, c, e), (g, n, _) = q.shape, k.shape
    s = held[: h * c * n].view(g, -1, n)
    queries = (q * (look.scaling / math.log(2))).reshape(g, -1, e)  # so that powers of 2 are what is summed: exp takes four times as long
    torch.bmm(queries, k.mT, out=s)
    of_heads = s.view(h, c, n)
    if look.mask is not None:
        mask = look.mask[row if look.mask.shape[0] > 1 else 0]
        mask = mask if mask.shape[0] == 1 else mask[own]
        mask = mask if mask.shape[1] == 1 else mask[:, part]
        of_heads.masked_fill_(~mask[..., :n], -torch.inf)
    elif look.skips():
        of_heads[:, :, n - c :].masked_fill_(torch.ones(c, c, dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    highest = s.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
    p = s.sub_(highest).exp2_()
    return p, p.sum(dim=-1, keepdim=True)
