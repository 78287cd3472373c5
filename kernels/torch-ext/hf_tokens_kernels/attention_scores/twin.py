"""The Triton twin: tiles of scores, computed again from queries, keys and the log-sum-exp wherever they are wanted."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from .look import Look


@triton.jit
def load_rows(X, stride, at, count, e, BE: tl.constexpr, UPCAST: tl.constexpr):
    """Rows `at` of count x e numbers, (B BE), zeros outside."""
    d = tl.arange(0, BE)
    x = tl.load(X + at[:, None].to(tl.int64) * stride + d[None, :], mask=(at < count)[:, None] & (d < e)[None, :], other=0)
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def tile(
    q, k, M, QP, KP, b, h, g, i, j, m, n, scaling, softcap, smb, smh, smm, smn, spb, spg,
    HIDES: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Scores of queries q (BM BE) and keys k (BN BE), -inf where hidden, and the slope that a soft cap leaves."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    slope = s
    if SOFTCAP:
        bent = 2 * tl.sigmoid(2 * s / softcap) - 1
        s = bent * softcap
        slope = 1 - bent * bent
    seen = (i < m)[:, None] & (j < n)[None, :]
    if HIDES == 1:
        seen &= j[None, :] <= i[:, None] + (n - m)
    if HIDES == 2:
        at = tl.load(QP + b * m + i, mask=i < m, other=0)
        place = tl.load(KP + b * spb + g * spg + j, mask=j < n, other=0)
        seen &= place[None, :] <= at[:, None]
    if MASK == 1:
        seen &= tl.load(M + b * smb + h * smh + i[:, None].to(tl.int64) * smm + j[None, :] * smn, mask=seen, other=0) != 0
    if MASK == 2:
        s += tl.load(M + b * smb + h * smh + i[:, None].to(tl.int64) * smm + j[None, :] * smn, mask=seen, other=0).to(tl.float32)
    return tl.where(seen, s, float("-inf")), slope


@triton.jit
def lse_kernel(
    Q, K, M, QP, KP, S, LSE, heads, groups, m, n, e, scaling, softcap,
    sqb, sqh, sqm, skb, skg, skn, smb, smh, smm, smn, spb, spg,
    HIDES: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, UPCAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program for each block of queries of a head: the log-sum-exp over all keys."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    g = h // groups
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    q = load_rows(Q + b * sqb + h * sqh, sqm, i, m, e, BE, UPCAST)
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.full([BM], 0.0, tl.float32)
    if SINKS:
        top = tl.zeros_like(top) + tl.load(S + h).to(tl.float32)
        total += 1
    end = n
    if HIDES == 1:
        end = tl.minimum(n, (tl.program_id(0) + 1) * BM + n - m)
    for first in range(0, end, BN):
        j = first + tl.arange(0, BN)
        k = load_rows(K + b * skb + g * skg, skn, j, n, e, BE, UPCAST)
        s, slope = tile(
            q, k, M, QP, KP, b, h, g, i, j, m, n, scaling, softcap, smb, smh, smm, smn, spb, spg, HIDES, MASK, SOFTCAP
        )  # fmt: skip
        high = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(high == float("-inf"), 0.0, high)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
        top = high
    tl.store(LSE + row * m + i, tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1)), float("inf")), mask=i < m)


@triton.jit
def columns_kernel(
    Q, K, M, QP, KP, LSE, W, OUT, BEST, heads, groups, m, n, e, scaling, softcap,
    sqb, sqh, sqm, skb, skg, skn, smb, smh, smm, smn, spb, spg,
    HIDES: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTS: tl.constexpr, MAX: tl.constexpr, CHOICE: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program for each block of keys of a head: what they receive from all queries."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    g = h // groups
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    k = load_rows(K + b * skb + g * skg, skn, j, n, e, BE, UPCAST)
    out = tl.full([BN], 0.0, tl.float32)
    best = tl.full([BN], 0, tl.int32)
    start = 0
    if HIDES == 1:  # the first block of queries of which one sees these keys
        start = tl.maximum(0, tl.program_id(0) * BN - (n - m)) // BM * BM
    for first in range(start, m, BM):
        i = first + tl.arange(0, BM)
        q = load_rows(Q + b * sqb + h * sqh, sqm, i, m, e, BE, UPCAST)
        s, slope = tile(
            q, k, M, QP, KP, b, h, g, i, j, m, n, scaling, softcap, smb, smh, smm, smn, spb, spg, HIDES, MASK, SOFTCAP
        )  # fmt: skip
        lse = tl.load(LSE + row * m + i, mask=i < m, other=float("inf"))
        p = tl.exp(s - lse[:, None])
        if WEIGHTS:
            p *= tl.load(W + b * m + i, mask=i < m, other=0).to(tl.float32)[:, None]
        if MAX:
            most, where = tl.max(p, 0, return_indices=True)
            if CHOICE:
                best = tl.where(most > out, first + where, best)
            out = tl.maximum(out, most)
        else:
            out += tl.sum(p, 0)
    tl.store(OUT + row * n + j, out, mask=j < n)
    if CHOICE:
        tl.store(BEST + row * n + j, best.to(tl.int64), mask=j < n)


@triton.jit
def queries_backward_kernel(
    Q, K, M, QP, KP, LSE, W, G, BEST, DQ, GIVEN, heads, groups, m, n, e, scaling, softcap,
    sqb, sqh, sqm, skb, skg, skn, smb, smh, smm, smn, spb, spg,
    HIDES: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTS: tl.constexpr, MAX: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program for each block of queries: with P' = P slope, dq = w scaling (sum_j P' g_j k_j - (sum_j P g_j) sum_j P' k_j)."""
    row = tl.program_id(1).to(tl.int64)
    b, h = row // heads, row % heads
    g = h // groups
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    q = load_rows(Q + b * sqb + h * sqh, sqm, i, m, e, BE, UPCAST)
    lse = tl.load(LSE + row * m + i, mask=i < m, other=float("inf"))
    given = tl.full([BM], 0.0, tl.float32)
    weighed = tl.full([BM, BE], 0.0, tl.float32)
    mean = tl.full([BM, BE], 0.0, tl.float32)
    end = n
    if HIDES == 1:
        end = tl.minimum(n, (tl.program_id(0) + 1) * BM + n - m)
    for first in range(0, end, BN):
        j = first + tl.arange(0, BN)
        k = load_rows(K + b * skb + g * skg, skn, j, n, e, BE, UPCAST)
        s, slope = tile(
            q, k, M, QP, KP, b, h, g, i, j, m, n, scaling, softcap, smb, smh, smm, smn, spb, spg, HIDES, MASK, SOFTCAP
        )  # fmt: skip
        p = tl.exp(s - lse[:, None])
        reach = tl.zeros_like(p) + tl.load(G + row * n + j, mask=j < n, other=0)[None, :]
        if MAX:
            reach = tl.where(tl.load(BEST + row * n + j, mask=j < n, other=-1)[None, :] == i[:, None], reach, 0.0)
        given += tl.sum(p * reach, 1)
        if SOFTCAP:
            p *= slope
        weighed += tl.dot((p * reach).to(k.dtype), k, input_precision="ieee")
        mean += tl.dot(p.to(k.dtype), k, input_precision="ieee")
    dq = (weighed - given[:, None] * mean) * scaling
    if WEIGHTS:
        dq *= tl.load(W + b * m + i, mask=i < m, other=0).to(tl.float32)[:, None]
    d = tl.arange(0, BE)
    tl.store(DQ + (row * m + i[:, None]) * e + d[None, :], dq, mask=(i < m)[:, None] & (d < e)[None, :])
    tl.store(GIVEN + row * m + i, given, mask=i < m)


