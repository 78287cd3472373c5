"""A tiny model of every family in Transformers and Diffusers, with random weights and inputs that fit it.

>>> specimen = build("llama")
>>> [tuple(out.shape) for out in specimen.run()][0]
(2, 16, 99)
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GenericForSequenceClassification

from ..model.signatures import CACHES, cache_argument
from .zoo_diffusers import DIFFUSERS_ROWS
from .zoo_inputs import INPUTS, diffusers_inputs
from .zoo_rules import BATCH, DIFFUSERS, LAYER_LISTS, LISTS, NO_CLASS, NUMBERS, PREFERRED, TOKENS, VOCAB, Row
from .zoo_transformers import TRANSFORMERS_ROWS, UNBUILDABLE

ROWS = TRANSFORMERS_ROWS | DIFFUSERS_ROWS
CACHE = cache_argument(GenericForSequenceClassification.forward)  # how the models of the installed Transformers call their cache


@dataclass
class Specimen:
    family: str
    model: nn.Module
    inputs: dict[str, Any]
    hints: dict[str, Any] = field(default_factory=dict)

    def run(self, **more: Any) -> list[torch.Tensor]:
        """The floating tensors that the model puts out, in order."""
        with torch.no_grad():
            return tensors(self.model(**{**self.inputs, **more}))


def families(library: str | None = None) -> list[str]:
    """The names of all families: of `"transformers"`, of `"diffusers"`, or of both."""
    known = {"transformers": _transformers_families, "diffusers": _diffusers_families}
    if library is not None and library not in known:
        raise ValueError(f"library must be one of {sorted(known)} or None. Got {library!r}.")
    return [family for name, listed in known.items() if library in (None, name) for family in listed()]


def is_part(family: str) -> bool:
    """Whether a family is only a part of another one, such as its text tower: no auto mapping of Transformers builds it."""
    return not family.startswith("diffusers/") and family not in _class_names()


def unbuildable() -> dict[str, str]:
    """The families without a specimen, and why. What the installed libraries lack for them is a part of the answer."""
    return {family: UNBUILDABLE[family] for family in families() if family in UNBUILDABLE}


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Specimen:
    if family in UNBUILDABLE:
        raise ValueError(f"{family} has no specimen: {UNBUILDABLE[family]}.")
    row = ROWS.get(family, Row())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _diffusers_model(family, row) if family.startswith("diffusers/") else _transformers_model(family, row)
        liven(model)
        model.eval()
        inputs = _diffusers_inputs(model, row) if family.startswith("diffusers/") else _transformers_inputs(model, row)
    model.to(dtype)
    inputs = {name: _cast(value, dtype) for name, value in inputs.items() if value is not None}
    return Specimen(family, model, inputs, {"tokens": TOKENS, "batch": BATCH})


def tensors(output: Any) -> list[torch.Tensor]:
    """The floating tensors in an output, flattened; caches are left out, and attention maps, which are those of the tokens that ran."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for name, value in output.items() if not name.endswith((*CACHES, "attentions", "_outputs")) for t in tensors(value)]
    if isinstance(output, (tuple, list)):
        return [t for value in output for t in tensors(value)]
    if is_dataclass(output):
        return [t for f in fields(output) for t in tensors(getattr(output, f.name))]
    return []


@torch.no_grad()
def liven(model: nn.Module) -> None:
    """Give every weight a size at which each block moves the output: zero gates, tiny layer scales and small initialisers leave it dead."""
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1:
            parameter.normal_(std=min(0.5, 1 / math.sqrt(parameter[0].numel())))
        elif parameter.abs().max() < 0.1:
            parameter.normal_(std=0.1)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


# Transformers


@cache
def _class_names() -> dict[str, str]:
    """model type -> name of the class that shows the family best"""
    from transformers.models.auto import modeling_auto

    names: dict[str, str] = {}
    for mapping in PREFERRED:
        for family, name in getattr(modeling_auto, mapping).items():
            name = name if isinstance(name, str) else name[0]
            names.setdefault(family, name)
    return names


