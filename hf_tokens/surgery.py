"""One pass through a stream: the verbs speak around each block, which runs on the tokens that are left; the model gets back all of them.

Outside of a block nothing changes: whoever reads a block's output (the next norm, a skip connection, `output_hidden_states`) sees the whole
sequence. The tokens that are left travel from block to block beside it.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from .anatomy import Stream
from .books import CROSS, SEGMENTS, Books, Stored
from .cache import Arrival, TokenCacheLayer, adopt, self_attention_cache
from .errors import UnsupportedError, explain
from .roles import CacheCompressor, LayerRouter, Method, TokenBank, TokenReducer, TokenRouter
from .signals import HOOKED, SUPPLY, TAPPED, Moment, padding, stored, views
from .token_map import TokenMap
from .training import follow_trainer

if TYPE_CHECKING:
    from .layer import BlockSurgery
    from .root import Root

BIAS, CROSS_BIAS = "position_bias", "encoder_decoder_position_bias"  # T5's first block makes them and hands them on
EPSILON = 1e-9  # so that a share of a whole number of tokens is that number
OF_THE_BLOCK = {*TAPPED, *HOOKED}  # signals of what a block computed: there are none where it ran on no token
REPLAYS = 8  # passes whose books are held for blocks that are run again in a backward pass


@cache
def parameters(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the positional parameters of a block's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(name for name, p in inspect.signature(cls.forward).parameters.items() if p.kind in kinds)[1:]


# How a model may lay out its tokens: to (b n d), and back, given the tensor that came. Parallel residual streams (c) count as one token.
PACKED = "n d"  # samples one behind the other in one row
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "b n d": (lambda x: x, lambda x, came: x),
    PACKED: (lambda x: x[None], lambda x, came: x[0]),
    "n b d": (lambda x: x.transpose(0, 1), lambda x, came: x.transpose(0, 1)),
    "b n c d": (lambda x: x.flatten(2), lambda x, came: x.unflatten(2, came.shape[2:])),
    "c b n d": (
        lambda x: x.permute(1, 2, 0, 3).flatten(2),
        lambda x, came: x.unflatten(2, (came.shape[0], came.shape[3])).permute(2, 0, 1, 3),
    ),
}


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The cache of a model's own tokens among the arguments of a block."""
    return next((cache for value in values if (cache := self_attention_cache(value)) is not None), None)


