"""The Triton twin: one pass over the tokens, each of which knows by an inverted index which row of the block's output is its own."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..token_merge.reference import learns
from ..token_merge.twin import take, tile


@triton.jit
def scatter_kernel(
    x, y, weights, slot, out, tokens, n, r, d, WEIGHTED: tl.constexpr, RESIDUAL: tl.constexpr, T: tl.constexpr, D: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    c = tl.program_id(1) * D + tl.arange(0, D)
    there, inside = token < tokens, (c < d)[None, :]
    place = tl.load(slot + token + token // n, mask=there, other=-1)  # a row of the inverted index has one more
    runs = place >= 0
    source = (token // n) * r + place
    at = token[:, None] * d + c[None, :]
    needed = there if WEIGHTED or RESIDUAL else there & ~runs
    old = tl.load(x + at, mask=needed[:, None] & inside, other=0).to(tl.float32)
    new = tl.load(y + source[:, None] * d + c[None, :], mask=runs[:, None] & inside, other=0).to(tl.float32)
    if WEIGHTED:
        w = tl.load(weights + source, mask=runs, other=0).to(tl.float32)[:, None]
        if RESIDUAL:
            new = old + w * new
        else:
            new = tl.where(w < 0.5, old + w * (new - old), new - (new - old) * (1 - w))  # exact at both ends
    elif RESIDUAL:
        new = old + new
    tl.store(out + at, tl.where(runs[:, None], new, old).to(out.dtype.element_ty), mask=there[:, None] & inside)


@triton.jit
def scatter_backward_kernel(
    g, x, y, weights, slot, index, gx, gy, gw, tokens, entries, n, r, d,
    WEIGHTED: tl.constexpr, RESIDUAL: tl.constexpr, LEARNS: tl.constexpr, T: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * T + tl.arange(0, T)
    there = token < tokens
    place = tl.load(slot + token + token // n, mask=there, other=-1)
    runs = place >= 0
    source = (token // n) * r + place
    gone = (token < entries) & (tl.load(index + token, mask=token < entries, other=0) < 0)  # the same numbers, as those of entries
    w = tl.full([T], 1.0, dtype=tl.float32)
    if WEIGHTED:
        w = tl.load(weights + source, mask=runs, other=1).to(tl.float32)
    dot = tl.zeros([T], dtype=tl.float32)
    for start in range(0, d, D):
        c = start + tl.arange(0, D)
        inside = (c < d)[None, :]
        at, of = token[:, None] * d + c[None, :], source[:, None] * d + c[None, :]
        got = tl.load(g + at, mask=there[:, None] & inside, other=0).to(tl.float32)
        if LEARNS:
            change = tl.load(y + of, mask=runs[:, None] & inside, other=0).to(tl.float32)
            if not RESIDUAL:
                change -= tl.load(x + at, mask=runs[:, None] & inside, other=0).to(tl.float32)
            dot += tl.sum(tl.where(runs[:, None], got, 0) * change, axis=1)
        tl.store(gy + of, (got * w[:, None]).to(gy.dtype.element_ty), mask=runs[:, None] & inside)
        tl.store(gy + at, tl.zeros([T, D], dtype=gy.dtype.element_ty), mask=gone[:, None] & inside)
        if not RESIDUAL:
            kept = tl.where(runs[:, None], got * (1 - w)[:, None], got)
            tl.store(gx + at, kept.to(gx.dtype.element_ty), mask=there[:, None] & inside)
    if LEARNS:
        tl.store(gw + source, dot.to(gw.dtype.element_ty), mask=runs)
        tl.store(gw + token, tl.zeros([T], dtype=gw.dtype.element_ty), mask=gone)


def inverse(index: Tensor, n: int) -> Tensor:
    """For each of n tokens, which entry of index (b r) is its own, -1 if none; a last column takes what is not there, (b n+1)."""
    b, r = index.shape
    slot = torch.full((b, n + 1), -1, dtype=torch.long, device=index.device)
    return slot.scatter_(1, torch.where(index < 0, n, index), torch.arange(r, device=index.device).expand(b, r))


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n = x.shape[1]
        return take(x, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return take(g, inverse(index, ctx.n)[:, : ctx.n]), None


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens that run, zeros where the index is negative: x (b n d) and index (b r) to (b r d)."""
    return Gather.apply(x, index) if learns(x) else take(x, index)


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None, residual: bool) -> Tensor:
        (b, n, d), slot, out = x.shape, inverse(index, x.shape[1]), torch.empty_like(x, memory_format=torch.contiguous_format)
        learns = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if learns and not residual else None, y if learns else None, index, weights, slot)
        ctx.residual = residual
        if out.numel():
            rows, channels = tile(b * n, d)
            given = [x.contiguous() if t is None else t.contiguous() for t in (x, y, weights, slot)]
            grid = (triton.cdiv(b * n, rows), triton.cdiv(d, channels))
            scatter_kernel[grid](*given, out, b * n, n, index.shape[1], d, weights is not None, residual, rows, channels)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, index, weights, slot = ctx.saved_tensors
        (b, n, d), r, g = g.shape, index.shape[1], g.contiguous()
        gx = g if ctx.residual else torch.empty_like(g)
        gy, gw = g.new_empty(b, r, d), torch.empty_like(weights) if ctx.needs_input_grad[3] else None
        if d and (n or r):
            rows, channels = tile(b * max(n, r), d)
            given = [g if t is None else t.contiguous() for t in (x, y, weights, slot, index)]
            flags = weights is not None, ctx.residual, gw is not None
            grid = (triton.cdiv(b * max(n, r), rows),)
            result = gx, gy, g if gw is None else gw
            scatter_backward_kernel[grid](g, *given, *result, b * n, b * r, n, r, d, *flags, rows, channels)
        return gx, gy, None, gw, None


def scatter(x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None, residual: bool) -> Tensor:
    """Tokens x (b n d) with y (b r d) mixed in at index (b r) by weights (b r)."""
    return Scatter.apply(x, y, index, weights, residual)