@cache
def _transformers_families() -> tuple[str, ...]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return tuple(sorted(CONFIG_MAPPING_NAMES))


def _transformers_model(family: str, row: Row) -> nn.Module:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_cls = CONFIG_MAPPING[family]
    name = row.model or _class_names().get(family) or _class_of_config(config_cls)
    model_cls = getattr(transformers, name, None) or getattr(_modeling(config_cls), name)
    return model_cls(config_cls(**_merge(tiny(config_cls()), row.config)))


@cache
def _splits_rotary(config_cls: type) -> bool:
    """Whether the family's rotary tables are cut into sections, whose sizes must then follow the small heads."""
    try:
        return "mrope_section" in inspect.getsource(_modeling(config_cls))
    except ModuleNotFoundError:
        return False


def _modeling(config_cls: type) -> Any:
    return importlib.import_module(config_cls.__module__.replace("configuration_", "modeling_"))


def _class_of_config(config_cls: type) -> str:
    """The model class of a family that no auto mapping knows: the part of a larger one, such as its text tower."""
    from transformers import PreTrainedModel

    try:
        listed = vars(_modeling(config_cls)).items()
    except ModuleNotFoundError:
        listed = ()
    models = {name: cls for name, cls in listed if inspect.isclass(cls) and issubclass(cls, PreTrainedModel)}
    names = [name for name, cls in models.items() if cls.config_class is config_cls and not name.endswith("PreTrainedModel")]
    if not names:
        raise ValueError(f"{config_cls.__name__} has no specimen: {NO_CLASS}.")
    return next((name for ending in ("ForCausalLM", "Model") for name in names if name.endswith(ending)), names[0])


