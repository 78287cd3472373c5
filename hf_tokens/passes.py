"""One pass through a stream: what is known of it from its first block to its last."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .books import Books
from .cache import Arrival, Stored, TokenCacheLayer
from .call import Call
from .errors import UnsupportedError, explain
from .roles import CacheCompressor, Method, TokenReducer
from .signals import PICTURED, Moment, padding, remember_pictures, views
from .spans import Span
from .token_map import TokenMap, put_back

if TYPE_CHECKING:
    from .layer import BlockSurgery
    from .surgery import Runtime


def first_real(now: Pass, books: Books) -> Tensor:
    """Index of each row's first real token among those that are left, (b)."""
    flags = books.flags(books.filled, True)
    flags = flags if now.padding is None else flags & now.padding.gather(1, books.rows)
    return flags.long().argmax(dim=1)


class Memory(dict):
    """What blocks of one stream tell each other.

    `tokens` holds (b m ...) tensors that follow the tokens of a pass through every map, `rows` (b ...) tensors that follow the samples
    of a cache as beams are reordered.
    """

    def __init__(self):
        super().__init__()
        self.tokens: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.prompted, self.end = False, 0  # whether the last pass of the sequence brought a prompt, and where it ended

    def move(self, tokens: TokenMap) -> None:
        """Let the per-token entries follow a map."""
        self.tokens = {name: tokens.gather(value) for name, value in self.tokens.items()}

    @contextlib.contextmanager
    def among(self, maps: tuple[TokenMap, ...], held: dict[str, Tensor]) -> Iterator[None]:
        """Let the per-token entries, as they were held, be those of other tokens for a while; what is written then comes back."""
        self.tokens = dict(held)
        if not maps:
            yield
            return
        path = functools.reduce(TokenMap.then, maps)
        self.tokens = {name: path.bring(value) for name, value in held.items()}
        yield
        back = {}
        for name, value in self.tokens.items():
            before = held[name] if name in held else value.new_zeros(len(value), path.n, *value.shape[2:])
            back[name] = put_back(value, path.slot, before)
        self.tokens = back

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Let the per-row entries follow a change of the batch."""
        self.rows = {name: change(value) for name, value in self.rows.items()}


@dataclass
class Entry:
    """What a block needs to be run again in a backward pass."""

    came: weakref.ref  # the hidden states that the model gave it; what a graph no longer holds will not come again
    books: Books
    inside: Tensor | None
    kept: bool  # whether those were what the model had got from the block before
    tokens: dict[str, Tensor]
    spans: tuple[Span, ...]


@dataclass
class Pass:
    """One pass through the stream.

    Attributes:
        books: The tokens that are left.
        padding: Real tokens of the sequence that entered, (b n) bool; None if all are.
        first: Place of each row's first real token in the whole sequence, (b), behind its end if none came yet; None if it is 0.
        apart: The first token that each real one sees, -1 for the others, (b n); None if all see the same.
        segments: Where each sample begins in a packed row, (s); None if each has a row of its own.
        inside: The tokens that are left, behind the last block that ran, (b m d).
        given: What the model got from that block.
        lent: By the type of block, the tokens whose keys later blocks may read, and what was stored before them.
        caches: The same layers by the index of their block.
        notes: By the key of a method, what its `observe` returned in each block.
        waiting: By the key of a method, the blocks whose entries are shared out once all have run.
        spans: The spans of blocks that this place lies in, the outermost first.
        answers: By the key of a pooler, what the tokens that it let ask have gathered, (b k d).
    """

    books: Books
    padding: Tensor | None
    first: Tensor | None
    memory: Memory
    at: int = -1
    layers: list[TokenCacheLayer] = field(default_factory=list)
    apart: Tensor | None = None
    segments: Tensor | None = None
    inside: Tensor | None = None
    given: Tensor | None = None
    lent: dict[str | None, tuple[Books, Stored | None]] = field(default_factory=dict)
    caches: dict[int, TokenCacheLayer] = field(default_factory=dict)
    notes: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    waiting: dict[str, list[tuple[Moment, Tensor | None]]] = field(default_factory=dict)
    answers: dict[str, Tensor] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()

    def surface(self, tokens: Tensor, given: Tensor, index: int) -> Tensor:
        """The whole sequence (b n d) with the tokens (b m d) of this place behind a block; one that is gone keeps its row of `given`.

        Tokens that stand together in a span come apart as they would if it ended here.
        """
        books, spans = self.books, []
        for span in reversed(self.spans):
            spans.insert(0, span.hold(tokens))
            tokens, books = spans[0].regain(self.memory, index, self.padding, bool(self.layers)), span.books
        self.spans = tuple(spans)
        return tokens if books.untouched else books.restore(tokens, given)

    def starts(self, books: Books) -> Tensor:
        """Where each sample of a packed row begins among the tokens that are left, (1 s)."""
        return torch.searchsorted(books.rows[0].contiguous(), self.segments)[None]

    @property
    def prefill(self) -> bool:
        """Whether this pass brings a prompt or a whole sequence, and not one token of generation."""
        return self.books.n > 1 or self.books.start == 0

    def seen(self) -> Tensor:
        """Real tokens of each row up to the end of this pass, (b)."""
        here = self.books.rows.new_full((self.books.batch,), self.books.n) if self.padding is None else self.padding.sum(dim=1)
        before = self.books.start if self.first is None or not self.books.start else self.books.start - self.first
        return here + before


def seen_before(side: BlockSurgery, cache: Cache | None) -> int:
    """Tokens that the cache of a block has seen."""
    held = cache.layers[side.layer_idx] if cache is not None and side.layer_idx in range(len(cache.layers)) else None
    return int(held.get_seq_length()) if isinstance(held, CacheLayerMixin) else 0


def refuse_cache(runtime: Runtime, side: BlockSurgery, cache: Cache | None) -> None:
    """A method that reads the whole sequence cannot be right for a part of it."""
    seen = seen_before(side, cache)
    whole = sorted({type(method).__name__ for method in runtime.methods() if not method.caches})
    if seen and whole:
        rule = f"{', '.join(whole)} must see the whole sequence in one pass"
        raise UnsupportedError(
            explain(rule, f"a cache of {seen} tokens", "Pass no cache, and `use_cache=False` to `generate`.")
        )


def open_pass(runtime: Runtime, side: BlockSurgery, call: Call) -> Pass:
    """Begin a pass at a block.

    Raises:
        UnsupportedError: A method of the stream cannot be right for such a pass.
    """
    refuse_cache(runtime, side, call.cache)
    layers, start, memory, known = [], 0, Memory(), {}
    if runtime.moves:
        cache = call.cache
        if cache is not None:
            slots = {i: s.layer_idx for i, s in runtime.sides.items() if s.layer_idx is not None and s.layer_idx < len(cache.layers)}
            known = {i: cache.layers[slot] for i, slot in slots.items()}
            known = {i: layer for i, layer in sorted(known.items()) if isinstance(layer, TokenCacheLayer)}
            layers = list(known.values())
            start = min((layer.seen for i, layer in known.items() if i >= side.index), default=0)  # blocks before have been run
    else:
        start = seen_before(side, call.cache)
    if layers:
        memory = layers[0].memory if start and layers[0].memory is not None else memory
        layers[0].memory = memory
        memory.tokens.clear()
    given = dict(context=call.context, behind=call.behind, prefix=runtime.prefix, additive=side.additive_mask, heads=runtime.stream.heads)
    books = Books.open(call.hidden, start, runtime.stream.causal and not runtime.sees_all, **given)
    real, first = padding(call.arguments, books)
    segments = None if start else call.segments(real)
    refuse_packed(runtime, segments, call.cache is not None)
    apart = None if runtime.stream.causal else views(call.arguments, books, real)
    admit_prompt(runtime, memory, books)
    if layers:
        first = begin_rows(layers, books, real, first)
    visual = runtime.inputs.get("visual")
    if visual is not None and visual.shape[1] == books.n and any(PICTURED in method.asks for method in runtime.methods()):
        remember_pictures(call.hidden, visual.to(call.hidden.device), books, memory.rows)
    return Pass(books, real, first, memory, layers=layers, caches=known, apart=apart, segments=segments)


def begin_rows(layers: list[TokenCacheLayer], books: Books, real: Tensor | None, first: Tensor | None) -> Tensor | None:
    """Place of each row's first real token (b), held from the pass that brought it: a sliding window hides it from later masks."""
    held, end = layers[0], books.start + books.n
    if real is not None:
        first = torch.where(real.any(dim=1), first, end)  # a row of padding has yet to begin
    if held.placed and books.start:
        if held.first is None or first is None:
            return held.first
        begins = held.first >= books.start
        first = torch.where(begins, first, held.first)
        late = (begins & (first < end)).nonzero()[:, 0].tolist()
        if late and any(layer.banks for layer in layers):
            rule = "Tokens go in front of a prompt in its first pass, which must hold a real token of each row"
            remedy = "Choose a larger `prefill_chunk_size`, or pad less."
            raise UnsupportedError(explain(rule, f"only padding in rows {late}", remedy))
    held.first, held.placed = first, True
    return first


