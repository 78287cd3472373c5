"""Weight edits: how W + delta stands in for W while the block runs, and how it is written into the base for good."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..errors import UnsupportedError, explain
from ..model.parts import Place, block_weights
from ..roles.base import Method
from ..roles.weight_edit import WeightEdit


@handles("WeightEdit")
class WeightEditHandler(Handler):
    def phases(self, method: WeightEdit) -> tuple[str, ...]:
        return ("weights",)

    def hooks(self, method: WeightEdit) -> set[str]:
        return {method.site}

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        block.state(EditedWeights).add(hook)
        return []

    def weights(self, block: BlockSurgery) -> AbstractContextManager:
        edited = block.state(EditedWeights)
        edited.warn_if_unmade()
        return edited.standing_in()


def edited_shapes(cls: type[Method], block: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights of a block that a method may change; none if it edits no weights."""
    weights = block_weights(block, cls.site) if issubclass(cls, WeightEdit) else {}
    return {name: tuple(module._parameters[attribute].shape) for name, (module, attribute) in weights.items()}


def weight_edits(block: BlockSurgery, adapter_name: str) -> list[WeightEdit]:
    """The weight edits that an adapter has in a block, whether they act or not."""
    methods = block.hf_tokens_methods[adapter_name].values() if adapter_name in block.hf_tokens_methods else ()
    return [method for method in methods if isinstance(method, WeightEdit)]


class EditedWeights:
    """The weights of a block that its edits may change."""

    def __init__(self, block: BlockSurgery):
        self.block = block
        self.places: dict[str, Place] = {}
        self._standing = False  # whether they stand in for the base's now

    def add(self, site: str) -> None:
        """Those of a site too."""
        self.places |= block_weights(self.block.module, site)

    @property
    def edits(self) -> list[WeightEdit]:
        """The edits that act."""
        return [method for _, method in self.block.plan.always.of("weights")]

    def effective(self, name: str) -> Tensor:
        """A weight with the changes of the edits that act."""
        module, attribute = self.places[name]
        base = module._parameters[attribute]
        for method in self.edits:
            if name in method.dims.weights and method.is_made:
                base = base + getattr(method, method.slot(name)).to(base)
        return base

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[None]:
        """Let the edited weights stand in for the base's own, whose tensors stay where they are; once, where a checkpoint enters again."""
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        if self._standing:
            yield
            return
        self._standing = True
        try:
            for name, (module, attribute) in self.places.items():
                base, weight = module._parameters[attribute], self.effective(name)
                if base.is_meta:
                    rule = "A weight that is edited lies on the device of its block"
                    raise UnsupportedError(explain(rule, f"an offloaded one, {name}", "Load the model without a device map that offloads."))
                if weight is not base:
                    replaced.append((module, attribute, base))
                    module._parameters[attribute] = weight
            yield
        finally:
            self._standing = False
            for module, attribute, base in replaced:
                module._parameters[attribute] = base

    @torch.no_grad()
    def bake(self) -> None:
        """Write the edits that act into the base's own tensors."""
        for name, (module, attribute) in self.places.items():
            module._parameters[attribute].copy_(self.effective(name))

    def warn_if_unmade(self) -> None:
        """Warn once that an edit has not been made."""
        for method in self.edits:
            if method.is_first_block and not torch.compiler.is_compiling() and not method.is_made and method.warns():
                warnings.warn(f"hf-tokens: the edit {method.key!r} is not made and changes nothing; call `hf_tokens.edit`.", stacklevel=2)
