"""Where the methods of an adapter go: everything that can be wrong with it is found here, before the model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import ConfigError, UnsupportedError, did_you_mean, explain
from ..handlers.objective import one_at_a_time
from ..handlers.weight_edit import reaches_outside
from ..model import families
from ..model.anatomy import pictured_stream, prompt_width
from ..model.blocks import layer_index, several_slots
from ..model.classes import class_name
from ..model.parts import OUTSIDE, WEIGHT_SITES, block_weights, check_plain, check_weights, cross_attentions, outside_weights
from ..model.pictures import block_that_is_read, forms_grids
from ..model.pipelines import their_caches
from ..model.signatures import parameters
from ..model.streams import LAYOUTS, PACKED, PROMPT, SIDE_BY_SIDE, Anatomy, Stream
from ..roles.attention_edit import AttentionEdit
from ..roles.base import Method
from ..roles.cache_compressor import CacheCompressor
from ..roles.config import MethodConfig
from ..roles.feature_cache import FeatureCache
from ..roles.objective import Objective
from ..roles.pooler import Pooler
from ..roles.registry import MethodInfo, method_info
from ..roles.routers import LayerRouter, TokenRouter
from ..roles.signals import GRIDDED, OF_ATTENTION, SCORED, SPANS, TAPPED
from ..roles.token_bank import TokenBank
from ..roles.token_reducer import TokenReducer
from ..roles.token_scorer import TokenScorer
from ..roles.weight_edit import WeightEdit
from .bases import check_base
from .config import HFTokensConfig

# What is of the residual stream itself, and the roles whose methods are given that.
OF_THE_STREAM = {"hidden", "entered", "attended", "own", "pictured"}
READERS = ("TokenBank", "TokenReducer", "TokenRouter", "LayerRouter", "CacheCompressor", "AttentionEdit")


@dataclass(frozen=True)
class Placement:
    """One method in one stream."""

    slot: int
    config: MethodConfig
    info: MethodInfo
    stream: Stream
    layers: tuple[int, ...]


def names_of(cls: type[Method]) -> set[str]:
    """The signals that the words of a method name."""
    return {name for names in cls.words.values() for name in names}


def sees(cls: type[Method]) -> bool:
    """Whether a method looks at visual tokens among the text."""
    return bool(SPANS & names_of(cls))


def reads_prompt(cls: type[Method], stream: Stream, base: Anatomy) -> bool:
    """Whether the model is given a prompt, and, for a method that gives each block its own, each block gets it by itself."""
    by_itself = all(PROMPT in parameters(type(block)) for block in stream.blocks)
    return prompt_width(base.model) is not None and (by_itself or not issubclass(cls, TokenBank) or not cls.deep)


def shows(cls: type[Method], stream: Stream, base: Anatomy) -> bool:
    """Whether a stream holds the visual tokens that a method looks at, or is the tower that it shortens for them."""
    known = not cls.tower or block_that_is_read(base) is not None
    return known and (stream is pictured_stream(base) or cls.tower and stream.kind == "vision")


def fits(info: MethodInfo, stream: Stream, base: Anatomy) -> bool:
    """Whether a method supports a stream."""
    cls = info.cls
    if sees(cls) and not shows(cls, stream, base) or cls.site == "embedding" and stream.table is None:
        return False
    if GRIDDED in names_of(cls) and not forms_grids(base.model):
        return False
    if cls.site == "prompt" and not reads_prompt(cls, stream, base):
        return False
    if (cls.kinds and stream.kind not in cls.kinds) or cls.causal not in (None, stream.causal):
        return False
    if issubclass(cls, WeightEdit):  # it never looks at the tokens
        return any(block_weights(block, cls.site) for block in stream.blocks)
    return stream.layout in LAYOUTS


def demand(info: MethodInfo) -> str:
    """What streams a method supports, in words."""
    causal = {True: "causal ", False: "bidirectional ", None: ""}[info.cls.causal]
    kinds = f" of kind {', '.join(info.cls.kinds)}" if info.cls.kinds else ""
    if issubclass(info.cls, WeightEdit):
        return f"a {causal}stream{kinds} whose blocks have {WEIGHT_SITES[info.cls.site][1]}"
    if info.cls.site == "prompt":
        each = " and hands it to each block" if info.cls.deep else ""
        return f"a {causal}stream{kinds} of a denoiser that is given a prompt of any length, `{PROMPT}`{each}"
    table = " and come from a table of embeddings" if info.cls.site == "embedding" else ""
    pictures = ", with tokens of pictures among them" if sees(info.cls) else ""
    pictures += ", known to lie row by row" if GRIDDED in names_of(info.cls) else ""
    pictures += ", behind a tower of which one block is known to be read" if info.cls.tower else ""
    return f"a {causal}stream{kinds} whose tokens stand in a row{table}{pictures}"


def head_outputs(base: Anatomy) -> int | None:
    """Features that the model's head returns; None if it has no linear head."""
    head = None if base.head is None else base.model.get_submodule(base.head)
    head = head.original_module if isinstance(head, AuxiliaryTrainingWrapper) else head
    return None if head is None else vars(head).get("out_features")


