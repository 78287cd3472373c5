"""One pass through a stream: methods are called around each block, which runs on the tokens that are left; the model gets back all of them.

Outside of a block nothing changes: all that reads its output (the next norm, a skip connection, `output_hidden_states`) gets the whole
sequence. The tokens that are left travel from block to block beside it. The life of a block, each phase called for the methods in the order
of their stacks (`handler.py` lists what a phase is for):

    run a block:
        arrive                                  in the first block of the stream
        no method is called: run it as it came
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

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import UnsupportedError, explain
from ..kv.adopt import adopt, find_cache
from ..kv.static import front, is_static
from ..model.arguments import BETWEEN
from .call import BlockCall
from .handler import handler_of
from .opening import open_pass
from .passage import ask_behind, cache_layer, refuse_other_width, run_block
from .plan import PassPlan
from .results import Entry, in_backward, other_tensors
from .run import Site, StreamRun
from .shortcuts import changes_anything, is_quiet, run_as_it_came, run_quietly

if TYPE_CHECKING:
    from .block import BlockSurgery
    from .surgery import StreamSurgery


def run_in_stream(block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
    """A block's forward, as the model calls it."""
    around = block.surgery.model.around[:1]
    output = around[0].around(block, run_pass, args, kwargs) if around else run_pass(block, args, kwargs)
    block.surgery.call.note_exit(block, output)
    return output


