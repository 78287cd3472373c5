"""TokenMap: where each of n tokens goes. Select, merge, pool and insert are this one type, so the books are written once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from hf_tokens_kernels import Slots, take_rows, unmerge
from hf_tokens_kernels.lazily import lazy
from torch import Tensor

from ..errors import UnsupportedError, explain


def take(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather whole rows: x (b ... n ...), index (b m) along `dim`; a batch of one in x is broadcast."""
    dim, b = dim % x.dim(), max(len(x), len(index))
    index = index.expand(b, -1)
    if dim == 1 and x.dim() > 2:
        return take_rows(x, index)
    lead = x.shape[1:dim].numel()
    if len(x) < b and (lead > 1 or dim == x.dim() - 1):
        x = x.expand(b, *x.shape[1:])
    if dim < x.dim() - 1:  # the same rows for each that stands in front
        out = take_rows(x.flatten(0, dim - 1), index if lead == 1 else index.repeat_interleave(lead, dim=0))
        return out.view(b, *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :])
    return x.gather(dim, index.view(b, *[1] * (dim - 1), -1).expand(*x.shape[:-1], -1))


def in_float32(x: Tensor) -> Tensor:
    """A tensor in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rank(values: Tensor) -> Tensor:
    """Place of each value in its row, 0 for the highest, of two equal ones the earlier, (... n)."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def look(*counts: Tensor) -> list[int]:
    """Numbers of tokens that depend on the data, read off."""
    if torch.compiler.is_exporting():
        rule = "An exported model knows the number of tokens of each row, none of them padding"
        raise UnsupportedError(explain(rule, "one that depends on the data", "Export it with pictures of one size and nothing else."))
    return torch.stack(counts).tolist()


def indices(marked: Tensor, count: int | None = None) -> Tensor:
    """Indices of the marked ones (... n) bool in their order, (... r), of each row `count` where that is known; a row with fewer is filled
    up with others behind them."""
    count = look(marked.sum(dim=-1).max())[0] if count is None else count
    if count == 1 and marked.shape[-1]:  # without a sort of all
        return marked.max(dim=-1, keepdim=True).indices
    return marked.long().argsort(dim=-1, descending=True, stable=True)[..., :count]


def put_back(y: Tensor, slot: Tensor, before: Tensor) -> Tensor:
    """Each of n tokens takes its slot's row of y (b m ...); one whose slot (b n) is -1 keeps its row of `before` (b n ...)."""
    return unmerge(y, slot, before)


def overwrite(x: Tensor, marked: Tensor, tokens: Tensor) -> Tensor:
    """Write tokens (b k d) over the marked ones (b m) bool of x (b m d); marks of several segments take them in turn."""
    turn = (marked.cumsum(dim=1) - 1).clamp(min=0) % tokens.shape[1]
    return torch.where(marked[..., None], take(tokens, turn), x)