def before_head(streams: list[Stream], info: MethodInfo, base: Anatomy) -> list[Stream]:
    """The stream among these that the model's head reads: the last that is called."""
    chosen = [stream for stream in streams if stream is base.streams[-1]]
    each = issubclass(info.cls, TokenScorer)
    if not chosen or head_outputs(base) is None or each and not families.CLASSIFIES_EACH.search(class_name(base.model)):
        rule = f"Method {info.name!r} needs a linear head{' that classifies tokens' * each} behind {demand(info)}"
        got = f"{type(base.model).__name__} with {base.head or 'no head'} behind its stream {base.streams[-1].name}"
        heads = "AutoModelForTokenClassification" if each else "AutoModelForCausalLM or AutoModelForImageClassification"
        raise UnsupportedError(explain(rule, got, f"Load it with a head, such as {heads}."))
    return chosen


def read_as_a_whole(streams: list[Stream], info: MethodInfo, base: Anatomy) -> list[Stream]:
    """The streams among these of which nothing reads each token: no head, and no later stream."""
    name = type(base.model).__name__
    last = [stream for stream in streams if stream is base.streams[-1] or families.TOWERS.search(name)]
    if info.cls.site == "output" and not info.cls.words.get("ask") and families.LATE_INTERACTION.search(name):
        return last
    each = base.model.get_output_embeddings() is not None or families.READS_EACH.search(name)
    if each or not last:
        rule = f"Method {info.name!r} needs a stream that is read as a whole: of an encoder, an embedder or a classifier"
        got = f"{name}, whose {'head' if each else f'stream {base.streams[-1].name!r}'} reads the tokens one by one"
        raise UnsupportedError(explain(rule, got, "Load it with another head or none, such as AutoModel does."))
    return last


def all_that_read(streams: list[Stream], info: MethodInfo, base: Anatomy) -> list[Stream]:
    """The streams, which must be all that can see the prompt: what is there for one block must be kept from the others."""
    inside = {id(module) for stream in streams for block in stream.blocks for module in block.modules()}
    outside = [stream.name for stream in base.streams if stream not in streams]
    outside += [path for path, module in cross_attentions(base.model) if id(module) not in inside]
    outside += ["a pool of the prompt"] if families.POOLED_PROMPT.search(class_name(base.model)) else []
    if outside:
        rule = f"Method {info.name!r} gives each block a prompt of its own, so it acts in all that reads the prompt"
        got = f"{outside} of {type(base.model).__name__} beside it"
        raise UnsupportedError(explain(rule, got, "Leave out `stream`, or choose another model."))
    return streams


def readable(streams: list[Stream], info: MethodInfo, base: Anatomy) -> list[Stream]:
    """Those of the fitting streams whose readers fit too; an objective acts once for the whole model."""
    if issubclass(info.cls, Pooler):
        return read_as_a_whole(streams, info, base)
    if info.cls.needs_head:
        return before_head(streams, info, base)
    if issubclass(info.cls, TokenBank) and info.cls.site == "prompt":
        return all_that_read(streams, info, base) if info.cls.deep else streams[:1]
    return streams[-1:] if issubclass(info.cls, Objective) else streams


