"""The Triton twin: every row and head is split along its cells, so that a long one keeps the GPU busy; a second kernel joins the splits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..precision import accumulated

PROGRAMS = 1024  # that a large pool is split into
LEAST_BLOCKS = 4  # of cells in a split


@triton.jit
def fold_in(scores, v, acc, top, total, UPCAST: tl.constexpr):
    """One step of a running softmax over scores (q n) with the values (n f)."""
    new = tl.maximum(top, tl.max(scores, axis=1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp(scores - safe[:, None])
    fade = tl.exp(top - safe)
    weights = p if UPCAST else p.to(v.dtype)
    acc = acc * fade[:, None] + tl.dot(weights, v, input_precision="ieee")
    return acc, new, total * fade + tl.sum(p, axis=1)


@triton.jit
def leave(acc, top, total, out, tops, totals, row, split, splits, Q: tl.constexpr, F: tl.constexpr, BQ: tl.constexpr, BF: tl.constexpr):
    """Store what one split has gathered."""
    i, f = tl.arange(0, BQ), tl.arange(0, BF)
    at = (row * splits + split).to(tl.int64) * Q
    tl.store(out + (at + i)[:, None] * F + f[None, :], acc, mask=(i < Q)[:, None] & (f < F)[None, :])
    tl.store(tops + at + i, top, mask=i < Q)
    tl.store(totals + at + i, total, mask=i < Q)


@triton.jit
def partial_kernel(
    q, keys, values, starts, lengths, sizes, told, cells, out, tops, totals, scaling, softcap, m, per, splits, stride_k, stride_v,
    Q: tl.constexpr, E: tl.constexpr, F: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr,
    SIZES: tl.constexpr, CAP: tl.constexpr, CAUSAL: tl.constexpr, TELLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    i, e, f = tl.arange(0, BQ), tl.arange(0, BE), tl.arange(0, BF)
    own = tl.load(q + (row.to(tl.int64) * Q + i)[:, None] * E + e[None, :], mask=(i < Q)[:, None] & (e < E)[None, :], other=0.0)
    if UPCAST:
        own = own.to(tl.float32)
    acc = tl.zeros([BQ, BF], dtype=tl.float32)
    top = tl.full([BQ], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BQ], dtype=tl.float32)
    end = tl.minimum(split * per + per, length)
    for first in range(split * per, end, BN):
        place = first + tl.arange(0, BN)
        there = place < end
        cell = start + place
        k = tl.load(keys + cell[:, None] * stride_k + e[None, :], mask=there[:, None] & (e < E)[None, :], other=0.0)
        v = tl.load(values + cell[:, None] * stride_v + f[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(own, tl.trans(k), input_precision="ieee") * scaling
        if CAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        if SIZES:
            scores += tl.log(tl.load(sizes + cell, mask=there, other=1.0).to(tl.float32))[None, :]
        seen = there[None, :]
        if CAUSAL:
            seen = seen & (place[None, :] < length - (m - 1 - i % m)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        if TELLS:
            tl.store(told + i.to(tl.int64)[:, None] * cells + cell[None, :], scores, mask=(i < Q)[:, None] & there[None, :])
        acc, top, total = fold_in(scores, v, acc, top, total, UPCAST)
    leave(acc, top, total, out, tops, totals, row, split, splits, Q, F, BQ, BF)


@triton.jit
def join_kernel(part, tops, totals, out, logs, splits, Q: tl.constexpr, F: tl.constexpr, BQ: tl.constexpr, BF: tl.constexpr):
    row = tl.program_id(0)
    i, f = tl.arange(0, BQ), tl.arange(0, BF)
    here = (i < Q)[:, None] & (f < F)[None, :]
    acc = tl.zeros([BQ, BF], dtype=tl.float32)
    top = tl.full([BQ], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BQ], dtype=tl.float32)
    for split in range(0, splits):
        at = (row * splits + split).to(tl.int64) * Q
        its = tl.load(tops + at + i, mask=i < Q, other=float("-inf"))
        new = tl.maximum(top, its)
        safe = tl.where(new == float("-inf"), 0.0, new)
        mine, fade = tl.exp(its - safe), tl.exp(top - safe)
        acc = acc * fade[:, None] + mine[:, None] * tl.load(part + (at + i)[:, None] * F + f[None, :], mask=here, other=0.0)
        total = total * fade + mine * tl.load(totals + at + i, mask=i < Q, other=0.0)
        top = new
    at = row.to(tl.int64) * Q
    some = total > 0
    read = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(out + (at + i)[:, None] * F + f[None, :], read.to(out.dtype.element_ty), mask=here)
    tl.store(logs + at + i, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")), mask=i < Q)


def wide(n: int) -> int:
    """The width of a block of n features or queries."""
    return max(16, triton.next_power_of_2(n))


def split(longest: int, cells: int, block: int) -> tuple[int, int]:
    """Cells of a split, and how many splits the longest row and head needs."""
    per = -(-max(LEAST_BLOCKS * block, -(-cells // PROGRAMS)) // block) * block
    return per, max(1, -(-longest // per))


def block_of(features: int, size: int) -> int:
    """Cells of a block, of so many features of so many bytes."""
    return max(32, min(128, 16384 // (features * size)))


def run(
    partial, q: Tensor, starts: Tensor, lengths: Tensor, width: int, cells: int, block: int, longest: int | None
) -> tuple[Tensor, Tensor]:
    """Launch a kernel over rows, heads and splits, and join the splits: what is read (b h m f), and its log (b h m)."""
    b, h, m, _ = q.shape
    rows = starts.numel()
    queries = h // starts.shape[1] * m
    longest = int(lengths.max()) if longest is None else longest
    per, splits = split(longest, cells, block)
    kept = dict(dtype=torch.float32, device=q.device)
    part = torch.empty(rows, splits, queries, width, **kept)
    tops, totals = (torch.empty(rows, splits, queries, **kept) for _ in range(2))
    partial((rows, splits), part, tops, totals, per, splits, queries)
    out, logs = (
        torch.empty(b, h, m, width, dtype=q.dtype, device=q.device),
        torch.empty(b, h, m, dtype=accumulated(q.dtype), device=q.device),
    )
    join_kernel[(rows,)](part, tops, totals, out, logs, splits, Q=queries, F=width, BQ=wide(queries), BF=wide(width))
    return out, logs


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
    longest: int | None,
    told: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    q, starts, lengths = q.contiguous(), starts.contiguous(), lengths.contiguous()
    keys, values = (x if x.stride(1) == 1 else x.contiguous() for x in (keys, values))
    m, e, f = q.shape[2], keys.shape[1], values.shape[1]
    block = block_of(max(wide(e), wide(f)), keys.element_size())

    def partial(grid: tuple[int, int], part: Tensor, tops: Tensor, totals: Tensor, per: int, splits: int, queries: int) -> None:
        partial_kernel[grid](
            q, keys, values, starts, lengths, keys if sizes is None else sizes.contiguous(), q if told is None else told, len(keys),
            part, tops, totals,
            scaling, 1.0 if softcap is None else softcap, m, per, splits, keys.stride(0), values.stride(0),
            Q=queries, E=e, F=f, BQ=wide(queries), BN=block, BE=wide(e), BF=wide(f),
            SIZES=sizes is not None, CAP=softcap is not None, CAUSAL=causal and m > 1, TELLS=told is not None, UPCAST=interpreted(),
        )  # fmt: skip

    return run(partial, q, starts, lengths, f, len(keys), block, longest)