class Call:
    """One call of a block, its arguments by name, its hidden states as (b n d)."""

    def __init__(self, stream: Stream, index: int, args: tuple, kwargs: dict):
        block = stream.blocks[index]
        self.stream, self.index = stream, index
        self.names = parameters(type(block))[: len(args)]
        self.rest = args[len(self.names) :]
        self.arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.hidden_name = stream.hidden_index(index).name
        raw = self.raw = self.arguments[self.hidden_name]
        usual = {2: "n d", 3: "b n d"}
        self.layout = usual.get(raw.dim(), stream.layout) if stream.layout in usual.values() else stream.layout
        if self.layout not in LAYOUTS or raw.dim() != len(self.layout.split()):
            raise UnsupportedError(
                explain(
                    f"The tokens of a stream must lie as one of {sorted(LAYOUTS)}",
                    f"{tuple(raw.shape)}, read as {stream.layout!r}, at {stream.paths[index]}",
                    "Choose another stream.",
                )
            )
        self.hidden: Tensor = LAYOUTS[self.layout][0](raw)
        context = stream.context_index(index)
        value = None if context is None else self.arguments.get(context.name)
        self.context = value.shape[1] if isinstance(value, Tensor) and value.dim() == 3 else 0

    @property
    def cache(self) -> Cache | None:
        """The cache among the arguments."""
        return find_cache(self.arguments.values())

    def run(self, inner: Callable, hidden: Tensor, books: Books, stored: Stored | None) -> Any:
        """Call the block on these tokens with every argument cut to fit."""
        original = self.pack(hidden)
        if books.untouched and stored is None:
            given = {**self.arguments, self.hidden_name: original}
            return self._apply(inner, given)
        self._spell_out_bias(books)
        given = {name: books.realign(name, value, stored) for name, value in self.arguments.items() if name != self.hidden_name}
        given[self.hidden_name] = original
        name = self._mask_name()
        if name is not None and given.get(name) is None and self.layout != "n d":
            given[name] = books.implied_mask(hidden, stored)
        output = self._apply(inner, given)
        return self._give_back(output, given)

    def _spell_out_bias(self, books: Books) -> None:
        """Where the first block would count the places for its relative bias by itself, give it the bias of the whole sequence."""
        attention, context = self.stream.attention(self.index), self.arguments.get("encoder_hidden_states")
        missing = {name for name in parameters(type(self.stream.blocks[self.index])) if self.arguments.get(name) is None}
        if BIAS in missing and attention is not None and vars(attention).get("has_relative_attention_bias"):
            self.arguments[BIAS] = attention.compute_bias(books.n, books.start + books.n, past_seen_tokens=books.start)
        if CROSS_BIAS in missing and context is not None:
            self.arguments[CROSS_BIAS] = context.new_zeros(1, self.stream.heads, books.n, context.shape[1])

    def unsaid_mask(self, hidden: Tensor, books: Books) -> Tensor | None:
        """The mask that these tokens need where the block has no argument for one."""
        named = self._mask_name() is not None and self.layout != "n d"
        if books.untouched or named or self.stream.causal or self.stream.attention(self.index) is None:
            return None
        return books.implied_mask(hidden, None)

    def _mask_name(self) -> str | None:
        names = parameters(type(self.stream.blocks[self.index]))
        return next((name for name in (*self.arguments, *names) if "mask" in name and not CROSS.search(name) and "head" not in name), None)

    def _apply(self, inner: Callable, given: dict) -> Any:
        given = dict(given)
        positional = [given.pop(name) for name in self.names]
        return inner(*positional, *self.rest, **given)

    def _give_back(self, output: Any, given: dict) -> Any:
        """An argument that the block passes on leaves it as it came: the next block cuts it anew."""
        if not isinstance(output, tuple):
            return output
        uncut = {id(cut): self.arguments[name] for name, cut in given.items() if isinstance(cut, Tensor) and name in self.arguments}
        return tuple(uncut.get(id(item), item) for item in output)

    def read(self, output: Any) -> Tensor:
        """The hidden states in a block's output, (b m d)."""
        return LAYOUTS[self.layout][0](self.stream.read(self.index, output))

    def pack(self, hidden: Tensor) -> Tensor:
        """(b n d) in the layout of the model."""
        return LAYOUTS[self.layout][1](hidden, self.raw)

    def write(self, output: Any, hidden: Tensor) -> Any:
        """A block's output with other hidden states."""
        return hidden if output is None else self.stream.write(self.index, output, hidden)


def first_real(now: Pass, books: Books) -> Tensor:
    """Index of each row's first real token among those that are left, (b)."""
    flags = books.flags(books.filled, True)
    flags = flags if now.padding is None else flags & now.padding.gather(1, books.rows)
    return flags.long().argmax(dim=1)


class Memory(dict):
    """What blocks of one stream tell each other. `tokens` holds (b m ...) tensors that follow the tokens through every map."""

    def __init__(self):
        super().__init__()
        self.tokens: dict[str, Tensor] = {}
        self.prompted = False  # whether the last pass of the sequence brought a prompt

    def move(self, tokens: TokenMap) -> None:
        """Let the per-token entries follow a map."""
        self.tokens = {name: tokens.gather(value) for name, value in self.tokens.items()}


@dataclass
class Entry:
    """What a block needs to be run again in a backward pass."""

    came: weakref.ref
    books: Books
    inside: Tensor | None
    given: Tensor | None
    tokens: dict[str, Tensor]


