"""Pooling over ragged groups of tokens, without a table of groups by tokens. Means and sums are `merge`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from ..precision import accumulated
from ..token_merge import check_slots
from . import reference

__all__ = ["pool_max", "pool_power", "pool_softmax"]


def pool_max(x: Tensor, slot: Tensor, m: int) -> Tensor:
    """The largest of each group, channel by channel; several that are equal share its gradient.

    Args:
        x: Tokens, (b n d).
        slot: Group of each token, below m; a negative one vanishes, whatever stands in it, (b n).
        m: Groups.

    Returns:
        (b m d), -inf where a group holds nothing.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_slots("pool_max", x, slot)
    if x.numel() and m and choose("pool_max", x, slot):
        from .twin import pool_max as twin

        return twin(x, slot, m)
    return reference.pool_max(x, slot, m)


def pool_softmax(x: Tensor, scores: Tensor, slot: Tensor, m: int, weights: Tensor | None = None) -> Tensor:
    """The mean of each group, weighted by the softmax of its scores.

    Args:
        x: Tokens, (b n d).
        scores: A score of each token, (b n), or one for each head of d/h channels, (b n h), up to one for each channel.
        slot: Group of each token, below m; a negative one vanishes, whatever stands in it, (b n).
        m: Groups.
        weights: How many times each token counts, not below zero, (b n); by default once.

    Returns:
        (b m d) of the dtype of x, zeros where a group holds nothing.

    Raises:
        ValueError: The shapes do not fit.

    >>> import torch
    >>> from hf_tokens_kernels import pool_softmax
    >>> x, slot = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[0, 0, 1]])
    >>> pool_softmax(x, torch.zeros(1, 3), slot, 2)[0, :, 0]
    tensor([2., 5.])
    """
    check_slots("pool_softmax", x, slot)
    heads = scores.shape[2] if scores.dim() == 3 else 1
    if scores.shape[:2] != slot.shape or scores.dim() > 3 or not heads or x.shape[2] % heads:
        due = f"{tuple(slot.shape)}, or one a head whose number divides {x.shape[2]}"
        raise ValueError(f"`scores` must be one number a token, {due}, got {tuple(scores.shape)}. Give (batch, tokens[, heads]).")
    check_weights(weights, slot)
    scores = scores.view(*slot.shape, heads)
    if x.numel() and m and choose("pool_softmax", x, scores, slot, *(() if weights is None else (weights,))):
        from .twin import pool_softmax as twin

        return twin(x, scores, slot, m, weights)
    return reference.pool_softmax(x, scores, slot, m, weights)


def pool_power(x: Tensor, p: float | Tensor, slot: Tensor, m: int, weights: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """The generalised mean of each group, (sum_i w_i x_i^p / sum_i w_i)^(1/p), channel by channel; computed by logarithms.

    Args:
        x: Tokens, (b n d); what is below `eps` counts as `eps`.
        p: Exponent, not zero: a number, or one for each of some groups of d/g channels, (g), which may learn.
        slot: Group of each token, below m; a negative one vanishes, whatever stands in it, (b n).
        m: Groups.
        weights: How many times each token counts, not below zero, (b n); by default once.
        eps: Least value.

    Returns:
        (b m d) of the dtype of x, zeros where a group holds nothing.

    Raises:
        ValueError: The shapes do not fit.

    >>> import torch
    >>> from hf_tokens_kernels import pool_power
    >>> pool_power(torch.tensor([[[3.0], [4.0]]]), 2.0, torch.tensor([[0, 0]]), 1)[0, 0, 0] ** 2
    tensor(12.5000)
    """
    check_slots("pool_power", x, slot)
    check_weights(weights, slot)
    dtype, d = accumulated(x.dtype), x.shape[2]
    p = torch.as_tensor(p, device=x.device).to(dtype).reshape(-1)
    if d % len(p):
        raise ValueError(f"`p` must be one exponent, or one for each of some groups of {d} channels, got {len(p)}. Give a divisor of {d}.")
    p = p.repeat_interleave(d // len(p))
    weights = None if weights is None else weights.to(dtype)
    each = slot.new_ones(slot.shape, dtype=dtype) if weights is None else weights
    place = torch.where(slot < 0, m, slot)
    total = each.new_zeros(len(slot), m + 1).scatter_add(1, place, each)[:, :m, None]
    if x.numel() and m and choose("pool_power", x, p, slot, each):
        from .twin import group_lse

        lse = group_lse(x, p, slot, m, weights, eps)
    else:
        lse = reference.group_lse(x, p, slot, m, weights, eps)
    there = total > 0
    mean = (lse.where(there, 0) - total.where(there, 1).log()) / p
    return mean.exp().masked_fill(~there, 0).to(x.dtype)


def check_weights(weights: Tensor | None, slot: Tensor) -> None:
    """Refuse weights that are not one a token."""
    if weights is not None and weights.shape != slot.shape:
        raise ValueError(f"`weights` must be one number a token, {tuple(slot.shape)}, got {tuple(weights.shape)}. Give (batch, tokens).")
