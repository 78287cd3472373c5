"""Where a model keeps its streams of blocks, their attention and MLP, its embeddings and its head. Read from structure, before any call."""

from __future__ import annotations

import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from . import families
from .classes import class_name, known_class
from .parts import CONTAINERS, OWN, all_attentions, attentions, children_of, is_attention, is_norm, mixer_of, path_of, qualified_name
from .pipelines import apart, denoisers
from .signatures import parameters
from .streams import PROMPT, Anatomy, Stream


def anatomy(model: Any) -> Anatomy:
    """The anatomy of a Transformers or Diffusers model, of a PeftModel around one, or of a Diffusers pipeline's denoiser."""
    model = unwrap(model)
    called_late = families.CALLED_BEFORE.values()
    lists = sorted(_block_lists(model, ""), key=lambda item: item[0].split(".")[0] in called_late)
    if not lists:
        raise UnsupportedError(
            f"{type(model).__name__} has no stream of Transformer blocks: no ModuleList, Sequential or ModuleDict in it holds "
            "blocks with an attention of their own. Pass the part of the model that holds its Transformer layers."
        )
    streams = [_stream(model, path, blocks) for path, blocks in lists]
    repeats, numbers = Counter(stream["name"] for stream in streams), Counter()
    for stream, table in zip(streams, _tables(model, streams), strict=True):
        name = stream["name"]
        numbers[name] += 1
        stream |= {"table": table, "name": f"{name}.{numbers[name]}" if repeats[name] > 1 else name}
    table = _input_embeddings(model)
    embeddings = path_of(table, model) if isinstance(table, nn.Module) else None
    model_type = model.config.model_type if _is_transformers(model) else type(model).__name__
    return Anatomy(model, model_type, tuple(Stream(**stream) for stream in streams), head=_head(model), embeddings=embeddings)


def unwrap(model: Any) -> nn.Module:
    """The Transformers or Diffusers model inside a PeftModel or a Diffusers pipeline; any other module is returned as it is."""
    peft, diffusers = sys.modules.get("peft"), sys.modules.get("diffusers")
    if diffusers is not None and isinstance(model, diffusers.DiffusionPipeline):
        found = denoisers(class_name(model), model.components)
        if not found:
            raise UnsupportedError(
                f"A pipeline must hold a `transformer` or a `unet`. {type(model).__name__} holds {sorted(model.components)}. "
                "Pass the component that denoises."
            )
        if len(found) > 1:
            raise apart("One model is looked at", type(model).__name__, found)
        model = next(iter(found.values()))
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        model = model.get_base_model()
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        raise UnsupportedError(
            "A model is compiled with its surgery in it. Got one that is compiled already. Attach first, then call `torch.compile`."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"A model must be a torch.nn.Module or a Diffusers pipeline. Got {type(model).__name__}.")
    return model


def prompt_width(model: nn.Module) -> int | None:
    """Features of the prompt, of any length, that a denoiser is given; None for one that is given none, and for another model."""
    if "diffusers" not in sys.modules or not isinstance(model, sys.modules["diffusers"].ModelMixin):
        return None
    takes = PROMPT in parameters(type(model)) and not families.FIXED_PROMPT.search(class_name(model))
    return _number(_config(model), "prompt") if takes else None


def image_tokens(model: nn.Module) -> list[int]:
    """The ids that stand for pictures and videos in a model's text; none if it reads text alone, or pictures beside its text."""
    if families.READS_ACROSS.search(class_name(model)):
        return []
    config = vars(_config(model) or object)
    return [config[name] for name in families.IMAGE_TOKENS if isinstance(config.get(name), int)]


def pictured_stream(model_anatomy: Anatomy) -> Stream | None:
    """The stream whose input the pictures among a model's text are: the first that takes its tokens from the model's table."""

    def table(path: str | None) -> Any:
        return None if path is None else next(model_anatomy.model.get_submodule(path).parameters(), None)

    shared = table(model_anatomy.embeddings)
    if shared is None or not image_tokens(model_anatomy.model):
        return None
    return next((stream for stream in model_anatomy.streams if table(stream.table) is shared), None)


def _block_lists(module: nn.Module, path: str) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    for name, child in children_of(module):
        at = f"{path}.{name}" if path else name
        items = dict(children_of(child)) if isinstance(child, CONTAINERS) else {}
        if items and _are_blocks(list(items.values())):
            yield at, items
        else:
            yield from _block_lists(child, at)


def _are_blocks(items: list[nn.Module]) -> bool:
    attending = [item for item in items if _has_own_attention(item)]
    classes = {type(item) for item in attending}
    return bool(attending) and all(type(item) in classes or _is_layer(item) for item in items)


