"""hf-tokens: learnable tokens, routers and compression hooks in pretrained Transformers and Diffusers models."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import did_you_mean
from .peft.tuner import register_with_peft

__version__ = "0.1.0"

# Where the public names live. A module is imported when a name of it is first asked for. Type checkers read __init__.pyi (`make cards`).
PUBLIC = {
    "api": ("aux_loss", "conclusions", "get_token_model", "objective_loss", "set_progress", "unload"),
    "commands.recipes": ("recipe",),
    "errors": ("AdapterError", "ConfigError", "HFTokensError", "UnsupportedError"),
    "attention.call": ("Attending",),
    "kv.formats": ("Plain", "Polar", "Quantized", "QuantizedTokens", "angle_between"),
    "model.anatomy": ("anatomy",),
    "model.streams": ("Anatomy", "Stream"),
    "peft.config": ("HFTokensConfig",),
    "peft.tuner": ("HFTokensModel",),
    "roles": (
        *("AttentionEdit", "CacheCompressor", "Dims", "FeatureCache", "Folded", "Holding", "LayerRouter", "Method", "ModelRouter"),
        *("Objective", "Pooler", "SlackConfig", "TokenBank", "TokenReducer", "TokenRouter", "TokenScorer"),
        *("TextWords", "VocabularyEdit", "WeightEdit"),
        *("allowance", "check_capacity", "heavy_hitters", "observed", "protect", "share_out", "straight_through"),
    ),
    "roles.config": ("MethodConfig", "option"),
    "roles.registry": ("list_methods", "method_info", "register"),
    "roles.weight_edit": ("closest_map",),
    "tokens.matching": ("match_ids", "match_sequence"),
    "tokens.token_map": ("TokenMap", "indices", "rank"),
    "tools.calibrate": ("calibrate", "set_method"),
    "tools.contexts": ("CompressedContext", "compress_context"),
    "tools.edits": ("edit",),
    "tools.export": ("export",),
    "tools.loading": ("card", "load", "save_adapter"),
    "tools.measure": ("measure",),
    "tools.model_routing": ("label_routes", "route_to"),
    "tools.prompts": ("compress_prompt", "embed_prompt"),
    "tools.search": ("search_path", "search_shares"),
    "tools.summary": ("RunRecord", "Summary", "record", "summary"),
    "tools.vocabulary": ("transplant",),
}
MODULES = {name: module for module, names in PUBLIC.items() for name in names}


def of_methods() -> dict[str, Any]:
    """The configs and classes of all methods, by name."""
    from .roles.registry import list_methods

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
