"""The weights of a block that may be edited, by their names in the base."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import UnsupportedError, explain
from . import families
from .parts import OWN, cross_attentions

Place = tuple[nn.Module, str]  # the module that holds a weight, and the weight's name in it


def base_modules(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base in one, by the name that it had before an adapter wrapped it."""
    yield path, module
    for name, child in module.named_children():
        if name == OWN:
            continue
        while isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            child = child.original_module if isinstance(child, AuxiliaryTrainingWrapper) else child.get_base_layer()
        yield from base_modules(child, f"{path}.{name}" if path else name)


def weights_of_block(block: nn.Module) -> dict[str, Place]:
    """Every parameter."""
    weights = ((path, module, name, weight) for path, module in base_modules(block, "") for name, weight in module._parameters.items())
    return {f"{path}.{name}" if path else name: (module, name) for path, module, name, weight in weights if weight is not None}


def weights_of_context(block: nn.Module) -> dict[str, Place]:
    """The projections of its cross-attention that read the context."""
    modules = (inner for path, attention in cross_attentions(block) for inner in base_modules(attention, path))
    linear = ((path, module) for path, module in modules if isinstance(module, nn.Linear))
    return {f"{path}.weight": (module, "weight") for path, module in linear if families.CONTEXT.search(path)}


# site of a WeightEdit -> its weights in a block, by their names in it, and what a block must have
WEIGHT_SITES = {
    "block": (weights_of_block, "parameters"),
    "context": (weights_of_context, "a cross-attention with linear projections of the context"),
}


def block_weights(block: nn.Module, site: str) -> dict[str, Place]:
    """The weights of a block at a site, by name."""
    return WEIGHT_SITES[site][0](block)


def check_weights(model: nn.Module, block: nn.Module, path: str, site: str) -> None:
    """Refuse a block without such weights, and weights that no other may stand in for."""
    weights = block_weights(block, site)
    if not weights:
        rule = f"This method needs {WEIGHT_SITES[site][1]} in the block"
        raise UnsupportedError(explain(rule, f"{type(block).__name__} at {path}", "Choose other layers or another model."))
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    for name, (module, attribute) in weights.items():
        weight = module._parameters[attribute]
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            rule, got = "A weight that is edited is a plain floating-point parameter", f"{type(weight).__name__} of {weight.dtype}"
            raise UnsupportedError(explain(rule, f"{got} at {path}.{name}", "Load the model without quantisation."))
        if len(names.get(id(weight), ())) > 1:
            rule = "A weight that is edited belongs to one place of the model"
            raise UnsupportedError(explain(rule, f"one tied as {names[id(weight)]}", "Choose other layers or another model."))
