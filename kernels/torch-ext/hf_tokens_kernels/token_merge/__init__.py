"""Tokens that join in slots, as a weighted mean or a sum, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from ..precision import accumulated
from . import reference

__all__ = ["merge", "take_rows", "unmerge"]

REDUCTIONS = ("mean", "sum")


def merge(x: Tensor, slot: Tensor, m: int, weights: Tensor | None = None, *, reduce: str = "mean") -> Tensor:
    """The tokens of each slot as one: their weighted mean or sum, added up in their order, in float32 at least.

    The bits are the same in every run. A mean over one token, whatever it weighs, is that token's bits.

    Args:
        x: Tokens, (b n d).
        slot: Slot of each token, below m; a negative one vanishes, whatever stands in it, (b n).
        m: Slots.
        weights: How much each token counts, not below zero, (b n); by default all the same.
        reduce: `mean`, divided by the sum of the weights, or `sum`.

    Returns:
        (b m d) of the dtype of x; a slot that holds nothing, or whose weights are zero, is zero.

    Raises:
        ValueError: The shapes do not fit, or there is no such reduction.

    >>> import torch
    >>> from hf_tokens_kernels import merge, unmerge
    >>> slot = torch.tensor([[0, 1, 0, -1]])
    >>> merge(torch.tensor([[[1.0], [2.0], [5.0], [9.0]]]), slot, 3)[0, :, 0]
    tensor([3., 2., 0.])
    >>> unmerge(torch.tensor([[[3.0], [2.0], [0.0]]]), slot)[0, :, 0]
    tensor([3., 2., 3., 0.])
    """
    check_slots("merge", x, slot)
    if reduce not in REDUCTIONS:
        raise ValueError(f"`reduce` must be one of {REDUCTIONS}, got {reduce!r}. Choose one of them.")
    if weights is not None and weights.shape != slot.shape:
        raise ValueError(f"`weights` must be one number a token, {tuple(slot.shape)}, got {tuple(weights.shape)}. Give (batch, tokens).")
    share = shares(slot, m, weights, reduce, accumulated(x.dtype))
    if choose("merge", x, slot, *(() if share is None else (share,))):
        from .twin import segment_sum

        return segment_sum(x, slot, m, share)
    return reference.segment_sum(x, slot, m, share)


def shares(slot: Tensor, m: int, weights: Tensor | None, reduce: str, dtype: torch.dtype) -> Tensor | None:
    """How much of each token is in its slot, (b n); None for all of it."""
    if weights is None and reduce == "sum":
        return None
    weights = slot.new_ones(slot.shape, dtype=dtype) if weights is None else weights.to(dtype)
    if reduce == "sum":
        return weights.masked_fill(slot < 0, 0)
    place = torch.where(slot < 0, m, slot)  # the last one collects what vanishes
    total = weights.new_zeros(len(slot), m + 1).scatter_add(1, place, weights).gather(1, place)
    return (weights / total.where(total > 0, 1)).masked_fill(slot < 0, 0)


def unmerge(y: Tensor, slot: Tensor, before: Tensor | None = None) -> Tensor:
    """Every token gets the row of its slot.

    Args:
        y: Rows of any shape, (b|1 m ...).
        slot: Slot of each token, below m, (b n).
        before: What those with a negative slot get, (b n ...); by default zeros.

    Returns:
        (b n ...) of the dtype of y.

    Raises:
        ValueError: The shapes do not fit.
    """
    if y.dim() < 2 or slot.dim() != 2 or len(y) not in (1, len(slot)):
        raise ValueError(f"Rows must be (b m ...) and their slots (b n), got {tuple(y.shape)} and {tuple(slot.shape)}. Give both a batch.")
    due = (*slot.shape, *y.shape[2:])
    if before is not None and before.shape != due:
        raise ValueError(f"`before` must have a row for each token, {due}, got {tuple(before.shape)}. Give the tokens as they were.")
    refuses = None if y.is_floating_point() else f"rows of {y.dtype}".replace("torch.", "")
    if choose("unmerge", y, slot, *(() if before is None else (before,)), refuses=refuses):
        from .twin import unmerge as twin

        return twin(y.flatten(2) if y.dim() > 2 else y[..., None], slot, None if before is None else before.reshape(*slot.shape, -1)).view(
            due
        )
    return reference.unmerge(y, slot, before)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Whole rows. There is no twin: this is one copy, and torch's own is the fastest. The gradient has the same bits in every run.

    Args:
        x: Rows of any shape, (b|1 n ...).
        index: Which ones, below n and not negative, (b r).

    Returns:
        (b r ...).
    """
    return reference.rows(x, index)


def check_slots(operation: str, x: Tensor, slot: Tensor) -> None:
    """Refuse what has not one slot a token."""
    if x.dim() != 3 or slot.shape != x.shape[:2]:
        raise ValueError(f"{operation} needs tokens (b n d) and a slot for each, (b n), got {tuple(x.shape)} and {tuple(slot.shape)}.")
