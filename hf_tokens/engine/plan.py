"""What follows from the set of methods that act: which are called in which phase of a block, and what they mean for the stream. Made anew
when adapters change."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..roles.base import Method
from ..roles.signals import PICTURED, SCORED
from .handler import Handler, handler_of
from .tap import taps

HandledMethods = tuple[tuple[Handler, Method], ...]


@dataclass(frozen=True)
class PassPlan:
    """The methods that are called in one kind of pass, by phase, in the order of the adapters and of their stacks.

    Attributes:
        methods: All of them.
        phases: Those of a phase, each with its handler.
        quiet: Whether none has anything to do in front of a block or in it, where it is the pass of a generated token.
    """

    methods: tuple[Method, ...] = ()
    phases: dict[str, HandledMethods] = field(default_factory=dict)
    quiet: bool = True

    def of(self, phase: str) -> HandledMethods:
        """Those of a phase, each with its handler."""
        return self.phases.get(phase, ())

    @classmethod
    def among(cls, methods: Iterable[Method]) -> PassPlan:
        """The plan for these methods."""
        methods, phases = tuple(methods), {}
        for method in methods:
            handler = handler_of(method)
            for phase in handler.phases(method):
                phases.setdefault(phase, []).append((handler, method))
        quiet = all(handler_of(method).quiet(method) for method in methods)
        return cls(methods, {phase: tuple(handled) for phase, handled in phases.items()}, quiet)


@dataclass(frozen=True)
class BlockPlan:
    """The methods of one block.

    Attributes:
        acting: All that act in it, in the order of the adapters and of their stacks.
        prompt: Those that are called in the pass of a prompt.
        decode: Those that are called in the pass of a generated token.
        always: All that act, by phase: for what does not depend on the pass.
        sums: Whether one of those that are called at a prompt reads what each key gets from all of its queries.
        taps, taps_decode: Whether the attention call is to be noted in such passes.
        attends: The method that decides how the attention call reads its keys.
        needs_scores: Whether one may need the keys of the attention call, which then cannot read its cache by itself.
    """

    acting: tuple[Method, ...] = ()
    prompt: PassPlan = PassPlan()
    decode: PassPlan = PassPlan()
    always: PassPlan = PassPlan()
    sums: bool = False
    taps: bool = False
    taps_decode: bool = False
    attends: Method | None = None
    needs_scores: bool = False

    @classmethod
    def of(cls, acting: list[Method]) -> BlockPlan:
        """The plan for these methods."""
        prompt = [method for method in acting if method.in_block]
        decode = [method for method in prompt if method.decodes or handler_of(method).notes_later(method)]
        later = [method for method in acting if method.decodes or handler_of(method).notes_later(method)]
        return cls(
            acting=tuple(acting),
            prompt=PassPlan.among(prompt),
            decode=PassPlan.among(decode),
            always=PassPlan.among(acting),
            sums=any(method.sums_scores or SCORED in method.asks for method in prompt),
            taps=any(taps(method, method.asks) for method in acting),
            taps_decode=any(taps(method, method.asks_later) for method in later),
            attends=next((method for method in acting if method.words.get("attend")), None),
            needs_scores=any(handler_of(method).needs_scores(method) for method in acting),
        )


@dataclass(frozen=True)
class StreamPlan:
    """What the methods of a stream mean for it as a whole.

    Attributes:
        methods: All that act in it.
        moves: Whether any changes the number of tokens of a causal stream, or remembers some.
        remembers: Whether the sequence remembers its visual tokens.
        fronts: Whether all that is done in its blocks is to put tokens in front of a prompt, which see none of it.
        sees_all: Whether its blocks run without their causal mask.
        exit: Number of blocks that run.
        shares_keys: Whether a block reads the keys of another one.
        last: Those that put tokens into the last block that runs, wherever that is.
        closing: Those that are called when a pass is over.
    """

    methods: tuple[Method, ...] = ()
    moves: bool = False
    remembers: bool = False
    fronts: bool = False
    sees_all: bool = False
    exit: int = 0
    shares_keys: bool = False
    last: HandledMethods = ()
    closing: HandledMethods = ()

    @classmethod
    def of(cls, methods: list[Method], causal: bool, length: int, shares_keys: bool) -> StreamPlan:
        """The plan for these methods in a stream of so many blocks."""
        remembers, pass_plan = any(PICTURED in method.asks for method in methods), PassPlan.among(methods)
        moves = causal and (remembers or any(method.moves_tokens for method in methods))
        return cls(
            methods=tuple(methods),
            moves=moves,
            remembers=remembers,
            fronts=moves and all(handler_of(method).fronts(method) for method in methods if method.in_block),
            sees_all=causal and any(method.sees_all for method in methods),
            exit=min((method.exit for method in methods if method.exit is not None), default=length),
            shares_keys=shares_keys,
            last=pass_plan.of("last"),
            closing=pass_plan.of("close"),
        )
