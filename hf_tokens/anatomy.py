"""Where a model keeps its streams of blocks, their attention and MLP, its embeddings and its head. Read from structure, before any call."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from hf_tokens import families

from .errors import UnsupportedError
from .signatures import HiddenIndex, context_index, hidden_index, parameters

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
OWN = "hf_tokens"
PROMPT = "encoder_hidden_states"  # how a denoiser calls the prompt that it is given


@dataclass(frozen=True, eq=False)
class Stream:
    """One sequence of residual blocks; `paths` are relative to the unwrapped model.

    `layout` is how the blocks hold their hidden states: "b n d" nearly everywhere, "n d" where the samples are packed into one row.
    `final_norm` is the norm behind the blocks that takes every token, None where there is none.
    A mixer is "attention", "cross" (a block that attends to another sequence only) or "other" (a state space, a convolution, an MLP).
    `table` is the path of the module that looks up the embeddings of a text stream's tokens; None where there is none of its own."""

    name: str
    kind: str
    blocks: tuple[nn.Module, ...] = field(repr=False)
    paths: tuple[str, ...] = field(repr=False)
    owner: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    layout: str
    mixers: tuple[str, ...] = field(repr=False)
    config: Any = field(repr=False)
    final_norm: nn.Module | None = field(repr=False)
    table: str | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def attention(self, i: int) -> nn.Module | None:
        """The self-attention of block i: the module that calls the attention function."""
        found = attentions(self.blocks[i])
        return found[0] if found else None

    def mlp(self, i: int) -> nn.Module | None:
        return _mlp(self.blocks[i])[0]

    def mlp_norm(self, i: int) -> nn.Module | None:
        """The norm between the residual stream and the MLP; None in post-norm and in parallel blocks."""
        return _mlp(self.blocks[i])[1]

    def hidden_index(self, i: int = 0) -> HiddenIndex:
        return hidden_index(type(self.blocks[i]))

    def context_index(self, i: int = 0) -> HiddenIndex | None:
        """The same for the second sequence that a joint block carries along (the text of an MM-DiT); None where there is none."""
        return context_index(type(self.blocks[i]))

    def bind(self, i: int, args: tuple, kwargs: dict) -> torch.Tensor:
        """The hidden states among the arguments of a call of block i."""
        index = self.hidden_index(i)
        return kwargs[index.name] if index.name in kwargs else args[index.position]

    def bind_context(self, i: int, args: tuple, kwargs: dict) -> torch.Tensor | None:
        """The second sequence among the arguments of a call of block i; None where it carries none along."""
        index = self.context_index(i)
        if index is None:
            return None
        return kwargs[index.name] if index.name in kwargs else args[index.position]

    def read(self, i: int, output: Any) -> torch.Tensor:
        """The hidden states in what block i returned."""
        return output if isinstance(output, torch.Tensor) else output[self.hidden_index(i).returned]

    def write(self, i: int, output: Any, hidden: torch.Tensor) -> Any:
        """What block i returned, with other hidden states in it."""
        if isinstance(output, torch.Tensor):
            return hidden
        at = self.hidden_index(i).returned
        return type(output)((*output[:at], hidden, *output[at + 1 :]))


@dataclass(frozen=True, eq=False)
class Anatomy:
    model: nn.Module = field(repr=False)
    model_type: str
    streams: tuple[Stream, ...]
    head: str | None
    embeddings: str | None

    def stream(self, name: str) -> Stream:
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise UnsupportedError(f"{self.model_type} has no stream {name!r}. Its streams: {', '.join(s.name for s in self.streams)}.")

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__} ({self.model_type})", f"  embeddings  {self.embeddings or '-'}"]
        for s in self.streams:
            shape = f"width {s.width}, heads {s.heads}" + (f" (kv {s.kv_heads})" if s.kv_heads != s.heads else "") + f" of {s.head_dim}"
            causal = "causal" if s.causal else "bidirectional"
            mixers = ", ".join(f"{n} {mixer}" for mixer, n in Counter(s.mixers).items())
            lines.append(f"  {s.name}: {len(s)} x {type(s.blocks[0]).__name__} in {s.owner or '(root)'}")
            lines.append(f"    {s.kind}, {causal}, {shape}, {s.layout}; {mixers}")
            lines.append(f"    {s.paths[0]} .. {s.paths[-1]}")
            for label, module in (("attention", s.attention(0)), ("mlp", s.mlp(0)), ("mlp norm", s.mlp_norm(0))):
                if module is not None:
                    lines.append(f"    {label:<10}{_path_of(module, s.blocks[0])} ({type(module).__name__})")
            if s.final_norm is not None:
                lines.append(f"    final norm  {_path_of(s.final_norm, self.model)} ({type(s.final_norm).__name__})")
        lines.append(f"  head  {self.head or '-'}")
        return "\n".join(lines)


