"""hf-tokens: learnable tokens, routers and compression hooks in pretrained Transformers and Diffusers models."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import did_you_mean
from .tuner import register_with_peft

__version__ = "0.1.0"

# Where the public names live. A module is imported when a name of it is first asked for. Type checkers read __init__.pyi (`make cards`).
PUBLIC = {
    "adapter": ("HFTokensConfig",),
    "anatomy": ("Anatomy", "Stream", "anatomy"),
    "api": (
        *("aux_loss", "calibrate", "conclusions", "get_token_model", "load", "objective_loss", "save_adapter", "set_method"),
        *("set_progress", "unload"),
    ),
    "config": ("MethodConfig", "option"),
    "edits": ("edit",),
    "embedding": ("match_ids", "match_sequence"),
    "errors": ("AdapterError", "ConfigError", "HFTokensError", "UnsupportedError"),
    "holding": ("Polar", "Quantized", "angle_between"),
    "measure": ("measure",),
    "prompts": ("compress_prompt", "embed_prompt"),
    "registry": ("list_methods", "method_info", "register"),
    "roles": (
        *("Attending", "AttentionEdit", "CacheCompressor", "Dims", "FeatureCache", "Folded", "Holding", "LayerRouter", "Method"),
        *("ModelRouter", "Objective", "Pooler", "TokenBank", "TokenReducer", "TokenRouter", "VocabularyEdit", "WeightEdit"),
        *("heavy_hitters", "straight_through"),
    ),
    "search": ("search_path", "search_shares"),
    "token_map": ("TokenMap", "indices", "rank"),
    "tuner": ("HFTokensModel",),
    "two_models": ("label_routes", "route_to"),
    "vocabulary": ("transplant",),
    "weights": ("closest_map",),
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names}


def of_methods() -> dict[str, Any]:
    """The configs and classes of all methods, by name."""
    from .registry import list_methods

    return {cls.__name__: cls for info in list_methods() for cls in (info.config, info.cls)}


def __getattr__(name: str) -> Any:
    if name in MODULES:
        globals()[name] = found = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
        return found
    if name == "__all__":
        return __dir__()
    rule = f"module {__name__!r} has no attribute {name!r}"
    if name.startswith("_"):
        raise AttributeError(rule)
    methods = of_methods()
    if name not in methods:
        # with `name` alone, Python adds no question of its own
        raise AttributeError(f"{rule}. {did_you_mean([name], [*MODULES, *methods])}".rstrip(), name=name)
    return methods[name]


def __dir__() -> list[str]:
    return sorted({*MODULES, *of_methods()})


register_with_peft()
globals().update({name: __getattr__(name) for name in PUBLIC.keys() & MODULES.keys()})  # a module that is called so would hide them
