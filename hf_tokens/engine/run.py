"""One pass through a stream: what is known of it from its first block to its last, and the site at which a verb is called."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..kv.layer import TokenCacheLayer
from ..roles.base import Method
from ..tokens.altered import altered
from ..tokens.entries import Stored, pick_entries
from ..tokens.ledger import TokenLedger
from ..tokens.token_map import TokenMap, put_back, take
from .context import ForwardContext

if TYPE_CHECKING:
    from ..attention.call import AttentionCall
    from .block import BlockSurgery
    from .surgery import StreamSurgery


BESIDE = "what a block returned for tokens of its own goes to the next"
SHIFT = "how many places tokens have moved on"  # in a memory's tokens, (b m)
REAL = "real tokens of the whole sequence, where padding stands between some"  # in a memory's rows, (b n) bool


class Memory(dict):
    """What blocks of one stream share.

    `tokens` holds (b m ...) tensors that follow the tokens of a pass through every map, `rows` (b ...) tensors that follow the samples
    of a cache as beams are reordered.
    """

    def __init__(self):
        super().__init__()
        self.tokens: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.prompts: list[tuple[int, int]] = []  # where passes that brought several tokens begin and end in the sequence
        self.end = 0  # where the last pass ended
        self.settled: Tensor | int = 0  # end of the last pass that dropped or changed entries of earlier tokens

    def note_pass(self, start: int, end: int) -> None:
        """Note where in the sequence a pass begins and ends."""
        self.prompts = [*((a, b) for a, b in self.prompts if b <= start), *([(start, end)] if end - start > 1 else [])]
        self.end = end

    def note_change(self, start: int, end: int, first: Tensor | None = None) -> None:
        """Note that a pass dropped or changed entries: what was there before, or the entries from the place `first` on."""
        if start:
            before = self.settled if isinstance(self.settled, int) or first is None else self.settled.to(first.device)
            self.settled = end if first is None else torch.where(first < start, end, before)

    def crop(self, length: int) -> None:
        """Tokens are taken back; refused where the entries of those that stay are no more what they were."""
        if length and length < self.settled:
            rule = "A cache can be cropped to a length since which no older entry was dropped or changed"
            remedy = "Give each question a `copy.deepcopy` of the cache, and leave out assisted decoding."
            raise UnsupportedError(explain(rule, f"{length} tokens, where those up to {int(self.settled)} shaped it", remedy))

    def hold(self, tokens: dict[str, Tensor]) -> None:
        """Let the per-token entries be these."""
        self.tokens = tokens

    def move(self, tokens: TokenMap) -> None:
        """Let the per-token entries follow a map."""
        self.tokens = {name: tokens.gather(value) for name, value in self.tokens.items()}

    @contextlib.contextmanager
    def among(self, maps: tuple[TokenMap, ...], noted: dict[str, Tensor]) -> Iterator[None]:
        """Let the per-token entries, as they were noted, be those of other tokens for a while; what is written then is kept."""
        self.tokens = dict(noted)
        if not maps:
            yield
            return
        path = functools.reduce(TokenMap.then, maps)
        self.tokens = {name: path.bring(value) for name, value in noted.items()}
        yield
        back = {}
        for name, value in self.tokens.items():
            before = noted[name] if name in noted else value.new_zeros(len(value), path.n, *value.shape[2:])
            back[name] = put_back(value, path.slot, before)
        self.tokens = back

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let the per-row entries follow a change of the batch."""
        self.rows = {name: change(value) for name, value in self.rows.items()}


