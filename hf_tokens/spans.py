"""Spans: from one block to another, tokens stand together in slots; behind the last, each is there again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .books import Books
from .errors import UnsupportedError, explain
from .roles import Method, TokenReducer
from .token_map import TokenMap, put_back, take

if TYPE_CHECKING:
    from .passes import Memory
    from .signals import Moment


@dataclass(frozen=True)
class Span:
    """Blocks in which tokens stand together.

    Attributes:
        method: Whose map it was.
        tokens: The map of n tokens onto m slots.
        books: The tokens in front of it.
        before: Those tokens, (b n d).
        given: What the slots held at first, (b m d).
        got: What they hold behind the last block that ran, (b m d).
        slots: Where each slot lives now, -1 where another method took it out, (b m).
        notes: What the memory held of the tokens in front.
        carried: What it held of the slots that the last tokens of earlier passes read.
    """

    method: TokenReducer
    tokens: TokenMap
    books: Books
    before: Tensor
    given: Tensor
    got: Tensor
    slots: Tensor
    notes: dict[str, Tensor]
    carried: dict[str, Tensor]

    def move(self, tokens: TokenMap) -> Span:
        """The same behind a map of what its slots have become."""
        return replace(self, slots=torch.where(self.slots < 0, -1, tokens.slot.gather(1, self.slots.clamp(min=0))))

    def hold(self, hidden: Tensor) -> Span:
        """The same with what a block left of the slots."""
        return replace(self, got=put_back(hidden, self.slots, self.got))

    def regain(self, memory: Memory, index: int, padding: Tensor | None, cached: bool) -> Tensor:
        """The tokens as they come back behind a block, (b n d).

        In a cached stream the slot that the row's last real token reads is remembered: the next pass may close none before it is read.
        """
        reads = self.tokens.slot if self.tokens.reads is None else self.tokens.reads
        sides = []
        for name, slots in ((f"{self.method.key}.given", self.given), (f"{self.method.key}.{index}", self.got)):
            known = self.carried.get(name)
            read = put_back(slots, reads, self.before if known is None else known[:, None].expand_as(self.before))
            if cached and self.tokens.reads is not None:
                memory.rows[name] = take(read, self._last(padding))[:, 0]
            sides.append(read)
        return self.method.regain(self.before, *sides)

    def _last(self, padding: Tensor | None) -> Tensor:
        """Each row's last real token, (b 1); that of padding where it has none."""
        real = self.books.flags(self.books.filled, True)
        real = real if padding is None else real & padding.gather(1, self.books.rows)
        return real.shape[1] - 1 - real.flip(1).long().argmax(dim=1, keepdim=True)

    def bring_back(self, notes: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the memory holds of the tokens: as it was in front, and what was new in the blocks as their slot has it, or zeros."""
        slot = torch.where(self.tokens.slot < 0, -1, self.slots.gather(1, self.tokens.slot.clamp(min=0)))
        blank = lambda value: value.new_zeros(*slot.shape, *value.shape[2:])
        return {name: self.notes[name] if name in self.notes else put_back(value, slot, blank(value)) for name, value in notes.items()}


def follow(spans: tuple[Span, ...], tokens: TokenMap) -> tuple[Span, ...]:
    """The spans behind another map: the slots of the innermost one follow it, those of the others lie in front of that one."""
    return (*spans[:-1], *(span.move(tokens) for span in spans[-1:]))


def begin_span(method: TokenReducer, tokens: TokenMap, moment: Moment, slots: Tensor) -> Span:
    """Note the tokens that a map is about to put together, and what their slots hold, (b m d)."""
    now, place = moment.now, torch.arange(tokens.m, device=slots.device).expand(slots.shape[:2])
    return Span(method, tokens, now.books, moment.hidden, slots, slots, place, dict(now.memory.tokens), dict(now.memory.rows))


def end_spans(methods: list[Method], moment: Moment) -> None:
    """Behind a block, let the tokens come back where it is the last of a method's, the innermost span first.

    Raises:
        UnsupportedError: Another method's span that began later goes on.
    """
    now = moment.now
    for method in reversed(methods):
        if not (isinstance(method, TokenReducer) and method.spans and method.dims.ends) or method.key not in [
            span.method.key for span in now.spans
        ]:
            continue
        span = now.spans[-1].hold(moment.hidden)
        if span.method.key != method.key:
            rule = "Of two spans of blocks one lies in the other, or behind it"
            came = f"that of {type(method).__name__}, which ends at block {moment.side.index} inside that of {type(span.method).__name__}"
            raise UnsupportedError(explain(rule, came, "Choose other layers, or another order of the methods."))
        moment.hidden = span.regain(now.memory, moment.side.index, now.padding, bool(now.layers))
        now.memory.tokens = span.bring_back(now.memory.tokens)
        now.books, now.spans = span.books, now.spans[:-1]