def anatomy(model: Any) -> Anatomy:
    """The anatomy of a Transformers or Diffusers model, of a PeftModel around one, or of a Diffusers pipeline's denoiser."""
    model = unwrap(model)
    found = sorted(_block_lists(model, ""), key=lambda item: _call_order(item[0]))
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no stream of Transformer blocks: no ModuleList, Sequential or ModuleDict in it holds "
            "blocks with an attention of their own. Pass the part of the model that holds its Transformer layers."
        )
    streams = [_stream(model, path, blocks) for path, blocks in found]
    count = Counter(stream["name"] for stream in streams)
    seen: Counter = Counter()
    for stream in streams:
        name = stream["name"]
        seen[name] += 1
        if count[name] > 1:
            stream["name"] = f"{name}.{seen[name]}"
    for stream, table in zip(streams, _tables(model, streams), strict=True):
        stream["table"] = table
    config = _config(model)
    return Anatomy(
        model=model,
        model_type=config.model_type if _is_transformers(model) else type(model).__name__,
        streams=tuple(Stream(**stream) for stream in streams),
        head=_head(model),
        embeddings=_embeddings(model),
    )


def unwrap(model: Any) -> nn.Module:
    """The Transformers or Diffusers model inside a PeftModel or a Diffusers pipeline; any other module is returned as it is."""
    peft, diffusers = sys.modules.get("peft"), sys.modules.get("diffusers")
    if diffusers is not None and isinstance(model, diffusers.DiffusionPipeline):
        found = denoising(model.components)
        if found is None:
            raise UnsupportedError(
                f"A pipeline must hold a `transformer` or a `unet`. {type(model).__name__} holds {sorted(model.components)}. "
                "Pass the component that denoises."
            )
        model = found
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
    takes = PROMPT in parameters(type(model)) and not families.FIXED_PROMPT.search(type(model).__name__)
    return _number(_config(model), "prompt") if takes else None


def image_tokens(model: nn.Module) -> list[int]:
    """The ids that stand for pictures and videos in a model's text; none if it reads text alone."""
    config = vars(_config(model) or object)
    return [config[name] for name in families.IMAGE_TOKENS if isinstance(config.get(name), int)]


def denoising(components: dict[str, Any]) -> Any:
    """The denoiser among the components of a pipeline; None if there is none."""
    return next((components[name] for name in ("transformer", "unet") if components.get(name) is not None), None)


def attentions(block: nn.Module) -> list[nn.Module]:
    """The self-attentions of a block, the one that calls the attention function first."""
    found = [(path, module) for path, module in _attentions(block) if not _is_cross(path, module)]
    return [module for _, module in sorted(found, key=lambda item: not _calls_interface(type(item[1])))]


def cross_attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The attentions of a block that read another sequence, with their paths in it."""
    return [(path, module) for path, module in _attentions(block) if _is_cross(path, module)]


def _is_cross(path: str, module: nn.Module) -> bool:
    known = getattr(module, "is_cross_attention", None)
    if isinstance(known, bool):
        return known
    return bool(families.CROSS.search(path) or families.CROSS_CLASS.search(type(module).__name__))


def _attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every innermost attention in a module, with its path."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in _children(block):
        inner = [(f"{name}.{path}", module) for path, module in _attentions(child)]
        if inner:
            found += inner
        elif _is_attention(type(child)) and next(child.children(), None) is not None:
            found.append((name, child))
    return found


@cache
def _is_attention(cls: type[nn.Module]) -> bool:
    if _calls_interface(cls):
        return True
    return bool(families.ATTENTION.search(cls.__name__)) and not families.NOT_ATTENTION.search(cls.__name__)


@cache
def _calls_interface(cls: type[nn.Module]) -> bool:
    """Whether a class looks the attention function up in Transformers' registry."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(cls.forward).__code__.co_names


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    # what hf-tokens hung on a block is no part of the base model
    return ((name, child) for name, child in module.named_children() if name != OWN)