def _merge(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in more.items():
        old = merged.get(key)
        same_kind = isinstance(value, dict) and isinstance(old, dict) and value.get("model_type") in (None, old.get("model_type"))
        merged[key] = _merge(old, value) if same_kind else value
    return merged


def tiny(config: Any) -> dict[str, Any]:
    """The arguments that make a config of this class small: shrunk by the names of its attributes, sub configs too."""
    from transformers import PreTrainedConfig

    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    layers = {values[name] for name in values if _rule(NUMBERS, name) == ("layers", 4) and isinstance(values[name], int)}
    small: dict[str, Any] = {}
    token = VOCAB  # of which the last are the special ones
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changed = {k: v for k, v in value.to_diff_dict().items() if not _of_every_layer(v, value)}
            small[name] = {"model_type": value.model_type, **_plain(changed), **tiny(value)}
        elif name == "rope_parameters" or name == "rope_scaling":
            small[name] = _tiny_rope(value, _splits_rotary(type(config)))
        elif re.search(r"token_(id|index|ids)$", name):
            token -= isinstance(value, int) and value >= 16
            small[name] = _tiny_token(name, value, token)
        elif name in LAYER_LISTS and isinstance(value, (list, tuple)):
            kinds = list(dict.fromkeys(value))
            small[name] = [kinds[i % len(kinds)] for i in range(4)] if 1 < len(kinds) <= 4 else None
        elif name in ("num_key_value_heads", "num_kv_heads") and value in (None, _heads(values)):
            small[name] = 4
        elif name == "head_dim" and value is None:
            small[name] = 8
        elif isinstance(value, int) and not isinstance(value, bool):
            small[name] = _tiny_number(name, value)
        elif isinstance(value, (list, tuple)) and value and not (len(value) in layers and len(value) > 4):
            small[name] = _tiny_list(name, value)
    return {name: value for name, value in small.items() if value is not None and value is not values[name]}


def _heads(values: dict[str, Any]) -> Any:
    return values.get("num_attention_heads", values.get("num_heads", -1))


def _of_every_layer(value: Any, config: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == getattr(config, "num_hidden_layers", None)


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    drop = ("transformers_version", "model_type", "architectures", "out_indices", "stage_names")
    kept = {name: value for name, value in settings.items() if name not in drop and not isinstance(value, dict)}
    if kept.get("out_features"):
        kept["out_features"] = [f"stage{i}" for i in range(1, 5)][-len(kept["out_features"]) :]
    return kept


def _rule(rules: Any, name: str) -> Any:
    return next(((label, value) for pattern, label, value in rules if pattern.search(name)), None)


def _tiny_number(name: str, value: int) -> int:
    rule = _rule(NUMBERS, name)
    if rule is None:
        return value
    label, small = rule
    if label == "layers":
        return small if value > 1 else value
    return min(value, small)


def _tiny_list(name: str, value: Any) -> Any:
    rule = _rule(LISTS, name)
    if rule is not None and not (rule[0] == "patch" and len(value) > 3):
        return type(value)((*rule[1], *rule[1][-1:] * len(value))[: len(value)])
    if all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return type(value)(_tiny_number(name, item) for item in value)
    return value


def _tiny_token(name: str, value: Any, token: int) -> Any:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if name in special:
        return None if value is None else special[name]
    return token if isinstance(value, int) and value >= 16 else value


def _tiny_rope(value: Any, sections: bool) -> Any:
    if not isinstance(value, dict):
        return value
    small = {name: _tiny_rope(item, sections) for name, item in value.items()}
    if "mrope_section" in small or sections and "rope_type" in small:
        small["mrope_section"] = [2, 1, 1]
    for name in ("long_factor", "short_factor"):
        if name in small:
            small[name] = [1.0] * 4
    return small


def _transformers_inputs(model: nn.Module, row: Row) -> dict[str, Any]:
    names = set(inspect.signature(model.forward).parameters)
    inputs: dict[str, Any] = {}
    for name, make in (*((n, None) for n in row.inputs if n not in dict(INPUTS)), *INPUTS):
        if name in row.inputs:
            value = row.inputs[name]
            inputs[name] = value(model, inputs) if callable(value) else value
        elif name in names and name not in inputs:
            inputs.update(make(model, inputs, names))
    return inputs


# Diffusers


@cache
def _diffusers_families() -> tuple[str, ...]:
    import diffusers
    from diffusers.models import transformers, unets

    known = vars(transformers) | vars(unets)
    names = sorted(name for name, cls in known.items() if inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin))
    return tuple(f"diffusers/{name}" for name in names)


def _diffusers_class(family: str) -> type:
    from diffusers.models import transformers, unets

    name = family.partition("/")[2]
    return getattr(transformers, name, None) or getattr(unets, name)


def _diffusers_model(family: str, row: Row) -> nn.Module:
    cls = _diffusers_class(family)
    defaults = {n: p.default for n, p in inspect.signature(cls.__init__).parameters.items() if p.default is not p.empty}
    small = {name: _tiny_diffusers(name, value) for name, value in defaults.items()}
    changed = {name: value for name, value in small.items() if value != defaults[name]}
    return cls(**_merge(changed, row.config))


def _tiny_diffusers(name: str, value: Any) -> Any:
    rule = _rule(DIFFUSERS, name)
    if rule is None or value is None or isinstance(value, (bool, str)):
        return value
    label, small = rule
    if isinstance(value, (list, tuple)) and isinstance(small, int):
        return type(value)(min(item, small) if isinstance(item, int) else item for item in value)
    if isinstance(value, (list, tuple)):
        return type(value)(small[: len(value)])
    if isinstance(small, tuple):
        small = small[0]
    return min(value, small) if isinstance(value, (int, float)) and label != "layers" else small


def _diffusers_inputs(model: nn.Module, row: Row) -> dict[str, Any]:
    inputs = diffusers_inputs(model)
    for name, value in row.inputs.items():
        inputs[name] = value(model, inputs) if callable(value) else value
    return inputs
