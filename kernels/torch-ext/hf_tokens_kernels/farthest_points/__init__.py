"""Farthest-point selection: tokens that lie far apart, each the farthest from those chosen before it."""

import torch
from torch import Tensor

from ..dispatch import choose
from . import reference

__all__ = ["METRICS", "farthest_points"]

METRICS = ("cosine", "euclidean")


@torch.no_grad()
def farthest_points(x: Tensor, k: int, *, start: Tensor | None = None, valid: Tensor | None = None, metric: str = "cosine") -> Tensor:
    """Choose k tokens one after the other, each the one whose nearest chosen token is farthest from it, of equal ones the first.

    A round reads every token once, and keeps one distance for each.

    Args:
        x: Tokens, (b n d); what stands at tokens that are not valid is not read.
        k: How many are chosen, n at most.
        start: The first one, (b), a valid one where there is any; None for the first valid one.
        valid: Tokens that may be chosen, (b n) bool; None for all.
        metric: `cosine`: 1 - cos; `euclidean`: the Euclidean distance.

    Returns:
        The tokens in the order of choice, (b k); -1 where there are none left.

    Raises:
        ValueError: Shapes or options do not go together.

    >>> farthest_points(torch.tensor([[[0.0], [1.0], [4.0], [9.0]]]), 3, metric="euclidean").tolist()
    [[0, 3, 2]]
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}. Choose one of them.")
    if x.dim() != 3 or not 1 <= k <= x.shape[1]:
        raise ValueError(f"x must be (b n d) and k in [1, n], got {tuple(x.shape)} and {k}. Lower k.")
    if valid is not None and valid.shape != x.shape[:2]:
        raise ValueError(f"valid must say for each token whether it counts, got {tuple(valid.shape)} for {tuple(x.shape[:2])}. Reshape it.")
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    start = valid.long().argmax(dim=1) if start is None else start
    if start.shape != x.shape[:1] or bool((valid.any(dim=1) & ~valid.gather(1, start[:, None])[:, 0]).any()):
        raise ValueError(f"start must be one valid token of each sample, (b), got {start.tolist()}. Choose valid ones, or None.")
    if choose("farthest_points", x):
        from . import twin

        chosen = twin.select(x, k, start, valid, metric)
    else:
        chosen = reference.select(x, k, start, valid, metric)
    return chosen.masked_fill(torch.arange(k, device=x.device) >= valid.sum(dim=1, keepdim=True), -1)
