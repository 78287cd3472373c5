"""The best of many destinations for every source token, without the matrix of all pairs."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..dispatch import choose
from ..precision import accumulated
from ..token_merge.reference import rows
from . import reference

__all__ = ["METRICS", "match"]

METRICS = ("cosine", "dot", "euclidean", "ward")


def match(
    src: Tensor,
    dst: Tensor,
    *,
    metric: str = "cosine",
    src_sizes: Tensor | None = None,
    dst_sizes: Tensor | None = None,
    src_mask: Tensor | None = None,
    dst_mask: Tensor | None = None,
    src_group: Tensor | None = None,
    dst_group: Tensor | None = None,
    same: bool = False,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The best destination of every source, and how well the two match; of equally good ones the first.

    No matrix of all pairs is built. Scores under `euclidean` and `ward` are found as |x|^2 - 2 x.y + |y|^2 and taken again from the pair
    itself, so destinations that lie within the rounding of that may stand for each other; so may those within the rounding of a dot
    product. The score is differentiable, the index is not.

    Args:
        src: Tokens that look for a match, (b s d).
        dst: Tokens that may be one, (b t d).
        metric: `cosine` or `dot`; `euclidean`: minus the squared distance; `ward`: minus p q / (p + q) times that, for tokens of sizes p
            and q, by how much the sum of squares grows where they join.
        src_sizes: Tokens behind each source, (b s); for `ward`. None for one.
        dst_sizes: Tokens behind each destination, (b t); for `ward`. None for one.
        src_mask: Sources that count, (b s) bool; what stands at the others is not read. None for all.
        dst_mask: Destinations that count, (b t) bool, as there.
        src_group: Group of each source, (b s): it gets no destination of its own group.
        dst_group: Group of each destination, (b t).
        same: Whether sources and destinations are the same tokens, of which none may get itself.
        k: How many of the best destinations, at most t; None for one.

    Returns:
        The scores, in float32 at least, and the destinations, (b s) each, or (b s k) in the order of the scores. Where there is no (other)
        destination, and for sources that do not count, the score is -inf and the index 0.

    Raises:
        ValueError: Shapes or options do not go together.

    >>> tokens = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]])
    >>> score, index = match(tokens, tokens, same=True)
    >>> index.tolist()
    [[2, 2, 0]]
    """
    sizes, masks, groups = (src_sizes, dst_sizes), (src_mask, dst_mask), (src_group, dst_group)
    _check(src, dst, metric, sizes, masks, groups, same, k)
    if same:
        return nearest(src, dst, metric, sizes, masks, own=torch.arange(src.shape[1], device=src.device).expand(src.shape[:2]), k=k)
    return nearest(src, dst, metric, sizes, masks, groups=groups, k=k)


def nearest(
    src: Tensor,
    dst: Tensor,
    metric: str,
    sizes: tuple[Tensor | None, Tensor | None] = (None, None),
    masks: tuple[Tensor | None, Tensor | None] = (None, None),
    groups: tuple[Tensor | None, Tensor | None] = (None, None),
    own: Tensor | None = None,
    k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`match`, where `own` (b s) may name the one destination that each source does not get."""
    refuses = None if k is None else "several destinations of a source"
    with torch.no_grad():
        if choose("match", src, dst, refuses=refuses):
            from . import twin

            if own is not None:
                groups = own, torch.arange(dst.shape[1], device=dst.device).expand(dst.shape[:2])
            score, index = twin.search(src, dst, metric, sizes, masks, groups)
        else:
            score, index = reference.search(src, dst, metric, sizes, masks, groups, own, k)
        there = score > -torch.inf
        index = index.masked_fill(~there, 0)
    if metric in ("cosine", "dot") and not (torch.is_grad_enabled() and (src.requires_grad or dst.requires_grad)):
        return score, index
    return _pairs(src, dst, index, metric, sizes, there), index


def _pairs(src: Tensor, dst: Tensor, index: Tensor, metric: str, sizes: tuple[Tensor | None, ...], there: Tensor) -> Tensor:
    """The score of each source with its destinations, index (b s ...); -inf where there is none."""
    wide, absent = accumulated(src.dtype), ~there[..., None]
    y = rows(dst, index.flatten(1)).view(*index.shape, dst.shape[2]).to(wide).masked_fill(absent, 0)
    x = (src if index.dim() == 2 else src[:, :, None]).to(wide).masked_fill(absent, 0)
    if metric == "cosine":
        x, y = normalize(x, dim=-1), normalize(y, dim=-1)
    if metric in ("cosine", "dot"):
        return (x * y).sum(dim=-1).masked_fill(~there, -torch.inf)
    score = -(x - y).square().sum(dim=-1)
    if metric == "ward":
        one, other = reference.sizes(src, dst, sizes)
        one = one if index.dim() == 2 else one[..., None]
        other = other.gather(1, index.flatten(1)).view(index.shape)
        score = score * (one * other / (one + other))
    return score.masked_fill(~there, -torch.inf)


def _check(src: Tensor, dst: Tensor, metric: str, sizes: tuple, masks: tuple, groups: tuple, same: bool, k: int | None) -> None:
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {METRICS}, got {metric!r}. Choose one of them.")
    if src.dim() != 3 or dst.dim() != 3 or (src.shape[0], src.shape[2]) != (dst.shape[0], dst.shape[2]) or dst.shape[1] == 0:
        rule = "src must be (b s d) and dst (b t d), with one destination at least"
        raise ValueError(f"{rule}, got {tuple(src.shape)} and {tuple(dst.shape)}. Bring them to one batch and width.")
    for name, pair in (("sizes", sizes), ("mask", masks), ("group", groups)):
        for side, given, tokens in zip(("src", "dst"), pair, (src, dst), strict=True):
            if given is not None and given.shape != tokens.shape[:2]:
                rule = f"{side}_{name} must have one number for each token of {side}"
                raise ValueError(f"{rule}, got {tuple(given.shape)} for {tuple(tokens.shape[:2])}. Give it that shape.")
    if (groups[0] is None) != (groups[1] is None):
        raise ValueError("src_group and dst_group go together, got one of them. Give both, or neither.")
    if same and (src.shape != dst.shape or groups[0] is not None):
        got = f"{tuple(src.shape)} and {tuple(dst.shape)}" if groups[0] is None else "groups"
        raise ValueError(f"same=True takes the same tokens as src and dst and no groups, got {got}. Say with groups what may not match.")
    if metric != "ward" and sizes != (None, None):
        raise ValueError(f'Sizes count under metric="ward" only, got {metric!r}. Leave them out.')
    if k is not None and not 1 <= k <= dst.shape[1]:
        raise ValueError(f"k must lie in [1, {dst.shape[1]}], the number of destinations, got {k}. Lower it.")
