"""What one call of the model makes of a stream, and what a block needs to be run again behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..model.arguments import find_padding, find_views
from ..tokens.altered import altered
from ..tokens.ledger import TokenLedger
from .call import BlockCall
from .context import ForwardContext
from .run import Memory, Span, StreamRun


class StreamCall:
    """One call of the model, as one of its streams sees it. It is gone when the call is over.

    Attributes:
        context: What the call brings.
        run: The pass that is under way.
        final: The stream's last hidden states (b n d), if they are kept, and which of them are real.
        held: What a handler keeps of the call, by a key of its own.
    """

    def __init__(self, context: ForwardContext, keeps_final: bool = False):
        self.context, self.keeps_final = context, keeps_final
        self.run: StreamRun | None = None
        self.final: tuple[Tensor, Tensor | None] | None = None
        self.held: dict[Any, Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamCall:
        return StreamCall(ForwardContext())

    def __reduce__(self) -> tuple:
        return StreamCall, (ForwardContext(),)

    def swap_run(self, run: StreamRun | None) -> StreamRun | None:
        """Another pass is under way; returns the one before."""
        before, self.run = self.run, run
        return before

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
        kept: Whether the tensor that came was what the model had got from the block before.
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
        """What a block is about to get."""
        return cls(run.context, run.ledger, run.inside, call.raw is run.given, dict(run.memory.tokens), run.spans)

    def begin(self, call: BlockCall) -> StreamRun:
        """The pass in which the block is run again."""
        memory = Memory()
        memory.hold(dict(self.tokens))
        real, first = find_padding(call.arguments, self.ledger)
        return StreamRun(
            self.context,
            self.ledger,
            real,
            first,
            memory,
            call.index - 1,
            apart=None if call.stream.causal else find_views(call.arguments, self.ledger, real),
            inside=self.inside,
            given=call.raw if self.kept else None,
            spans=self.spans,
        )
