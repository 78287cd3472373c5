"""Agglomerative clustering of a batch of distance matrices."""

import torch
from torch import Tensor

from .reference import LINKAGES, clusters

__all__ = ["LINKAGES", "agglomerate"]


@torch.no_grad()
def agglomerate(
    distance: Tensor, target: int | Tensor, linkage: str = "average", valid: Tensor | None = None, protected: Tensor | None = None
) -> Tensor:
    """Join the two nearest clusters until `target` are left, from single tokens up.

    Among equal distances the pair goes first whose earlier cluster, then whose later cluster, has the earlier first member.

    Args:
        distance: Symmetric distances, (b n n); what stands at tokens that are not valid is not read.
        target: Clusters that stay among the tokens that may join, an int or (b); one at least.
        linkage: `single`, `complete` or `average`: the least, largest or mean distance of two members; `ward`: by how much the sum of
            squares within the clusters grows, where `distance` holds squared Euclidean distances.
        valid: Tokens that are there, (b n) bool; None for all.
        protected: Tokens that stay alone and do not count, (b n) bool; None for none.

    Returns:
        The first member of each token's cluster, (b n); -1 where the token is not valid.
    """
    if linkage not in LINKAGES:
        raise ValueError(f"linkage must be one of {LINKAGES}, got {linkage!r}. Choose one of them.")
    valid, free, joins = books(distance, target, valid, protected)
    wide = torch.promote_types(distance.dtype, torch.float32)

    def build() -> Tensor:
        out = torch.where(free[:, None], distance, torch.inf).to(wide)
        out.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return out

    return clusters(build, free, joins, linkage).masked_fill(~valid, -1)


def books(x: Tensor, target: int | Tensor, valid: Tensor | None, protected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (b n ...): tokens that are there and those that may join, (b n), and how many joins there are, (b)."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    free = valid if protected is None else valid & ~protected
    target = torch.as_tensor(target, device=x.device).clamp(min=1)
    return valid, free, (free.sum(dim=1) - target).clamp(min=0)
