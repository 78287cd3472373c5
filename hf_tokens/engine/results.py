"""What one call of the model is, for the model and for a stream, and what a block needs to be run again behind it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..model.arguments import find_padding, find_views
from ..tokens.altered import altered
from ..tokens.ledger import TokenLedger
from .call import BlockCall
from .context import ForwardContext
from .loss import LossReplacement
from .run import Memory, Span, StreamRun

if TYPE_CHECKING:
    from .block import BlockSurgery
    from .model import ModelSurgery

Held = TypeVar("Held")


class World:
    """Another library's part in the calls of a model: its denoising steps, its trainer. It takes no part by default."""

    def before_model(self, model: ModelSurgery, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Fields of the call's `ForwardContext`."""
        return {}

    def after_model(self, output: Any) -> None: ...
    def abandon(self) -> None: ...
    def block_added(self, block: BlockSurgery) -> None: ...
    def training_begins(self, model: ModelSurgery) -> None: ...
    def evaluation_begins(self, model: ModelSurgery) -> None: ...
    def detach(self) -> None: ...


class ModelCall:
    """One call of the model, gone when it is over.

    Attributes:
        context: What it brings.
        read: What the head read, or the model below the head returned, where an objective names it.
        replacement: A loss that takes the place of the model's own.
        held: What a handler keeps of the call, by a key of its own.
    """

    def __init__(self, model: ModelSurgery, context: ForwardContext):
        self.model, self.context = model, context
        self.read: dict[str, Tensor] = {}
        self.replacement: LossReplacement | None = None
        self.held: dict[Any, Any] = {}

    def replace_arguments(self, arguments: dict[str, Any]) -> None:
        """Let the model be given others than it was called with."""
        self.context = altered(self.context, arguments=arguments)

    def replace_loss(self, replacement: LossReplacement | None) -> None:
        """Let a loss take the place of the model's own."""
        self.replacement = replacement


class StreamCall:
    """One call of the model, as one of its streams sees it. It is gone when the call is over.

    Attributes:
        context: What the call brings.
        run: The pass that is under way.
        final: The stream's last hidden states (b n d), if they are kept, and which of them are real.
        exits: Those behind each block, by its index; None if they are not kept.
        held: What a handler keeps of the call, by a key of its own.
    """

    def __init__(self, context: ForwardContext, keeps_final: bool = False):
        self.context, self.keeps_final = context, keeps_final
        self.run: StreamRun | None = None
        self.final: tuple[Tensor, Tensor | None] | None = None
        self.exits: dict[int, Tensor] | None = None
        self._learns = False
        self.held: dict[Any, Any] = {}

    def __reduce__(self) -> tuple:
        return StreamCall, (ForwardContext(),)

    def swap_run(self, run: StreamRun | None) -> StreamRun | None:
        """Another pass is under way; returns the one before."""
        before, self.run = self.run, run
        return before

    def keep_exits(self) -> None:
        """Keep the hidden states behind each block."""
        self.exits, self._learns = {}, torch.is_grad_enabled()

    def note_exit(self, block: BlockSurgery, output: Any) -> None:
        """A block has returned: note its hidden states, if they are kept.

        Raises:
            UnsupportedError: They have no graph, for its checkpoint runs it without one at first.
        """
        if self.exits is None:
            return
        if self._learns and not torch.is_grad_enabled():
            rule = "Where a loss is of the states behind inner blocks, gradient checkpointing must be non-reentrant"
            raise UnsupportedError(explain(rule, f"a reentrant one around {block.path}", "Use non-reentrant checkpointing."))
        self.exits[block.index] = block.surgery.stream.read(block.index, output)

    def see_picture(self, picture: tuple[int, int] | None) -> None:
        """The stream is about to be given pictures of this height and width."""
        self.context = altered(self.context, picture=picture)

    def note_final(self, hidden: Tensor, real: Tensor | None) -> None:
        """The stream has ended with these hidden states."""
        if self.keeps_final:
            self.final = hidden, real


@dataclass(frozen=True)
class Entry:
    """What a block needs to be run again in a backward pass.

    Attributes:
        context: The call of the model.
        ledger: The tokens that it got.
        inside: Those that were left, (b m d).
        kept: Whether the tensor that it was given is what the block before returned.
        tokens: What the memory held of them.
        spans: The spans of blocks that it lies in.
    """

    context: ForwardContext
    ledger: TokenLedger
    inside: Tensor | None
    kept: bool
    tokens: dict[str, Tensor]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, run: StreamRun, call: BlockCall) -> Entry:
        """What a block is about to be given."""
        return cls(run.context, run.ledger, run.inside, call.raw is run.given, dict(run.memory.tokens), run.spans)

    def begin(self, call: BlockCall) -> StreamRun:
        """The pass in which the block is run again."""
        memory = Memory()
        memory.hold(dict(self.tokens))
        real, first = find_padding(call.arguments, self.ledger, self.context.gives_mask)
        apart = None if call.stream.causal else find_views(call.arguments, self.ledger, real)
        known = dict(apart=apart, inside=self.inside, given=call.raw if self.kept else None, spans=self.spans)
        return StreamRun(self.context, self.ledger, real, first, memory, call.index - 1, **known)


def in_backward() -> bool:
    """Whether the code runs for a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Replays(Generic[Held]):
    """For each block and tensor that it was given, what it needs to be run again. What a graph no longer holds will not come again."""

    def __init__(self):
        self._held: dict[int, list[tuple[weakref.ref, Held]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": {}}

    def hold(self, block: BlockSurgery, hidden: Tensor, make: Callable[[], Held]) -> None:
        """Hold it where the model checkpoints the block as a whole."""
        if torch.is_grad_enabled() and block.checkpointed_outside:
            live = [(ref, value) for ref, value in self._held.get(block.index, ()) if ref() is not None]
            self._held[block.index] = [*live, (weakref.ref(hidden), make())]

    def known(self, block: BlockSurgery) -> bool:
        """Whether anything is held for a block."""
        return block.index in self._held

    def find(self, block: BlockSurgery, hidden: Tensor) -> Held | None:
        """What was held first for this tensor; None if nothing was."""
        return next((value for ref, value in self._held.get(block.index, ()) if ref() is hidden), None)

    def find_last(self, block: BlockSurgery, hidden: Tensor) -> Held:
        """What was held last for it; refused where nothing was."""
        values = [value for ref, value in self._held.get(block.index, ()) if ref() is hidden]
        if not values:
            raise other_tensors(block)
        return values[-1]

    @property
    def counts(self) -> dict[int, int]:
        """How much is held for each block, by its index."""
        return {index: len(values) for index, values in self._held.items()}


def other_tensors(block: BlockSurgery) -> UnsupportedError:
    """The error for a block that is run again on tensors that it was not given."""
    rule = "Gradient checkpointing of whole blocks must hand the block the same tensors again"
    return UnsupportedError(explain(rule, f"other ones at {block.path}", "Use non-reentrant checkpointing."))
