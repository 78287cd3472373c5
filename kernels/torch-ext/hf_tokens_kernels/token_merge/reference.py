"""The torch reference: whole rows move by one flat index, and tokens are summed in the order of their slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lazily import lazy
from ..precision import accumulated


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient is wanted."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def flat(index: Tensor, n: int) -> Tensor:
    """An index into each row of a batch (b r), as one into the n tokens of all rows behind each other, (b*r)."""
    b = len(index)
    return (index if b == 1 else index + torch.arange(0, b * n, n, device=index.device).unsqueeze(1)).reshape(-1)


def rows(x: Tensor, index: Tensor, places: Tensor | None = None) -> Tensor:
    """Whole rows, x (b|1 n ...) at index (b r), to (b r ...); `places` is the flat index, where it is known."""
    alone = x.shape[0] == 1
    added = not x.is_cpu and learns(x)  # there, an index_select adds up its gradient in any order
    if added or not (alone or x.is_contiguous()):
        return (x[0][index] if alone else x[torch.arange(len(x), device=x.device)[:, None], index]).contiguous()
    source = x[0] if alone else x.flatten(0, 1)
    if alone or places is None:
        places = index.reshape(-1) if alone else flat(index, x.shape[1])
    return source.index_select(0, places).view(*index.shape, *x.shape[2:])


def absent(index: Tensor) -> Tensor | None:
    """Where an index is below zero; None where a look at it is cheap and finds none."""
    looks = index.is_cpu and not torch.compiler.is_compiling()
    return None if looks and (not index.numel() or int(index.min()) >= 0) else index < 0


class Slots:
    """The slots of tokens, and what a move along them needs, found at the first that needs it.

    Attributes:
        slot: Slot of each token, below m; a negative one vanishes, (b n).
        m: Slots.
    """

    def __init__(self, slot: Tensor, m: int):
        self.slot, self.m = slot, m
        self._shared: tuple[Tensor | None, Tensor] | None = None  # the weights that were shared out last, and their shares

    @lazy
    def gone(self) -> Tensor | None:
        """The tokens that vanish, (b n) bool; None where a look at them is cheap and finds none."""
        return absent(self.slot)

    @lazy
    def places(self) -> Tensor:
        """The slot of each token among those of all rows behind each other, any one where it vanishes, (b*n)."""
        return flat(self.slot if self.gone is None else self.slot.clamp(min=0), self.m)

    @lazy
    def members(self) -> tuple[Tensor, Tensor]:
        """The tokens sorted by their slots, those that vanish last, (b*n); and where each slot begins, and they, (b*m + 1)."""
        slots = len(self.slot) * self.m
        places = self.places if self.gone is None else self.places.masked_fill(self.gone.reshape(-1), slots)
        ordered, order = places.sort(stable=True)
        return order, torch.searchsorted(ordered, torch.arange(slots + 1, device=self.slot.device))

    def shares(self, given: Tensor | None, dtype: torch.dtype) -> Tensor:
        """How much each token counts in the mean of its slot, from the weights of all or none, (b n); zero where it vanishes."""
        if self._shared is not None and self._shared[0] is given and self._shared[1].dtype == dtype:
            return self._shared[1]
        weights = self.slot.new_ones(self.slot.shape, dtype=dtype) if given is None else given.to(dtype)
        slot, m = (self.slot, self.m) if self.gone is None else (self.slot.masked_fill(self.gone, self.m), self.m + 1)
        total = weights.new_zeros(len(slot), m).scatter_add(1, slot, weights).gather(1, slot)
        share = weights / total.masked_fill(total == 0, 1)
        share = share if self.gone is None else share.masked_fill(self.gone, 0)
        if not share.requires_grad:
            self._shared = given, share
        return share


def segment_sum(x: Tensor, slots: Slots, share: Tensor | None = None) -> Tensor:
    """The sum of the tokens of each slot, each times its share: x (b n d) and share (b n) to (b m d)."""
    return SegmentSum.apply(x, slots, share) if learns(x, share) else summed(x, slots, share)


def summed(x: Tensor, slots: Slots, share: Tensor | None) -> Tensor:
    (b, _, d), m = x.shape, slots.m
    if not x.numel() or not m:
        return x.new_zeros(b, m, d)
    order, starts = slots.members
    weights = None if share is None else share.reshape(-1).index_select(0, order)
    out = torch.embedding_bag(x.reshape(-1, d).to(accumulated(x.dtype)), order, starts, False, 0, False, weights)[0]
    return out[:-1].view(b, m, d).to(x.dtype)  # the last bag holds what vanishes


def share_gradient(g: Tensor, x: Tensor, slot: Tensor) -> Tensor:
    """The gradient of the shares: g (b n d) of what each token gave, and x (b n d), to (b n)."""
    return (g.to(accumulated(x.dtype)) * x).sum(dim=-1).masked_fill(slot < 0, 0)


class SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Slots, share: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, share)
        ctx.slots = slots
        return summed(x, slots, share)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, share = ctx.saved_tensors
        g = unmerge(g, ctx.slots, None)
        gx = g if share is None else (g * share[..., None]).to(g.dtype)
        return gx, None, share_gradient(g, x, ctx.slots.slot) if ctx.needs_input_grad[2] else None


def unmerge(y: Tensor, slots: Slots, before: Tensor | None) -> Tensor:
    """Each token takes its slot's row: y (b|1 m ...) and before (b n ...) to (b n ...)."""
    return Unmerge.apply(y, slots, before) if learns(y, before) else unmerged(y, slots, before)


def unmerged(y: Tensor, slots: Slots, before: Tensor | None) -> Tensor:
    slot, gone = slots.slot, slots.gone
    if not slots.m:
        return y.new_zeros(*slot.shape, *y.shape[2:]) if before is None else before.to(y.dtype, copy=True)
    out = rows(y, slot if gone is None else slot.clamp(min=0), slots.places)
    if gone is None:
        return out
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
    def forward(ctx: Any, y: Tensor, slots: Slots, before: Tensor | None) -> Tensor:
        ctx.slots, ctx.shape, ctx.dtype = slots, y.shape, y.dtype if before is None else before.dtype
        return unmerged(y, slots, before)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        slot, y = ctx.slots.slot, None
        if ctx.needs_input_grad[0]:
            y = segment_sum(g.reshape(*slot.shape, -1), ctx.slots)
            y = (y.sum(dim=0, keepdim=True) if ctx.shape[0] == 1 else y).view(ctx.shape)
        gone = (slot < 0).view(*slot.shape, *[1] * (g.dim() - 2))
        return y, None, g.masked_fill(~gone, 0).to(ctx.dtype) if ctx.needs_input_grad[2] else None
