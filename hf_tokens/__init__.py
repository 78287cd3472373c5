"""hf-tokens: learnable tokens, routers and compression hooks in pretrained Transformers and Diffusers models."""

from __future__ import annotations

import importlib
from typing import Any

from .api import aux_loss, conclusions, get_token_model, objective_loss, set_progress, unload
from .attention.call import Attending
from .errors import AdapterError, ConfigError, HFTokensError, UnsupportedError
from .kv.storage import Polar, Quantized, angle_between
from .model.anatomy import anatomy
from .model.streams import Anatomy, Stream
from .peft.config import HFTokensConfig
from .peft.tuner import HFTokensModel
from .roles.attention_edit import AttentionEdit
from .roles.base import Dims, Method, straight_through
from .roles.cache_compressor import CacheCompressor, Folded, Holding, heavy_hitters
from .roles.config import MethodConfig, option
from .roles.feature_cache import FeatureCache
from .roles.objective import Objective
from .roles.pooler import Pooler
from .roles.registry import list_methods, method_info, register
from .roles.routers import LayerRouter, ModelRouter, TokenRouter
from .roles.token_bank import TokenBank
from .roles.token_reducer import TokenReducer
from .roles.vocabulary_edit import VocabularyEdit
from .roles.weight_edit import WeightEdit, closest_map
from .tokens.matching import match_ids, match_sequence
from .tokens.token_map import TokenMap, indices, rank
from .tools.calibrate import calibrate, set_method
from .tools.edits import edit
from .tools.loading import load, save_adapter
from .tools.measure import measure
from .tools.model_routing import label_routes, route_to
from .tools.prompts import compress_prompt, embed_prompt
from .tools.search import search_path, search_shares
from .tools.vocabulary import transplant

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
