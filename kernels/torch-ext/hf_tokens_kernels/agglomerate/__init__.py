"""Agglomerative clustering, of a batch of distance matrices or of features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import accumulated
from . import features as by_features
from .reference import LINKAGES, clusters

__all__ = ["LINKAGES", "METRICS", "agglomerate", "cluster"]

METRICS = ("cosine", "euclidean")
MATRIX_TOKENS = {"single": 0, "complete": 2048, "average": 512, "ward": 512}  # up to which the matrix is the faster way


@torch.compiler.disable  # how many rounds there are depends on the data
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
    wide = accumulated(distance.dtype)

    def build() -> Tensor:
        out = torch.where(free[:, None], distance, torch.inf).to(wide)
        out.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        return out

    return clusters(build, free, joins, linkage).masked_fill(~valid, -1)


def cluster(
    features: Tensor,
    target: int | Tensor,
    linkage: str = "average",
    metric: str = "cosine",
    valid: Tensor | None = None,
    protected: Tensor | None = None,
) -> Tensor:
    """`agglomerate` of tokens by their features.

    Few tokens go through the matrix of their distances, as `agglomerate` does. For many no such matrix is built: every round reads the
    features of all clusters once for each block of those whose nearest one has joined. The clusters are the same, but where two
    distances lie within rounding of each other: sums of features round otherwise than sums of distances, and equal distances may do so
    too. Of joins at the height of the cut those go first that are found in an earlier round. `torch.export` records one operator,
    `hf_tokens_kernels::cluster`, which is there wherever this package is imported.

    Args:
        features: (b n d); what stands at tokens that are not valid is not read.
        target: As there.
        linkage: As there. `ward` takes the squared Euclidean distances, under `cosine` of features of length one.
        metric: `cosine`: 1 - cos; `euclidean`: the squared Euclidean distance, with which `average` is not to be had.
        valid: As there.
        protected: As there.

    Returns:
        The first member of each token's cluster, (b n); -1 where the token is not valid.

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]])
    >>> cluster(tokens, 2).tolist()
    [[0, 1, 0]]
    """
    if linkage not in LINKAGES:
        raise ValueError(f"linkage must be one of {LINKAGES}, got {linkage!r}. Choose one of them.")
    if metric not in METRICS or (metric, linkage) == ("euclidean", "average"):
        rule = f"metric must be one of {METRICS}, and average linkage takes the first"
        raise ValueError(f"{rule}, got {metric!r} and {linkage!r}. Give `agglomerate` the distances.")
    valid, free, joins = books(features, target, valid, protected)
    if torch.compiler.is_exporting():
        return recorded(features, free, joins, linkage, metric).masked_fill(~valid, -1)
    return clustered(features, free, joins, linkage, metric).masked_fill(~valid, -1)


@torch.compiler.disable
@torch.no_grad()
def clustered(features: Tensor, free: Tensor, joins: Tensor, linkage: str, metric: str) -> Tensor:
    """The first member of each token's cluster, (b n), after `joins` (b) joins among the tokens that are `free` (b n)."""
    x = features.to(accumulated(features.dtype)).masked_fill(~free[..., None], 0)
    x = normalize(x, dim=-1) if metric == "cosine" else x
    if x.shape[1] <= MATRIX_TOKENS[linkage]:
        return clusters(lambda: distances(x, free, linkage, metric), free, joins, linkage)
    return by_features.clusters(x, free, joins, linkage, metric)


@torch.library.custom_op("hf_tokens_kernels::cluster", mutates_args=())
def recorded(features: Tensor, free: Tensor, joins: Tensor, linkage: str, metric: str) -> Tensor:
    """The same as an operator: how many rounds there are depends on the data, what comes out does not."""
    return clustered(features, free, joins, linkage, metric).clone()


@recorded.register_fake
def _(features: Tensor, free: Tensor, joins: Tensor, linkage: str, metric: str) -> Tensor:
    return torch.empty_like(free, dtype=torch.long)


def distances(x: Tensor, free: Tensor, linkage: str, metric: str) -> Tensor:
    """Distances of tokens by features x (b n d), (b n n), inf on the diagonal and in the columns of those that are not free."""
    absent = torch.zeros_like(x[..., 0]).masked_fill_(~free, torch.inf)[:, None]  # b 1 n
    if metric == "cosine":
        twice = 2 if linkage == "ward" else 1
        out = torch.baddbmm(absent + twice, x, x.mT, alpha=-twice)
    else:
        square = x.square().sum(dim=-1)
        out = torch.baddbmm(absent + square[:, None], x, x.mT, alpha=-2).add_(square[..., None])
    out = out.clamp_(min=0) if linkage == "ward" or metric == "euclidean" else out
    out.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return out


def books(x: Tensor, target: int | Tensor, valid: Tensor | None, protected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (b n ...): tokens that are there and those that may join, (b n), and how many joins there are, (b)."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    free = valid if protected is None else valid & ~protected
    target = torch.as_tensor(target, device=x.device).clamp(min=1)
    return valid, free, (free.sum(dim=1) - target).clamp(min=0)
