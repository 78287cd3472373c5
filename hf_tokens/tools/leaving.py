"""What acts in a model, method by method: in which forms each leaves, and what would be lost of it in the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from peft import PeftConfig
from torch import nn

from ..engine.block import BlockSurgery
from ..errors import UnsupportedError, explain
from ..peft.config import PEFT_FORMS, PEFT_METHOD
from ..roles.base import Method
from .loading import recall
from .surgeries import blocks_in


@dataclass(frozen=True)
class StackPart:
    """One method of the stack that acts.

    Attributes:
        name: Its name; `peft` for a PEFT method.
        leaves: The forms in which it leaves.
        lost: What is lost of it in the others; empty if nothing is.
        adapter: The adapter that it is in.
        methods: Its instances in the blocks.
        config: That of a PEFT method.
    """

    name: str
    leaves: tuple[str, ...]
    lost: str
    adapter: str
    methods: tuple[tuple[BlockSurgery, Method], ...] = ()
    config: PeftConfig | None = None


def parts_of_stack(model: nn.Module) -> list[StackPart]:
    """The stack that acts in a model, in its order."""
    parts = []
    for adapter in acting_adapters(model):
        if adapter not in configs_in(model):
            recall(model, adapter)
        config, slots = configs_in(model)[adapter], sites_of(model, adapter)
        nested, slot = iter(config.peft_configs()), 0
        for method in config.methods:
            if method["method"] == PEFT_METHOD:
                inner = next(nested)
                parts.append(StackPart(PEFT_METHOD, PEFT_FORMS, f"its {inner.peft_type.value}", adapter, config=inner))
                continue
            if slot in slots:
                own = slots[slot][0][1]
                parts.append(StackPart(own.config.method, own.leaves_as(own.config), own.lost, adapter, tuple(slots[slot])))
            slot += 1
    return parts


def sites_of(model: nn.Module, adapter: str) -> dict[int, list[tuple[BlockSurgery, Method]]]:
    """The instances of an adapter's methods that act, each with its block, by their slot in the stack."""
    slots: dict[int, list[tuple[BlockSurgery, Method]]] = {}
    for block in blocks_in(model):
        for method in block.plan.acting:
            name, _, slot = method.key.rpartition(".")
            if name == adapter:
                slots.setdefault(int(slot), []).append((block, method))
    return slots


def leaving(stack: list[StackPart], form: str, without: Collection[str]) -> list[StackPart]:
    """What leaves of a stack in a form."""
    return [part for part in stack if form in part.leaves and part.name not in without]


def acting_adapters(model: nn.Module) -> list[str]:
    """The names of our adapters that act in a model."""
    block = blocks_in(model)[0]
    if block.disable_adapters:
        rule, remedy = "What acts in a model is exported", "Call it outside of `disable_adapter()`."
        raise UnsupportedError(explain(rule, "a model whose adapters are disabled", remedy))
    return [name for name in block.active_adapters if any(name in each.hf_tokens_methods for each in blocks_in(model))]


def configs_in(model: nn.Module) -> dict[str, PeftConfig]:
    """The configs of all adapters in a model, whoever put them there."""
    held = [config for m in model.modules() if isinstance(config := vars(m).get("peft_config"), dict)]
    return {name: config for configs in held for name, config in configs.items()}