def choose_streams(config: MethodConfig, info: MethodInfo, base: Anatomy) -> list[Stream]:
    """The streams that a method acts on."""
    rule = f"Method {info.name!r} needs {demand(info)}"
    grid = lambda s: "" if s.layout in LAYOUTS else f", on a grid: {s.layout}"
    streams = ", ".join(f"{s.name} ({'causal ' if s.causal else ''}{s.kind}{grid(s)})" for s in base.streams)
    if config.stream is not None:
        named = [s for s in base.streams if config.stream in (s.name, s.name.split(".")[0])]
        if not named:
            remedy = f"{did_you_mean([config.stream], [s.name for s in base.streams])}It has {streams}."
            raise ConfigError(explain(f"{type(config).__name__}.stream must be a stream of the model", repr(config.stream), remedy))
        if not all(fits(info, s, base) for s in named):
            raise UnsupportedError(explain(rule, f"{config.stream!r}", f"The model has {streams}."))
        return readable(named, info, base)
    fitting = [s for s in base.streams if fits(info, s, base)]
    if not fitting:
        raise UnsupportedError(explain(rule, f"{type(base.model).__name__} with {streams}", "Choose another method or model."))
    fitting = [s for s in fitting if s.layout != PACKED or info.cls.packed] or fitting  # what is packed only where nothing else is
    if info.cls.site == "stack":  # what is decided once begins where all tokens are together
        fitting = [s for s in fitting if not families.REFINERS.search(s.paths[0])] or fitting
    return readable(fitting, info, base)


def attends(cls: type[Method]) -> bool:
    """Whether a method acts in each of its blocks by itself, and needs a self-attention there."""
    alone = issubclass(cls, (CacheCompressor, AttentionEdit, TokenRouter)) and not cls.pairs
    names = names_of(cls) | {*cls.signals, *cls.observes}
    return alone and (issubclass(cls, (CacheCompressor, AttentionEdit)) or bool(names & {*TAPPED, *OF_ATTENTION, SCORED}))


def attending_layers(info: MethodInfo, stream: Stream, layers: Iterable[int]) -> list[int]:
    """Those of the blocks that a method would choose that have a self-attention, if any has; what is left out is said."""
    layers = [*layers]
    inside = [i for i in layers if stream.mixers[i] == "attention"]
    if not inside or len(inside) == len(layers):
        return layers
    left = [i for i in layers if i not in inside]
    warnings.warn(f"hf-tokens: {info.name} acts in blocks {inside} of stream {stream.name!r}; {left} have no self-attention.", stacklevel=2)
    return inside


def all_blocks(base: Anatomy) -> list[nn.Module]:
    """The blocks of all streams of a model."""
    return [block for stream in base.streams for block in stream.blocks]


def check_edited(base: Anatomy, info: MethodInfo, config: MethodConfig, stream: Stream, layers: tuple[int, ...]) -> None:
    """Refuse weights that no others may stand in for."""
    for index in layers:
        check_weights(base.model, stream.blocks[index], stream.paths[index], info.cls.site_of(config))
    if reaches_outside(info.cls, config):
        for name, ((module, attribute), *_) in outside_weights(base.model, all_blocks(base)).items():
            check_plain(module._parameters[attribute], name.removeprefix(OUTSIDE))


def choose_layers(config: MethodConfig, info: MethodInfo, stream: Stream, base: Anatomy) -> tuple[int, ...]:
    """The blocks of a stream that a method acts on."""
    n = len(stream)
    if info.cls.tower and stream.kind == "vision":
        return (block_that_is_read(base),)
    if config.layers == ():
        remedy = "Leave it out for the method's own choice, or leave out the method."
        raise ConfigError(explain(f"{type(config).__name__}.layers must name a block", "()", remedy))
    named = info.cls.default_layers(config, n) if config.layers is None else config.layers
    if config.layers is None and issubclass(info.cls, WeightEdit):
        named = [i for i in named if block_weights(stream.blocks[i], info.cls.site_of(config))]
    if config.layers is None and attends(info.cls):
        named = attending_layers(info, stream, named)
    outside = [i for i in named if not -n <= i < n]
    if outside:
        rule = f"{type(config).__name__}.layers must lie in [{-n}, {n - 1}] for the {n} blocks of stream {stream.name!r}"
        raise ConfigError(explain(rule, outside, "Name blocks that exist."))
    return tuple(sorted({i % n for i in named}))


