"""hf-tokens: learnable tokens, routers and compression hooks in pretrained Transformers and Diffusers models."""

from __future__ import annotations

import importlib
from typing import Any

from .adapter import HFTokensConfig
from .anatomy import Anatomy, Stream, anatomy
from .api import aux_loss, calibrate, conclusions, get_token_model, load, objective_loss, save_adapter, set_method, set_progress, unload
from .config import MethodConfig, option
from .edits import edit
from .embedding import match_ids, match_sequence
from .errors import AdapterError, ConfigError, HFTokensError, UnsupportedError
from .holding import Polar, Quantized, angle_between
from .measure import measure
from .prompts import compress_prompt, embed_prompt
from .registry import list_methods, method_info, register
from .roles import (
    Attending,
    AttentionEdit,
    CacheCompressor,
    Dims,
    FeatureCache,
    Folded,
    Holding,
    LayerRouter,
    Method,
    ModelRouter,
    Objective,
    Pooler,
    TokenBank,
    TokenReducer,
    TokenRouter,
    VocabularyEdit,
    WeightEdit,
    heavy_hitters,
    straight_through,
)
from .search import search_path, search_shares
from .token_map import TokenMap, indices, rank
from .tuner import HFTokensModel
from .two_models import label_routes, route_to
from .vocabulary import transplant
from .weights import closest_map

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Anatomy",
    "Attending",
    "AttentionEdit",
    "CacheCompressor",
    "ConfigError",
    "Dims",
    "FeatureCache",
    "HFTokensConfig",
    "HFTokensError",
    "HFTokensModel",
    "Folded",
    "Holding",
    "LayerRouter",
    "Method",
    "MethodConfig",
    "ModelRouter",
    "Objective",
    "Polar",
    "Quantized",
    "Pooler",
    "Stream",
    "TokenBank",
    "TokenMap",
    "TokenReducer",
    "TokenRouter",
    "UnsupportedError",
    "VocabularyEdit",
    "WeightEdit",
    "anatomy",
    "angle_between",
    "aux_loss",
    "calibrate",
    "closest_map",
    "compress_prompt",
    "conclusions",
    "edit",
    "embed_prompt",
    "get_token_model",
    "heavy_hitters",
    "indices",
    "label_routes",
    "list_methods",
    "load",
    "match_ids",
    "match_sequence",
    "measure",
    "method_info",
    "objective_loss",
    "option",
    "rank",
    "register",
    "route_to",
    "save_adapter",
    "search_path",
    "search_shares",
    "set_method",
    "set_progress",
    "straight_through",
    "transplant",
    "unload",
]


def __getattr__(name: str) -> Any:
    """Configs and classes of methods, by name, without a list to keep."""
    if name.startswith("_"):
        raise AttributeError(name)
    for info in list_methods():
        if name in (info.config.__name__, info.cls.__name__):
            return getattr(importlib.import_module(info.cls.__module__), name)
    raise AttributeError(f"module 'hf_tokens' has no attribute {name!r}; methods: {[info.config.__name__ for info in list_methods()]}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for info in list_methods() for name in (info.config.__name__, info.cls.__name__))})