@dataclass
class Pass:
    """One pass through the stream.

    Attributes:
        books: The tokens that are left.
        padding: Real tokens of the sequence that entered, (b n) bool; None if all are.
        first: Place of each row's first real token in the whole sequence, (b); None if it is 0.
        apart: The first token that each real one sees, -1 for the others, (b n); None if all see the same.
        inside: The tokens that are left, behind the last block that ran, (b m d).
        given: What the model got from that block.
    """

    books: Books
    padding: Tensor | None
    first: Tensor | None
    memory: Memory
    at: int = -1
    layers: list[TokenCacheLayer] = field(default_factory=list)
    apart: Tensor | None = None
    inside: Tensor | None = None
    given: Tensor | None = None
    waiting: dict[str, list[tuple[Method, Moment, Tensor]]] = field(default_factory=dict)

    @property
    def prefill(self) -> bool:
        """Whether this pass brings a prompt or a whole sequence, and not one token of generation."""
        return self.books.n > 1 or self.books.start == 0

    def seen(self) -> Tensor:
        """Real tokens of each row up to the end of this pass, (b)."""
        here = self.books.rows.new_full((self.books.batch,), self.books.n) if self.padding is None else self.padding.sum(dim=1)
        before = self.books.start if self.first is None or not self.books.start else self.books.start - self.first
        return here + before


