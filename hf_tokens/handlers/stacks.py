"""The stack of a feature cache: the blocks of a stream that it acts on, of which it keeps what they added together.

Whether they run is decided once in a call of the model, for all streams: behind the first block where that `leads`, which then always runs;
inside of it, where the method names what its attention is given; else in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.block import BlockSurgery
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.signatures import bound_arguments
from ..roles.feature_cache import FeatureCache
from .kept_features import Feature, check_alone, kept_under, pack_block, parts_of_output, reuse, store_of, tell_computed
from .sublayers import Sublayer

ATTENTION_INPUT = "attention_input"  # the signal that is known inside of the first block


class StackReused(Exception):
    """The first block need not go on: the stack is reused."""


@dataclass
class StackCall:
    """Where a call of the model is.

    Attributes:
        reuses: Whether the method reuses what it kept; None where that is not decided.
        whole: Whether a gradient is wanted, so that all is computed.
        passing: Whether the blocks of this stream are passed by.
        asking: The first block as it came, while it is to be decided inside of it.
        begun: What stood in front of the stack, tokens and second sequence.
        left: The tokens as the block before left them.
    """

    reuses: bool | None = None
    whole: bool = False
    passing: bool = False
    asking: tuple[Tensor, dict[str, Any]] | None = None
    begun: tuple[Tensor, Tensor | None] | None = None
    left: Tensor | None = None


def stack_call(method: FeatureCache, block: BlockSurgery) -> StackCall:
    """Where this call of the model is; behind it, where a checkpoint runs a block again, all is computed."""
    call = block.surgery.model.call
    return StackCall(whole=True) if call is None else call.held.setdefault(("stack", method.key), StackCall())


def run_stack(method: FeatureCache, block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
    """A block of the stack: its forward; where the stack is reused its tokens as they came, in the first with what all added."""
    stream, index = block.surgery.stream, block.index
    hidden, context = stream.bind(index, args, kwargs), stream.bind_context(index, args, kwargs)
    state, decides = stack_call(method, block), method.dims.place == 0
    if decides and torch.is_grad_enabled():
        state.whole |= hidden.requires_grad or any(p.requires_grad for p in block.base.parameters())
    if state.whole:
        return block.inner(*args, **kwargs)
    check_alone(method, block)
    check_order(method, block, state, hidden)
    run, seen = partial(block.inner, *args, **kwargs), seen_in_front(method, block, args, kwargs) if decides else {}
    if decides and method.leads:
        return run_leader(method, block, state, run, (hidden, context), seen)
    if decides and ATTENTION_INPUT in method.asks:
        state.asking = hidden, seen
    elif decides:
        decide(method, block, state, hidden, seen)
    if method.is_first_block:
        begin(method, block, state, hidden, context)
    if state.passing:
        tell_computed(method, block, hidden, 0)
        return pass_by(method, block, state, hidden, context)
    try:
        output = run()
    except StackReused:
        begin(method, block, state, hidden, context)
        tell_computed(method, block, hidden, 0)
        return pass_by(method, block, state, hidden, context)
    tell_computed(method, block, hidden, hidden[..., 0].numel())
    if state.asking is not None:
        rule = "What a block's attention is given is read off a call of it"
        raise UnsupportedError(explain(rule, f"{block.path} without one", "Choose other layers or another model."))
    note(method, block, state, output, hidden)
    return output


def seen_in_front(method: FeatureCache, block: BlockSurgery, args: tuple, kwargs: dict) -> dict[str, Any]:
    """What the first block is given, as far as the method names it."""
    seen = {"entered": block.surgery.stream.bind(block.index, args, kwargs)}
    if "time_embedding" not in method.asks:
        return seen
    embedding = bound_arguments(block.module, args, kwargs).get(families.TIME_EMBEDDING)
    if not isinstance(embedding, Tensor):
        rule, got = f"What a block is given of the timestep is its `{families.TIME_EMBEDDING}`", type(block.module).__name__
        raise UnsupportedError(explain(rule, f"{got} without it", "Choose another model or method."))
    return seen | {"time_embedding": embedding}


def run_leader(
    method: FeatureCache, block: BlockSurgery, state: StackCall, run: Callable, given: tuple[Tensor, Tensor | None], seen: dict[str, Any]
) -> Any:
    """The first block where it always runs, and it is decided behind it."""
    output = run()
    returned, beside = note_form(method, block, output, given[0])
    decide(method, block, state, returned, seen)
    begin(method, block, state, returned, beside)
    if state.passing:
        return pass_by(method, block, state, returned, beside, ran=True)
    note(method, block, state, output, given[0])
    return output


def note_form(method: FeatureCache, block: BlockSurgery, output: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """Keep the form of a block's results; returns its tokens and its second sequence."""
    returned, beside, form = parts_of_output(block, output, hidden)
    store_of(method, block)["form"] = form, beside is not None
    return returned, beside