def _is_layer(item: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(item, GradientCheckpointingLayer) and next(_block_lists(item, ""), None) is None


def _has_own_attention(item: nn.Module) -> bool:
    """Whether an item attends by itself: it is no bare attention, and not all it attends with sits in lists of blocks inside of it."""
    if isinstance(item, CONTAINERS) or families.NOT_BLOCK.search(class_name(item)):
        return False
    if is_attention(type(item)) and not any(families.NORM.search(class_name(child)) for child in item.children()):
        return False
    nested = [path for path, _ in _block_lists(item, "")]
    return any(not any(path.startswith(f"{inner}.") for inner in nested) for path, _ in all_attentions(item))


def _stream(model: nn.Module, path: str, items: dict[str, nn.Module]) -> dict[str, Any]:
    blocks = tuple(items.values())
    line = _lineage(model, path)
    owner = next(at for at, module in reversed(line) if not isinstance(module, CONTAINERS))
    attending = next((own[0] for block in reversed(blocks) if (own := attentions(block))), None)  # the first may change the width
    if attending is None:
        attending = next(module for block in blocks for _, module in all_attentions(block))
    config = next((_config(module) for _, module in reversed(line) if _config(module) is not None), None)
    width = _width(attending) or _number(config, "width")
    if families.CONCATENATES.search(class_name(attending)):
        width //= 2
    heads = _number(attending, "heads") or _number(config, "heads") or 1
    head_dim = _number(attending, "head_dim") or width // heads
    kv_heads = _number(attending, "kv_heads") or heads // (getattr(attending, "num_key_value_groups", None) or 1)
    kind = _kind(model, line)
    known = dict(kind=kind, blocks=blocks, owner=owner, config=config, width=width, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return known | dict(
        name=_name(kind, line, config, _config(model)),
        paths=tuple(f"{path}.{name}" for name in items),
        causal=_causal(line, blocks[0], attending, config),
        layout="n b d" if vars(attending).get("batch_first") is False else _layout(type(blocks[0])),
        mixers=tuple(mixer_of(block) for block in blocks),
        final_norm=_final_norm(model, line),
    )


def _final_norm(model: nn.Module, line: list[tuple[str, nn.Module]]) -> nn.Module | None:
    """The norm that takes the whole sequence behind the blocks: of the nearest module around them that has one, inside the base model."""
    base = model.base_model if _is_transformers(model) and not class_name(model).endswith("Model") else model
    for (_, parent), (path, _child) in zip(reversed(line[:-1]), reversed(line), strict=False):
        if isinstance(parent, CONTAINERS):
            continue
        if families.POOLED_NORM.search(class_name(parent)):
            return None
        names = [name for name, _ in children_of(parent)]
        at = names.index(path.rpartition(".")[2])
        norms = {name: norm for name, norm in children_of(parent) if is_norm(norm) and not families.NOT_FINAL.search(name)}
        norms = [norm for name, norm in norms.items() if names.index(name) > at or name in families.FINAL_NORMS]
        if norms or parent is base:
            return next(iter(norms), None)
    return None


def _lineage(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules on the way from the root to the path, with their own paths."""
    line, at, module = [("", model)], "", model
    for part in path.split("."):
        at = f"{at}.{part}" if at else part
        module = module.get_submodule(part)
        line.append((at, module))
    return line


def _is_transformers(module: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(module, PreTrainedModel)


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _kind(model: nn.Module, line: list[tuple[str, nn.Module]]) -> str:
    if not _is_transformers(model):
        return "denoiser" if "diffusers" in sys.modules and isinstance(model, sys.modules["diffusers"].ModelMixin) else "other"
    for path, module in reversed(line[1:]):
        for kind, pattern in families.KINDS:
            if pattern.search(path.rpartition(".")[2]) or pattern.search(class_name(module)):
                return kind
    nearest = next(module for _, module in reversed(line) if _is_transformers(module))
    if _main_input(nearest) in parameters(type(nearest)):
        return families.MAIN_INPUTS.get(_main_input(nearest), "other")
    kinds = (kind for kind, pattern in families.KINDS if pattern.search(class_name(nearest)))
    return next(kinds, families.MAIN_INPUTS.get(_main_input(model), "other"))


def _main_input(model: Any) -> str:
    name = model.main_input_name
    return name if isinstance(name, str) else name[0]  # OneFormer lists several


def _name(kind: str, line: list[tuple[str, nn.Module]], config: Any, root: Any) -> str:
    if getattr(config, "is_encoder_decoder", False) or getattr(root, "is_encoder_decoder", False):
        for path, module in line:  # the outermost wins: the layers of a BERT that decodes are called `encoder`
            words = f"{path.rpartition('.')[2]} {class_name(module)}".lower()
            for name in ("decoder", "encoder"):
                if name in words.replace("encoderdecoder", ""):
                    return name
    return kind


def _causal(line: list[tuple[str, nn.Module]], block: nn.Module, attention: nn.Module, config: Any) -> bool:
    """Which mask the module that makes the blocks' mask makes; the attention's own flag where none does."""
    known = families.CAUSAL.get(qualified_name(type(block)))
    if known is not None:
        return known
    flagged = any(getattr(attention, flag, False) is True for flag in ("is_causal", "is_decoder"))
    for _, module in reversed(line):
        if _config(module) is not None and _config(module) is not config:
            break  # a larger model masks its own stream, not this one
        names = _mask_functions(type(module))
        causal, both_ways = names & set(families.CAUSAL_MASKS), names & set(families.OPEN_MASKS)
        if causal or both_ways:
            return flagged if causal and both_ways else bool(causal)
    return flagged


def _layout(cls: type[nn.Module]) -> str:
    layouts = (layout for pattern, layout in families.BLOCK_LAYOUTS if pattern.search(qualified_name(cls)))
    return next(layouts, "n d" if "cu_seqlens" in parameters(cls) else "b n d")


@cache
def _mask_functions(cls: type[nn.Module]) -> frozenset[str]:
    own = itertools.takewhile(lambda c: c is not known_class(cls), cls.__mro__)  # of somebody's own class, in front of the library's
    bodies = [inspect.unwrap(f) for c in (*own, known_class(cls)) for f in vars(c).values() if inspect.isfunction(f)]
    return frozenset(name for body in bodies for name in body.__code__.co_names if name in families.CAUSAL_MASKS + families.OPEN_MASKS)


def _number(source: Any, key: str) -> int | None:
    for name in families.ATTRIBUTES[key]:
        value = getattr(source, name, None)
        value = value[0] if isinstance(value, (tuple, list)) and len({*value}) == 1 else value  # one for each stage of a UNet
        if isinstance(value, int) and value > 0:
            return value
    return None


def _width(attention: nn.Module) -> int | None:
    """The number of features that the first projection of an attention reads."""
    from transformers.pytorch_utils import Conv1D

    widths = {
        name: module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features
        for name, module in attention.named_modules()
        if isinstance(module, Conv1D) or isinstance(getattr(module, "in_features", None), int)
    }
    queries = [width for name, width in widths.items() if families.QUERY.search(name)]
    return next(iter(queries or widths.values()), None)


def _input_embeddings(model: nn.Module) -> Any:
    """What a model of Transformers calls its input embeddings; None where it has none, or another library made it."""
    try:
        return model.get_input_embeddings() if _is_transformers(model) else None
    except NotImplementedError:
        return None


def _tables(model: nn.Module, streams: list[dict[str, Any]]) -> list[str | None]:
    """For each stream the path of its embedding table. One that serves several is that of the stream nearest to it, the first of these."""
    names = {id(module): path for path, module in model.named_modules()}
    nearest = [_nearest_table(model, stream["owner"]) if stream["kind"] == "text" else (0, None) for stream in streams]
    best: dict[int, int] = {}
    for i, (depth, table) in enumerate(nearest):
        if table is not None and depth > nearest[best.setdefault(id(table), i)][0]:
            best[id(table)] = i
    return [names[id(table)] if best.get(id(table)) == i else None for i, (_, table) in enumerate(nearest)]


def _nearest_table(model: nn.Module, owner: str) -> tuple[int, nn.Module | None]:
    """The embedding table of the nearest model around a stream, and how deep that model lies."""
    parts = owner.split(".") if owner else []
    for depth in range(len(parts), -1, -1):
        table = _input_embeddings(model.get_submodule(".".join(parts[:depth])))
        if isinstance(table, nn.Module) and not isinstance(table, CONTAINERS):
            if any(isinstance(module, nn.Embedding) for module in table.modules()):
                return depth, table
    return 0, None


def special_tokens(model: nn.Module, stream: Stream) -> tuple[int, int]:
    """How many special tokens (class, distillation, registers) an encoder of pictures puts in front of its patches, and behind them."""
    return tuple(_special_tokens(model, stream, names) for names in (families.PREFIX_TOKENS, families.SUFFIX_TOKENS))


def _special_tokens(model: nn.Module, stream: Stream, names: re.Pattern) -> int:
    if stream.kind not in ("vision", "video"):
        return 0
    at = stream.owner
    while True:
        special = {
            value: value.shape[:-1].numel()
            for name, value in model.get_submodule(at).named_parameters()
            if names.search(name) and not any(path in name for path in ("decoder", OWN))
        }
        if special or not at:
            return sum(special.values())
        at = at.rpartition(".")[0]


def _head(model: nn.Module) -> str | None:
    head = model.get_output_embeddings() if _is_transformers(model) else None
    if isinstance(head, nn.Module):
        return path_of(head, model)
    children = dict(children_of(model))
    return next((name for name in families.HEADS if name in children), None)
