"""The parts of a block: its attentions, its MLP, the norms beside them, and its weights that may be edited, by their names in the base."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterable, Iterator
from functools import cache

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import UnsupportedError, explain
from . import families
from .classes import class_name, known_class
from .signatures import forward_tree, parameters

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
OWN = "hf_tokens"  # the child by which a surgery hangs on a block
VALUES = "to_v"  # how an attention of diffusers calls its projection of the values


def attentions(block: nn.Module) -> list[nn.Module]:
    """The self-attentions of a block, the one that calls the attention function first."""
    own = [module for path, module in all_attentions(block) if not is_cross(path, module)]
    return sorted(own, key=lambda module: not calls_interface(type(module)))


def cross_attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attentions of a block that read another sequence, with their paths in it."""
    return [(path, module) for path, module in all_attentions(block) if is_cross(path, module)]


def is_cross(path: str, module: nn.Module) -> bool:
    """Whether an attention reads another sequence."""
    known = getattr(module, "is_cross_attention", None)
    if isinstance(known, bool):
        return known
    return bool(families.CROSS_PATH.search(path) or families.CROSS_CLASS.search(class_name(module)))


def all_attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every innermost attention in a module, with its path."""
    out: list[tuple[str, nn.Module]] = []
    for name, child in children_of(block):
        inner = [(f"{name}.{path}", module) for path, module in all_attentions(child)]
        if inner:
            out += inner
        elif is_attention(type(child)) and next(child.children(), None) is not None:
            out.append((name, child))
    return out


@cache
def is_attention(cls: type[nn.Module]) -> bool:
    """Whether a class is an attention, by its source or its name."""
    name = known_class(cls).__name__
    named = families.ATTENTION.search(name) and not families.NOT_ATTENTION.search(name)
    return calls_interface(cls) or bool(named)


@cache
def calls_interface(cls: type[nn.Module]) -> bool:
    """Whether a class looks the attention function up in Transformers' registry."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(cls.forward).__code__.co_names


@cache
def checks_mask(cls: type[nn.Module]) -> bool:
    """Whether an attention takes no mask but one with a row for each query: its error says so."""
    words = (word for word in inspect.unwrap(cls.forward).__code__.co_consts if isinstance(word, str))
    return any(families.MASK_OF_SIZE in word for word in words)


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # what hf-tokens hung on a block is no part of the base model
    return ((name, child) for name, child in module.named_children() if name != OWN)


def is_norm(module: nn.Module) -> bool:
    """Whether a module, or what `modules_to_save` has put a copy beside, is a norm."""
    module = vars(module)["_modules"].get("original_module") or module
    return bool(families.NORM.search(class_name(module))) and not isinstance(module, CONTAINERS)


def mixer_of(block: nn.Module) -> str:
    if attentions(block):
        return "attention"
    return "cross" if all_attentions(block) else "other"


def qualified_name(cls: type) -> str:
    known = known_class(cls)
    return f"{known.__module__.rpartition('.')[2]}.{known.__name__}"


