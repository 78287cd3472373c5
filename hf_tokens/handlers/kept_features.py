"""What a feature cache keeps from step to step: of sublayers and of whole blocks, for each denoising context."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..engine.block import BlockSurgery
from ..errors import UnsupportedError, explain
from ..model.pictures import grid
from ..roles.feature_cache import FeatureCache
from .sublayers import Sublayer

Form = tuple[type, int]  # of results: their class and their number


@dataclass
class Feature:
    """What a sublayer returned, or what a block added, and how many steps ago each token of it was computed."""

    output: Tensor  # b n d
    age: Tensor  # b n
    context: Tensor | None = None  # what a block added to a second sequence, b c d
    form: Form | None = None  # of a block's results, where they are several

    def fits(self, hidden: Tensor, context: Tensor | None) -> bool:
        """Whether it can be added to these tokens."""
        return self.output.shape == hidden.shape and (self.context is None or context is not None and self.context.shape == context.shape)

    @classmethod
    def fresh(cls, output: Tensor, context: Tensor | None = None, form: Form | None = None) -> Feature:
        """A feature that was computed just now."""
        return cls(output, torch.zeros(output.shape[:2], dtype=torch.long, device=output.device), context, form)


class Features(dict):
    """What a stream keeps from step to step: denoising context, its run last -> what it is of -> name -> value."""

    def __init__(self):
        super().__init__()
        self._ran: weakref.WeakKeyDictionary[Sublayer, weakref.ref] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return Features, ()

    def enter(self, run: int, begins: bool) -> None:
        """A step of a run follows: forget those that were within it, and what it had itself where it begins anew."""
        for context in [context for context in self if context[-1] > run or begins and context[-1] == run]:
            del self[context]

    def ran(self, sublayer: Sublayer, run: Any) -> bool:
        """Note that a sublayer runs in a pass; returns whether it did so before."""
        before, self._ran[sublayer] = self._ran.get(sublayer), weakref.ref(run)
        return before is not None and before() is run


def added_by_block(block: BlockSurgery, output: Any, hidden: Tensor, context: Tensor | None) -> Feature:
    """What a block added to its tokens, and to the second sequence that it carries along."""
    returned, beside, form = parts_of_output(block, output, hidden)
    return Feature.fresh(returned - hidden, None if beside is None else beside - context, form)


def parts_of_output(block: BlockSurgery, output: Any, hidden: Tensor) -> tuple[Tensor, Tensor | None, Form | None]:
    """A block's tokens and its second sequence among its results, and the form of these."""
    stream, index = block.surgery.stream, block.index
    returned = stream.read(index, output)
    if returned.shape != hidden.shape or hidden.dim() != 3:
        rule = "A block can be reused if it returns as many tokens as it got, as (batch, tokens, features)"
        raise UnsupportedError(explain(rule, f"{tuple(hidden.shape)} in and {tuple(returned.shape)} out", "Choose other layers."))
    if isinstance(output, Tensor):
        return returned, None, None
    second = stream.context_index(index)
    beside = None if second is None else output[second.returned]
    if any(item is not None and item is not returned and item is not beside for item in output):
        rule = "A block can be reused if it returns its tokens, and those of a second sequence, alone"
        raise UnsupportedError(explain(rule, f"{len(output)} results of {type(block.module).__name__}", "Choose other layers."))
    return returned, beside, (type(output), len(output))


def pack_block(block: BlockSurgery, form: Form | None, output: Tensor, context: Tensor | None) -> Any:
    """A block's results in the form that they had."""
    if form is None:
        return output
    stream, index = block.surgery.stream, block.index
    kind, length = form
    items: list[Any] = [None] * length
    items[stream.hidden_index(index).returned] = output
    if context is not None:
        items[stream.context_index(index).returned] = context
    return kind(items)


def needs_gradient(block: BlockSurgery, hidden: Tensor) -> bool:
    """Whether a gradient is wanted: what an earlier step computed has none."""
    return torch.is_grad_enabled() and block.needs_gradient((hidden,))


def check_alone(method: FeatureCache, block: BlockSurgery) -> None:
    """Refuse company that would let a feature stand for other tokens."""
    active, untouched = block.plan.acting, block.surgery.call.run.ledger.untouched
    others = any(other.moves_tokens for other in active) or sum(isinstance(other, FeatureCache) for other in active) > 1
    if others or not untouched:
        rule = "A feature cache stands alone: no other one beside it, and no method that changes the number of tokens"
        raise UnsupportedError(explain(rule, [type(m).__name__ for m in active], "Give them different layers or models."))


def reuse(
    method: FeatureCache, block: BlockSurgery, hidden: Tensor, kept: Feature | None, part: str, seen: dict[str, Any] | None = None
) -> Tensor | None:
    """The method's verb, given what is seen of the block at hand."""
    signals = supply_features(method, block, method.signals, hidden, kept, part, seen)
    return method.at_hand(partial(getattr(method, method.verb), **signals))


def supply_features(
    method: FeatureCache,
    block: BlockSurgery,
    names: tuple[str, ...],
    hidden: Tensor,
    kept: Feature | None,
    part: str,
    seen: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The signals of these names."""
    surgery, n = block.surgery, hidden.shape[1]
    context = surgery.call.context
    sources: dict[str, Callable[[], Any]] = {
        "hidden": lambda: hidden,
        "part": lambda: part,
        "age": lambda: kept.age + 1,
        "influence": lambda: store_of(method, block).get("influence"),
        "doubt": lambda: store_of(method, block).get("doubt"),
        "shared_doubt": lambda: store_of(method, block).get("shared_doubt"),
        "grid": lambda: grid(n, context.picture),
        "noise": lambda: context.steps_of_denoiser.noise(n),
        "contrast": lambda: context.steps_of_denoiser.contrast(n),
        "guidance": lambda: context.steps_of_denoiser.guidance(n),
        "layer": lambda: block.index,
        "layers": lambda: len(surgery.stream),
        "memory": lambda: kept_under(block, (method.key, *hidden.shape[:2])),
    }
    sources |= {name: (lambda value=value: value) for name, value in (seen or {}).items()}
    unused = dict.fromkeys({*method.ignores} & {*names})
    return {name: sources[name]() if name in sources else getattr(context, name) for name in names if name not in unused} | unused


def store_of(method: FeatureCache, block: BlockSurgery) -> dict:
    """What was kept for a block and this denoising context."""
    return kept_under(block, (method.key, block.index))


def kept_under(block: BlockSurgery, key: tuple) -> dict:
    """What was kept under a key for this denoising context."""
    return block.surgery.state(Features).setdefault(block.surgery.call.context.denoising, {}).setdefault(key, {})


def tell_computed(method: FeatureCache, block: BlockSurgery, hidden: Tensor, computed: int) -> None:
    """Tell the listeners how many of the tokens (b n d) are computed again."""
    if block.surgery.heard:
        block.surgery.acted(block, method, computed, hidden[..., 0].numel())
