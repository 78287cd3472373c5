"""The torch reference: one copy of the tokens, into which the rows that ran are written."""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_merge.reference import absent, flat, rows


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens that run, zeros where the index is negative: x (b n d) and index (b r) to (b r d)."""
    gone = absent(index)
    return rows(x, index) if gone is None else rows(x, index.clamp(min=0)).masked_fill(gone[..., None], 0)


def scatter(x: Tensor, y: Tensor, index: Tensor, weights: Tensor | None, residual: bool) -> Tensor:
    """Tokens x (b n d) with y (b r d) mixed in at index (b r) by weights (b r)."""
    gone = absent(index)
    n, there = x.shape[1], index if gone is None else index.clamp(min=0)
    if weights is not None and gone is not None:
        weights = weights.masked_fill(gone, 0)
    if weights is not None or residual:
        old = rows(x, there)
        weight = None if weights is None else weights.to(x.dtype)[..., None]
        y = torch.lerp(old, y, weight) if not residual else old + y if weight is None else torch.addcmul(old, weight, y)
    place, y = flat(there, n), y.reshape(-1, y.shape[2])
    if gone is None:
        return x.reshape(-1, x.shape[2]).index_copy(0, place, y).view_as(x)
    padded = torch.cat([x.reshape(-1, x.shape[2]), x.new_zeros(1, x.shape[2])])  # the last row takes what is not there
    return padded.index_copy_(0, place.masked_fill(gone.reshape(-1), len(padded) - 1), y)[:-1].view_as(x)
