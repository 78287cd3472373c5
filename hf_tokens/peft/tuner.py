"""What PEFT does with an adapter: inject it, switch it, save it, take it out."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, _set_adapter, register_peft_method
from torch import Tensor, nn

from ..diffusion.steps import DenoisingWorld
from ..engine.block import BlockSurgery
from ..engine.model import ModelSurgery
from ..engine.surgery import StreamSurgery
from ..engine.trial import stripped
from ..errors import ConfigError, UnsupportedError, explain
from ..handlers.weight_edit import edited_shapes, reaches_outside
from ..model.anatomy import anatomy, prompt_width, special_tokens
from ..model.changes import change_of
from ..model.parts import OWN
from ..model.pictures import vision_tower
from ..model.streams import Stream
from ..roles.base import Dims, Method
from ..roles.config import MethodConfig
from ..roles.in_peft import HF_TOKENS, NAME, PlainType
from ..training.trainer import TrainingWorld
from .config import HFTokensConfig
from .doors import calling_loader, calling_maker, calling_saver, is_copied, tell_loader
from .files import MISREAD, Bounds, Saved, check_file, check_state, in_silence, misread, tried
from .nested import BaseRecord, bake, check_apart, check_nested, take_off
from .patterns import check_patterns
from .placement import Placement, all_blocks, head_outputs, plan
from .publishing import CardDoor, CardWorld
from .saving import PEFT_PREFIX


def names_of_ours(configs: dict[str, PeftConfig]) -> set[str]:
    """Names of our adapters among those of a model."""
    return {name for name, config in configs.items() if config.peft_type == HF_TOKENS}


OF_SAMPLES = ("adapter_names", "alora_offsets")  # arguments of a call in which each sample has its own


def check_name(adapter_name: str, configs: dict[str, PeftConfig]) -> None:
    """Refuse a name that is taken: one adapter would take the other's place in the dict that they share."""
    if adapter_name in configs:
        rule = "Every adapter in a model has a name of its own"
        got = f"{adapter_name!r} for {NAME} beside {adapter_name!r} for {configs[adapter_name].peft_type.value}"
        raise ConfigError(explain(rule, got, "Pass another `adapter_name`, or unload the one that is there."))


