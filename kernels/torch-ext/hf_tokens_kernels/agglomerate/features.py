"""Clustering from features, without the matrix of distances: in each round clusters look for the nearest other one, row by row.

Average linkage of 1 - cos is 1 minus the product of the two means of unit features, and Ward linkage needs means and sizes. Single linkage
needs the nearest token outside of each token's own cluster, complete linkage the farthest members, for which features are read in chunks.
"""

import torch
from torch import Tensor

from ..similarity_match import nearest
from ..token_merge.reference import rows
from .reference import State, grow, roots

CHUNK_ELEMENTS = 1 << 20  # distances at a time, under complete linkage


def clusters(x: Tensor, free: Tensor, joins: Tensor, linkage: str, metric: str) -> Tensor:
    """The first member of each token's cluster, (b n), after `joins` (b) joins of x (b n d) among the tokens that are `free` (b n)."""
    index = torch.arange(free.shape[1], device=free.device).expand_as(free)
    if linkage == "single":
        one, other, height = spanning(x, free, joins, metric)
        chosen = lowest(height, joins)
        return connect(index, torch.where(chosen, one, 0), torch.where(chosen, other, 0))
    state = (Farthest if linkage == "complete" else Means)(x, free, "ward" if linkage == "ward" else metric)
    into, height, when = grow(state, joins)
    early = when.argsort(dim=1, stable=True)
    chosen = lowest(height.gather(1, early), joins).gather(1, early.argsort(dim=1))  # of equally high ones the earlier
    return roots(torch.where(chosen, into, index))


def lowest(height: Tensor, count: Tensor) -> Tensor:
    """Which ones are among the `count` (b) lowest of each row (b e), of equal ones the first."""
    return height.argsort(dim=1, stable=True).argsort(dim=1) < count[:, None]


