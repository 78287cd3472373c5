"""What the author of a method reads: the roles and their verbs, the signals, the knobs and the registry."""

from .attention_edit import AttentionEdit
from .base import Dims, Method, straight_through
from .cache_compressor import (
    CacheCompressor,
    Folded,
    Holding,
    SlackConfig,
    allowance,
    check_capacity,
    heavy_hitters,
    observed,
    protect,
    share_out,
)
from .feature_cache import FeatureCache
from .objective import Objective
from .pooler import Pooler
from .routers import LayerRouter, ModelRouter, TokenRouter
from .signals import SIGNALS
from .token_bank import TokenBank
from .token_reducer import TokenReducer
from .token_scorer import TextWords, TokenScorer
from .vocabulary_edit import VocabularyEdit
from .weight_edit import WeightEdit

__all__ = ["SIGNALS", "AttentionEdit", "CacheCompressor", "Dims", "FeatureCache", "Folded", "Holding", "LayerRouter", "Method"]
__all__ += ["ModelRouter", "Objective", "Pooler", "SlackConfig", "TokenBank", "TokenReducer", "TokenRouter", "TokenScorer"]
__all__ += ["TextWords", "VocabularyEdit", "WeightEdit"]
__all__ += ["allowance", "check_capacity", "heavy_hitters", "observed", "protect", "share_out", "straight_through"]
