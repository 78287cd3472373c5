"""The one PEFT type, HF_TOKENS: its config, where its methods go, and what PEFT does with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftModel, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, _set_adapter, register_peft_method
from torch import nn

from .anatomy import Anatomy, Stream, anatomy, prefix_tokens
from .call import LAYOUTS, PACKED
from .config import MethodConfig
from .errors import AdapterError, ConfigError, UnsupportedError, explain
from .layer import BlockSurgery, layer_index
from .registry import MethodInfo, method_config, method_info
from .roles import CacheCompressor, Dims, LayerRouter, TokenRouter
from .root import Root
from .surgery import Runtime

NAME = "HF_TOKENS"
CHILD = "hf_tokens"
PEFT_METHOD = "peft"
FORMAT = 1  # of adapter_config.json and of the names of an adapter's tensors


def extend_peft_type() -> PeftType:
    """Add HF_TOKENS to PEFT's closed enum."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


class PlainType(str):
    """Stands for the enum member where PEFT's enum cannot be extended: compares as the string, has what PEFT reads."""

    value = property(str)
    name = property(str)


def peft_type() -> PeftType | PlainType:
    """The PEFT type, as an enum member where that is possible."""
    try:
        return extend_peft_type()
    except (AttributeError, TypeError):
        return PlainType(NAME)


HF_TOKENS = peft_type()


@dataclass
class HFTokensConfig(PeftConfig):
    """An adapter: an ordered stack of methods, in their JSON form.

    Args:
        methods: Names, method configs, or dicts such as `{"method": "ftp", "sparsity": 0.3}`; a LoRA among them is
            `{"method": "peft", "config": {"peft_type": "LORA", ...}}` or a PeftConfig.
        modules_to_save: Modules that are trained and saved as a whole, such as a new head.
        init_weights: Taken for PEFT's sake.
    """

    methods: list[Any] | None = field(default=None)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    init_weights: bool = field(default=True)
    base: dict[str, list[Any]] | None = field(default=None)
    hf_tokens_version: int = field(default=FORMAT)

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = HF_TOKENS
        if isinstance(self.methods, (str, dict, MethodConfig, PeftConfig)):
            self.methods = [self.methods]
        if self.methods is not None and not isinstance(self.methods, Iterable):
            rule = "The methods of an adapter are a name, a config, or a list of them"
            raise ConfigError(explain(rule, repr(self.methods), "`hf-tokens list` names them."))
        if not self.methods:
            raise ConfigError(
                explain("An adapter has at least one method", self.methods, "Pass methods=['...']; `hf-tokens list` names them.")
            )
        self.methods = [plain_form(method) for method in self.methods]
        if self.target_modules or self.exclude_modules:
            came = f"target_modules={self.target_modules!r}, exclude_modules={self.exclude_modules!r}"
            raise ConfigError(explain("A method's own `layers` and `stream` say where it acts", came, "Set those in its config."))
        if self.hf_tokens_version != FORMAT:
            rule = f"This hf-tokens reads adapters of format {FORMAT}"
            raise ConfigError(
                explain(rule, f"hf_tokens_version={self.hf_tokens_version!r}", "Update hf-tokens, or train the adapter again.")
            )

    def stack(self) -> list[MethodConfig]:
        """The method configs, in order, without the PEFT configs among them."""
        return [method_config(method) for method in self.methods if method["method"] != PEFT_METHOD]

    def peft_configs(self) -> list[PeftConfig]:
        """The PEFT configs among the methods."""
        return [get_peft_config({**m["config"], "inference_mode": self.inference_mode}) for m in self.methods if m["method"] == PEFT_METHOD]


def plain_form(method: Any) -> dict[str, Any]:
    """The checked JSON form of one method."""
    if isinstance(method, PeftConfig):
        data = {k: sorted(v) if isinstance(v, set) else v for k, v in method.to_dict().items() if v is not None}
        method = {"method": PEFT_METHOD, "config": {**data, "peft_type": str(data["peft_type"].value)}}
    if isinstance(method, dict) and method.get("method") == PEFT_METHOD:
        if not isinstance(method.get("config"), dict) or "peft_type" not in method["config"]:
            raise ConfigError(explain("A 'peft' method has a config with a 'peft_type'", repr(method), "Pass the PeftConfig itself."))
        kind = method["config"]["peft_type"]
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind, object)
        if not issubclass(tuner, BaseTuner) or tuner is HFTokensModel:
            rule = "A 'peft' method is one of PEFT's that act on layers, such as LORA"
            raise ConfigError(explain(rule, repr(kind), "Put another kind around the model, by `peft.get_peft_model`."))
        return method
    return method_config(method).to_dict()


