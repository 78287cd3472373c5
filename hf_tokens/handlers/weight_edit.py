"""Weight edits: how W + delta stands in for W while the block runs, and how it is written into the base for good."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import SignedForward
from ..errors import UnsupportedError, explain
from ..model.parts import OUTSIDE, Place, block_weights, outside_weights
from ..roles.base import Method
from ..roles.config import MethodConfig
from ..roles.weight_edit import WeightEdit

OUTSIDE_HOOK = "weights outside of the blocks"


@handles("WeightEdit")
class WeightEditHandler(Handler):
    def phases(self, method: WeightEdit) -> tuple[str, ...]:
        return ("weights", "outside") if outside_names(method) else ("weights",)

    def hooks(self, method: WeightEdit) -> set[str]:
        return {method.site, OUTSIDE_HOOK} if outside_names(method) else {method.site}

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        edited = block.state(EditedWeights)
        return edited.add_outside() if hook == OUTSIDE_HOOK else edited.add(hook)

    def weights(self, block: BlockSurgery) -> AbstractContextManager:
        edited = block.state(EditedWeights)
        edited.warn_if_unmade()
        return edited.standing_in(edited.inside)

    def outside(self, block: BlockSurgery, run: Callable, *args: Any, **kwargs: Any) -> Any:
        edited = block.state(EditedWeights)
        with edited.standing_in(edited.outside):
            return run(*args, **kwargs)


def outside_names(method: WeightEdit) -> list[str]:
    """The weights outside of the blocks whose changes an instance holds."""
    return [name for name in method.dims.weights if name.startswith(OUTSIDE)]


def reaches_outside(cls: type[Method], config: MethodConfig) -> bool:
    """Whether a method changes weights outside of the blocks too."""
    return issubclass(cls, WeightEdit) and cls.site_of(config) == "model" and config.layers is None and config.stream is None


def edited_shapes(cls: type[Method], config: MethodConfig, block: nn.Module, outside: Iterable[nn.Module] | None) -> dict[str, tuple]:
    """The shapes of the weights that an instance in a block may change; none if it edits no weights.

    Args:
        cls: The method.
        config: Its config.
        block: The block.
        outside: The model and its blocks, for the instance that holds the changes outside of them.
    """
    weights = block_weights(block, cls.site_of(config)) if issubclass(cls, WeightEdit) else {}
    model, *blocks = outside or (None,)
    weights |= {} if model is None else {name: places[0] for name, places in outside_weights(model, blocks).items()}
    return {name: tuple(module._parameters[attribute].shape) for name, (module, attribute) in weights.items()}


def base_weight(module: nn.Module, attribute: str, name: str) -> nn.Parameter:
    """A weight of the base, where it was when the edit was attached."""
    weight = module._parameters.get(attribute)
    if weight is None:
        rule = "A weight that is edited is a parameter of its module"
        got = f"{name}, in whose place {type(module).__name__} has something else"
        remedy = "Parametrize, prune or quantize the model before the adapter is attached, or take the adapter out."
        raise UnsupportedError(explain(rule, got, remedy))
    return weight


def weight_edits(block: BlockSurgery, adapter_name: str) -> list[WeightEdit]:
    """The weight edits that an adapter has in a block, whether they act or not."""
    methods = block.hf_tokens_methods[adapter_name].values() if adapter_name in block.hf_tokens_methods else ()
    return [method for method in methods if isinstance(method, WeightEdit)]


class HolderForward(SignedForward):
    """The forward of a module with weights outside of the blocks in it: what calls it beside the model reads the edited ones too."""

    def __init__(self, module: nn.Module, edited: EditedWeights, names: frozenset[str]):
        self.edited, self.names = edited, names
        super().__init__(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.edited.standing_in(self.names):
            return self.inner(*args, **kwargs)


class EditedWeights:
    """The weights that the edits in a block may change: the block's, and those outside of all blocks."""

    def __init__(self, block: BlockSurgery):
        self.block = block
        self.places: dict[str, tuple[Place, ...]] = {}
        self.inside = self.outside = frozenset[str]()
        self._standing: frozenset[str] = frozenset()  # those that stand in for the base's now

    def add(self, site: str) -> list[Any]:
        """Those of a site of the block too."""
        found = block_weights(self.block.module, site)
        self.places |= {name: (place,) for name, place in found.items()}
        self.inside |= found.keys()
        return []

    def add_outside(self) -> list[Any]:
        """Those outside of the blocks too; returns what stands on the modules that hold them."""
        methods = (method for methods in self.block.hf_tokens_methods.values() for method in methods.values())
        self.outside = frozenset(name for method in methods if isinstance(method, WeightEdit) for name in outside_names(method))
        found = {name: places for name, places in outside_weights(self.block.base, ()).items() if name in self.outside}
        self.places |= found
        held: dict[nn.Module, set[str]] = {}
        for name, places in found.items():
            for module, _ in places:
                held.setdefault(module, set()).add(name)
        # a module may read what one inside of it holds, and not call that; the model's own call is that of the model
        below = {part: set().union(*(held[m] for m in part.modules() if m in held)) for part in self.block.base.modules()}
        below.pop(self.block.base, None)
        called = {part: names for part, names in below.items() if names and type(part).forward is not nn.Module.forward}
        return [HolderForward(part, self, frozenset(names)) for part, names in called.items()]

    @property
    def edits(self) -> list[WeightEdit]:
        """The edits that act."""
        return [method for _, method in self.block.plan.always.of("weights")]

    def effective(self, name: str) -> Tensor:
        """A weight with the changes of the edits that act."""
        base = base_weight(*self.places[name][0], name)
        for method in self.edits:
            if name in method.dims.weights and method.is_made:
                base = base + getattr(method, method.slot(name)).to(base)
        return base

    @contextlib.contextmanager
    def standing_in(self, names: frozenset[str]) -> Iterator[None]:
        """Let edited weights stand in for the base's own, whose tensors stay where they are; once, where a checkpoint or a part of the
        model enters again."""
        replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
        before = self._standing
        try:
            self._standing = before | names
            for name in self.places if names - before else ():
                if name in names and name not in before:
                    self._replace(name, replaced)
            yield
        finally:
            self._standing = before
            for module, attribute, base in replaced:
                module._parameters[attribute] = base

    def _replace(self, name: str, replaced: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
        """Put an edited weight into its places, and note what was there."""
        weight = self.effective(name)
        for module, attribute in self.places[name]:
            base = base_weight(module, attribute, name)
            if base.is_meta:
                rule = "A weight that is edited lies on the device of its block"
                raise UnsupportedError(explain(rule, f"an offloaded one, {name}", "Load the model without a device map that offloads."))
            if weight is not base:
                replaced.append((module, attribute, base))
                module._parameters[attribute] = weight

    @torch.no_grad()
    def bake(self) -> None:
        """Write the edits that act into the base's own tensors."""
        for name, (place, *_) in self.places.items():
            base_weight(*place, name).copy_(self.effective(name))

    def warn_if_unmade(self) -> None:
        """Warn once that an edit has not been made."""
        for method in self.edits:
            if method.is_first_block and not torch.compiler.is_compiling() and not method.is_made and method.warns():
                warnings.warn(f"hf-tokens: the edit {method.key!r} is not made and changes nothing; call `hf_tokens.edit`.", stacklevel=2)
