"""The torch reference: in every round all pairs that are nearest to each other join at once, in all samples.

Single, complete, average and Ward linkage are reducible: a join never brings a third cluster closer than the nearer of the two was. So
two clusters that are nearest to each other, with no tie, stay so until they join, and the order of the joins does not matter. The rounds
record the height of every join; the lowest ones are the joins that the sequential algorithm would have made. Where several joins share
the height at the cut, these are made again one after the other. For the same reason a round looks for a new nearest one only for the
clusters that joined, those whose nearest one joined, and those that have several nearest ones; and once there are pairs enough, it leaves
alone what is farther from its nearest one than the last of the pairs that are needed.
"""

import abc
from collections.abc import Callable

import torch
from torch import Tensor

LINKAGES = ("single", "complete", "average", "ward")
PAIRWISE = {"single": torch.minimum, "complete": torch.maximum, "average": torch.add, "ward": torch.add}
GROUPWISE = {"single": "amin", "complete": "amax", "average": "sum", "ward": "sum"}


class State(abc.ABC):
    """A cluster per token, named by its first member; joins are made in place.

    Attributes:
        size: Tokens in each cluster, (b n).
        alive: Clusters that are there and may join, (b n).
        low: Distance to the nearest cluster, (b n), or less where that is too far to join; inf where there is none.
        mate: The nearest cluster, of several the first, (b n).
        lone: Whether there is only one nearest cluster, (b n).
    """

    def __init__(self, alive: Tensor, size: Tensor):
        self.alive, self.size = alive, size
        self.low = torch.full_like(size, torch.inf)
        self.mate = torch.zeros_like(alive, dtype=torch.long)
        self.lone = torch.ones_like(alive)
        self.refresh(alive)

    @abc.abstractmethod
    def refresh(self, stale: Tensor) -> None:
        """Look for the nearest cluster of those marked, (b n) bool."""

    @abc.abstractmethod
    def merge(self, sample: Tensor, one: Tensor, other: Tensor, partner: Tensor) -> None:
        """Let clusters `other` join clusters `one`, (p) each, as `partner` (b n) says too; sizes are still those from before."""

    def join(self, partner: Tensor, bound: Tensor) -> None:
        """Let each cluster join its partner (b n), one without being its own; the earlier of two is the new one.

        The nearest clusters are brought up to date where they are no farther than `bound` (b 1).
        """
        index = torch.arange(partner.shape[1], device=partner.device)
        late, paired = partner < index, partner != index
        sample, other = late.nonzero(as_tuple=True)  # p
        one = partner[sample, other]
        self.merge(sample, one, other, partner)
        self.size[sample, one] += self.size[sample, other]
        self.alive = self.alive & ~late
        self.low.masked_fill_(late, torch.inf)
        self.refresh(self.alive & (paired | (self.low <= bound) & (paired.gather(1, self.mate) | ~self.lone)))


class Clusters(State):
    """Clusters by the matrix of their distances.

    Attributes:
        between: Distances of the clusters, (b n n); under average and Ward linkage their sums over all pairs of members. inf on the
            diagonal and in the columns of what is no cluster; the rows of these hold anything.
        tokens: Whether each cluster is a single token.
        within: The sum of distances inside each cluster, over ordered pairs, (b n); under Ward linkage.
    """

    def __init__(self, between: Tensor, alive: Tensor, linkage: str, size: Tensor | None = None, within: Tensor | None = None):
        self.between, self.linkage, self.tokens = between, linkage, size is None
        size = torch.ones_like(between[..., 0]) if size is None else size
        self.within = torch.zeros_like(size) if within is None else within
        super().__init__(alive, size)

    def refresh(self, stale: Tensor) -> None:
        sample, place = stale.nonzero(as_tuple=True)  # q
        gap = self.distance(sample, place)
        low, mate = gap.min(dim=1)  # of equals the first
        second = gap.scatter_(1, mate[:, None], torch.inf).amin(dim=1)
        row = (sample, place)
        self.low[row], self.mate[row], self.lone[row] = low, mate, low < second

    def distance(self, sample: Tensor, place: Tensor) -> Tensor:
        """How far all clusters of a sample are from one of its clusters, (q n); inf where there is none."""
        n = self.size.shape[1]
        out = self.between.view(-1, n).index_select(0, sample * n + place)
        if self.linkage in ("single", "complete"):
            return out
        if self.tokens:
            return out if self.linkage == "average" else out.div_(2)
        one, other = self.size[sample, place][:, None], self.size.index_select(0, sample)
        if self.linkage == "average":
            return out.div_(one * other)
        out.mul_(2 * one * other).sub_(other**2 * self.within[sample, place][:, None]).sub_(one**2 * self.within.index_select(0, sample))
        return out.div_(2 * one * other * (one + other))

    def merge(self, sample: Tensor, one: Tensor, other: Tensor, partner: Tensor) -> None:
        n, combine, self.tokens = partner.shape[1], PAIRWISE[self.linkage], False
        index = torch.arange(n, device=partner.device)
        flat, mine = self.between.view(-1, n), partner.index_select(0, sample)  # p n
        rows = flat.index_select(0, sample * n + one)
        if self.linkage == "ward":
            self.within[sample, one] += self.within[sample, other] + 2 * rows.gather(1, other[:, None])[:, 0]
        rows = combine(rows, flat.index_select(0, sample * n + other))
        columns = rows.gather(1, mine)
        if GROUPWISE[self.linkage] == "sum":
            columns.masked_fill_(mine == index, 0)
        rows = combine(rows, columns).masked_fill_(mine < index, torch.inf).scatter_(1, one[:, None], torch.inf)
        flat.index_copy_(0, sample * n + one, rows)
        self.between.mT[sample, one] = rows
        self.between.mT[sample, other] = torch.inf