def _block_lists(module: nn.Module, path: str) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    for name, child in _children(module):
        at = f"{path}.{name}" if path else name
        items = dict(_children(child)) if isinstance(child, CONTAINERS) else {}
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
    if isinstance(item, CONTAINERS) or families.NOT_BLOCK.search(type(item).__name__):
        return False
    if _is_attention(type(item)) and not _holds_norm(item):
        return False
    nested = [path for path, _ in _block_lists(item, "")]
    return any(not any(path.startswith(f"{inner}.") for inner in nested) for path, _ in _attentions(item))


def _holds_norm(module: nn.Module) -> bool:
    return any(families.NORM.search(type(child).__name__) for child in module.children())


def _call_order(path: str) -> tuple:
    first = path.split(".")[0]
    after = families.CALLED_BEFORE.values()
    return (first in after,)


def _stream(model: nn.Module, path: str, items: dict[str, nn.Module]) -> dict[str, Any]:
    blocks = tuple(items.values())
    line = _lineage(model, path)
    owner, holder = next((at, module) for at, module in reversed(line) if not isinstance(module, CONTAINERS))
    attending = next((found[0] for block in reversed(blocks) if (found := attentions(block))), None)  # the first may change the width
    if attending is None:
        attending = next(module for block in blocks for _, module in _attentions(block))
    config = next((_config(module) for _, module in reversed(line) if _config(module) is not None), None)
    width = _width(attending) or _number(config, "width")
    if families.CONCATENATES.search(type(attending).__name__):
        width //= 2
    heads = _number(attending, "heads") or _number(config, "heads") or 1
    head_dim = _number(attending, "head_dim") or width // heads
    kv_heads = _number(attending, "kv_heads") or heads // (getattr(attending, "num_key_value_groups", None) or 1)
    kind = _kind(model, line)
    return dict(
        name=_name(kind, line, config, _config(model)),
        kind=kind,
        blocks=blocks,
        paths=tuple(f"{path}.{name}" for name in items),
        owner=owner,
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        causal=_causal(line, blocks[0], attending, config),
        layout="n b d" if vars(attending).get("batch_first") is False else _layout(type(blocks[0])),
        mixers=tuple(_mixer(block) for block in blocks),
        config=config,
        final_norm=_final_norm(model, line),
    )