@triton.jit
def keys_backward_kernel(
    Q, K, M, QP, KP, LSE, W, G, BEST, GIVEN, DK, heads, groups, m, n, e, scaling, softcap,
    sqb, sqh, sqm, skb, skg, skn, smb, smh, smm, smn, spb, spg,
    HIDES: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, WEIGHTS: tl.constexpr, MAX: tl.constexpr,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A program for each block of keys of a key head, over all its query heads: dk = scaling sum_i w_i P' (g_j - given_i) q_i."""
    cell = tl.program_id(1).to(tl.int64)
    b, g = cell // (heads // groups), cell % (heads // groups)
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    k = load_rows(K + b * skb + g * skg, skn, j, n, e, BE, UPCAST)
    dk = tl.full([BN, BE], 0.0, tl.float32)
    start = 0
    if HIDES == 1:
        start = tl.maximum(0, tl.program_id(0) * BN - (n - m)) // BM * BM
    for one in range(0, groups):
        h = g * groups + one
        row = b * heads + h
        grad = tl.load(G + row * n + j, mask=j < n, other=0)
        for first in range(start, m, BM):
            i = first + tl.arange(0, BM)
            q = load_rows(Q + b * sqb + h * sqh, sqm, i, m, e, BE, UPCAST)
            s, slope = tile(
                q, k, M, QP, KP, b, h, g, i, j, m, n, scaling, softcap, smb, smh, smm, smn, spb, spg, HIDES, MASK, SOFTCAP
            )  # fmt: skip
            p = tl.exp(s - tl.load(LSE + row * m + i, mask=i < m, other=float("inf"))[:, None])
            reach = tl.zeros_like(p) + grad[None, :]
            if MAX:
                reach = tl.where(tl.load(BEST + row * n + j, mask=j < n, other=-1)[None, :] == i[:, None], reach, 0.0)
            ds = p * (reach - tl.load(GIVEN + row * m + i, mask=i < m, other=0)[:, None])
            if SOFTCAP:
                ds *= slope
            if WEIGHTS:
                ds *= tl.load(W + b * m + i, mask=i < m, other=0).to(tl.float32)[:, None]
            dk += tl.dot(tl.trans(ds).to(q.dtype), q, input_precision="ieee")
    d = tl.arange(0, BE)
    tl.store(DK + (cell * n + j[:, None]) * e + d[None, :], dk * scaling, mask=(j < n)[:, None] & (d < e)[None, :])


class Launch:
    """What all kernels are given of a call."""

    def __init__(self, q: Tensor, k: Tensor, look: Look, weights: Tensor | None = None):
        (b, h, m, e), (_, g, n, _) = q.shape, k.shape
        self.q, self.k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.b, self.h, self.g, self.m, self.n = b, h, g, m, n
        self.look, self.weights = look, None if weights is None else weights.contiguous()
        mask, places = look.mask, look.key_positions
        self.mask = mask if mask is None or mask.dtype != torch.bool else mask.view(torch.uint8)
        self.queries = None if places is None else look.query_positions.contiguous()
        self.places = None if places is None else places.contiguous()
        wide = triton.next_power_of_2(max(e, 16))
        block = 64 if wide > 128 else 128
        fit = lambda size: min(block, triton.next_power_of_2(max(size, 16)))
        self.bm, self.bn = fit(m), fit(n)
        self.meta: dict[str, Any] = dict(BM=self.bm, BN=self.bn, BE=wide, num_warps=4 if wide <= 64 else 8)

    def front(self) -> tuple:
        """Queries, keys, mask and positions; what is not there is the queries, and never read."""
        return self.q, self.k, *(self.q if t is None else t for t in (self.mask, self.queries, self.places))

    def tail(self) -> tuple:
        """Sizes and strides."""
        look, e = self.look, self.q.shape[3]
        sizes = (self.h, self.h // self.g, self.m, self.n, e, look.scaling, 1.0 if look.softcap is None else look.softcap)
        mask = (0, 0, 0, 0) if self.mask is None else self.mask.expand(self.b, self.h, self.m, self.n).stride()
        places = (0, 0) if self.places is None else self.places.expand(self.b, self.g, self.n).stride()[:2]
        return *sizes, *self.q.stride()[:3], *self.k.stride()[:3], *mask, *places

    def flags(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        look = self.look
        hides = 2 if self.places is not None else 1 if look.skips() else 0
        mask = 0 if self.mask is None else 1 if look.mask.dtype == torch.bool else 2
        return dict(HIDES=hides, MASK=mask, SOFTCAP=look.softcap is not None, UPCAST=interpreted(), **self.meta)

    def weighed(self) -> Tensor:
        """The weights of the queries; where there are none the queries, never read."""
        return self.q if self.weights is None else self.weights


def lse(q: Tensor, k: Tensor, look: Look) -> Tensor:
    """See `reference.lse`."""
    to = Launch(q, k, look)
    out = torch.empty(to.b, to.h, to.m, dtype=torch.float32, device=q.device)
    sinks = to.q if look.sinks is None else look.sinks.contiguous()
    grid = (triton.cdiv(to.m, to.bm), to.b * to.h)
    lse_kernel[grid](*to.front(), sinks, out, *to.tail(), SINKS=look.sinks is not None, **to.flags())
    return out


def columns(
    q: Tensor, k: Tensor, look: Look, weights: Tensor | None, reduce: str, lse: Tensor, choice: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See `reference.columns`; the log-sum-exp must be known."""
    to = Launch(q, k, look, weights)
    out = torch.empty(to.b, to.h, to.n, dtype=torch.float32, device=q.device)
    best = torch.empty(to.b, to.h, to.n, dtype=torch.long, device=q.device) if choice and reduce == "max" else None
    given = (lse.float().contiguous(), to.weighed(), out, out if best is None else best)
    flags = dict(WEIGHTS=weights is not None, MAX=reduce == "max", CHOICE=best is not None)
    columns_kernel[triton.cdiv(to.n, to.bn), to.b * to.h](*to.front(), *given, *to.tail(), **flags, **to.flags())
    return out, best


def columns_backward(
    grad: Tensor, q: Tensor, k: Tensor, look: Look, weights: Tensor | None, lse: Tensor, best: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.columns_backward`."""
    to = Launch(q, k, look, weights)
    dq, dk = (torch.empty(t.shape, dtype=torch.float32, device=q.device) for t in (q, k))
    given = torch.empty(to.b, to.h, to.m, dtype=torch.float32, device=q.device)
    known = (lse, to.weighed(), grad, grad if best is None else best)
    flags = dict(WEIGHTS=weights is not None, MAX=best is not None)
    rows = (triton.cdiv(to.m, to.bm), to.b * to.h)
    queries_backward_kernel[rows](*to.front(), *known, dq, given, *to.tail(), **flags, **to.flags())
    cells = (triton.cdiv(to.n, to.bn), to.b * to.g)
    keys_backward_kernel[cells](*to.front(), *known, given, dk, *to.tail(), **flags, **to.flags())
    return dq, dk, given