@dataclass(frozen=True)
class Placement:
    """One method in one stream."""

    slot: int
    config: MethodConfig
    info: MethodInfo
    stream: Stream
    layers: tuple[int, ...]


def fits(info: MethodInfo, stream: Stream) -> bool:
    """Whether a method supports a stream."""
    cls = info.cls
    return (not cls.kinds or stream.kind in cls.kinds) and cls.causal in (None, stream.causal) and stream.layout in LAYOUTS


def demand(info: MethodInfo) -> str:
    """What streams a method supports, in words."""
    causal = {True: "causal ", False: "bidirectional ", None: ""}[info.cls.causal]
    kinds = f" of kind {', '.join(info.cls.kinds)}" if info.cls.kinds else ""
    return f"a {causal}stream{kinds} whose tokens stand in a row"


def head_outputs(found: Anatomy) -> int | None:
    """Features that the model's head returns; None if it has no linear head."""
    head = None if found.head is None else found.model.get_submodule(found.head)
    head = head.original_module if isinstance(head, AuxiliaryTrainingWrapper) else head
    return None if head is None else vars(head).get("out_features")


def before_head(streams: list[Stream], info: MethodInfo, found: Anatomy) -> list[Stream]:
    """The stream among these that the model's head reads: the last that is called."""
    chosen = [stream for stream in streams if stream is found.streams[-1]]
    if not chosen or head_outputs(found) is None:
        rule = f"Method {info.name!r} needs a linear head behind {demand(info)}"
        came = f"{type(found.model).__name__} with {found.head or 'no head'} behind its stream {found.streams[-1].name}"
        raise UnsupportedError(explain(rule, came, "Load it with a classification head, such as AutoModelForImageClassification."))
    return chosen


def choose_streams(config: MethodConfig, info: MethodInfo, found: Anatomy) -> list[Stream]:
    """The streams that a method acts on."""
    rule = f"Method {info.name!r} needs {demand(info)}"
    grid = lambda s: "" if s.layout in LAYOUTS else f", on a grid: {s.layout}"
    here = ", ".join(f"{s.name} ({'causal ' if s.causal else ''}{s.kind}{grid(s)})" for s in found.streams)
    if config.stream is not None:
        named = [s for s in found.streams if config.stream in (s.name, s.name.split(".")[0])]
        if not named:
            raise ConfigError(
                explain(f"{type(config).__name__}.stream must be a stream of the model", repr(config.stream), f"It has {here}.")
            )
        if not all(fits(info, s) for s in named):
            raise UnsupportedError(explain(rule, f"{config.stream!r}", f"The model has {here}."))
        return before_head(named, info, found) if info.cls.needs_head else named
    fitting = [s for s in found.streams if fits(info, s)]
    if not fitting:
        raise UnsupportedError(explain(rule, f"{type(found.model).__name__} with {here}", "Choose another method or model."))
    fitting = [s for s in fitting if s.layout != PACKED or info.cls.packed] or fitting  # what is packed only where nothing else is
    return before_head(fitting, info, found) if info.cls.needs_head else fitting


def choose_layers(config: MethodConfig, info: MethodInfo, stream: Stream) -> tuple[int, ...]:
    """The blocks of a stream that a method acts on."""
    n = len(stream)
    if config.layers == ():
        remedy = "Leave it out for the method's own choice, or leave out the method."
        raise ConfigError(explain(f"{type(config).__name__}.layers must name a block", "()", remedy))
    named = info.cls.default_layers(config, n) if config.layers is None else config.layers
    outside = [i for i in named if not -n <= i < n]
    if outside:
        rule = f"{type(config).__name__}.layers must lie in [{-n}, {n - 1}] for the {n} blocks of stream {stream.name!r}"
        raise ConfigError(explain(rule, outside, "Name blocks that exist."))
    return tuple(sorted({i % n for i in named}))