class Runtime:
    """The surgery of one stream: its blocks' layers, and the pass that is under way."""

    def __init__(self, stream: Stream, prefix: int):
        self.stream, self.prefix = stream, prefix
        self.sides: dict[int, BlockSurgery] = {}
        self.current: Pass | None = None
        self.entries: dict[int, list[Entry]] = {}
        self.progress = 1.0
        self.inputs: dict[str, Any] = {}
        self.reads: Tensor | None = None
        self.counts: dict[int, int] | None = None
        self.records: dict[int, list] | None = None
        self.moves, self.exit = False, len(stream)
        self.root: Root | None = None
        self.holders: list[nn.Module] = []  # the modules around the blocks, the model first
        self.keeps_final = False
        self.final: Tensor | None = None
        self.final_real: Tensor | None = None
        self.taught: Tensor | None = None
        self.contexts: dict[str, dict] = {}

    def methods(self) -> Iterator[Method]:
        """Every active method of the stream."""
        for side in self.sides.values():
            yield from side.active()

    # -- a block -----------------------------------------------------------------------------------------------------

    def run(self, side: BlockSurgery, args: tuple, kwargs: dict) -> Any:
        """A block's forward."""
        methods = side.active()
        if side.index == 0 and self.moves:
            self._adopt(args, kwargs)
        idle = not methods and side.index < self.exit and (self.current is None or self.current.books.untouched)
        if idle and not self._shortened(side, args, kwargs):
            output = side.inner(*args, **kwargs)
            if self.counts is not None:
                hidden = self.stream.bind(side.index, args, kwargs)
                self._count(side, hidden.numel() // hidden.shape[-1])
            if self.keeps_final and side.index == len(self.stream) - 1:
                self.final = self.stream.read(side.index, output)
            return output
        if torch._C._current_graph_task_id() != -1:
            return self._replay(side, methods, args, kwargs)
        try:
            return self._run(side, methods, Call(self.stream, side.index, args, kwargs))
        except BaseException:
            self.current = None
            raise

    def refresh(self) -> None:
        """Note whether any active method moves tokens of a causal stream, and where the stream ends for them."""
        self.moves = self.stream.causal and any(method.moves_tokens for method in self.methods())
        self.exit = min((method.exit for method in self.methods() if method.exit is not None), default=len(self.stream))

    def _shortened(self, side: BlockSurgery, args: tuple, kwargs: dict) -> bool:
        """Whether the block's cache holds fewer tokens than it has seen, so that its mask must be cut."""
        if not self.moves or side.layer_idx is None:
            return False
        cache = find_cache((*args, *kwargs.values()))
        layer = cache.layers[side.layer_idx] if cache is not None and side.layer_idx < len(cache.layers) else None
        return isinstance(layer, TokenCacheLayer) and layer.length != layer.seen

    def _adopt(self, args: tuple, kwargs: dict) -> None:
        """Let our layers hold the cache from the first token on."""
        cache = find_cache((*args, *kwargs.values()))
        indices = [side.layer_idx for side in self.sides.values() if side.layer_idx is not None]
        if cache is not None and indices:
            adopt(cache, max(indices))

    def _replay(self, side: BlockSurgery, methods: list[Method], args: tuple, kwargs: dict) -> Any:
        """A checkpointed block is run again in the backward pass: with the books it had."""
        call = Call(self.stream, side.index, args, kwargs)
        raw = call.arguments[call.hidden_name]
        held = self.entries.get(side.index, [])
        known = next((entry for entry in held if entry.came() is raw), None)
        if known is None:
            raise UnsupportedError(
                explain(
                    "Gradient checkpointing of whole blocks must hand the block the same tensors again",
                    f"other ones at {self.stream.paths[side.index]}",
                    "Use non-reentrant checkpointing.",
                )
            )
        memory = Memory()
        memory.tokens = dict(known.tokens)
        outside, now = self.current, Pass(known.books, None, None, memory, side.index - 1, [], known.inside, known.given)
        now.padding, now.first = padding(call.arguments, known.books)
        self.current = now
        try:
            return self._run(side, methods, call, replaying=True)
        finally:
            self.current = outside

    def _run(self, side: BlockSurgery, methods: list[Method], call: Call, replaying: bool = False) -> Any:
        now = self._enter(side, call)
        if not replaying and torch.is_grad_enabled() and side.checkpointed_outside:
            held = self.entries.setdefault(side.index, [])
            held.append(Entry(weakref.ref(call.raw), now.books, now.inside, now.given, dict(now.memory.tokens)))
            del held[:-REPLAYS]
        layer = self._cache_layer(side, call, now)
        moment = Moment(self, side, now, self._tokens_left(call, now), layer)
        for method in methods:
            if isinstance(method, TokenReducer) and method.site == "before":
                self._reduce(method, moment)
            elif isinstance(method, TokenBank) and method.site == "input":
                self._insert(method, moment)
        output, moment.hidden = self._block(side, methods, call, moment)
        whole = moment.hidden if now.books.untouched else now.books.restore(moment.hidden, call.hidden)
        behind = now.books
        self._behind(methods, moment)
        if now.books is not behind:
            whole = now.books.restore(moment.hidden, whole)
        side.captured.clear()
        side.heard_call = None
        given = call.pack(whole)
        now.inside, now.given = (None, None) if now.books.untouched else (moment.hidden, given)
        if side.index == len(self.stream) - 1 and not replaying:
            self._close(now, whole)
        return call.write(output, given)

    def _behind(self, methods: list[Method], moment: Moment) -> None:
        """What the methods say and hear behind a block."""
        ran = moment.local is not None
        for method in methods:
            if ran and method.observes:
                method.observe(**{name: SUPPLY[name](moment) for name in method.observes})
        for method in methods:
            if isinstance(method, TokenReducer) and method.site == "middle":
                self._settle(method, moment)
            elif isinstance(method, TokenReducer) and method.site == "after" and (ran or not OF_THE_BLOCK & set(method.signals)):
                self._reduce(method, moment)
            elif isinstance(method, CacheCompressor) and moment.layer is not None and ran:
                self._compress(method, moment)

    def _tokens_left(self, call: Call, now: Pass) -> Tensor:
        """The tokens as the last block left them, unless someone outside changed the sequence since."""
        if now.books.untouched:
            return call.hidden
        return now.inside if call.raw is now.given else now.books.cut(call.hidden, now.inside)

    def _enter(self, side: BlockSurgery, call: Call) -> Pass:
        now = self.current
        if now is None or side.index <= now.at:
            now = self.current = self._open(side, call)
        if call.hidden.shape[1] != now.books.n:
            raise UnsupportedError(
                explain(
                    f"The model may not change the number of tokens inside the stream {self.stream.name!r}",
                    f"{call.hidden.shape[1]} where {now.books.n} were due, at {self.stream.paths[side.index]}",
                    "Act on the blocks behind that place, or on another stream.",
                )
            )
        now.at = side.index
        return now

    def _refuse_cache(self, side: BlockSurgery, cache: Cache | None) -> None:
        """A method that reads the whole sequence cannot be right for a part of it."""
        held = cache.layers[side.layer_idx] if cache is not None and side.layer_idx in range(len(cache.layers)) else None
        seen = held.get_seq_length() if isinstance(held, CacheLayerMixin) else 0
        whole = sorted({type(method).__name__ for method in self.methods() if not method.caches})
        if seen and whole:
            rule = f"{', '.join(whole)} must see the whole sequence in one pass"
            raise UnsupportedError(
                explain(rule, f"a cache of {seen} tokens", "Pass no `past_key_values`, and `use_cache=False` to `generate`.")
            )

    def _open(self, side: BlockSurgery, call: Call) -> Pass:
        self._refuse_cache(side, call.cache)
        layers, start, memory = [], 0, Memory()
        self._refuse_packed(call)
        if self.moves:
            cache = call.cache
            if cache is not None:
                slots = {i: s.layer_idx for i, s in self.sides.items() if s.layer_idx is not None and s.layer_idx < len(cache.layers)}
                known = {i: cache.layers[slot] for i, slot in slots.items()}
                known = {i: layer for i, layer in sorted(known.items()) if isinstance(layer, TokenCacheLayer)}
                layers = list(known.values())
                start = min((layer.seen for i, layer in known.items() if i >= side.index), default=0)  # blocks before have been run
        if layers:
            memory = layers[0].memory if start and layers[0].memory is not None else memory
            layers[0].memory = memory
            memory.tokens.clear()
        books = Books.open(call.hidden, start, self.stream.causal, call.context, self.prefix, side.additive_mask)
        real, first = padding(call.arguments, books)
        apart = None if self.stream.causal else views(call.arguments, books, real)
        self._admit_prompt(memory, books)
        if layers and start:
            first = layers[0].first  # a sliding window hides it from later masks
        elif layers:
            layers[0].first = first
        return Pass(books, real, first, memory, layers=layers, apart=apart)

    def _refuse_packed(self, call: Call) -> None:
        """A method that thinks of one sample a row cannot be right for several in one."""
        segments = [len(value) - 1 for name, value in call.arguments.items() if SEGMENTS.match(name) and isinstance(value, Tensor)]
        if call.layout == PACKED and max(segments, default=1) > 1 and not all(method.packed for method in self.methods()):
            rule = f"The stream {self.stream.name!r} packs its samples into one row, and these methods take one sample a call"
            raise UnsupportedError(explain(rule, f"{max(segments)} segments", "Give the model one image, or name another stream."))

    def _admit_prompt(self, memory: Memory, books: Books) -> None:
        """A prompt that comes right behind another one is a chunk of one prompt."""
        prompt = books.n > 1 or books.start == 0
        whole = [type(method).__name__ for method in self.methods() if not method.chunks]
        if prompt and books.start and memory.prompted and whole:
            raise UnsupportedError(
                explain(
                    "Methods that look at a prompt as a whole must get it in one pass",
                    f"{', '.join(sorted(set(whole)))} and a prompt in chunks",
                    "Leave out `prefill_chunk_size`, or pass the whole prompt to the model at once.",
                )
            )
        memory.prompted = prompt

    def _cache_layer(self, side: BlockSurgery, call: Call, now: Pass) -> TokenCacheLayer | None:
        cache = call.cache if now.layers else None
        if cache is None or side.layer_idx is None or side.drops_cache:
            return None
        layer = cache.layers[side.layer_idx] if side.layer_idx < len(cache.layers) else None
        return layer if isinstance(layer, TokenCacheLayer) else None

    def _block(self, side: BlockSurgery, methods: list[Method], call: Call, moment: Moment) -> tuple[Any, Tensor]:
        """Run the block on the tokens that are routed to it, between the tokens that are there for this block only."""
        now, hidden, layer = moment.now, moment.hidden, moment.layer
        gate, dense = self._gate(methods, moment)
        books, x, routed = now.books, hidden, None
        if gate is not None:
            runs = (gate != 0) & books.flags(books.filled, True)
            if dense:
                books = replace(books, filled=runs, untouched=False, memo={})
            elif not bool(runs.all()):
                routed = TokenMap.select(runs)
                books, x = books.move(routed), routed.gather(hidden)
        if side.bare and books.m == 1 and books.filled is not None and not bool(books.filled.any()):  # nothing is left to compute
            if layer is not None:
                layer.seen = books.start + books.n
            return None, hidden
        guests: list[tuple[TokenBank, TokenMap]] = []
        learns = x.requires_grad or torch.is_grad_enabled() and side.learns(call.arguments.values())
        for method in methods:
            if isinstance(method, TokenBank) and method.site != "input":
                tokens = self._tokens(method, replace(moment, hidden=x, now=replace(now, books=books)))
                if tokens is not None and self._admit(method, layer):
                    opened = TokenMap.insert(x.shape[1], 0, tokens.shape[1], len(x), x.device, beside=first_real(now, books))
                    x, books = torch.cat([tokens, x], dim=1), books.move(opened)
                    guests.append((method, opened))
                    learns |= method.site != "query" and tokens.requires_grad
        stored = self._expect(layer, books, now)
        moment.local, moment.routed = books, routed
        asking = sum(opened.m - opened.n for bank, opened in guests if bank.site == "query")
        unsaid = call.unsaid_mask(x, books)
        if unsaid is not None or side.taps:
            side.open_tap()
        with self._listen(side, asking, replace(moment, hidden=x, now=replace(now), mask=unsaid)):
            output = call.run(side.inner, x, books, stored)
        if unsaid is not None:
            side.attention_call()
        self._count(side, x.shape[0] * x.shape[1])
        side.bare = isinstance(output, Tensor)
        y = call.read(output)
        y = self._dismiss(guests, y, learns)
        if routed is not None:
            y = routed.restore(y, hidden)
        if gate is not None:
            mixed = hidden + gate[..., None].to(y.dtype) * (y - hidden)
            y = mixed if gate.requires_grad else torch.where((gate == 1)[..., None], y, mixed)
        return output, y

    def _dismiss(self, guests: list[tuple[TokenBank, TokenMap]], y: Tensor, learns: bool) -> Tensor:
        """Behind the block, take out the tokens that were there for it only; those that asked tell what they read."""
        for bank, opened in reversed(guests):
            k = opened.m - opened.n
            summary, y = y[:, :k], y[:, k:]
            if bank.site == "query":
                read = bank.read(summary)
                if read is not None:
                    self.reads = read if self.reads is None else self.reads + read
                y = y if learns else y.detach()  # no token saw them, so no gradient of theirs need go through the tokens
        return y

    @contextlib.contextmanager
    def _listen(self, side: BlockSurgery, asking: int, moment: Moment) -> Iterator[None]:
        """Open the hooks inside of the block while it runs, and again when its own checkpoint runs it in the backward pass."""
        hearing = partial(side.hearing, side.taps or moment.mask is not None, asking, moment)
        checkpoint = vars(side.block).get("_gradient_checkpointing_func")
        if checkpoint is not None:
            side.block._gradient_checkpointing_func = lambda function, *args: checkpoint(hearing()(function), *args)
        try:
            with hearing():
                yield
        finally:
            if checkpoint is not None:
                side.block._gradient_checkpointing_func = checkpoint

    def _count(self, side: BlockSurgery, tokens: int) -> None:
        if self.counts is not None:
            self.counts[side.index] = self.counts.get(side.index, 0) + tokens

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def ask(self, method: Method, moment: Moment) -> Any:
        """Call a method's verb with the signals that it names."""
        moment = replace(moment, whole_cache=isinstance(method, CacheCompressor))
        given = {name: SUPPLY[name](moment) for name in method.signals}
        return getattr(method, method.verb)(**given)

    def _gate(self, methods: list[Method], moment: Moment) -> tuple[Tensor | None, bool]:
        if moment.side.index >= self.exit:
            return torch.zeros_like(moment.now.books.rows, dtype=moment.hidden.dtype), False
        gate, dense = None, False
        for method in methods:
            if isinstance(method, (TokenRouter, LayerRouter)):
                one = self.ask(method, moment)
                if one is None:
                    continue
                one = one[:, None].expand_as(moment.now.books.rows) if one.dim() == 1 else one
                gate = one if gate is None else gate * one
                dense |= method.training and torch.is_grad_enabled() and method.trains_dense
        return gate, dense

    def _reduce(self, method: TokenReducer, moment: Moment) -> None:
        tokens = self.ask(method, moment)
        if tokens is not None:
            self._move(tokens, moment, tokens.apply(moment.hidden, moment.now.books.all_sizes()), method.proportional)

    def _move(self, tokens: TokenMap, moment: Moment, hidden: Tensor, proportional: bool = False) -> None:
        """Change the tokens for the rest of the stream."""
        now = moment.now
        if tokens.joins and now.apart is not None:
            self._check_joins(tokens, now.apart.gather(1, now.books.rows))
        now.memory.move(tokens)
        books = now.books.move(tokens)
        now.books = replace(books, proportional=True) if proportional else books
        moment.hidden = hidden

    def _check_joins(self, tokens: TokenMap, view: Tensor) -> None:
        into = tokens.gather(view).gather(1, tokens.slot.clamp(min=0))
        if bool(((into != view) & (tokens.slot >= 0) & (into >= 0) & (view >= 0)).any()):
            rule = f"Tokens that join must see the same tokens, in the stream {self.stream.name!r}"
            remedy = "Give the model one image a call, or choose a method that joins no tokens."
            raise UnsupportedError(explain(rule, "a mask that keeps them apart", remedy))

    def _settle(self, method: TokenReducer, moment: Moment) -> None:
        """Behind the block, a merge in its middle becomes one of the stream: the mean of x + mlp(mean x) is mean x + mlp(mean x)."""
        held = moment.middle.get(id(method))
        if held is not None:
            self._move(held, moment, held.apply(moment.hidden, moment.now.books.all_sizes()), method.proportional)

    def middle(self, side: BlockSurgery, method: TokenReducer, x: Tensor) -> Tensor:
        """Between attention and MLP: the tokens that the MLP gets."""
        moment, held = replace(side.moment, hidden=x), side.moment.middle
        if id(method) not in held:
            held[id(method)] = self.ask(method, moment)
        tokens = held[id(method)]
        return x if tokens is None else tokens.apply(x, moment.now.books.all_sizes())

    def _tokens(self, bank: TokenBank, moment: Moment) -> Tensor | None:
        tokens = self.ask(bank, moment)
        if tokens is None or tokens.shape[-2] == 0:
            return None
        tokens = tokens.to(moment.hidden)
        tokens = tokens.repeat(*[1] * (tokens.dim() - 1), moment.hidden.shape[-1] // tokens.shape[-1])  # one for each parallel stream
        return tokens.expand(len(moment.hidden), -1, -1) if tokens.dim() == 2 else tokens

    @staticmethod
    def _admit(bank: TokenBank, layer: TokenCacheLayer | None) -> bool:
        """Tokens whose keys the cache holds already are not given again."""
        if layer is None or bank.site == "query":
            return True
        if bank.key in layer.banks:
            return False
        layer.banks.add(bank.key)
        return True

    def _insert(self, bank: TokenBank, moment: Moment) -> None:
        now, hidden = moment.now, moment.hidden
        mark = now.memory.tokens.get(bank.key)
        there = mark is not None and mark.shape[1] == now.books.m
        if not there and not self._admit_sequence(bank, now):
            return
        tokens = self._tokens(bank, moment)
        if tokens is None:
            return
        if there:
            place = mark.long().argsort(dim=1, descending=True, stable=True)[:, : tokens.shape[1]]
            moment.hidden = torch.where(mark[..., None], hidden.scatter(1, place[..., None].expand_as(tokens), tokens), hidden)
            return
        real = SUPPLY["mask"](moment)
        start = real.long().argmax(dim=1)
        end = real.shape[1] - real.flip(1).long().argmax(dim=1)
        at = bank.place(start, end)
        opened = TokenMap.insert(now.books.m, at, tokens.shape[1], len(hidden), hidden.device, beside=torch.minimum(at, end - 1))
        wide = opened.gather(hidden)
        place = opened.fresh.long().argsort(dim=1, descending=True, stable=True)[:, : tokens.shape[1]]
        self._move(opened, moment, wide.scatter(1, place[..., None].expand_as(tokens), tokens))
        now.memory.tokens[bank.key] = opened.fresh

    @staticmethod
    def _admit_sequence(bank: TokenBank, now: Pass) -> bool:
        if not now.layers:
            return now.books.start == 0
        if bank.key in now.layers[0].banks:
            return False
        now.layers[0].banks.add(bank.key)
        return True

    def _compress(self, method: CacheCompressor, moment: Moment) -> None:
        layer, now = moment.layer, moment.now
        if self.records is not None:
            self.records.setdefault(moment.side.index, []).append((method.key, self._score(method, moment).detach()))
            return
        if not now.prefill and not method.decodes:
            return
        real = stored(moment)
        if method.allots and now.prefill:
            now.waiting.setdefault(method.key, []).append((method, moment, self._score(method, moment)))
            if moment.side.index == max(i for i, s in self.sides.items() if any(m.key == method.key for m in s.active())):
                self._allot(method, now.waiting.pop(method.key))
            return
        lengths = real.sum(dim=-1)  # b, or b k
        seen = now.seen().view(-1, *[1] * (lengths.dim() - 1)).expand_as(lengths)
        if method.allots:
            budgets = (layer.shares * seen + EPSILON).long().clamp(min=1).minimum(lengths)
        else:
            pairs = zip(lengths.flatten().tolist(), seen.flatten().tolist(), strict=True)
            budgets = torch.tensor([min(n, method.budget(n, s)) for n, s in pairs], device=lengths.device).view_as(lengths)
        if self._overfull(layer, lengths, budgets):
            self._evict(layer, self.ask(method, moment), real, budgets)

    def _score(self, method: CacheCompressor, moment: Moment) -> Tensor:
        """The score of every entry, -inf where there is none."""
        score, real = self.ask(method, moment), stored(moment)
        return score.masked_fill(~(real[:, None] if score.dim() > real.dim() else real), -torch.inf)

    @staticmethod
    def _overfull(layer: TokenCacheLayer, lengths: Tensor, budgets: Tensor) -> bool:
        """Whether rows have more real entries than they may, or more room than any of them needs."""
        return bool((budgets < lengths).any()) or int(lengths.max()) < layer.length

    def _allot(self, method: CacheCompressor, waiting: list[tuple[Method, Moment, Tensor]]) -> None:
        """Every block has scored its entries: share them out."""
        real = {m.side.index: stored(m) for _, m, _ in waiting}
        scores = {m.side.index: score for _, m, score in waiting}
        budgets = method.leader.allot(scores)
        for _, moment, score in waiting:
            layer = moment.side.index
            lengths = real[layer].sum(dim=-1)
            allowed = budgets[layer].minimum(lengths)
            moment.layer.shares = allowed.double() / moment.now.seen()
            if self._overfull(moment.layer, lengths, allowed):
                self._evict(moment.layer, score, real[layer], allowed)

    @staticmethod
    def _evict(layer: TokenCacheLayer, score: Tensor, real: Tensor, budgets: Tensor) -> None:
        """Keep the highest of the real entries, as many as each row (b) or head (b k) may have; of two equal ones the earlier."""
        if score.dim() == 3 and real.dim() == 2:
            real, budgets = real[:, None].expand_as(score), budgets[:, None].expand(score.shape[:2])
        if score.dim() == 2 and real.dim() == 3:
            score = score[:, None].expand_as(real)
        score = score.masked_fill(~real, -torch.inf)
        if layer.fresh is not None:
            score = score.masked_fill(layer.fresh if score.dim() == layer.fresh.dim() else layer.fresh[:, None], torch.inf)
        most = max(1, int(budgets.max()))
        index = score.argsort(dim=-1, descending=True, stable=True)[..., :most]
        kept = torch.arange(most, device=index.device) < budgets[..., None]
        order = torch.where(kept, index, score.shape[-1]).sort(dim=-1)
        filled = order.values < score.shape[-1]
        layer.keep(order.values.clamp(max=score.shape[-1] - 1), None if bool(filled.all()) else filled)

    # -- cache and end ----------------------------------------------------------------------------------------------

    @staticmethod
    def _expect(layer: TokenCacheLayer | None, books: Books, now: Pass) -> Stored | None:
        if layer is None:
            return None
        layer.expect(Arrival(books.rows + books.start, books.filled, books.fresh, books.start + books.n))
        if layer.origins is None:
            empty = books.rows.new_empty(books.batch, 0)
            return None if books.untouched else Stored(empty, None)
        whole = layer.filled is None and layer.length == layer.seen
        return None if whole and books.untouched else Stored(layer.origins, layer.filled)

    def _close(self, now: Pass, whole: Tensor) -> None:
        for layer in now.layers:
            layer.seen = now.books.start + now.books.n
        self.current = None
        if self.keeps_final:
            self.final, self.final_real = whole, now.padding

    def found_in_training(self) -> None:
        """The model was set to training mode: follow the trainer that did it."""
        if self.root is not None:
            follow_trainer(self.root)
