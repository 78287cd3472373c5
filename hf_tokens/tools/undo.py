"""All or nothing: what a door does to a model is undone where it does not come to its end."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .surgeries import blocks_in

Undo = Callable[[], None]


class AllOrNothing:
    """A context: after an error or an interrupt, models are as they were, their modules, hooks and flags, their methods and configs.

    The numbers in their tensors are not looked after: who writes some says how that is undone. An interrupt that comes when all is done
    leaves it done; that is why this is no generator, which would be closed some time later, by an exception of its own.
    """

    def __init__(self, models: Iterable[nn.Module], *undo: Undo):
        self.undo = (*(before_now(model) for model in models), *undo)

    def __enter__(self) -> None: ...

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        if error is not None:
            for undo in self.undo:
                undo()


def before_now(model: nn.Module) -> Undo:
    """What brings a model back to what it is now."""
    blocks = blocks_in(model)
    surgeries = {id(block.surgery.model): block.surgery.model for block in blocks}.values()
    streams = {id(block.surgery): block.surgery for block in blocks}.values()
    parts = [part for block in blocks for part in (block.tap, block.signals)]
    kept = [attributes_of(thing) for thing in (*model.modules(), *surgeries, *streams, *parts)]
    stacks = [attributes_of(config) for config in vars(model).get("peft_config", {}).values()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    opened = {id(block): block.tap.opened for block in blocks}

    def undo() -> None:
        for block in blocks:
            if block.tap.opened and not opened[id(block)]:
                block.tap.close()
        for put_back in (*kept, *stacks):
            put_back()
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        for surgery in surgeries:
            surgery.abandon()

    return undo


def attributes_of(thing: Any) -> Undo:
    """What gives an object the attributes that it has now; lists, dicts and sets among them hold what they hold now."""
    held = dict(vars(thing))
    contents = [(value, value.copy()) for value in held.values() if type(value) in (dict, OrderedDict, list, set)]

    def put_back() -> None:
        vars(thing).clear()
        vars(thing).update(held)
        for value, content in contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)

    return put_back