def note(method: FeatureCache, block: BlockSurgery, state: StackCall, output: Any, hidden: Tensor) -> None:
    """A block of the stack has run: keep the form of its results, and behind the last what all added."""
    returned, beside = note_form(method, block, output, hidden)
    state.left = returned
    if method.dims.is_last_block:
        before, second = state.begun
        second = None if beside is None or second is None else beside - second
        store_of_stack(method, block, hidden)["added"] = Feature.fresh(returned - before, second)


def decide(method: FeatureCache, block: BlockSurgery, state: StackCall, hidden: Tensor, seen: dict[str, Any]) -> None:
    """Ask the method."""
    chosen = reuse(method, block, hidden, None, "stack", seen)
    if chosen is not None and chosen.shape[1]:
        rule = "A feature cache of a stack computes all of it, or nothing"
        raise UnsupportedError(explain(rule, f"{chosen.shape[1]} of {hidden.shape[1]} tokens", "Return None, or indices (b 0)."))
    state.reuses = chosen is not None


def decides_inside(method: FeatureCache, sublayer: Sublayer) -> bool:
    """Whether it is to be decided in front of this attention."""
    call = sublayer.block.surgery.model.call
    state = None if call is None else call.held.get(("stack", method.key))
    return state is not None and state.asking is not None


def decide_inside(method: FeatureCache, sublayer: Sublayer, hidden: Tensor, arguments: dict[str, Any]) -> Any:
    """The first block's attention, if it is decided that the stack runs."""
    block = sublayer.block
    state = stack_call(method, block)
    (entered, seen), state.asking = state.asking, None
    decide(method, block, state, entered, {**seen, ATTENTION_INPUT: hidden})
    if state.reuses and "added" in store_of_stack(method, block, entered):
        raise StackReused
    return sublayer.inner(hidden, **arguments)


def begin(method: FeatureCache, block: BlockSurgery, state: StackCall, hidden: Tensor, context: Tensor | None) -> None:
    """The first block of a stream: note what it is given, and whether what is kept can be added to it."""
    kept = store_of_stack(method, block, hidden).get("added")
    state.passing = bool(state.reuses) and kept is not None and kept.fits(hidden, context)
    state.begun = hidden, context


def pass_by(method: FeatureCache, block: BlockSurgery, state: StackCall, hidden: Tensor, context: Tensor | None, ran: bool = False) -> Any:
    """What a block returns that is passed by."""
    if method.is_first_block:
        kept = store_of_stack(method, block, hidden)["added"]
        hidden, context = hidden + kept.output, context if kept.context is None else context + kept.context
    form, joint = store_of(method, block)["form"]
    block.tap.site.within["reused"] = not ran
    state.left = hidden
    return pack_block(block, form, hidden, context if joint else None)


def check_order(method: FeatureCache, block: BlockSurgery, state: StackCall, hidden: Tensor) -> None:
    """Refuse blocks that run in another order, or between which something else changes the tokens."""
    if method.dims.place and state.reuses is None:
        rule, got = "Blocks that are reused together begin with the first of them in the model", f"{block.path} in front of it"
        raise UnsupportedError(explain(rule, got, "Name the stream, or choose other layers."))
    if not method.is_first_block and (state.left is None or state.left.data_ptr() != hidden.data_ptr()):
        rule, got = "Between blocks that are reused together nothing changes the tokens", f"others in front of {block.path}"
        raise UnsupportedError(explain(rule, got, "Leave out what is added there (a ControlNet), or choose other layers."))


def store_of_stack(method: FeatureCache, block: BlockSurgery, hidden: Tensor) -> dict:
    """What is kept of a stack for tokens of this shape."""
    return kept_under(block, (method.key, "stack", *hidden.shape[:2]))