def plan(base: Anatomy, config: HFTokensConfig) -> list[Placement]:
    """Where every method goes; everything that can be wrong with it is found here, before the model is touched."""
    if not config.stack():
        rule = "An adapter has at least one method beside its LoRAs"
        kinds = [method["config"]["peft_type"] for method in config.methods]
        raise ConfigError(explain(rule, kinds, "Call `peft.get_peft_model` for these alone."))
    placements = []
    for slot, method in enumerate(config.stack()):
        info = method_info(method.method, method.version)
        if not info.cls.placed:
            rule = f"A method of the role {info.role} is no adapter"
            raise UnsupportedError(explain(rule, repr(info.name), "Its card says which function applies it."))
        for stream in choose_streams(method, info, base):
            layers = choose_layers(method, info, stream, base)
            for check in (check_cache, check_place, check_first, check_span, check_streams):
                check(info, stream, layers)
            if issubclass(info.cls, WeightEdit):
                check_edited(base, info, method, stream, layers)
            info.cls.check(method, stream.kind, len(stream), layers)
            placements.append(Placement(slot, method, info, stream, layers))
    check_single(placements)
    check_inside(base, placements)
    for stream in base.streams:
        for index in range(len(stream)):
            check_company([p for p in placements if p.stream is stream and index in p.layers], stream.paths[index])
    check_base(
        base.model, config, {p.stream.name: [len(p.stream), p.stream.width, p.stream.paths[0].rpartition(".")[0]] for p in placements}
    )
    return placements


def reduces(cls: type[Method], site: str) -> bool:
    """Whether a method is a reducer of a site."""
    return issubclass(cls, TokenReducer) and cls.site == site


def stores_otherwise(cls: type[Method]) -> bool:
    """Whether a cache compressor stores entries in another format."""
    return issubclass(cls, CacheCompressor) and cls.hold is not CacheCompressor.hold


def folds(placement: Placement) -> bool:
    """Whether a cache compressor lets entries that stay take in those that go."""
    return issubclass(placement.info.cls, CacheCompressor) and placement.info.cls.folds(placement.config)


# what one block takes: a rule, the methods that it is about, and those that may not stand beside one of them, another of their own kind too
COMPANY: tuple[tuple[str, Callable, Callable], ...] = (
    (
        "One block takes one reducer between its attention and MLP, and no router beside it",
        lambda p: reduces(p.info.cls, "middle"),
        lambda p: issubclass(p.info.cls, (TokenRouter, LayerRouter)),
    ),
    ("One block takes one reducer in front of its sublayers", lambda p: reduces(p.info.cls, "sublayer"), lambda p: False),
    (
        "A feature cache stands alone: no other one beside it, and no method that changes the number of tokens",
        lambda p: issubclass(p.info.cls, FeatureCache),
        lambda p: p.info.cls.moves_tokens,
    ),
    (
        "One block takes one cache compressor that stores entries in another format",
        lambda p: stores_otherwise(p.info.cls),
        lambda p: False,
    ),
    (
        "Entries that two blocks store as one take in no others",
        lambda p: stores_otherwise(p.info.cls) and p.info.cls.pairs,
        folds,
    ),
    (
        "Entries that are turned to other places as others leave take in none",
        lambda p: folds(p) and "rotation" in p.info.cls.words["fold"],
        folds,
    ),
    (
        "A bank that shapes an attention call stands beside no method that looks at it",
        lambda p: bool(p.info.cls.words.get("attend")),
        lambda p: bool(({"queries", "scores", SCORED} if issubclass(p.info.cls, CacheCompressor) else TAPPED) & names_of(p.info.cls)),
    ),
)


def check_company(placements: list[Placement], path: str) -> None:
    """The methods of one block must get on with each other."""
    for rule, about, against in COMPANY:
        ruled = [p for p in placements if about(p)]
        others = [p for p in placements if p not in ruled and against(p)]
        if len(ruled) > 1 or ruled and others:
            names = [p.info.name for p in placements if p in ruled + others]
            raise UnsupportedError(explain(rule, f"{names} in {path}", "Give them different layers."))