def mlp_and_norm(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The MLP of a block and the norm in front of it; None for what it has not."""
    children = dict(children_of(block))
    last = list(children_of(children["layer"])) if isinstance(children.get("layer"), nn.ModuleList) else []
    if last:  # T5 and its kin keep attention and MLP, each with its norm, in a list of sub-layers
        children = dict(children_of(last[-1][1]))
        mlp = next((child for name, child in children.items() if name in ("DenseReluDense", "mlp")), None)
        return mlp, children.get("layer_norm") if mlp is not None else None
    mlp = next((children[name] for name in families.MLPS if name in children), None)
    if mlp is None or isinstance(mlp, (*CONTAINERS, nn.Linear)):  # a projection alone is a part of an MLP that has no module of its own
        return None, None
    if getattr(block, "use_parallel_residual", False) or families.POST_NORM_BLOCKS.search(qualified_name(type(block))):
        return mlp, None
    post = any(name in children for name in families.POST_NORMS)
    known = families.MLP_NORM_OF.get(qualified_name(type(block)))
    names = (known,) if known else families.MLP_NORMS
    norms = [children[name] for name in names if name in children and not (post and name.startswith("post_attention"))]
    return mlp, norms[0] if norms and not isinstance(norms[0], CONTAINERS) else None


Middle = tuple[nn.Module | None, nn.Module | None, nn.Module | None]


def middle(block: nn.Module) -> Middle:
    """Where the MLP of a block begins, the module that returns what it adds to the residual, and the norm that reads the sum of both.

    None for what it has not: a block that normalises first has no norm behind its MLP.
    """
    mlp, norm = mlp_and_norm(block)
    children = dict(children_of(block))
    if mlp is None and {*families.TWO_PART_MLP} <= children.keys():
        last = children[families.TWO_PART_MLP[1]]
        if families.RESIDUAL in parameters(type(last)):
            last = dict(children_of(last)).get(families.BEFORE_RESIDUAL)
        post = families.POST_NORM_BLOCKS.search(qualified_name(type(block)))
        norm, mlp = None if post else children.get(families.TWO_PART_NORM), last
    written = written_middle(block)
    return (norm, mlp, None) if written[0] is None and norm is not None and mlp is not None else written


def written_middle(block: nn.Module) -> Middle:
    """The same as the block's own forward has it: behind its attentions a norm, the MLP or its two projections, and maybe a norm."""
    children = dict(children_of(block))
    called = [name for name in calls_of(type(block)) if name in children and not passes_through(children[name])]
    attending = {path.partition(".")[0] for path, _ in all_attentions(block)}
    behind = called[max((i + 1 for i, name in enumerate(called) if name in attending), default=len(called)) :]
    mlp = list(families.INLINE_MLP) if families.INLINE_MLP[0] in behind else [name for name in behind if name in families.MLPS]
    norms = [name for name in behind if is_norm(children[name])]
    if mlp and norms and behind in ([norms[0], *mlp], [norms[0], *mlp, norms[-1]]):
        last = children[mlp[-1]]
        return (children[norms[0]], last, None) if norms[0] == norms[-1] else (children[mlp[0]], last, children[norms[-1]])
    return None, None, None


@cache
def calls_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """What a class calls of itself in its forward, in the order in which it does, each as often as it stands there."""
    tree = forward_tree(cls)
    return () if tree is None else tuple(calls_in(tree))


def calls_in(node: ast.AST) -> Iterator[str]:
    """The attributes of `self` that are called in a tree; what is called for an argument comes first."""
    for child in ast.iter_child_nodes(node):
        yield from calls_in(child)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == "self":
        yield node.func.attr


def passes_through(module: nn.Module) -> bool:
    """Whether a module without weights is a dropout or an activation."""
    return isinstance(module, (nn.Dropout, nn.Identity)) or type(module).__module__ in families.ACTIVATIONS


def path_of(target: nn.Module, root: nn.Module) -> str | None:
    return next((path for path, module in root.named_modules() if module is target), None)


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
    "model": (weights_of_block, "parameters"),
    "context": (weights_of_context, "a cross-attention with linear projections of the context"),
}


def block_weights(block: nn.Module, site: str) -> dict[str, Place]:
    """The weights of a block at a site, by name."""
    return WEIGHT_SITES[site][0](block)


OUTSIDE = "/"  # begins the name of a weight outside of the blocks, which is its path in the model


def outside_weights(model: nn.Module, blocks: Iterable[nn.Module]) -> dict[str, tuple[Place, ...]]:
    """The weights of a model outside of these blocks: one that is tied has several places and the name of the first."""
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    places: dict[int, list[tuple[str, Place]]] = {}
    for path, (module, name) in weights_of_block(model).items():
        if id(module._parameters[name]) not in inside:
            places.setdefault(id(module._parameters[name]), []).append((path, (module, name)))
    return {OUTSIDE + found[0][0]: tuple(place for _, place in found) for found in places.values()}


def check_plain(weight: nn.Parameter, path: str) -> None:
    """Refuse a weight that no other tensor can stand in for."""
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        rule, got = "A weight that is edited or copied is a plain floating-point parameter", f"{type(weight).__name__} of {weight.dtype}"
        raise UnsupportedError(explain(rule, f"{got} at {path}", "Load the model without quantisation."))


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
        check_plain(weight, f"{path}.{name}")
        if len(names.get(id(weight), ())) > 1:
            rule = "A weight that is edited belongs to one place of the model"
            raise UnsupportedError(explain(rule, f"one tied as {names[id(weight)]}", "Choose other layers or another model."))