@dataclass(frozen=True)
class Span:
    """Blocks in which tokens stand together.

    Attributes:
        method: Whose map it was.
        tokens: The map of n tokens onto m slots.
        ledger: The tokens in front of it.
        before: Those tokens, (b n d).
        given: What the slots held at first, (b m d).
        got: What they hold behind the last block that ran, (b m d).
        slots: Where each slot lives now, -1 where another method took it out, (b m).
        notes: What the memory held of the tokens in front.
        carried: What it held of the slots that the last tokens of earlier passes read.
    """

    method: Method
    tokens: TokenMap
    ledger: TokenLedger
    before: Tensor
    given: Tensor
    got: Tensor
    slots: Tensor
    notes: dict[str, Tensor]
    carried: dict[str, Tensor]

    def move(self, tokens: TokenMap) -> Span:
        """The same behind a map of what its slots have become."""
        return altered(self, slots=torch.where(self.slots < 0, -1, tokens.slot.gather(1, self.slots.clamp(min=0))))

    def hold(self, hidden: Tensor) -> Span:
        """The same with what a block left of the slots."""
        return altered(self, got=put_back(hidden, self.slots, self.got))

    def regain(self, memory: Memory, index: int, padding: Tensor | None, cached: bool) -> Tensor:
        """The tokens as they come back behind a block, (b n d).

        In a cached stream the slot that the row's last real token reads is remembered: the next pass may close none before it is read.
        """
        reads = self.tokens.slot if self.tokens.reads is None else self.tokens.reads
        states = []
        for name, slots in ((f"{self.method.key}.given", self.given), (f"{self.method.key}.{index}", self.got)):
            known = self.carried.get(name)
            read = put_back(slots, reads, self.before if known is None else known[:, None].expand_as(self.before))
            if cached and self.tokens.reads is not None:
                memory.rows[name] = take(read, self._last(padding))[:, 0]
            states.append(read)
        return self.method.at_hand(functools.partial(self.method.regain, self.before, *states))

    def _last(self, padding: Tensor | None) -> Tensor:
        """Each row's last real token, (b 1); that of padding where it has none."""
        real = self.ledger.real(padding)
        return real.shape[1] - 1 - real.flip(1).long().argmax(dim=1, keepdim=True)

    def bring_back(self, notes: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the memory holds of the tokens: as it was in front, and what was new in the blocks as their slot has it, or zeros."""
        slot = torch.where(self.tokens.slot < 0, -1, self.slots.gather(1, self.tokens.slot.clamp(min=0)))
        blank = lambda value: value.new_zeros(*slot.shape, *value.shape[2:])
        return {name: self.notes[name] if name in self.notes else put_back(value, slot, blank(value)) for name, value in notes.items()}


class BlockTokens(NamedTuple):
    """Tokens that are there for one block only.

    Attributes:
        method: Whose they are.
        opened: The map that opened their places.
        before: The tokens before it, (b m d).
        after: The tokens behind it, (b m+k d).
        only_read: Whether they only read the others, and none sees them.
    """

    method: Method
    opened: TokenMap
    before: Tensor
    after: Tensor
    only_read: bool


@dataclass
class StreamRun:
    """One pass through the stream.

    Attributes:
        context: The call of the model that it is part of.
        ledger: The tokens that are left.
        padding: Real tokens of the sequence that entered, (b n) bool; None if all are.
        first: Place of each row's first real token in the whole sequence, (b), behind its end if there was none yet; None if it is 0.
        memory: What its blocks share.
        at: Index of the block that runs, or ran last.
        layers: The cache layers of its blocks.
        apart: The first token that each real one sees, -1 for the others, (b n); None where no mask says it.
        segments: Where each sample begins in a packed row, (s); None if each has a row of its own.
        real: Real tokens of the whole sequence, (b start+n) bool, where padding stands between some; None where not.
        inside: The tokens that are left, behind the last block that ran, (b m d).
        given: What that block returned to the model.
        lent: By the type of block, the tokens whose keys later blocks may read, and what was stored before them.
        caches: The same layers by the index of their block.
        notes: By the key of a method, what its `observe` returned in each block.
        held: What a handler keeps of the pass, by a key of its own.
        spans: The spans of blocks that this place lies in, the outermost first.
    """

    context: ForwardContext
    ledger: TokenLedger
    padding: Tensor | None
    first: Tensor | None
    memory: Memory
    at: int = -1
    layers: list[TokenCacheLayer] = field(default_factory=list)
    apart: Tensor | None = None
    segments: Tensor | None = None
    real: Tensor | None = None
    inside: Tensor | None = None
    given: Tensor | None = None
    lent: dict[str | None, tuple[TokenLedger, Stored | None]] = field(default_factory=dict)
    caches: dict[int, TokenCacheLayer] = field(default_factory=dict)
    notes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    held: dict[Any, Any] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()

    def enter(self, index: int, context_length: int) -> None:
        """A block is called, with so many tokens of a second sequence."""
        if context_length != self.ledger.context:
            self.ledger = altered(self.ledger, context=context_length, memo={})
        self.at = index

    def passed(self, hidden: Tensor, given: Tensor) -> None:
        """A block has run: these tokens are left (b m d), and that is returned to the model."""
        self.inside, self.given = (None, None) if self.ledger.untouched else (hidden, given)

    def move(self, tokens: TokenMap, proportional: bool = False, span: Span | None = None) -> None:
        """Let the tokens follow a map, for the rest of the stream or of the span of blocks that begins or goes on here.

        The slots of the innermost span follow it, those of the others lie in front of that one.
        """
        self.memory.move(tokens)
        innermost = tuple(inner.move(tokens) for inner in self.spans[-1:])
        self.spans = (*self.spans, span) if span is not None else (*self.spans[:-1], *innermost)
        ledger = self.ledger.move(tokens)
        self.ledger = altered(ledger, proportional=True) if proportional else ledger

    def shift(self, by: Tensor) -> None:
        """Let the tokens stand so many places further on, (b m)."""
        known = self.memory.tokens.get(SHIFT)
        self.memory.tokens[SHIFT] = by if known is None else known + by
        self.ledger = altered(self.ledger, untouched=False, memo={})

    def end_span(self, span: Span) -> None:
        """The innermost span is over: its tokens are there again."""
        self.memory.hold(span.bring_back(self.memory.tokens))
        self.ledger, self.spans = span.ledger, self.spans[:-1]

    def surface(self, tokens: Tensor, given: Tensor, index: int) -> Tensor:
        """The whole sequence (b n d) with the tokens (b m d) of this place behind a block; one that is gone keeps its row of `given`.

        Tokens that stand together in a span come apart as they would if it ended here.
        """
        ledger, spans = self.ledger, []
        for span in reversed(self.spans):
            spans.insert(0, span.hold(tokens))
            tokens, ledger = spans[0].regain(self.memory, index, self.padding, bool(self.layers)), span.ledger
        self.spans = tuple(spans)
        return tokens if ledger.untouched else ledger.restore(tokens, given)

    def starts(self, ledger: TokenLedger) -> Tensor:
        """Where each sample of a packed row begins among the tokens that are left, (1 s)."""
        return torch.searchsorted(ledger.rows[0].contiguous(), self.segments)[None]

    def first_real(self, ledger: TokenLedger) -> Tensor:
        """Index of each row's first real token among those that are left, (b)."""
        return ledger.real(self.padding).long().argmax(dim=1)

    @property
    def prefill(self) -> bool:
        """Whether this pass brings a prompt or a whole sequence, and not one token of generation."""
        return self.ledger.n > 1 or self.ledger.start == 0 or self.context.recital is not None

    def position(self, place: Tensor) -> Tensor:
        """How many real tokens of its row stand before each place, (b m) or (b k m); below 0 for one that is none."""
        if self.real is not None:
            rank = (self.real.cumsum(dim=1) - 1).masked_fill(~self.real, -1)
            return pick_entries(rank, place)
        return place if self.first is None else place - self.first.view(-1, *[1] * (place.dim() - 1))

    def seen(self) -> Tensor:
        """Real tokens of each row up to the end of this pass, (b)."""
        if self.real is not None:
            return self.real.sum(dim=1)
        own = self.ledger.rows.new_full((self.ledger.batch,), self.ledger.n) if self.padding is None else self.padding.sum(dim=1)
        before = self.ledger.start if self.first is None or not self.ledger.start else self.ledger.start - self.first
        return own + before


@dataclass
class Site:
    """A place in a pass at which a verb is called.

    Attributes:
        surgery, block, run: Where it is.
        hidden: The tokens at hand, (b m d).
        layer: The block's layer of the cache.
        local: The tokens that the block really ran on: those of this block only in front, then those routed to it.
        routed: The map to those routed to it.
        maps: How the local tokens came from those of the stream, one map after the other.
        tokens: What the memory held of these when the block began; it may begin again.
        whole_cache: Whether a signal is of all entries of the cache.
        mask, bias: Of the tokens at hand, where the block has no argument for it.
        within: Maps that methods made inside of the block, by the method's id and place.
        entered: The tokens as the block found them.
        budget: Entries that each row (b 1) or head (b k) of the cache may keep.
        stays, goes: Those that do, and those that go, (b k n).
        below: The cache of the block that this one is a pair with.
        alike: For each entry the one of the same token there, -1 where there is none, (b k n).
        past: The entries that its cache held before the block ran.
        key: Of the method that is called.
        call: The attention call that `attend` shapes.
        part: And which of the tokens its queries are.
    """

    surgery: StreamSurgery
    block: BlockSurgery
    run: StreamRun
    hidden: Tensor
    layer: TokenCacheLayer | None
    local: TokenLedger | None = None
    routed: TokenMap | None = None
    maps: tuple[TokenMap, ...] = ()
    tokens: dict[str, Tensor] = field(default_factory=dict)
    whole_cache: bool = False
    mask: Tensor | None = None
    bias: Tensor | None = None
    within: dict[Any, TokenMap | None] = field(default_factory=dict)
    entered: Tensor | None = None
    budget: Tensor | None = None
    stays: Tensor | None = None
    goes: Tensor | None = None
    below: TokenCacheLayer | None = None
    alike: Tensor | None = None
    past: Stored | None = None
    key: str = ""
    call: AttentionCall | None = None
    part: slice | None = None

    def put(self, hidden: Tensor) -> None:
        """Let the tokens at hand be these."""
        self.hidden = hidden

    def move(self, tokens: TokenMap, hidden: Tensor, proportional: bool = False, span: Span | None = None) -> None:
        """Change the tokens for the rest of the stream, or of the span of blocks that begins or goes on here."""
        if tokens.joins and self.run.apart is not None:
            self._check_joins(tokens, self.run.apart.gather(1, self.run.ledger.rows))
        self.run.move(tokens, proportional, span)
        self.hidden = hidden

    def _check_joins(self, tokens: TokenMap, view: Tensor) -> None:
        into = tokens.gather(view).gather(1, tokens.slot.clamp(min=0))
        if bool(((into != view) & (tokens.slot >= 0) & (into >= 0) & (view >= 0)).any()):
            rule = f"Tokens that join must see the same tokens, in the stream {self.surgery.stream.name!r}"
            remedy = "Give the model one image a call, or choose a method that joins no tokens."
            raise UnsupportedError(explain(rule, "a mask that keeps them apart", remedy))

    def enter(self) -> None:
        """The block is about to be given the tokens at hand."""
        self.entered = self.hidden

    def local_tokens(self, ledger: TokenLedger, routed: TokenMap | None, maps: tuple[TokenMap, ...]) -> None:
        """The block is about to run on these tokens."""
        self.local, self.routed, self.maps, self.tokens = ledger, routed, maps, dict(self.run.memory.tokens)
        self.past = None if self.layer is None else self.layer.stored()

    def local_notes(self, name: str) -> Tensor | None:
        """What the memory held of the tokens that the block runs on, (b m ...); None if nothing."""
        notes = self.tokens.get(name)
        return notes if notes is None or not self.maps else functools.reduce(TokenMap.then, self.maps).bring(notes)

    def inside(self, hidden: Tensor, **more: Any) -> Site:
        """The site as a verb within the block finds it: all tokens that the block runs on."""
        return altered(self, hidden=hidden, run=altered(self.run, ledger=self.local), **more)

    def local_real(self) -> Tensor | None:
        """Queries of the block's attention call that are real tokens, (b m) bool; None if all are."""
        ledger, padding = self.local, self.run.padding
        if ledger.filled is None and ledger.fresh is None and padding is None:
            return None
        return ledger.real(padding) & ~ledger.flags(ledger.fresh, False)

    def from_call(self, x: Tensor, dim: int) -> Tensor:
        """What belongs to the cached entries in a tensor over the keys of the call; some have left since."""
        return self.layer.bring(x, dim)

    def from_local(self, x: Tensor, dim: int) -> Tensor:
        """What belongs to the tokens of the stream in a tensor over the keys or queries of the call; skipped tokens get zeros."""
        m = self.run.ledger.m if self.routed is None else self.routed.m
        if x.shape[dim] < m:
            rule = "What an attention computes can be read where one call holds all the tokens"
            raise UnsupportedError(explain(rule, f"{x.shape[dim]} of {m}", "Give the model one image a call, or choose another stream."))
        x = x.narrow(dim, x.shape[dim] - m, m)
        if self.routed is None:
            return x
        gone = (self.routed.slot < 0).view(len(x), *[1] * (dim - 1), -1, *[1] * (x.dim() - dim - 1))
        return take(x, self.routed.slot.clamp(min=0), dim).masked_fill(gone, 0)