class HFTokensModel(BaseTuner):
    """The tuner behind `get_peft_model`."""

    prefix = "hf_tokens_"
    tuner_layer_cls = BlockSurgery
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any):
        configs = model.peft_config if isinstance(model, PeftModel) else vars(model).get("peft_config", {})
        check_name(adapter_name, configs)
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except BaseException:
            configs.pop(adapter_name, None)
            raise
        maker = calling_maker()
        if maker is not None:
            maker.create_or_update_model_card = CardDoor(maker)

    def _prepare_adapter_config(self, peft_config: HFTokensConfig, model_config: dict) -> HFTokensConfig:
        with misread(peft_config, self.model):
            names = {id(module): name for name, module in self.model.named_modules()}
            for nested in peft_config.peft_configs():
                check_nested(nested)
                check_patterns(nested, names.values())
            self._anatomy = anatomy(self.model)
            self._plan = plan(self._anatomy, peft_config)
            if not peft_config.goes_around_layers:
                check_file(peft_config, lambda held: self._needed(names, held))
        self._blocks = {id(p.stream.blocks[i]): (p.stream, i) for p in self._plan for i in range(len(p.stream))}
        peft_config.aim(sorted(names[block] for block in self._blocks))
        return peft_config

    def _needed(self, names: dict[int, str], held: dict[str, Saved]) -> dict[str, Tensor]:
        """The tensors of the methods, without any numbers, by their names in a file, given the names of the modules, and what came."""
        needed = {}
        with in_silence(), torch.device("meta"), Bounds(self.model, held):
            for p in self._plan:
                for index in p.layers:
                    path = f"{PEFT_PREFIX}{names[id(p.stream.blocks[index])]}.{OWN}.hf_tokens_methods.{p.slot}"
                    needed |= {f"{path}.{name}": tensor for name, tensor in self._build(p, index).state_dict().items()}
        return needed

    def _check_tied_modules(self, model: nn.Module, peft_config: HFTokensConfig) -> None:
        if peft_config.modules_to_save:  # nothing else of ours can be tied, and not every model lists what is
            super()._check_tied_modules(model, peft_config)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        if id(target) not in self._blocks:
            return
        stream, index = self._blocks[id(target)]
        block = target._modules.get(OWN)
        if block is None:
            block = BlockSurgery(self._stream_surgery(stream), index)
            target.hf_tokens = block
        placements = [p for p in self._plan if p.stream is stream and index in p.layers]
        block.add(adapter_name, {str(p.slot): self._build(p, index) for p in placements})

    def _put_in_place(self, adapter_name: str) -> None:
        """Give each method its instances in the first block of its stream, and in the first of all."""
        at = lambda p, index: p.stream.blocks[index].hf_tokens.hf_tokens_methods[adapter_name][str(p.slot)]
        firsts = {p.slot: at(p, p.layers[0]) for p in reversed(self._plan)}
        for p in self._plan:
            for index in p.layers:
                at(p, index).put_in_place(f"{adapter_name}.{p.slot}", at(p, p.layers[0]), firsts[p.slot])

    def _build(self, p: Placement, index: int) -> Method:
        stream = p.stream
        places = [(other.stream.name, i) for other in self._plan if other.slot == p.slot for i in other.layers]
        holds = reaches_outside(p.info.cls, p.config) and places[0] == (stream.name, index)
        outside = (self._anatomy.model, *all_blocks(self._anatomy)) if holds else None
        dims = Dims(
            **{name: getattr(stream, name) for name in ("width", "heads", "kv_heads", "head_dim", "kind", "causal")},
            layer=index,
            layers=len(stream),
            is_first_block=index == p.layers[0],
            is_last_block=index == p.layers[-1],
            place=places.index((stream.name, index)),
            places=len(places),
            outputs=head_outputs(self._anatomy),
            weights=edited_shapes(p.info.cls, p.config, stream.blocks[index], outside),
            table=None if stream.table is None else self._anatomy.model.get_submodule(stream.table),
            prompt=prompt_width(self._anatomy.model),
            block=(stripped(stream.blocks[max(len(stream) - 2, 0)]),) if "block" in p.info.cls.signals else (),
            change=change_of(self._anatomy.model),
        )
        return p.info.cls(p.config, dims)

    def _stream_surgery(self, stream: Stream) -> StreamSurgery:
        for surgery in self._model_surgery.streams:
            if surgery.stream.blocks[0] is stream.blocks[0]:
                return surgery
        base, parts = self._anatomy.model, stream.paths[0].split(".")
        holders = [base.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
        return StreamSurgery(self._model_surgery, stream, special_tokens(base, stream), holders)

    @property
    def _model_surgery(self) -> ModelSurgery:
        block = next(self._surgeries(), None)
        if block is not None:
            return block.surgery.model
        surgery = vars(self).get("_new_surgery")
        if surgery is None:
            base = self._anatomy.model
            denoising = DenoisingWorld(base) if "diffusers" in sys.modules else None
            worlds = (TrainingWorld(), CardWorld()) if denoising is None else (TrainingWorld(), CardWorld(), denoising)
            is_denoiser = denoising is not None and denoising.hook is not None
            surgery = ModelSurgery(base, self._anatomy.head, vision_tower(self._anatomy), worlds, is_denoiser)
            vars(self)["_new_surgery"] = surgery
        return surgery

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter; if anything fails, the model is as it was."""
        config = self.peft_config[adapter_name]
        if isinstance(config, MethodConfig):
            config = self.peft_config[adapter_name] = HFTokensConfig.around(config)
        if config.goes_around_layers:
            with misread(config, model):
                check_file(config, lambda held: tried(model, config, adapter_name, held))
        try:
            with misread(config, model, MISREAD):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._put_in_place(adapter_name)
                for block in self._surgeries():
                    block.know(self._own_adapters)
                if config.peft_configs():
                    self._inject_nested(model, config, adapter_name, kwargs.get("low_cpu_mem_usage", False))
                if is_copied(config):
                    self._copy_buffers(next(name for name, other in self.peft_config.items() if other is config), adapter_name)
        except BaseException:
            self._roll_back(adapter_name)
            raise
        finally:
            config.aim(None)

    @torch.no_grad()
    def _copy_buffers(self, adapter_name: str, to: str) -> None:
        """Give one adapter what another one holds beside its parameters: what it drew, selected or solved for."""
        buffers = dict(self.model.named_buffers())
        for name, value in buffers.items():
            if f".{adapter_name}." in name:
                buffers[name.replace(f".{adapter_name}.", f".{to}.")].copy_(value)

    def _inject_nested(self, model: nn.Module, config: HFTokensConfig, adapter_name: str, low_cpu_mem_usage: bool) -> None:
        trained = {p: p.requires_grad for p in model.parameters()}
        with BaseRecord(model).kept(adapter_name):
            taken: dict[PeftType, set[str]] = {}
            for inner in config.peft_configs():
                names = self._inject_peft(model, inner, adapter_name, low_cpu_mem_usage)
                check_apart(inner, names, taken)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        for parameter, flag in trained.items():  # only what came now is switched by the new config
            parameter.requires_grad = flag
        loader = None if config.in_trial else calling_loader()
        if loader is not None:
            tell_loader(loader, adapter_name, self._nested_names(model, adapter_name))

    def _nested_names(self, model: nn.Module, adapter_name: str) -> dict[str, str]:
        """Names of an adapter's tensors outside of our layers and of modules saved as a whole, with those that they have in a file."""
        wrapped = tuple(f"{path}." for path, m in model.named_modules() if isinstance(m, (AuxiliaryTrainingWrapper, BlockSurgery)))
        state = self._get_adapter_state_dict(model, self.peft_config[adapter_name], adapter_name, model.state_dict(), [])
        names = [name for name in state if not name.startswith(wrapped)]
        return {name: self._remove_adapter_name_from_key(name, adapter_name) for name in names}

    def _inject_peft(self, model: nn.Module, inner: PeftConfig, adapter_name: str, low_cpu_mem_usage: bool) -> set[str]:
        """Put a PEFT method in; returns the modules that it took."""
        configs = vars(model).pop("peft_config", None)  # or the inner tuner would write its config into our dict
        try:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[inner.peft_type](model, inner, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
            return {*tuner.targeted_module_names}
        finally:
            vars(model).pop("peft_config", None)
            if configs is not None:
                model.peft_config = configs

    def _roll_back(self, adapter_name: str) -> None:
        take_off(self.model, {adapter_name})
        for block in list(self._surgeries()):
            if adapter_name in block.hf_tokens_methods:
                del block.hf_tokens_methods[adapter_name]
            block.refresh()
        if not any(len(block.hf_tokens_methods) for block in self._surgeries()):
            self._detach()

    def _surgeries(self) -> Iterator[BlockSurgery]:
        for module in list(self.model.modules()):
            block = module._modules.get(OWN)
            if isinstance(block, BlockSurgery):
                yield block

    def _detach(self) -> None:
        blocks, unused = list(self._surgeries()), vars(self).pop("_new_surgery", None)
        surgeries = [*(block.surgery.model for block in blocks), *([] if unused is None else [unused])]
        for block in blocks:
            block.detach()
        for surgery in {id(surgery): surgery for surgery in surgeries}.values():
            surgery.detach()

    @property
    def _own_adapters(self) -> set[str]:
        """Names of our adapters; a PeftModel inside of ours shares its dict with it."""
        return names_of_ours(self.peft_config)

    def _owned(self) -> list[BaseTunerLayer]:
        """Our layers, and those of a PEFT method inside one of our adapters; not those of an adapter stacked from outside."""
        inner = {name for name in self._own_adapters if self.peft_config[name].peft_configs()}
        layers = (m for m in self.model.modules() if isinstance(m, BaseTunerLayer))
        return [layer for layer in layers if isinstance(layer, BlockSurgery) or inner & layer._get_available_adapters()]

    def _wrappers(self) -> list[AuxiliaryTrainingWrapper]:
        """Modules that one of our adapters saves as a whole; not those that only an adapter stacked from outside does."""
        wrappers = (m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper))
        return [wrapper for wrapper in wrappers if wrapper._get_available_adapters() & self._own_adapters]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Switch to these adapters; what an adapter stacked from outside has stays as it is."""
        for wrapper in self._wrappers():
            _set_adapter(wrapper, adapter_name, inference_mode=inference_mode)
        for layer in self._owned():
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name
        vars(self).pop("_trained", None)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        """Switch our layers on or off; PEFT freezes what goes off and trains what comes back, but what was frozen before stays so."""
        layers = [*self._owned(), *self._wrappers()]
        if not enabled and "_trained" not in vars(self):
            vars(self)["_trained"] = {p: p.requires_grad for layer in layers for p in layer.parameters()}
        for layer in layers:
            layer.enable_adapters(enabled)
        if enabled:
            for parameter, flag in vars(self).pop("_trained", {}).items():
                parameter.requires_grad = flag

    def delete_adapter(self, adapter_name: str) -> None:
        foreign = [layer for layer in self._owned() if not isinstance(layer, BlockSurgery)]
        super().delete_adapter(adapter_name)
        for layer in foreign:
            layer.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT opens it around a call that brings arguments for the adapters.

        Raises:
            UnsupportedError: Each sample names an adapter of its own, or a place where it begins.
        """
        given = [name for name in OF_SAMPLES if kwargs.get(name) is not None]
        if given:
            rule = "The adapters of a token surgery act on all samples of a batch"
            remedy = "Switch with `set_adapter`, and call the model once for each adapter."
            raise UnsupportedError(explain(rule, f"`{given[0]}` in a call", remedy))
        yield

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """There are no weights to merge into: always refused."""
        rule = "Token surgery is not a change of weights and cannot be merged"
        raise UnsupportedError(explain(rule, "a call of merge", "Use `unload()`."))

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """There are no weights to sum, and a sum of tokens or of routers is no adapter: always refused."""
        rule = "Token surgeries cannot be summed: what each does to the tokens depends on its own"
        remedy = "Let several act one behind the other: `model.base_model.set_adapter([...])`."
        raise UnsupportedError(explain(rule, "a call of add_weighted_adapter", remedy))

    def _merge_edits(self, safe_merge: bool) -> None:
        """Write edits of weights that act, and the LoRAs among them, into the base for good."""
        blocks = list(self._surgeries())
        if any(block.plan.prompt.methods for block in blocks) or not any(block.plan.always.of("weights") for block in blocks):
            self.merge_adapter()
        bake(self.model, self._own_adapters, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None) -> nn.Module:
        if merge:
            self._merge_edits(safe_merge)
        adapters = self._own_adapters
        take_off(self.model, adapters)
        self._detach()
        if isinstance(self.model, PeftModel):  # it shares its dict with us
            for name in adapters:
                del self.peft_config[name]
        vars(self.model).pop("peft_config", None)
        return self.model

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        saver = calling_saver()
        if saver is not None:
            config.prepare_to_save((tensor for key, tensor in state_dict.items() if f".{adapter_name}." in key), saver, adapter_name)
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        if config.peft_configs():
            return {key: value for key, value in state.items() if f".{adapter_name}" in key}
        return {key: value for key, value in state.items() if f".{OWN}.hf_tokens_" in key or key.startswith(f"{OWN}.")}

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """Called of what is to be loaded: that is an adapter's own, or it is refused."""
        named, own = super()._remap_adapter_state_dict_for_load, get_peft_model_state_dict(model, None, adapter_name, False, False)
        for path, module in model.named_modules():  # what PEFT has named already in what is to be loaded
            if isinstance(module, AuxiliaryTrainingWrapper):
                names = module.adapter_state_dict_load_map(adapter_name)
                own |= {f"{path}.{inside}": own.pop(f"{path}.{saved}") for saved, inside in names.items()}
        loaded = named(model, config, adapter_name, state_dict)
        check_state(named(model, config, adapter_name, own), loaded)
        return loaded

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        renamed, count = re.subn(rf"\.hf_tokens_methods\.{re.escape(adapter_name)}\.", ".hf_tokens_methods.", key, count=1)
        return renamed if count else super()._remove_adapter_name_from_key(key, adapter_name)


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