def needs_row(method: Method, cached: bool) -> bool:
    """Whether a method wants each sample in a row of its own; one that compresses a cache has nothing to do where there is none."""
    return not method.packed and (cached or not isinstance(method, CacheCompressor))


def refuse_packed(runtime: Runtime, segments: Tensor | None, cached: bool) -> None:
    """A method that thinks of one sample a row cannot be right for several in one."""
    if segments is not None and len(segments) > 1 and any(needs_row(method, cached) for method in runtime.methods()):
        rule = f"The stream {runtime.stream.name!r} packs its samples into one row, and these methods take one sample a call"
        raise UnsupportedError(explain(rule, f"{len(segments)} segments", "Give it one sample a call, or name another stream."))


def admit_prompt(runtime: Runtime, memory: Memory, books: Books) -> None:
    """A prompt that comes right behind another one is a chunk of one prompt; one that was cropped is no more what was looked at."""
    prompt, cropped = books.n > 1 or books.start == 0, books.start < memory.end
    whole = [type(method).__name__ for method in runtime.methods() if not method.chunks]
    if (prompt or cropped) and books.start and memory.prompted and whole:
        raise UnsupportedError(
            explain(
                "Methods that look at a prompt as a whole must get it in one pass",
                f"{', '.join(sorted(set(whole)))} and a prompt {'that was cropped' if cropped else 'in chunks'}",
                "Leave out `prefill_chunk_size` and assisted decoding, or pass the whole prompt to the model at once.",
            )
        )
    running = sorted({type(method).__name__ for method in runtime.methods() if isinstance(method, TokenReducer) and method.spans})
    if cropped and running:
        rule = f"Tokens that {', '.join(running)} has read cannot be taken back"
        came = f"a cache cut from {memory.end} tokens to {books.start}"
        raise UnsupportedError(explain(rule, came, "Start a new cache, and leave out assisted decoding."))
    memory.prompted, memory.end = prompt, books.start + books.n


def lend(runtime: Runtime, side: BlockSurgery, books: Books, now: Pass, stored: Stored | None) -> Stored | None:
    """What is stored before a block's own keys; a block that reads the keys of another one must have the tokens that this one had."""
    if not side.borrows:
        now.lent[side.type] = books, stored
        return stored
    lent, before = now.lent.get(side.type, (None, None))
    if books is not lent and not (books.untouched and (lent is None or lent.untouched)):
        rule = "A block that reads the keys of another one must get the tokens that this one had"
        raise UnsupportedError(explain(rule, f"other ones at {runtime.stream.paths[side.index]}", "Act on the blocks before that place."))
    return before


def expect(layer: TokenCacheLayer | None, books: Books) -> Stored | None:
    """Announce the tokens of a block to its cache; returns what is stored there already, where its mask must be cut for it."""
    if layer is None:
        return None
    sizes = books.sizes if books.proportional else None
    layer.expect(Arrival(books.rows + books.start, books.filled, books.fresh, books.start + books.n, sizes))
    if layer.origins is None:
        empty = books.rows.new_empty(books.batch, 0)
        return None if books.untouched and not books.start else Stored(empty)  # every token of the prompt may have skipped it
    return None if layer.whole and books.untouched else layer.stored()
