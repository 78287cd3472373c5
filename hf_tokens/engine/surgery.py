"""The surgery of one stream: its blocks, what the methods in them mean for it, the call that is under way, and who listens to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..model.streams import Stream
from ..roles.base import Method
from ..tokens.altered import altered
from .context import ForwardContext, State
from .plan import StreamPlan
from .results import Replays, StreamCall, in_backward
from .run import StreamRun

if TYPE_CHECKING:
    from .block import BlockSurgery
    from .model import ModelSurgery


COUNT = "num_hidden_layers"  # the name by which any config of transformers counts the blocks


class StreamSurgery:
    """The surgery of one stream: its blocks, and the pass that is under way."""

    def __init__(self, model: ModelSurgery, stream: Stream, special: tuple[int, int], holders: list[nn.Module]):
        self.model, self.stream = model, stream
        self.prefix, self.suffix = special  # special tokens in front and behind
        self._counted = getattr(stream.config, COUNT, None) == len(stream)  # whether the config counts these blocks
        self.holders = holders  # the modules around the blocks, the model first
        self.blocks: dict[int, BlockSurgery] = {}
        self.plan = StreamPlan(exit=len(stream))
        self.call = StreamCall(ForwardContext())
        self.replays: Replays = Replays()
        self._states: dict[type, Any] = {}
        model.streams.append(self)

    @property
    def depth(self) -> int:
        """Number of blocks that the model runs: where it exits early, its config counts fewer for a while."""
        return min(len(self.stream), getattr(self.stream.config, COUNT)) if self._counted else len(self.stream)

    def state(self, kind: type[State]) -> State:
        """What a handler keeps of this stream, made when it is first needed."""
        if kind not in self._states:
            self._states[kind] = kind()
        return self._states[kind]

    def methods(self) -> Iterator[Method]:
        """Every active method of the stream."""
        for block in self.blocks.values():
            yield from block.plan.acting

    @property
    def shifts(self) -> bool:
        """Whether a method of the blocks so far, acting or not, moves tokens on to other places."""
        stacks = (stack for block in self.blocks.values() for stack in block.hf_tokens_methods.values())
        return any(method.shifts for stack in stacks for method in stack.values())

    def add(self, block: BlockSurgery) -> None:
        """Take in a block, and announce it to the worlds."""
        self.blocks[block.index] = block
        for world in self.model.worlds:
            world.block_added(block)

    def refresh(self) -> None:
        """Note what the methods that act mean for the stream."""
        shares = any(block.shares_keys for block in self.blocks.values())
        self.plan = StreamPlan.of(list(self.methods()), self.stream.causal, len(self.stream), shares)
        self.model.refresh()

    def begin(self, context: ForwardContext, keeps_final: bool = False) -> None:
        """The model is called."""
        self.call = StreamCall(context, keeps_final)

    def resume(self, call: StreamCall) -> None:
        """Go on with a call in which another one was made."""
        self.call = call

    @contextlib.contextmanager
    def stopping_after(self, index: int) -> Iterator[None]:
        """The blocks behind this one do not run for a while."""
        self.plan = altered(self.plan, exit=min(self.plan.exit, index + 1))
        try:
            yield
        finally:
            self.refresh()

    @property
    def examines(self) -> bool:
        """Whether a listener has the methods examined, so that nothing is changed."""
        return any(listener.examines for listener in self.model.listeners)

    def report(self, block: BlockSurgery, method: Method, finding: Any) -> None:
        """Pass on to the listeners what a method returned when it was examined."""
        for listener in self.model.listeners:
            listener.examined(block, method, finding)

    @property
    def heard(self) -> bool:
        """Whether anyone listens; a block that is run again in a backward pass has been heard before."""
        return bool(self.model.listeners) and not torch.compiler.is_compiling() and not in_backward()

    def count(self, block: BlockSurgery, tokens: int, part: str | None = None) -> None:
        """So many tokens were computed by a block, or by a part of it."""
        for listener in self.model.listeners:
            listener.computed(block, part, tokens)

    def acted(self, block: BlockSurgery, method: Method, left: Tensor | int, of: int) -> None:
        """A method acted in a block: so many of so many of what its role counts. Called where `heard`."""
        for listener in self.model.listeners:
            listener.acted(block, method, left, of)


class Listener:
    """Called for what happens in a model, as long as it is subscribed by `ModelSurgery.listening`; it does nothing by default."""

    examines = False  # whether the methods are examined, and change nothing
    scores = False  # whether token scorers are called for it

    def computed(self, block: BlockSurgery, part: str | None, tokens: int) -> None:
        """A block, or a part of it, computed so many tokens."""

    def acted(self, block: BlockSurgery, method: Method, left: Tensor | int, of: int) -> None:
        """A method acted in a block: so many of so many of what its role counts (`Method.counts`)."""

    def routed(self, block: BlockSurgery, runs: Tensor) -> None:
        """Which of the tokens at hand run the block, (b m) bool."""

    def passed(self, block: BlockSurgery, run: StreamRun) -> None:
        """A block has run, with methods around it; the run's ledger says which tokens are left."""

    def judged(self, method: Method, loss: Tensor) -> None:
        """A method has a loss of the forward that ends, that of all its blocks."""

    def lost(self, own: Tensor, whole: Tensor) -> None:
        """The loss of a forward: the model's own, and what stands in its place."""

    def examined(self, block: BlockSurgery, method: Method, finding: Any) -> None:
        """A method was examined in a block, with this result."""

    def scored(self, method: Method, scores: Tensor) -> None:
        """A scorer said what each token is worth, (b m)."""

    def closed(self, surgery: StreamSurgery, run: StreamRun) -> None:
        """A pass through a stream is over."""