def plan(found: Anatomy, config: HFTokensConfig) -> list[Placement]:
    """Where every method goes; everything that can be wrong with it is said here, before the model is touched."""
    placements = []
    for slot, one in enumerate(config.stack()):
        info = method_info(one.method, one.version)
        for stream in choose_streams(one, info, found):
            layers = choose_layers(one, info, stream)
            check_cache(info, stream, layers)
            info.cls.check(one, stream.kind, len(stream), layers)
            placements.append(Placement(slot, one, info, stream, layers))
    for stream in found.streams:
        for index in range(len(stream)):
            here = [p for p in placements if p.stream is stream and index in p.layers]
            in_middle = [p for p in here if p.info.role == "TokenReducer" and p.info.cls.site == "middle"]
            routers = [p for p in here if issubclass(p.info.cls, (TokenRouter, LayerRouter))]
            if len(in_middle) > 1 or in_middle and routers:
                names = [p.info.name for p in in_middle + routers]
                raise UnsupportedError(
                    explain(
                        "One block takes one reducer between its attention and MLP, and no router beside it",
                        f"{names} in {stream.paths[index]}",
                        "Give them different layers.",
                    )
                )
            caches = [p for p in here if p.info.role == "FeatureCache"]
            if caches and (len(caches) > 1 or any(p.info.cls.moves_tokens for p in here if p not in caches)):
                rule = "A feature cache stands alone: no other one beside it, and no method that changes the number of tokens"
                names = [p.info.name for p in here]
                raise UnsupportedError(explain(rule, f"{names} in {stream.paths[index]}", "Give them different layers."))
    check_base(found, config, placements)
    return placements


def check_cache(info: MethodInfo, stream: Stream, layers: tuple[int, ...]) -> None:
    """A cache compressor needs a cache."""
    without = [i for i in layers if layer_index(stream.blocks[i], stream.attention(i)) is None]
    if issubclass(info.cls, CacheCompressor) and without:
        rule = f"Method {info.name!r} needs blocks that store their keys in a cache"
        raise UnsupportedError(
            explain(rule, f"{type(stream.blocks[without[0]]).__name__} at {stream.paths[without[0]]}", "Choose another stream or model.")
        )


def check_base(found: Anatomy, config: HFTokensConfig, placements: list[Placement]) -> None:
    """Compare the base that an adapter was made for with this one."""
    now = {p.stream.name: [len(p.stream), p.stream.width, p.stream.paths[0].rpartition(".")[0]] for p in placements}
    if config.base is not None and config.base != now:
        try:
            text = lambda base: ", ".join(f"{name}: {n} blocks of width {width} at {path}" for name, (n, width, path) in base.items())
            made_for = text(config.base)
        except (AttributeError, TypeError, ValueError):
            made_for = repr(config.base)
        raise AdapterError(
            explain(f"This adapter was made for a base with {made_for}", text(now), "Load the base model that its card names.")
        )
    config.base = now


def names_of_ours(configs: dict[str, PeftConfig]) -> set[str]:
    """Names of our adapters among those of a model."""
    return {name for name, config in configs.items() if config.peft_type == HF_TOKENS}


def bare(module: nn.Module, ours: set[str]) -> nn.Module:
    """What is left of a module without the layers that only a LoRA or `modules_to_save` of these adapters put around it."""
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not isinstance(module, BlockSurgery):
        if not module._get_available_adapters() <= ours:
            break
        module = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.get_base_layer()
    return module


def unwrap(model: nn.Module, ours: set[str]) -> None:
    """Give modules that a LoRA or `modules_to_save` of ours wraps their own place back; leave what an adapter from outside wraps."""
    done = None
    for path, module in list(model.named_modules()):
        if done is not None and path.startswith(done):
            continue
        inner = bare(module, ours)
        if inner is not module:
            model.set_submodule(path, inner)
            done = f"{path}."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            there = module._get_available_adapters()
            for name in there & ours:
                module.delete_adapter(name, new_active_adapters=sorted(there - ours)[:1])
        elif isinstance(module, BaseTunerLayer) and not isinstance(module, BlockSurgery):
            for name in module._get_available_adapters() & ours:
                module.delete_adapter(name)


