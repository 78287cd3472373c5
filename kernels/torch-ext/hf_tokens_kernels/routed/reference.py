"""The torch reference: one copy of the tokens, into which the rows that ran are written. No row is written twice, so none is added up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..token_merge.reference import absent, flat, learns, rows, share_gradient


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens that run, zeros where the index is negative: x (b n d) and index (b r) to (b r d)."""
    return Gather.apply(x, index) if learns(x) else gathered(x, index)


def gathered(x: Tensor, index: Tensor) -> Tensor:
    gone = absent(index)
    return rows(x, index) if gone is None else rows(x, index.clamp(min=0)).masked_fill(gone[..., None], 0)


def written(x: Tensor | None, y: Tensor, index: Tensor, n: int) -> Tensor:
    """Tokens x (b n d), or zeros, with rows y (b r d) in the places of index (b r)."""
    (b, _, d), gone = y.shape, absent(index)
    place = flat(index, n) if gone is None else flat(index.clamp(min=0), n).masked_fill(gone.reshape(-1), b * n)
    if x is None:
        out = y.new_zeros(b * n + 1, d)  # the last row takes what is not there
    elif gone is None:
        return x.reshape(-1, d).index_copy(0, place, y.reshape(-1, d)).view(b, n, d)
    else:
        out = torch.cat([x.reshape(-1, d), x.new_zeros(1, d)])
    return out.index_copy_(0, place, y.reshape(-1, d))[:-1].view(b, n, d)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.n = x.shape[1]
        return gathered(x, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        return written(None, g, index, ctx.n), None


def scatter(x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None, residual: bool) -> Tensor:
    """Tokens x (b n d) with y (b r d) mixed in at index (b r) by weights (b r)."""
    return Scatter.apply(x, y, index, weights, residual) if learns(x, y, weights) else scattered(x, y, index, weights, residual)


def scattered(x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None, residual: bool) -> Tensor:
    if weights is not None or residual:
        old = gathered(x, index)
        weight = None if weights is None else weights.to(x.dtype)[..., None]
        y = torch.lerp(old, y, weight) if not residual else old + y if weight is None else torch.addcmul(old, weight, y)
    return written(x, y, index, x.shape[1])


class Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None, residual: bool) -> Tensor:
        learns = ctx.needs_input_grad[3]
        ctx.save_for_backward(x if learns and not residual else None, y if learns else None, index, weights)
        ctx.residual = residual
        return scattered(x, y, index, weights, residual)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, y, index, weights = ctx.saved_tensors
        got, gx, gw = gather(g, index), None, None
        gy = got if weights is None else got * weights.to(got.dtype).masked_fill(index < 0, 0)[..., None]
        if ctx.needs_input_grad[0]:
            kept = torch.zeros_like(got) if weights is None else got - gy
            gx = g if ctx.residual else scatter(g, kept, index, None, False)
        if ctx.needs_input_grad[3]:
            gw = share_gradient(got, y if ctx.residual else y - gather(x, index), index).to(weights.dtype)
        return gx, gy, None, gw, None