def clusters(build: Callable[[], Tensor], free: Tensor, joins: Tensor, linkage: str) -> Tensor:
    """The first member of each token's cluster, (b n), after `joins` (b) joins among the tokens that are `free` (b n).

    `build` gives the distances (b n n), new ones at each call, inf on the diagonal and in the columns of tokens that are not free.
    """
    index = torch.arange(free.shape[1], device=free.device).expand_as(free)
    into, height, _ = grow(Clusters(build(), free, linkage), joins)
    ranked = height.sort(dim=1).values.gather(1, (joins - 1).clamp(min=0)[:, None])
    cut = torch.where(joins[:, None] > 0, ranked, -torch.inf)  # b 1
    label = roots(torch.where(height <= cut, into, index))
    left = joins - (height < cut).sum(dim=1)
    tied = (height == cut).sum(dim=1) > left
    if bool(tied.any()):
        below = roots(torch.where(height < cut, into, index))
        label = torch.where(tied[:, None], one_by_one(regroup(build(), free, below, linkage), below, left * tied), label)
    return label


def grow(state: State, joins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Join until the `joins` lowest heights of each sample are known: the cluster that each one joined, how high, and when, (b n) each."""
    index = torch.arange(state.size.shape[1], device=joins.device).expand_as(state.mate)
    into, height, when = index, torch.full_like(state.size, torch.inf), torch.zeros_like(state.mate)
    last = (joins - 1).clamp(min=0)[:, None]
    while True:
        low, mate, lone = state.low, state.mate, state.lone
        lowest, first = low.min(dim=1, keepdim=True)
        known = (height < lowest).sum(dim=1, keepdim=True)  # what is still to come lies at `lowest` or above
        more = (known < joins[:, None]) & lowest.isfinite()
        if not bool(more.any()):
            return into, height, when
        mutual = lone & lone.gather(1, mate) & (mate.gather(1, mate) == index)
        bound = torch.where(mutual & (mate < index), low, height).sort(dim=1).values.gather(1, last)  # no join needed lies above it
        bound = bound.masked_fill(~more, -torch.inf)
        partner = torch.where(mutual & (low <= bound), mate, index)
        partner = torch.where(more, pair(partner, first, mate.gather(1, first)), partner)
        late = partner < index
        into, height, when = torch.where(late, partner, into), torch.where(late, low, height), when + ~late
        state.join(partner, bound)


def one_by_one(state: Clusters, label: Tensor, left: Tensor) -> Tensor:
    """The labels (b n) after `left` more joins of the nearest pair, the first among equals."""
    index = torch.arange(label.shape[1], device=label.device).expand_as(label)
    for step in range(int(left.max())):
        first = state.low.argmin(dim=1, keepdim=True)
        more = (step < left)[:, None]
        partner = torch.where(more, pair(index, first, state.mate.gather(1, first)), index)
        label = torch.minimum(label, partner.gather(1, label))
        state.join(partner, torch.where(more, state.low.new_tensor(torch.inf), -torch.inf))
    return label


def pair(partner: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Partners (b n) in which `one` and `other` (b 1) have each other, and nobody else has either."""
    partner = partner.scatter(1, one, other).scatter(1, other, one)
    index = torch.arange(partner.shape[1], device=partner.device)
    return torch.where(partner.gather(1, partner) == index, partner, index)


def roots(into: Tensor) -> Tensor:
    """The end of every token's way along `into` (b n), which points to earlier tokens only."""
    for _ in range(into.shape[1].bit_length()):
        into = into.gather(1, into)
    return into


def regroup(distance: Tensor, free: Tensor, label: Tensor, linkage: str) -> Clusters:
    """The clusters of single tokens that `label` (b n) puts together."""
    n = label.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=label.device)
    between = distance.masked_fill(~(free[:, :, None] & free[:, None]) | itself, 0)
    for _ in range(2):  # rows, then columns
        between = torch.zeros_like(between).scatter_reduce(
            1, label[..., None].expand_as(between), between, GROUPWISE[linkage], include_self=False
        )
        between = between.transpose(1, 2)
    size = torch.zeros_like(between[..., 0]).scatter_add(1, label, torch.ones_like(between[..., 0])).clamp(min=1)
    alive = free & (label == torch.arange(n, device=label.device))
    within = between.diagonal(dim1=1, dim2=2).clone()
    return Clusters(between.masked_fill(itself | ~alive[:, None], torch.inf).contiguous(), alive, linkage, size, within)
