"""Which entries of the KV cache stay, and what becomes of the others."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from ..errors import ConfigError, UnsupportedError, explain
from ..kv.formats import KVFormat
from ..tokens.entries import alike
from ..tokens.token_map import indices
from .base import Method
from .config import MethodConfig, option
from .signals import OF_A_PAGE


class Folded(NamedTuple):
    """What becomes of the entries that take in those that go.

    Attributes:
        index: Entries that change, (b k r); -1 stands for none.
        keys, values: What they become, (b k r e); None leaves the values.
        sizes: How many tokens each entry stands for, (b k n); None leaves that.

    The first entry of one head takes in the others:

    >>> keys, values = torch.arange(3.0).view(1, 1, 3, 1), torch.ones(1, 1, 3, 1)
    >>> folded = Folded(torch.zeros(1, 1, 1, dtype=torch.long), keys.mean(2, keepdim=True), values.mean(2, keepdim=True))
    >>> folded.keys.item()
    1.0
    """

    index: Tensor
    keys: Tensor
    values: Tensor | None = None
    sizes: Tensor | None = None


class Holding(NamedTuple):
    """How entries are stored that a cache compressor does not keep as they are.

    Attributes:
        keys, values: Formats of the entries beyond the budget.
        scale: Factor on each channel of the keys, (b k e), before they are packed; they are divided by it when they are read. Or None.
        kept: Formats of the keys and values that stay; None leaves them as they are.
        early: Entries that are put into the formats `kept` before any others are stored, (b k n) bool; None: those that stay.

    Keys and values beyond the budget in two bits, the others as they are:

    >>> packed = Quantized(bits=2, width=8, group=4)
    >>> holding = Holding(keys=packed, values=packed)
    >>> holding.kept is None
    True
    """

    keys: KVFormat
    values: KVFormat
    scale: Tensor | None = None
    kept: tuple[KVFormat, KVFormat] | None = None
    early: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SlackConfig(MethodConfig):
    """Config of a method whose heads may hold more than their budget for a while.

    >>> SlackConfig(slack=16).slack
    16
    """

    slack: int = option(0, ge=0, help="Entries above its budget that a head may hold while decoding; then all of these leave at once.")


class CacheCompressor(Method):
    """Which entries of the KV cache stay behind a prompt, and what becomes of the others.

    The others are dropped; before that, `fold` may let the ones that stay take them in. A method that defines `hold` drops none, and one
    that defines `divide` gives each key head a number of its own, by the scores of all in its block. Entries above
    the budget may wait while decoding, and leave at once, where its config is a `SlackConfig`: that takes less time.

    >>> class Newest(CacheCompressor):
    ...     chunks = False
    ...     def score(self, newer):
    ...         return -newer.float()
    ...     def budget(self, length, seen):
    ...         return allowance(length, seen, capacity=2, budget=None)
    >>> newest = Newest(MethodConfig(), dims)
    >>> newest.score(torch.tensor([[2, 1, 0]])).topk(newest.budget(3, 3)).indices
    tensor([[2, 1]])
    """

    role, verb, counts, causal, decodes = "CacheCompressor", "score", "cache", True, False
    saves = "bytes of the KV cache, and their reading for each token"
    further, usual_kinds = ("fold", "hold", "examine"), ("text",)
    lost = "which entries of the cache stay, as it decides while the model runs"

    @classmethod
    def leaves_as(cls, config: MethodConfig) -> tuple[str, ...]:
        """As code, if all that it does is to drop entries of a block by their scores, made of what a page of code can give them."""
        drops = (cls.hold, cls.divide, cls.allot) == (CacheCompressor.hold, CacheCompressor.divide, CacheCompressor.allot)
        at_once = cls.recites is None and not (cls.observes or cls.of_prompts or cls.pairs or cls.folds(config))
        return ("custom-generate",) if drops and at_once and OF_A_PAGE.issuperset(cls.signals) else ()

    @property
    def slack(self) -> int:
        """Entries above its budget that a row or head may hold while decoding."""
        return self.config.slack if isinstance(self.config, SlackConfig) else 0

    @classmethod
    def folds(cls, config: MethodConfig) -> bool:
        """Whether `fold` is called with this config: where a method defines it, it may say when."""
        return cls.fold is not CacheCompressor.fold

    @abc.abstractmethod
    def score(self, *signals: Any) -> Tensor:
        """The importance of each cached entry, (b n), or (b k n) for each key head; the highest stay."""

    @abc.abstractmethod
    def budget(self, length: int, seen: int) -> int | list[int] | None:
        """How many of `length` entries of a row stay in this block, once the block has seen so many of it, real or inserted.

        A list has a number for each key head; None leaves it to the scores: those above 0 stay.
        """

    def allot(self, scores: dict[int, Tensor], notes: dict[int, Tensor]) -> dict[int, Tensor]:
        """If `allots`: how many entries stay in each block behind a prompt, (b) by layer; each row keeps that share while it decodes.

        Integers count entries; floats are shares of the tokens that the row was given. Or of each key head, (b k).

        Args:
            scores: What `score` returned in each block, -inf where a row has no entry; empty if it names `budget`, and is called later.
            notes: What `observe` returned in each block.
        """
        raise UnsupportedError(explain("A cache compressor that sets `allots` says how", type(self).__name__, "Define its `allot`."))

    def lead(self, before: Tensor) -> Tensor:
        """If it `recites`: ids in front of a part of the prompt that is said again, (b p), given those of the prompt before it, (b n)."""
        return before[:, :0]

    def divide(self, scores: Tensor, budgets: Tensor) -> Tensor:
        """How many entries each key head of a block keeps, (b k), where it is not as many as `budget` says: called if a method defines it.

        Args:
            scores: What `score` returned, (b k n): -inf where there is no entry.
            budgets: As many as `budget` said, none above what there is, (b k).
        """
        raise UnsupportedError(explain("A cache compressor that divides its entries says how", type(self).__name__, "Define `divide`."))

    def fold(self) -> Folded | tuple[Tensor, Tensor, Tensor | None] | None:
        """The entries that change as those that go join those that stay.

        Or all keys and values (b k n e), and how many tokens each stands for, (b k n) or None.
        """

    def hold(self) -> Holding | None:
        """How the entries beyond the budget are stored."""


def heavy_hitters(received: Tensor, newer: Tensor, budget: Tensor, recent: float) -> Tensor:
    """Scores that keep the most recent entries, in a part of the budget, and in the rest those that got the most attention, (b k n).

    Args:
        received, newer, budget: The signals of these names.
        recent: Part of the budget that goes to the most recent entries.
    """
    newer = newer if newer.dim() == 3 else newer[:, None]
    return torch.where(newer < (recent * budget[..., None] + 1e-9).floor(), torch.inf, received)


def share_out(weights: Tensor, mean: float) -> Tensor:
    """Shares of the blocks (b l) in proportion to their weights, none above 1, of which the mean is given."""
    layers = weights.shape[1]
    order = weights.sort(dim=1, descending=True).values
    rest = order.flip(1).cumsum(dim=1).flip(1)  # b l: this one and all below
    left = mean * layers - torch.arange(layers, dtype=weights.dtype, device=weights.device)
    factor = left.clamp(min=0) / rest  # b l: where those above it have 1
    first = (factor * order <= 1 + 1e-9).long().argmax(dim=1, keepdim=True)
    return (factor.gather(1, first) * weights).clamp(max=1)


def allowance(length: int, seen: int, capacity: int, budget: float | None) -> int:
    """How many of `length` entries stay: `capacity`, or where `budget` is given that share of the tokens seen, and one at least."""
    return min(length, capacity if budget is None else max(1, math.floor(budget * seen + 1e-9)))


def check_capacity(config: MethodConfig, capacity: int, budget: float | None, protected: int) -> None:
    """Refuse a capacity below the number of entries that are always kept; a share gives way to none, as it grows with the tokens.

    Raises:
        ConfigError: It is.
    """
    if budget is None and capacity < protected:
        rule = f"{type(config).__name__}.capacity must be at least what is always kept, {protected} entries"
        raise ConfigError(explain(rule, capacity, "Raise it, or keep fewer of the newest and the first ones."))


def protect(score: Tensor, positions: Tensor, newer: Tensor, budget: Tensor, *, first: int = 0, newest: int | Tensor = 0) -> Tensor:
    """Scores (b n) or (b k n) that are inf for entries which always stay: the first tokens, and the newest in what the budget leaves.

    Args:
        score, positions, newer, budget: The scores, and the signals of these names.
        first: Tokens at the beginning of each row.
        newest: Entries at its end, or how many in each row (b 1) or head (b k).
    """
    heads = budget.shape[1]
    last = torch.as_tensor(newest, device=budget.device).minimum((budget - first).clamp(min=0))  # b 1|k
    wide = max(x.dim() for x in (score, positions, newer, last[..., None] if heads > 1 else last)) > 2
    score, positions, newer = (x[:, None] if wide and x.dim() == 2 else x for x in (score, positions, newer))
    return torch.where((positions < first) | (newer < (last[..., None] if wide else last)), torch.inf, score)


def observed(scores: Any, mask: Tensor, newer: Tensor, window: int, kernel: int = 1, pooling: str = "max") -> Tensor:
    """What each entry gets from each of the last `window` queries, pooled over its neighbours in front of that window, (b k n).

    Args:
        scores, mask, newer: The signals of these names.
        window: Queries that look, the last real ones of the pass.
        kernel: Neighbours among which each entry's score is pooled, itself in the middle.
        pooling: `max`, or `average`: beyond the first and the last neighbour stand zeros, which count.
    """
    got = scores.of_last(window)
    older = torch.logical_and(*alike(mask, newer >= window))
    return pool_neighbours(got, older if older.dim() == 3 else older[:, None].expand_as(got), kernel, pooling)


def pool_neighbours(score: Tensor, there: Tensor, kernel: int, pooling: str) -> Tensor:
    """Scores (b k n) pooled among those that are there, in their order; the others stay as they are."""
    if kernel == 1:
        return score
    order = indices(there, there.shape[-1])
    inside, blank = there.gather(-1, order), -torch.inf if pooling == "max" else 0.0
    beside = pad(score.gather(-1, order).masked_fill(~inside, blank), (kernel // 2, (kernel - 1) // 2), value=blank)
    pooled = (max_pool1d if pooling == "max" else avg_pool1d)(beside, kernel, stride=1)
    return torch.where(there, torch.empty_like(score).scatter_(-1, order, pooled), score)
