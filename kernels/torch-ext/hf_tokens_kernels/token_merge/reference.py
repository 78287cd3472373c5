"""The torch reference: whole rows move by one flat index, and tokens are summed in the order of their slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision import accumulated


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def flat(index: Tensor, n: int) -> Tensor:
    """An index into each row of a batch (b r), as one into the n tokens of all rows behind each other, (b*r)."""
    b = len(index)
    return (index if b == 1 else index + torch.arange(0, b * n, n, device=index.device).unsqueeze(1)).reshape(-1)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Whole rows, x (b|1 n ...) at index (b r), to (b r ...)."""
    alone = x.shape[0] == 1
    added = not x.is_cpu and learns(x)  # there, an index_select adds up its gradient in any order
    if added or not (alone or x.is_contiguous()):
        return (x[0][index] if alone else x[torch.arange(len(x), device=x.device)[:, None], index]).contiguous()
    source = x[0] if alone else x.view(-1, *x.shape[2:])
    return source.index_select(0, index.reshape(-1) if alone else flat(index, x.shape[1])).view(*index.shape, *x.shape[2:])


def absent(index: Tensor) -> Tensor | None:
    """Where an index is below zero; None where a look at it is cheap and finds none."""
    looks = index.is_cpu and not torch.compiler.is_compiling()
    return None if looks and (not index.numel() or int(index.min()) >= 0) else index < 0


def members(slot: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The tokens of slot (b n), sorted by it, those that vanish last, (b*n); and where each slot begins, and they, (b*m + 1)."""
    slots = len(slot) * m
    ordered, order = flat(slot, m).masked_fill(slot.reshape(-1) < 0, slots).sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(slots + 1, device=slot.device))


def segment_sum(x: Tensor, slot: Tensor, m: int, share: Tensor | None = None) -> Tensor:
    """The sum of the tokens of each slot, each times its share: x (b n d), slot (b n), share (b n) to (b m d)."""
    return SegmentSum.apply(x, slot, m, share) if learns(x, share) else summed(x, slot, m, share)


def summed(x: Tensor, slot: Tensor, m: int, share: Tensor | None) -> Tensor:
    b, _, d = x.shape
    if not x.numel() or not m:
        return x.new_zeros(b, m, d)
    order, starts = members(slot, m)
    weights = None if share is None else share.reshape(-1).index_select(0, order)
    out = torch.embedding_bag(x.reshape(-1, d).to(accumulated(x.dtype)), order, starts, False, 0, False, weights)[0]
    return out[:-1].view(b, m, d).to(x.dtype)  # the last bag holds what vanishes


def share_gradient(g: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    """The gradient of the shares: g (b n d) of what each token gave, and x (b n d), to (b n)."""
    return (g.to(accumulated(x.dtype)) * x).sum(dim=-1).masked_fill(slot < 0, 0)


class SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Tensor, m: int, share: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, slot, share)
        return summed(x, slot, m, share)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, slot, share = ctx.saved_tensors
        g = unmerge(g, slot, None)
        gx = g if share is None else (g * share[..., None]).to(g.dtype)
        return gx, None, None, share_gradient(g, x, slot) if ctx.needs_input_grad[3] else None


def unmerge(y: Tensor, slot: Tensor, before: Tensor | None) -> Tensor:
    """Each token takes its slot's row: y (b|1 m ...), slot (b n) and before (b n ...) to (b n ...)."""
    return Unmerge.apply(y, slot, before) if learns(y, before) else unmerged(y, slot, before)


def unmerged(y: Tensor, slot: Tensor, before: Tensor | None) -> Tensor:
    if not y.shape[1]:
        return y.new_zeros(*slot.shape, *y.shape[2:]) if before is None else before.to(y.dtype, copy=True)
    gone = absent(slot)
    if gone is None:
        return rows(y, slot)
    out = rows(y, slot.clamp(min=0))
    if not y.is_cpu or torch.compiler.is_compiling():
        wide = gone.view(*gone.shape, *[1] * (y.dim() - 2))
        return out.masked_fill(wide, 0) if before is None else torch.where(wide, before.to(y.dtype), out)
    places = gone.reshape(-1).nonzero()[:, 0]
    if before is None:
        out.view(-1, *y.shape[2:]).index_fill_(0, places, 0)
    else:
        out.view(-1, *y.shape[2:]).index_copy_(0, places, before.flatten(0, 1).index_select(0, places).to(y.dtype))
    return out


class Unmerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, slot: Tensor, before: Tensor | None) -> Tensor:
        ctx.save_for_backward(slot)
        ctx.shape, ctx.dtype = y.shape, y.dtype if before is None else before.dtype
        return unmerged(y, slot, before)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (slot,) = ctx.saved_tensors
        y = None
        if ctx.needs_input_grad[0]:
            y = segment_sum(g.reshape(*slot.shape, -1), slot, ctx.shape[1])
            y = (y.sum(dim=0, keepdim=True) if ctx.shape[0] == 1 else y).view(ctx.shape)
        gone = (slot < 0).view(*slot.shape, *[1] * (g.dim() - 2))
        return y, None, g.masked_fill(~gone, 0).to(ctx.dtype) if ctx.needs_input_grad[2] else None