def run_pass(block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
    """The short ways first: where nothing is to be done around a block, it runs as it came."""
    surgery = block.surgery
    run = surgery.call.run
    later = run is not None and not run.prefill and block.index > run.at
    pass_plan = block.plan.decode if later else block.plan.prompt
    if block.index == 0:
        if surgery.plan.moves:
            adopt_cache(surgery, args, kwargs)
        if not in_backward():
            for handler, method in block.plan.always.of("arrive"):
                handler.arrive(method, block, args, kwargs)
    replayed = None
    if in_backward() and surgery.replays.known(block):
        replayed = surgery.replays.find(block, surgery.stream.bind(block.index, args, kwargs))
    if replayed is None and not changes_anything(block, pass_plan, args, kwargs):
        return run_as_it_came(block, args, kwargs)
    if in_backward():
        return run_again(block, BlockCall(surgery.stream, block.index, block.facts, args, kwargs), replayed)
    try:
        layer = cache_layer(block, find_cache((*args, *kwargs.values()))) if later else None
        if layer is not None and is_quiet(block, pass_plan, layer, args, kwargs):
            return run_quietly(block, layer, args, kwargs)
        return walk(block, BlockCall(surgery.stream, block.index, block.facts, args, kwargs))
    except BaseException:
        abandon_pass(block)
        raise


def run_again(block: BlockSurgery, call: BlockCall, known: Any) -> Any:
    """A checkpointed block is run again in the backward pass: with the ledger it had."""
    if known is None:
        raise other_tensors(block)
    surgery = block.surgery
    before = surgery.call.swap_run(known.begin(call))
    try:
        return walk(block, call, replaying=True)
    finally:
        surgery.call.swap_run(before)


def walk(block: BlockSurgery, call: BlockCall, replaying: bool = False) -> Any:
    """The phases of a block, one after the other."""
    surgery, run = block.surgery, enter_pass(block, call)
    pass_plan = block.pass_plan(run)
    if not replaying:
        surgery.replays.hold(block, call.raw, lambda: Entry.of(run, call))
    if surgery.plan.sees_all:
        call.see_all(run.ledger, run.padding)
    layer = cache_layer(block, call.cache) if run.layers and not block.drops_cache else None
    site = Site(surgery, block, run, tokens_left(call, run), layer)
    for handler, method in pass_plan.of("before"):
        handler.before(method, site)
    site.enter()
    output = run_block(pass_plan, call, site)
    whole = restored(pass_plan, site, call.hidden)
    left = whole
    for handler, method in pass_plan.of("leave"):
        left = handler.leave(method, site, left, replaying)
    block.forget()
    if layer is not None:
        layer.release()
    if surgery.heard:
        for listener in surgery.model.listeners:
            listener.passed(block, run)
    given = call.pack(left)
    run.passed(site.hidden, given)
    if block.index == surgery.depth - 1 and not replaying:
        close_pass(site, whole)
    return call.write(output, given)


def enter_pass(block: BlockSurgery, call: BlockCall) -> StreamRun:
    """The pass that a block is called in: that of the block before, or a new one."""
    surgery = block.surgery
    run = surgery.call.run
    if block.index >= surgery.depth:
        rule = f"The model runs as many blocks of the stream {surgery.stream.name!r} as its config counts"
        got = f"{surgery.depth} by the config, and a call of {block.path}"
        raise UnsupportedError(explain(rule, got, "Leave out `assistant_early_exit`, or choose another model."))
    if run is None or block.index <= run.at:
        run = open_pass(surgery, surgery.call.context, block, call)
        surgery.call.swap_run(run)
    if call.hidden.shape[1] != run.ledger.n:
        rule = f"The model may not change the number of tokens inside the stream {surgery.stream.name!r}"
        got = f"{call.hidden.shape[1]} where {run.ledger.n} were due, at {block.path}"
        raise UnsupportedError(explain(rule, got, "Act on the blocks behind that place, or on another stream."))
    run.enter(block.index, call.context)
    return run


def tokens_left(call: BlockCall, run: StreamRun) -> Tensor:
    """The tokens as the last block left them, unless the sequence was changed outside since."""
    if run.ledger.untouched:
        return call.hidden
    if run.spans and call.raw is not run.given:
        rule = "Between the blocks where a method lets tokens stand together, nothing but the blocks may change them"
        got = f"other tokens than the block before gave, at {call.stream.paths[call.index]}"
        raise UnsupportedError(explain(rule, got, "Choose other layers, or non-reentrant checkpointing."))
    return run.inside if call.raw is run.given else run.ledger.cut(call.hidden, run.inside)


def restored(pass_plan: PassPlan, site: Site, given: Tensor) -> Tensor:
    """Call the methods behind a block; returns the whole sequence (b n d), where a token that is gone keeps its row of `given`.

    One that vanishes here has what the block made of it, which is put in its place only if there is such a one.
    """
    run, index, ledger, hidden = site.run, site.block.index, site.run.ledger, site.hidden
    spanned = bool(run.spans)
    given = run.surface(hidden, given, index) if spanned else given
    ask_behind(pass_plan, site)
    for handler, method in reversed(pass_plan.of("end")):
        handler.end(method, site)
    if run.ledger is not ledger:
        refuse_other_width(site.block, given, site.hidden)
    elif spanned:
        return given
    if not spanned and run.ledger.losses > ledger.losses:
        given = hidden if ledger.untouched else ledger.restore(hidden, given)
    return run.surface(site.hidden, given, index)


def close_pass(site: Site, whole: Tensor) -> None:
    """The pass is over."""
    surgery, run = site.surgery, site.run
    for handler, method in surgery.plan.closing:
        handler.close(method, site)
    for layer in run.layers:
        layer.see(run.ledger.start + run.ledger.n)
    surgery.call.swap_run(None)
    for listener in surgery.model.listeners:
        listener.closed(surgery, run)
    surgery.call.note_final(whole, run.padding)


def abandon_pass(block: BlockSurgery) -> None:
    """A block has raised: nothing of the pass stays."""
    run = block.surgery.call.swap_run(None)
    block.forget()
    for layer in () if run is None else run.layers:
        layer.release()


def reads_by_mask(surgery: StreamSurgery, kwargs: dict) -> bool:
    """Whether nothing but a mask tells the blocks of the keys in a cache: no bias by their places."""
    biased = any(block.facts.bias_maker is not None for block in surgery.blocks.values())
    return not biased and all(value is None or "mask" in name or not BETWEEN.search(name) for name, value in kwargs.items())


def adopt_cache(surgery: StreamSurgery, args: tuple, kwargs: dict) -> None:
    """Let our layers hold the cache from the first token on."""
    cache = find_cache((*args, *kwargs.values()))
    indices = [block.layer_idx for i, block in surgery.blocks.items() if block.layer_idx is not None and i < surgery.depth]
    if cache is None or not indices:
        return
    if any(block.facts.several_slots for block in surgery.blocks.values()):
        check_slots(surgery)
    if surgery.plan.fronts and is_static(cache) and reads_by_mask(surgery, kwargs):
        front(cache, indices)
    else:
        adopt(cache, max(indices), surgery.stream.config)


def check_slots(surgery: StreamSurgery) -> None:
    """Refuse to keep books of one slot for a block with several; what is there for one block only is there for all its attentions."""
    inserts = all({*handler_of(method).phases(method)} <= {"insert", "last"} for method in surgery.plan.methods)
    if not inserts or any(block.facts.moves_slots for block in surgery.blocks.values()):
        rule = "A surgery that changes the number of tokens needs blocks with one slot of the cache each"
        got, remedy = f"several in {type(surgery.stream.blocks[0]).__name__}", "Pass `use_cache=False`, or choose another model."
        raise UnsupportedError(explain(rule, got, remedy))