@dataclass(frozen=True)
class TokenMap:
    """A map of n tokens onto m slots, per row of the batch.

    Attributes:
        slot: Slot of every token, -1 where it vanishes, (b n).
        source: Token whose place (position, mask row) each slot takes, (b m).
        fresh: Slots that hold a token which was not there before, (b m); None if there are none.
        filled: Slots that hold anything; False pads rows that keep fewer tokens, (b m); None if all do.
        joins: Whether a slot may hold several tokens.
        content: What the slots hold, if that is neither the one token nor the mean of those that join, (b m d).
        reads: Slot from which each token comes back behind a span of blocks, -1 for one of an earlier pass, (b n); None if its own.
        loses: Whether a token may vanish.
        gone: Tokens that join another or vanish in each row, if they are known to be as many and none is special or padding; None else.

    Of four tokens the last joins the first, and each reads what its slot became:

    >>> merged = TokenMap.merge(4, src=torch.tensor([[3]]), dst=torch.tensor([[0]]))
    >>> merged.slot, merged.m
    (tensor([[0, 1, 2, 0]]), 3)
    >>> x = torch.tensor([[[1.0], [2.0], [3.0], [5.0]]])
    >>> merged.restore(merged.mean(x), before=x).flatten()
    tensor([3., 2., 3., 3.])
    >>> merged.then(TokenMap.keep(3, torch.tensor([[1, 2]]))).slot
    tensor([[-1,  0,  1, -1]])
    """

    slot: Tensor
    source: Tensor
    fresh: Tensor | None = None
    filled: Tensor | None = None
    joins: bool = False
    content: Tensor | None = None
    reads: Tensor | None = None
    loses: bool = True
    gone: int | None = None

    @lazy
    def slots(self) -> Slots:
        """What moves along the map need of its slots."""
        return Slots(self.slot, self.m)

    @property
    def n(self) -> int:
        return self.slot.shape[1]

    @property
    def m(self) -> int:
        return self.source.shape[1]

    @classmethod
    def identity(cls, n: int, batch: int, device: torch.device | None = None) -> TokenMap:
        """Every token stays where it is."""
        index = torch.arange(n, device=device).expand(batch, n)
        return cls(index, index, loses=False)

    @classmethod
    def keep(cls, n: int, index: Tensor) -> TokenMap:
        """Keep the tokens of `index` (b m), in their order of appearance; the rest vanish."""
        index = index.sort(dim=1).values
        slot = torch.full((index.shape[0], n), -1, dtype=torch.long, device=index.device)
        slot.scatter_(1, index, torch.arange(index.shape[1], device=index.device).expand_as(index))
        return cls(slot, index)

    @classmethod
    def select(cls, kept: Tensor, gone: int | None = None) -> TokenMap:
        """Keep the tokens marked in `kept` (b n) bool; rows that keep fewer are filled up in front, and there is one slot at least.

        `gone` is how many each row loses, where all are real and that is known without a look.
        """
        n, count = kept.shape[1], kept.sum(dim=1)
        least, most = look(*count.aminmax()) if gone is None else (n - gone, n - gone)
        m = max(1, most)
        lack = m - count[:, None]
        slot = torch.where(kept, kept.cumsum(dim=1) - 1 + lack, -1)
        source = kept.long().argsort(dim=1, stable=True)[:, n - m :]
        filled = torch.arange(m, device=kept.device) >= lack
        return cls(slot, source, filled=None if least == m else filled, gone=gone)

    @classmethod
    def merge(cls, n: int, src: Tensor, dst: Tensor) -> TokenMap:
        """Tokens `src` (b r) join tokens `dst` (b r), which must stay themselves."""
        index = torch.arange(n, device=src.device).expand(src.shape[0], n)
        into = index.scatter(1, src, dst)
        stays = torch.ones_like(into, dtype=torch.bool).scatter(1, src, False)
        rank = stays.cumsum(dim=1) - 1
        source = stays.long().argsort(dim=1, descending=True, stable=True)[:, : n - src.shape[1]]
        return cls(rank.gather(1, into), source, joins=True, loses=False)

    @classmethod
    def pool(cls, group: Tensor, gone: int | None = None) -> TokenMap:
        """Tokens with the same label in `group` (b n), below n, become one; a label of -1 vanishes.

        A slot takes the place of the member whose index is the label, else of the first member. `gone` is how many of the tokens of each
        row join another or vanish, where all are real and that is known without a look.
        """
        n = group.shape[1]
        index = torch.arange(n, device=group.device).expand_as(group)
        dead = group < 0
        label = torch.where(dead, n, group)
        first = torch.full((group.shape[0], n + 1), n, dtype=torch.long, device=group.device)
        first = first.scatter_reduce(1, label, index, reduce="amin").gather(1, label)  # b n
        leader = torch.where(group.gather(1, group.clamp(min=0)) == group, group, first)
        leaders = cls.select((leader == index) & ~dead, gone)
        slot = torch.where(dead, -1, leaders.slot.gather(1, leader.clamp(0, n - 1)))
        loses = torch.compiler.is_compiling() or bool(dead.any())
        return cls(slot, leaders.source, filled=leaders.filled, joins=True, loses=loses, gone=gone)

    @classmethod
    def segments(cls, ends: Tensor, lead: Tensor | None = None, at: Tensor | None = None, real: Tensor | None = None) -> TokenMap:
        """Tokens up to each end (b n) bool become one, in the place of that end; those behind the last end vanish, and those not real.

        A token reads the last segment that has ended with it or before it, so that none reads what it could not have seen.

        Args:
            ends: Tokens that end a segment.
            lead: Rows that begin with a fresh slot, which is read up to the first end, (b) bool.
            at: Token beside which it stands, (b); by default the first.
            real: Tokens that are no padding, (b n) bool; by default all.
        """
        (b, n), device = ends.shape, ends.device
        lead = torch.zeros(b, 1, dtype=torch.bool, device=device) if lead is None else lead[:, None]
        done = ends.long().cumsum(dim=1)  # segments that have ended, b n
        count = done[:, -1:] + lead
        m = max(1, int(count.max()))
        lack = m - count
        segment = done - ends.long()
        joins = segment < done[:, -1:] if real is None else real & (segment < done[:, -1:])
        slot = torch.where(joins, segment + lack + lead, -1)
        reads = torch.where(done + lead > 0, done - 1 + lack + lead, -1)
        place = torch.arange(m, device=device).expand(b, m)
        index = ends.long().argsort(dim=1, descending=True, stable=True).gather(1, (place - lack - lead.long()).clamp(0, n - 1))
        fresh = (place == lack) & lead
        first = torch.zeros_like(lack) if at is None else at[:, None]
        filled = place >= lack
        source = torch.where(fresh, first, torch.where(filled, index, 0))
        return cls(slot, source, fresh if bool(lead.any()) else None, None if bool(filled.all()) else filled, joins=True, reads=reads)

    @classmethod
    def insert(
        cls, n: int, at: int | Tensor, k: int, batch: int, device: torch.device | None = None, beside: Tensor | None = None
    ) -> TokenMap:
        """Open k fresh slots in front of token `at` (n appends at the end): an int, one place (b) or several (b s) a row.

        They take the place of token `beside`, like `at` in shape, by default that of `at`.
        """
        at = torch.as_tensor(at, device=device).expand(batch) if not isinstance(at, Tensor) or at.dim() < 2 else at
        at = at[:, None] if at.dim() == 1 else at  # b s
        beside = at if beside is None else beside.view_as(at)
        index = torch.arange(n, device=at.device).expand(batch, n)
        slot = index + k * (at[:, None] <= index[..., None]).sum(dim=-1)
        source = torch.full((batch, n + k * at.shape[1]), -1, dtype=torch.long, device=at.device).scatter(1, slot, index)
        fresh = source < 0
        group = ((fresh.cumsum(dim=1) - 1) // max(k, 1)).clamp(min=0, max=at.shape[1] - 1)
        return cls(slot, torch.where(fresh, beside.gather(1, group), source).clamp(max=n - 1), fresh=fresh, loses=False, gone=0)

    @classmethod
    def follow(cls, marked: Tensor, k: int) -> TokenMap:
        """Open k fresh slots behind each marked token (b n) bool, which take its place; rows with fewer are filled up in front."""
        n, count = marked.shape[1], marked.long().cumsum(dim=1)
        m = n + k * int(count[:, -1].max())
        lack = m - n - k * count[:, -1:]
        index = torch.arange(n, device=marked.device).expand_as(marked)
        slot = index + k * (count - marked.long()) + lack
        source = torch.full((len(marked), m), -1, dtype=torch.long, device=marked.device).scatter(1, slot, index)
        filled = torch.arange(m, device=marked.device) >= lack
        fresh = (source < 0) & filled
        filled = None if not bool(lack.any()) else filled
        return cls(slot, source.cummax(dim=1).values.clamp(min=0), fresh=fresh, filled=filled, loses=False)

    @classmethod
    def pad(cls, n: int, k: int, batch: int, device: torch.device | None = None) -> TokenMap:
        """Put k slots of filler behind n tokens."""
        slots = torch.arange(n + k, device=device).expand(batch, n + k)
        return cls(slots[:, :n], slots.clamp(max=n - 1), filled=slots < n, loses=False)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The row of each slot's source token: x (b n ...) to (b m ...)."""
        return take(x, self.source, dim)

    def bring(self, x: Tensor) -> Tensor:
        """The same, with zeros in fresh slots: x (b n ...) to (b m ...)."""
        y = self.gather(x)
        return y if self.fresh is None else y.masked_fill(self.fresh.view(*self.fresh.shape, *[1] * (y.dim() - 2)), 0)

    def fill(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Behind an insertion: x (b n d) with tokens (b k d) in the fresh slots, (b m d)."""
        return overwrite(self.gather(x), self.fresh, tokens)

    def inserted(self, y: Tensor) -> Tensor:
        """What stands in the fresh slots of an insertion, (b m d) to (b k d)."""
        return take(y, self.fresh.long().argsort(dim=1, descending=True, stable=True)[:, : self.m - self.n])

    def sum(self, x: Tensor) -> Tensor:
        """The sum of all tokens in each slot: x (b n d) to (b m d)."""
        return self.slots.merge(x, reduce="sum")

    def count(self, sizes: Tensor) -> Tensor:
        """The sum of a number of each token (b n) in each slot, (b m)."""
        out = sizes.new_zeros(len(sizes), self.m + 1)  # the last slot collects what vanishes
        return out.scatter_add(1, torch.where(self.slot < 0, self.m, self.slot), sizes)[:, : self.m]

    def mean(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The mean of all tokens in each slot, weighted by `sizes` (b n); empty slots are zero."""
        return self.slots.merge(x, sizes)

    def apply(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """The tokens behind the map: the weighted mean of those that join, or the one that stays, or the map's own content."""
        if self.content is not None:
            return self.content.to(x.dtype)
        return self.mean(x, sizes) if self.joins else self.gather(x)

    def holding(self, content: Tensor) -> TokenMap:
        """The same map with other content in its slots, (b m d)."""
        return replace(self, content=content)

    def restore(self, y: Tensor, before: Tensor) -> Tensor:
        """Back to n tokens: each takes its slot's row of y (b m d); one that vanished keeps its row of `before` (b n d)."""
        return self.slots.unmerge(y, before)

    def row(self, i: int) -> TokenMap:
        """The map of one row of the batch."""
        cut = lambda x: None if x is None else x[i : i + 1]
        flags = cut(self.fresh), cut(self.filled)
        return TokenMap(cut(self.slot), cut(self.source), *flags, self.joins, cut(self.content), cut(self.reads), self.loses)

    def beside(self, front: int, behind: int) -> TokenMap:
        """The map of a longer sequence, whose tokens in front of these and behind them stay."""
        if not front and not behind:
            return self
        place = torch.arange(front + max(self.n, self.m) + behind, device=self.slot.device).expand(len(self.slot), -1)
        lead, pad = place[:, :front], (front, behind)
        slot = torch.where(self.slot < 0, -1, self.slot + front)
        slot = torch.cat([lead, slot, place[:, front + self.m : front + self.m + behind]], dim=1)
        source = torch.cat([lead, self.source + front, place[:, front + self.n : front + self.n + behind]], dim=1)
        wide = lambda flags, value: None if flags is None else torch.nn.functional.pad(flags, pad, value=value)
        return TokenMap(slot, source, wide(self.fresh, False), wide(self.filled, True), self.joins, loses=self.loses)

    def then(self, other: TokenMap) -> TokenMap:
        """This map, then another one."""
        slot = torch.where(self.slot < 0, -1, other.slot.gather(1, self.slot.clamp(min=0)))
        fresh = None if self.fresh is None else self.fresh.gather(1, other.source)
        if other.fresh is not None:
            fresh = other.fresh if fresh is None else fresh | other.fresh
        filled = None if self.filled is None else self.filled.gather(1, other.source)
        if other.filled is not None:
            filled = other.filled if filled is None else filled & other.filled
        joins, loses = self.joins or other.joins, self.loses or other.loses
        return TokenMap(slot, self.source.gather(1, other.source), fresh, filled, joins, loses=loses)