def spanning(x: Tensor, free: Tensor, joins: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """The shortest edges of the minimal spanning trees of x, the `joins` shortest at least: their tokens and lengths, (b e) each.

    Boruvka's rounds: every cluster reaches out along its shortest edge. What is no edge has the length inf.
    """
    n = x.shape[1]
    index = torch.arange(n, device=x.device).expand_as(free)
    label, gap, to = index, torch.full_like(x[..., 0], torch.inf), index.clone()
    edges = [(index, index, gap)]
    while True:
        asks, real = marked(free & (label.gather(1, to) == label))  # a token keeps its nearest one until that is in its own cluster
        if asks.shape[1]:
            groups = label.gather(1, asks), label
            score, at = nearest(rows(x, asks), x, "dot" if metric == "cosine" else metric, masks=(real, free), groups=groups)
            row = torch.arange(len(asks), device=x.device)[:, None].expand_as(asks)[real], asks[real]
            gap[row], to[row] = (1 - score if metric == "cosine" else -score)[real], at[real]
        low = torch.full_like(gap, torch.inf).scatter_reduce(1, label, gap, "amin")  # of the clusters, by their names
        short = torch.where(gap == low.gather(1, label), index, n)
        leaves = torch.full_like(short, n).scatter_reduce(1, label, short, "amin").clamp(max=n - 1)
        enters = to.gather(1, leaves)
        least, first = low.min(dim=1, keepdim=True)
        known = sum((length < least).sum(dim=1, keepdim=True) for _, _, length in edges)
        more = (known < joins[:, None]) & least.isfinite()
        if not bool(more.any()):
            return tuple(torch.cat(parts, dim=1) for parts in zip(*edges, strict=True))
        mate = label.gather(1, enters)
        theirs, mutual = low.gather(1, mate), mate.gather(1, mate) == index
        reach = torch.where(mutual, mate < index, (theirs < low) | (theirs == low) & (mate < index)) & low.isfinite() & more
        stuck = more & ~reach.any(dim=1, keepdim=True)  # where rounding has each wait for another one
        reach = reach | stuck & (index == first)
        edges.append((leaves, enters, low.masked_fill(~reach, torch.inf)))
        label = connect(label, torch.where(reach, leaves, 0), torch.where(reach, enters, 0))


def connect(label: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Labels (b n), each the first token with that label, where tokens `one` and `other` (b e) get to have the same."""
    while True:
        a, b = label.gather(1, one), label.gather(1, other)
        least = torch.minimum(a, b)
        new = label.scatter_reduce(1, a, least, "amin").scatter_reduce(1, b, least, "amin")
        new = new.gather(1, new)
        if torch.equal(new, label):
            return label
        label = new


def marked(flags: Tensor) -> tuple[Tensor, Tensor]:
    """Where flags (b n) are set, (b m), and which of these are real and do not fill up their row."""
    count = flags.sum(dim=1, keepdim=True)
    index = flags.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return index, torch.arange(index.shape[1], device=flags.device) < count


class Means(State):
    """Clusters by their means: average linkage of 1 - cos, and Ward linkage."""

    def __init__(self, x: Tensor, alive: Tensor, metric: str):
        self.sums, self.metric = x.clone(), metric
        super().__init__(alive, torch.ones_like(x[..., 0]))

    def refresh(self, stale: Tensor) -> None:
        (live, there), (asks, real) = marked(self.alive), marked(stale)
        if not asks.shape[1]:
            return
        size = self.size.gather(1, live)
        means = rows(self.sums, live) / size[..., None]
        own = (self.alive.cumsum(dim=1) - 1).gather(1, asks)
        ward = self.metric == "ward"
        sizes = (size.gather(1, own.clamp(min=0)), size) if ward else (None, None)
        score, at = nearest(rows(means, own.clamp(min=0)), means, "ward" if ward else "dot", sizes, (real, there), own=own.clamp(min=0))
        self.low[stale] = (-score if ward else 1 - score)[real]
        self.mate[stale] = live.gather(1, at)[real]

    def merge(self, sample: Tensor, one: Tensor, other: Tensor, partner: Tensor) -> None:
        self.sums[sample, one] += self.sums[sample, other]


class Farthest(State):
    """Complete linkage: the farthest members of two clusters, some clusters at a time against all tokens of their sample.

    Attributes:
        x: Features, (b n d).
        label: The cluster of each token, (b n).
        free: Tokens in clusters, (b n).
    """

    def __init__(self, x: Tensor, alive: Tensor, metric: str):
        self.x, self.free, self.metric = x, alive, metric
        self.label = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        super().__init__(alive, torch.ones_like(x[..., 0]))

    def merge(self, sample: Tensor, one: Tensor, other: Tensor, partner: Tensor) -> None:
        self.label = torch.minimum(self.label, partner.gather(1, self.label))

    def refresh(self, stale: Tensor) -> None:
        for i in stale.any(dim=1).nonzero()[:, 0].tolist():
            order = self.label[i].masked_fill(~self.free[i], stale.shape[1]).argsort(stable=True)[: int(self.free[i].sum())]
            cluster = self.alive[i].nonzero()[:, 0]  # m
            length = self.size[i, cluster].long()
            x, ends, asks = self.x[i, order], length.cumsum(dim=0), stale[i, cluster].nonzero()[:, 0]
            for part in asks.split(max(1, CHUNK_ELEMENTS // (len(order) * int(length.max())))):
                self.low[i, cluster[part]], at = self.rows(x, length, ends, part)
                self.mate[i, cluster[part]] = cluster[at]

    def rows(self, x: Tensor, length: Tensor, ends: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        """Distance and place of the nearest of m clusters, for those of `part` (q); x (n d) in the order of the clusters."""
        count = length[part]
        start = (ends - length)[part] - (count.cumsum(dim=0) - count)
        member = torch.arange(int(count.sum()), device=x.device) + start.repeat_interleave(count)
        y = x[member]
        gap = 1 - x @ y.mT if self.metric == "cosine" else x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.mT  # n c
        gap = torch.segment_reduce(gap, "max", lengths=length, unsafe=True).mT.contiguous()  # c m
        gap = torch.segment_reduce(gap, "max", lengths=count, unsafe=True)  # q m
        return gap.scatter_(1, part[:, None], torch.inf).min(dim=1)