def check_cache(info: MethodInfo, stream: Stream, layers: tuple[int, ...]) -> None:
    """A cache compressor needs a cache."""
    blocks = {i: stream.blocks[i] for i in layers}
    without = [i for i, block in blocks.items() if layer_index(block, stream.attention(i)) is None or several_slots(block)]
    if issubclass(info.cls, CacheCompressor) and without:
        rule, at = f"Method {info.name!r} needs blocks that store their keys in a slot of a cache", without[0]
        got = f"{type(stream.blocks[at]).__name__} at {stream.paths[at]}"
        raise UnsupportedError(explain(rule, got, "Choose another stream or model."))


def check_place(info: MethodInfo, stream: Stream, layers: tuple[int, ...]) -> None:
    """A pooler stands where the tokens leave."""
    if issubclass(info.cls, Pooler) and layers != (len(stream) - 1,):
        rule = f"Method {info.name!r} acts behind the last block of a stream, {len(stream) - 1} of {stream.name!r}"
        raise UnsupportedError(explain(rule, f"layers {layers}", "Leave out `layers`."))


def check_streams(info: MethodInfo, stream: Stream, layers: tuple[int, ...]) -> None:
    """A method that reads the hidden states of parallel residual streams says that it can."""
    reads = OF_THE_STREAM & names_of(info.cls) if info.role in READERS and info.cls.site != "mlp" else set()
    if stream.layout in SIDE_BY_SIDE and reads and not info.cls.side_by_side:
        rule = f"Method {info.name!r} reads {sorted(reads)} of one residual stream"
        got = f"{type(stream.blocks[0]).__name__} with several side by side, {stream.layout!r}"
        raise UnsupportedError(explain(rule, got, "Choose another stream, method or model."))


def check_single(placements: list[Placement]) -> None:
    """The tokens of a stream leave it once, and a loss is replaced once."""
    poolers = [p for p in placements if issubclass(p.info.cls, Pooler)]
    for stream in {id(p.stream): p.stream for p in poolers}.values():
        names = [p.info.name for p in poolers if p.stream is stream]
        if len(names) > 1:
            rule = f"The stream {stream.name!r} takes one Pooler"
            raise UnsupportedError(explain(rule, names, "Give each an adapter of its own, and switch between them."))
    replacing = [p.info.name for p in placements if p.info.cls.replaces]
    if len(replacing) > 1:
        raise one_at_a_time(replacing)


def check_inside(base: Anatomy, placements: list[Placement]) -> None:
    """What changes the tokens of a block, or keeps what it returned, stands inside of a cache of diffusers' own, and never around it."""
    names = [p.info.name for p in placements if p.info.cls.moves_tokens or issubclass(p.info.cls, FeatureCache)]
    caches = their_caches(base.model) if names else []
    if caches:
        rule = f"{sorted(set(names))} must be in a denoiser before a cache of diffusers' own"
        raise UnsupportedError(explain(rule, f"one with {caches}", "Call `disable_cache()`, and `enable_cache` again behind it."))


def check_first(info: MethodInfo, stream: Stream, layers: tuple[int, ...]) -> None:
    """A bank at the embeddings or the prompt sits in the first block, and in later ones if it is deep."""
    cls = info.cls
    in_front = issubclass(cls, TokenBank) and (cls.site == "embedding" or cls.site == "prompt" and not cls.deep)
    if in_front and (layers[0] != 0 or len(layers) > 1 and not cls.deep):
        rule = f"Method {info.name!r} acts in the first block{' and later ones' if cls.deep else ' alone'}"
        raise UnsupportedError(explain(rule, f"layers={layers} of stream {stream.name!r}", "Leave out `layers`."))


def check_span(info: MethodInfo, stream: Stream, layers: tuple[int, ...]) -> None:
    """What shortens a stream for a while, or reuses a stack of its blocks, does so in blocks that follow each other."""
    spans = issubclass(info.cls, TokenReducer) and info.cls.spans or info.cls.site == "stack"
    if spans and layers != tuple(range(layers[0], layers[-1] + 1)):
        rule = f"Method {info.name!r} acts from one block to another, in all blocks between them"
        raise UnsupportedError(explain(rule, f"layers={layers} of stream {stream.name!r}", "Name blocks that follow each other."))
