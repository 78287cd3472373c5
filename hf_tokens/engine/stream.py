"""One pass through a stream: methods are asked around each block, which runs on the tokens that are left; the model gets back all of them.

Outside of a block nothing changes: whoever reads a block's output (the next norm, a skip connection, `output_hidden_states`) sees the whole
sequence. The tokens that are left travel from block to block beside it. The life of a block, each phase asked of the methods in the order
of their stacks (`handler.py` says what a phase is for):

    run a block:
        arrive                                  in the first block of the stream
        nobody is asked: run it as it came
        before                                  tokens = those that are left
        gate                                    once for each run of the block
        for each run:
            tokens = those routed to it; insert
            call, on arguments cut to the tokens: weights, attention, between, mlp, sublayer
            remove; tokens = all again, the update by its gate
        listen, observe, after, end             tokens = those that stay
        leave, behind the last block; close, when the pass is over
        return the whole sequence
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError, explain
from ..kv.adopt import adopt, find_cache
from ..kv.layer import TokenCacheLayer
from ..model.blocks import tells_no_places
from ..model.streams import Stream
from ..roles.base import Method
from ..tokens.altered import altered
from .ask import ask
from .call import BlockCall
from .context import ForwardContext, State
from .handler import handler_of
from .opening import expect, lend, open_pass
from .passage import run_block
from .plan import Speakers, StreamPlan
from .replay import Replays, in_backward, other_tensors
from .results import Entry, StreamCall
from .run import Site, StreamRun

if TYPE_CHECKING:
    from .block import BlockSurgery
    from .model import ModelSurgery



class StreamSurgery:
    """The surgery of one stream: its blocks, and the pass that is under way."""

    def __init__(self, model: ModelSurgery, stream: Stream, prefix: int, holders: list[nn.Module]):
        self.model, self.stream, self.prefix = model, stream, prefix
        self.holders = holders  # the modules around the blocks, the model first
        self.blocks: dict[int, BlockSurgery] = {}
        self.plan = StreamPlan(exit=len(stream))
        self.call = StreamCall(ForwardContext())
        self.replays: Replays = Replays()
        self._states: dict[type, Any] = {}
        model.add(self)

    def state(self, kind: type[State]) -> State:
        """What a handler keeps of this stream, made when it is first asked for."""
        if kind not in self._states:
            self._states[kind] = kind()
        return self._states[kind]

    def methods(self) -> Iterator[Method]:
        """Every active method of the stream."""
        for block in self.blocks.values():
            yield from block.active()

    def add(self, block: BlockSurgery) -> None:
        """Take in a block."""
        self.blocks[block.index] = block
        self.model.block_added(block)

    def refresh(self) -> None:
        """Note what the methods that act mean for the stream."""
        shares = any(block.shares_keys for block in self.blocks.values())
        self.plan = StreamPlan.of(list(self.methods()), self.stream.causal, len(self.stream), shares)
        self.model.refresh()

    # -- a call of the model -----------------------------------------------------------------------------------------

    def begin(self, context: ForwardContext, keeps_final: bool = False) -> None:
        """The model is called."""
        self.call = StreamCall(context, keeps_final)

    def resume(self, call: StreamCall) -> None:
        """Go on with a call in which another one was made."""
        self.call = call

    def end(self) -> None:
        """The call is over, whether it returned or raised: nothing of it stays."""
        self.call = StreamCall(ForwardContext())

    @contextlib.contextmanager
    def stopping_after(self, index: int) -> Iterator[None]:
        """The blocks behind this one do not run for a while."""
        self.plan = altered(self.plan, exit=min(self.plan.exit, index + 1))
        try:
            yield
        finally:
            self.refresh()

    def see_picture(self, picture: tuple[int, int] | None) -> None:
        """The stream is about to be given pictures of this height and width."""
        self.call.see_picture(picture)

    @property
    def examines(self) -> bool:
        """Whether someone listens to what the methods find, and nothing is to be changed by it."""
        return any(listener.examines for listener in self.model.listeners)

    def tell(self, block: BlockSurgery, method: Method, found: Any) -> None:
        """Tell those who listen what a method found."""
        for listener in self.model.listeners:
            listener.examined(block, method, found)

    def count(self, block: BlockSurgery, tokens: int, part: str | None = None) -> None:
        """So many tokens were computed by a block, or by a part of it."""
        for listener in self.model.listeners:
            listener.computed(block, part, tokens)

    # -- a block -----------------------------------------------------------------------------------------------------

    def run(self, block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
        """A block's forward, as the model calls it."""
        for handler in self.model.around:
            return handler.around(block, self._pass, args, kwargs)
        return self._pass(block, args, kwargs)

    def _pass(self, block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
        run = self.call.run
        later = run is not None and not run.prefill and block.index > run.at
        speakers = block.plan.decode if later else block.plan.prompt
        if block.index == 0:
            if self.plan.moves:
                self._adopt(args, kwargs)
            if not in_backward():
                for handler, method in block.plan.always.of("arrive"):
                    handler.arrive(method, block, args, kwargs)
        replayed = None
        if in_backward() and self.replays.known(block):
            replayed = self.replays.find(block, self.stream.bind(block.index, args, kwargs))
        if replayed is None and not self._changes(block, speakers, args, kwargs):
            return self._as_it_came(block, args, kwargs)
        if in_backward():
            return self._replay(block, BlockCall(self.stream, block.index, args, kwargs), replayed)
        try:
            if later and self._quiet(block, speakers, args, kwargs):
                return self._step(block, args, kwargs)
            return self._walk(block, BlockCall(self.stream, block.index, args, kwargs))
        except BaseException:
            self._abandon(block)
            raise

    def _abandon(self, block: BlockSurgery) -> None:
        """A block has raised: nothing of the pass stays."""
        run = self.call.swap_run(None)
        block.forget()
        for layer in () if run is None else run.layers:
            layer.release()

    def _changes(self, block: BlockSurgery, speakers: Speakers, args: tuple, kwargs: dict) -> bool:
        """Whether anything is to be done around a block, or its arguments are to be cut."""
        plan, run, index = self.plan, self.call.run, block.index
        if speakers.methods or index >= plan.exit or plan.sees_all or plan.remembers and index == 0:
            return True
        if run is not None and not run.ledger.untouched or index == plan.exit - 1 and plan.last:
            return True
        if block.shares_keys and run is not None:
            lent, stored = run.lent.get(block.layer_type, (None, None))
            return stored is not None or lent is not None and not lent.untouched
        layer = self.cache_layer(block, find_cache((*args, *kwargs.values()))) if plan.moves and block.layer_idx is not None else None
        return layer is not None and not layer.whole  # its mask must be cut

    def _as_it_came(self, block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
        output = block.inner(*args, **kwargs)
        if self.model.listeners:
            hidden = self.stream.bind(block.index, args, kwargs)
            self.count(block, hidden.numel() // hidden.shape[-1])
        if block.index == len(self.stream) - 1:
            run = self.call.run
            self.call.note_final(self.stream.read(block.index, output), None if run is None else run.padding)
        return output

    def _quiet(self, block: BlockSurgery, speakers: Speakers, args: tuple, kwargs: dict) -> bool:
        """Whether a block runs on a generated token as it came: nobody is asked before it is done, and no mask must be cut to its cache."""
        run, layer = self.call.run, self.cache_layer(block, find_cache((*args, *kwargs.values())))
        if layer is None or layer.filled is not None or layer.packed or not run.ledger.untouched:
            return False
        ends = block.index >= min(self.plan.exit, len(self.stream)) - 1 or self.plan.sees_all
        shaped = block.shares_keys or block.drops_cache or block.plan.attends is not None
        if ends or shaped or torch.is_grad_enabled() and block.checkpointed_outside:
            return False
        silent = all(handler_of(method).quiet(method, layer) for method in speakers.methods)
        return silent and tells_no_places(block.module, args, kwargs)

    def _step(self, block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
        """Run such a block."""
        run, layer = self.call.run, self.cache_layer(block, find_cache((*args, *kwargs.values())))
        run.enter(block.index, run.ledger.context)
        lend(self, block, run.ledger, run, expect(layer, run.ledger))
        output = block.inner(*args, **kwargs)
        self.count(block, run.ledger.batch)
        if block.plan.decode.of("after"):
            hidden = self.stream.read(block.index, output)
            self._behind(block.plan.decode, Site(self, block, run, hidden, layer, local=run.ledger))
        block.signals.clear()
        layer.release()
        return output

    def _replay(self, block: BlockSurgery, call: BlockCall, known: Any) -> Any:
        """A checkpointed block is run again in the backward pass: with the ledger it had."""
        if known is None:
            raise other_tensors(block)
        held = self.call.swap_run(known.begin(call))
        try:
            return self._walk(block, call, replaying=True)
        finally:
            self.call.swap_run(held)

    def _walk(self, block: BlockSurgery, call: BlockCall, replaying: bool = False) -> Any:
        """The phases of a block, one after the other."""
        run = self._enter(block, call)
        speakers = block.speakers(run)
        if not replaying:
            self.replays.hold(block, call.raw, lambda: Entry.of(run, call))
        if self.plan.sees_all:
            call.see_all(run.ledger, run.padding)
        layer = self.cache_layer(block, call.cache) if run.layers and not block.drops_cache else None
        site = Site(self, block, run, self._tokens_left(call, run), layer)
        for handler, method in speakers.of("before"):
            handler.before(method, site)
        site.enter()
        output = run_block(speakers, call, site)
        whole = self._restored(speakers, site, call.hidden)
        left = whole
        for handler, method in speakers.of("leave"):
            left = handler.leave(method, site, left, replaying)
        block.forget()
        if layer is not None:
            layer.release()
        given = call.pack(left)
        run.passed(site.hidden, given)
        if block.index == len(self.stream) - 1 and not replaying:
            self._close(site, whole)
        return call.write(output, given)

    def _enter(self, block: BlockSurgery, call: BlockCall) -> StreamRun:
        run = self.call.run
        if run is None or block.index <= run.at:
            run = open_pass(self, self.call.context, block, call)
            self.call.swap_run(run)
        if call.hidden.shape[1] != run.ledger.n:
            raise UnsupportedError(
                explain(
                    f"The model may not change the number of tokens inside the stream {self.stream.name!r}",
                    f"{call.hidden.shape[1]} where {run.ledger.n} were due, at {block.path}",
                    "Act on the blocks behind that place, or on another stream.",
                )
            )
        run.enter(block.index, call.context)
        return run

    def _tokens_left(self, call: BlockCall, run: StreamRun) -> Tensor:
        """The tokens as the last block left them, unless someone outside changed the sequence since."""
        if run.ledger.untouched:
            return call.hidden
        if run.spans and call.raw is not run.given:
            rule = "Between the blocks where a method lets tokens stand together, nothing but the blocks may change them"
            came = f"other tokens than the block before gave, at {self.stream.paths[call.index]}"
            raise UnsupportedError(explain(rule, came, "Choose other layers, or non-reentrant checkpointing."))
        return run.inside if call.raw is run.given else run.ledger.cut(call.hidden, run.inside)

    def _restored(self, speakers: Speakers, site: Site, given: Tensor) -> Tensor:
        """Ask the methods behind a block; returns the whole sequence (b n d), where a token that is gone keeps its row of `given`.

        One that vanishes here has what the block made of it, which is put in its place only if there is such a one.
        """
        run, index, ledger, hidden = site.run, site.block.index, site.run.ledger, site.hidden
        spanned = bool(run.spans)
        given = run.surface(hidden, given, index) if spanned else given
        self._behind(speakers, site)
        for handler, method in reversed(speakers.of("end")):
            handler.end(method, site)
        if spanned and run.ledger is ledger:
            return given
        if not spanned and run.ledger.losses > ledger.losses:
            given = hidden if ledger.untouched else ledger.restore(hidden, given)
        return run.surface(site.hidden, given, index)

    def _behind(self, speakers: Speakers, site: Site) -> None:
        """What the methods are asked behind a block."""
        for handler, method in speakers.of("listen")[:1]:
            handler.listen(method, site)
        for method in speakers.methods:
            if method.observes and ran_for(method, site):
                note = ask(method, site, "observe")
                if note is not None:
                    site.run.notes.setdefault(method.key, {})[site.block.index] = note
        for handler, method in speakers.of("after"):
            handler.after(method, site)

    def _close(self, site: Site, whole: Tensor) -> None:
        """The pass is over."""
        run = site.run
        for handler, method in self.plan.closing:
            handler.close(method, site)
        for layer in run.layers:
            layer.see(run.ledger.start + run.ledger.n)
        self.call.swap_run(None)
        for listener in self.model.listeners:
            listener.closed(self, run)
        self.call.note_final(whole, run.padding)

    # -- the cache ---------------------------------------------------------------------------------------------------

    @staticmethod
    def cache_layer(block: BlockSurgery, cache: Any) -> TokenCacheLayer | None:
        """Our layer of a block in a cache."""
        layer = cache.layers[block.layer_idx] if cache is not None and block.layer_idx in range(len(cache.layers)) else None
        return layer if isinstance(layer, TokenCacheLayer) else None

    def _adopt(self, args: tuple, kwargs: dict) -> None:
        """Let our layers hold the cache from the first token on."""
        cache = find_cache((*args, *kwargs.values()))
        indices = [block.layer_idx for block in self.blocks.values() if block.layer_idx is not None]
        if cache is not None and indices:
            adopt(cache, max(indices))


def ran_for(method: Method, site: Site) -> bool:
    """Whether a block ran, and for a method that needs it with a cache, so that there is something to observe."""
    return site.local is not None and (site.layer is not None or not handler_of(method).needs_cache)