def _final_norm(model: nn.Module, line: list[tuple[str, nn.Module]]) -> nn.Module | None:
    """The norm that takes the whole sequence behind the blocks: of the nearest module around them that has one, inside the base model."""
    base = model.base_model if _is_transformers(model) and not type(model).__name__.endswith("Model") else model
    for (_, holder), (path, _child) in zip(reversed(line[:-1]), reversed(line), strict=False):
        if isinstance(holder, CONTAINERS):
            continue
        if families.POOLED_NORM.search(type(holder).__name__):
            return None
        names = [name for name, _ in _children(holder)]
        at = names.index(path.rpartition(".")[2])
        norms = {name: norm for name, norm in _children(holder) if _is_norm(norm) and not families.NOT_FINAL.search(name)}
        found = [norm for name, norm in norms.items() if names.index(name) > at or name in families.FINAL_NORMS]
        if found or holder is base:
            return found[0] if found else None
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether a module, or what `modules_to_save` has put a copy beside, is a norm."""
    module = vars(module)["_modules"].get("original_module") or module
    return bool(families.NORM.search(type(module).__name__)) and not isinstance(module, CONTAINERS)


def _mixer(block: nn.Module) -> str:
    if attentions(block):
        return "attention"
    return "cross" if _attentions(block) else "other"


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
            if pattern.search(path.rpartition(".")[2]) or pattern.search(type(module).__name__):
                return kind
    nearest = next(module for _, module in reversed(line) if _is_transformers(module))
    if _main_input(nearest) in parameters(type(nearest)):
        return families.MAIN_INPUTS.get(_main_input(nearest), "other")
    found = [kind for kind, pattern in families.KINDS if pattern.search(type(nearest).__name__)]
    return found[0] if found else families.MAIN_INPUTS.get(_main_input(model), "other")


def _main_input(model: Any) -> str:
    name = model.main_input_name
    return name if isinstance(name, str) else name[0]  # OneFormer lists several


def _name(kind: str, line: list[tuple[str, nn.Module]], config: Any, root: Any) -> str:
    if getattr(config, "is_encoder_decoder", False) or getattr(root, "is_encoder_decoder", False):
        for path, module in line:  # the outermost wins: the layers of a BERT that decodes are called `encoder`
            words = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
            for name in ("decoder", "encoder"):
                if name in words.replace("encoderdecoder", ""):
                    return name
    return kind


def _causal(line: list[tuple[str, nn.Module]], block: nn.Module, attention: nn.Module, config: Any) -> bool:
    """Which mask the module that makes the blocks' mask makes; the attention's own flag where none does."""
    known = families.CAUSAL.get(_qualified(type(block)))
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


def _qualified(cls: type) -> str:
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _layout(cls: type[nn.Module]) -> str:
    for pattern, layout in families.LAYOUTS:
        if pattern.search(_qualified(cls)):
            return layout
    return "n d" if "cu_seqlens" in parameters(cls) else "b n d"


@cache
def _mask_functions(cls: type[nn.Module]) -> frozenset[str]:
    bodies = [inspect.unwrap(f) for f in vars(cls).values() if inspect.isfunction(f)]
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


def _mlp(block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    children = dict(_children(block))
    last = list(_children(children["layer"])) if isinstance(children.get("layer"), nn.ModuleList) else []
    if last:  # T5 and its kin keep attention and MLP, each with its norm, in a list of sub-layers
        children = dict(_children(last[-1][1]))
        mlp = next((child for name, child in children.items() if name in ("DenseReluDense", "mlp")), None)
        return mlp, children.get("layer_norm") if mlp is not None else None
    mlp = next((children[name] for name in families.MLPS if name in children), None)
    if mlp is None or isinstance(mlp, CONTAINERS):
        return None, None
    if getattr(block, "use_parallel_residual", False) or families.POST_NORM_BLOCKS.search(_qualified(type(block))):
        return mlp, None
    post = any(name in children for name in families.POST_NORMS)
    known = families.MLP_NORM_OF.get(_qualified(type(block)))
    names = (known,) if known else families.MLP_NORMS
    norms = [children[name] for name in names if name in children and not (post and name.startswith("post_attention"))]
    return mlp, norms[0] if norms and not isinstance(norms[0], CONTAINERS) else None


def _path_of(target: nn.Module, root: nn.Module) -> str | None:
    return next((path for path, module in root.named_modules() if module is target), None)


def _embeddings(model: nn.Module) -> str | None:
    if not _is_transformers(model):
        return None
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return _path_of(found, model) if isinstance(found, nn.Module) else None


def _tables(model: nn.Module, streams: list[dict[str, Any]]) -> list[str | None]:
    """For each stream the path of its embedding table. One that serves several is that of the stream nearest to it, the first of these."""
    names = {id(module): path for path, module in model.named_modules()}
    found = [_nearest_table(model, stream["owner"]) if stream["kind"] == "text" else (0, None) for stream in streams]
    best: dict[int, int] = {}
    for i, (depth, table) in enumerate(found):
        if table is not None and depth > found[best.setdefault(id(table), i)][0]:
            best[id(table)] = i
    return [names[id(table)] if best.get(id(table)) == i else None for i, (_, table) in enumerate(found)]


def _nearest_table(model: nn.Module, owner: str) -> tuple[int, nn.Module | None]:
    """The embedding table of the nearest model around a stream, and how deep that model lies."""
    parts = owner.split(".") if owner else []
    for depth in range(len(parts), -1, -1):
        holder = model.get_submodule(".".join(parts[:depth]))
        if not _is_transformers(holder):
            continue
        try:
            table = holder.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(table, nn.Module) and not isinstance(table, CONTAINERS):
            if any(isinstance(module, nn.Embedding) for module in table.modules()):
                return depth, table
    return 0, None


def prefix_tokens(model: nn.Module, stream: Stream) -> int:
    """How many special tokens (class, distillation, registers) an encoder of pictures puts in front of its patches."""
    if stream.kind not in ("vision", "video"):
        return 0
    at, holder = stream.owner, model.get_submodule(stream.owner)
    inside = set()
    while True:
        for name, value in holder.named_parameters():
            if families.PREFIX.search(name) and not any(path in name for path in ("decoder", OWN)):
                inside.add((id(value), value.shape[-2] if value.dim() == 3 else 1))
        if inside or not at:
            return sum(count for _, count in inside)
        at = at.rpartition(".")[0]
        holder = model.get_submodule(at)


def _head(model: nn.Module) -> str | None:
    found = model.get_output_embeddings() if _is_transformers(model) else None
    if isinstance(found, nn.Module):
        return _path_of(found, model)
    children = dict(_children(model))
    return next((name for name in families.HEADS if name in children), None)