def check_name(adapter_name: str, there: dict[str, PeftConfig]) -> None:
    """Refuse a name that is taken: one adapter would take the other's place in the dict that they share."""
    if adapter_name in there:
        rule = "Every adapter in a model has a name of its own"
        came = f"{adapter_name!r} for {NAME} beside {adapter_name!r} for {there[adapter_name].peft_type.value}"
        raise ConfigError(explain(rule, came, "Pass another `adapter_name`, or unload the one that is there."))


class HFTokensModel(BaseTuner):
    """The tuner behind `get_peft_model`."""

    prefix = "hf_tokens_"
    tuner_layer_cls = BlockSurgery
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        there = model.peft_config if isinstance(model, PeftModel) else vars(model).get("peft_config", {})
        check_name(adapter_name, there)
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            there.pop(adapter_name, None)
            raise

    def _prepare_adapter_config(self, peft_config: HFTokensConfig, model_config: dict) -> HFTokensConfig:
        self._anatomy = anatomy(self.model)
        self._plan = plan(self._anatomy, peft_config)
        names = {id(module): name for name, module in self.model.named_modules()}
        self._blocks = {id(p.stream.blocks[i]): (p.stream, i) for p in self._plan for i in range(len(p.stream))}
        peft_config.target_modules = sorted(names[block] for block in self._blocks)
        return peft_config

    def _check_tied_modules(self, model: nn.Module, peft_config: HFTokensConfig) -> None:
        if peft_config.modules_to_save:  # nothing else of ours can be tied, and not every model says what is
            super()._check_tied_modules(model, peft_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        if id(target) not in self._blocks:
            return
        stream, index = self._blocks[id(target)]
        side = target._modules.get(CHILD)
        if side is None:
            side = BlockSurgery(self._runtime(stream), index)
            target.hf_tokens = side
        methods = {}
        for p in self._plan:
            if p.stream is stream and index in p.layers:
                methods[str(p.slot)] = self._build(p, index, adapter_name)
        side.add(adapter_name, methods)
        for slot, method in methods.items():
            first = min(p.layers[0] for p in self._plan if p.stream is stream and str(p.slot) == slot)
            method._leader = (stream.blocks[first].hf_tokens.hf_tokens_methods[adapter_name][slot],)

    def _build(self, p: Placement, index: int, adapter_name: str):
        stream = p.stream
        dims = Dims(
            width=stream.width,
            heads=stream.heads,
            kv_heads=stream.kv_heads,
            head_dim=stream.head_dim,
            layer=index,
            layers=len(stream),
            kind=stream.kind,
            causal=stream.causal,
            leads=index == p.layers[0],
            outputs=head_outputs(self._anatomy),
        )
        method = p.info.cls(p.config, dims)
        method.key = f"{adapter_name}.{p.slot}"
        return method

    def _runtime(self, stream: Stream) -> Runtime:
        for runtime in self._root.runtimes:
            if runtime.stream.blocks[0] is stream.blocks[0]:
                return runtime
        runtime = Runtime(stream, prefix_tokens(self._anatomy.model, stream))
        runtime.root = self._root
        parts = stream.paths[0].split(".")
        runtime.holders = [self._anatomy.model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        self._root.runtimes.append(runtime)
        return runtime

    @property
    def _root(self) -> Root:
        for module in self.model.modules():
            side = module._modules.get(CHILD)
            if isinstance(side, BlockSurgery):
                return side.runtime.root
        held = vars(self).get("_new_root")
        if held is None:
            held = Root(self._anatomy.model, self._anatomy.head)
            vars(self)["_new_root"] = held
        return held

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter; if anything fails, the model is as it was."""
        config = self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            for side in self._sides():
                side.know(self._ours)
            for inner in config.peft_configs():
                self._inject_peft(model, inner, adapter_name, kwargs.get("low_cpu_mem_usage", False))
            if config.peft_configs():
                self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        except BaseException:
            self._roll_back(adapter_name)
            raise
        finally:
            config.target_modules = None

    def _inject_peft(self, model: nn.Module, inner: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        ours = vars(model).pop("peft_config", None)  # or the inner tuner would write its config into our dict
        try:
            PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type](model, inner, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            vars(model).pop("peft_config", None)
            if ours is not None:
                model.peft_config = ours

    def _roll_back(self, adapter_name: str) -> None:
        unwrap(self.model, {adapter_name})
        for side in list(self._sides()):
            if adapter_name in side.hf_tokens_methods:
                del side.hf_tokens_methods[adapter_name]
            side.refresh()
        if not any(len(side.hf_tokens_methods) for side in self._sides()):
            self._detach()

    def _sides(self) -> Iterator[BlockSurgery]:
        for module in list(self.model.modules()):
            side = module._modules.get(CHILD)
            if isinstance(side, BlockSurgery):
                yield side

    def _detach(self) -> None:
        roots = {id(side.runtime.root): side.runtime.root for side in self._sides()}
        held = vars(self).pop("_new_root", None)
        if held is not None:
            roots[id(held)] = held
        for side in list(self._sides()):
            side.detach()
        for root in roots.values():
            root.detach()

    # -- switching ---------------------------------------------------------------------------------------------------

    @property
    def _ours(self) -> set[str]:
        """Names of our adapters; a PeftModel inside of ours shares its dict with us."""
        return names_of_ours(self.peft_config)

    def _owned(self) -> list[BaseTunerLayer]:
        """Our layers, and those of a PEFT method inside one of our adapters; not those of an adapter stacked from outside."""
        inner = {name for name in self._ours if self.peft_config[name].peft_configs()}
        return [
            m
            for m in self.model.modules()
            if isinstance(m, BlockSurgery) or (isinstance(m, BaseTunerLayer) and inner & m._get_available_adapters())
        ]

    def _wrappers(self) -> list[AuxiliaryTrainingWrapper]:
        """Modules that one of our adapters saves as a whole; not those that only an adapter stacked from outside does."""
        found = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        return [m for m in found if m._get_available_adapters() & self._ours]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to these adapters; what an adapter stacked from outside has stays as it is."""
        for wrapper in self._wrappers():
            _set_adapter(wrapper, adapter_name, inference_mode=inference_mode)
        for layer in self._owned():
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in [*self._owned(), *self._wrappers()]:
            layer.enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter."""
        foreign = [layer for layer in self._owned() if not isinstance(layer, BlockSurgery)]
        super().delete_adapter(adapter_name)
        for layer in foreign:
            layer.delete_adapter(adapter_name)

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """There are no weights to merge into.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            explain("Token surgery is not a change of weights and cannot be merged", "a call of merge", "Use `unload()`.")
        )

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None) -> nn.Module:
        if merge:
            self.merge_adapter()
        ours = self._ours
        unwrap(self.model, ours)
        self._detach()
        if isinstance(self.model, PeftModel):  # it shares its dict with us
            for name in ours:
                del self.peft_config[name]
        vars(self.model).pop("peft_config", None)
        return self.model

    # -- saving ------------------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.peft_configs():
            return {key: value for key, value in found.items() if f".{adapter_name}" in key}
        return {key: value for key, value in found.items() if f".{CHILD}.hf_tokens_" in key or key.startswith(f"{CHILD}.")}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        ours, count = re.subn(rf"\.hf_tokens_methods\.{re.escape(adapter_name)}\.", ".hf_tokens_methods.", key, count=1)
        return ours if count else super()._remove_adapter_name_from_key(key, adapter_name)


def register_with_peft() -> None:
    """The one change that importing hf_tokens makes elsewhere."""
    if HF_TOKENS in PEFT_TYPE_TO_CONFIG_MAPPING:
        return
    if isinstance(HF_TOKENS, PlainType):
        PEFT_TYPE_TO_CONFIG_MAPPING[HF_TOKENS] = HFTokensConfig
        PEFT_TYPE_TO_TUNER_MAPPING[HF_TOKENS] = HFTokensModel
        PEFT_TYPE_TO_PREFIX_MAPPING[HF_TOKENS] = HFTokensModel.prefix
    else:
        register_peft_method(name="hf_tokens", config_cls=HFTokensConfig, model_cls=HFTokensModel)


register_with_peft()
