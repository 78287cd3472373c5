"""The tokens that a router chose, and the way back into the sequence, with its weight and the residual."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from . import reference

__all__ = ["routed_gather", "routed_scatter"]


def routed_gather(x: Tensor, index: Tensor, counts: Tensor | None = None) -> Tensor:
    """The tokens that run.

    Rows with different numbers of them have an index of one width, which a capacity may set, so that no shape depends on what is chosen:
    what is not there is negative, or lies at or behind the row's count.

    Args:
        x: Tokens, (b n d).
        index: Which run, each one once at most, (b r).
        counts: How many of them each row has, (b); by default all that are not negative.

    Returns:
        (b r d), zeros where there is none.

    Raises:
        ValueError: The shapes do not fit.

    >>> import torch
    >>> from hf_tokens_kernels import routed_gather, routed_scatter
    >>> x, index = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[2, -1]])
    >>> routed_gather(x, index)[0, :, 0]
    tensor([3., 0.])
    >>> routed_scatter(x, torch.tensor([[[7.0], [9.0]]]), index, torch.tensor([[0.5, 1.0]]))[0, :, 0]
    tensor([1., 2., 5.])
    """
    check("routed_gather", x, index, counts)
    index = cut(index, counts)
    if choose("routed_gather", x, index, refuses=strange(x)):
        from .twin import gather

        return gather(x, index)
    return reference.gather(x, index)


def routed_scatter(
    x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None = None, *, residual: bool = False, counts: Tensor | None = None
) -> Tensor:
    """The tokens, with what became of those that ran: x + w (y - x), or x + w y with `residual`. The others keep their bits.

    Without `residual`, a weight of one leaves the bits of y, and a weight of zero those of x.

    Args:
        x: Tokens, (b n d).
        y: What became of those that ran, (b r d), of the dtype of x.
        index: Which those are, each one once at most; a negative one is not there, (b r).
        weights: The router's weight of each, (b r); by default one.
        residual: Whether y is an update only, which the tokens are added to here; else they are in it.
        counts: How many of them each row has, (b); by default all that are not negative.

    Returns:
        (b n d).

    Raises:
        ValueError: The shapes or dtypes do not fit.
    """
    check("routed_scatter", x, index, counts)
    if y.shape != (*index.shape, x.shape[2]) or y.dtype != x.dtype:
        due = f"{(*index.shape, x.shape[2])} of {x.dtype}"
        raise ValueError(f"`y` must have a row for each index, {due}, got {tuple(y.shape)} of {y.dtype}. Give what the block returned.")
    if weights is not None and weights.shape != index.shape:
        raise ValueError(f"`weights` must be one number an index, {tuple(index.shape)}, got {tuple(weights.shape)}. Gather them first.")
    index = cut(index, counts)
    if choose("routed_scatter", x, y, index, *(() if weights is None else (weights,)), refuses=strange(x)):
        from .twin import scatter

        return scatter(x, y, index, weights, residual)
    return reference.scatter(x, y, index, weights, residual)


def strange(x: Tensor) -> str | None:
    return None if x.is_floating_point() else f"tokens of {x.dtype}".replace("torch.", "")


def cut(index: Tensor, counts: Tensor | None) -> Tensor:
    """The index, negative at and behind the count of each row."""
    if counts is None:
        return index
    return index.masked_fill(torch.arange(index.shape[1], device=index.device) >= counts[:, None], -1)


def check(operation: str, x: Tensor, index: Tensor, counts: Tensor | None) -> None:
    """Refuse shapes that do not fit."""
    if x.dim() != 3 or index.dim() != 2 or len(x) != len(index):
        raise ValueError(f"{operation} needs tokens (b n d) and an index (b r), got {tuple(x.shape)} and {tuple(index.shape)}.")
    if counts is not None and counts.shape != index.shape[:1]:
        raise ValueError(f"`counts` must be one number a row, ({len(index)},), got {tuple(counts.shape)}. Count along the index.")
