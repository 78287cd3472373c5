"""Written by `make cards`: the public names, the configs and classes of the methods among them, for type checkers and editors."""

from hf_tokens_adapters.attention_edit.apt import (
    APT,
    APTConfig,
)
from hf_tokens_adapters.attention_edit.crosslmm import (
    CrossLMM,
    CrossLMMConfig,
)
from hf_tokens_adapters.cache_compressor.ada_kv import (
    AdaKV,
    AdaKVConfig,
)
from hf_tokens_adapters.cache_compressor.d2o import (
    D2O,
    D2OConfig,
)
from hf_tokens_adapters.cache_compressor.duo_attention import (
    DuoAttention,
    DuoAttentionConfig,
)
from hf_tokens_adapters.cache_compressor.expected_attention import (
    ExpectedAttention,
    ExpectedAttentionConfig,
)
from hf_tokens_adapters.cache_compressor.h2o import (
    H2O,
    H2OConfig,
)
from hf_tokens_adapters.cache_compressor.kivi import (
    KIVI,
    KIVIConfig,
)
from hf_tokens_adapters.cache_compressor.kvzip import (
    KVzip,
    KVzipConfig,
)
from hf_tokens_adapters.cache_compressor.mikv import (
    MiKV,
    MiKVConfig,
)
from hf_tokens_adapters.cache_compressor.minicache import (
    MiniCache,
    MiniCacheConfig,
)
from hf_tokens_adapters.cache_compressor.prefixkv import (
    PrefixKV,
    PrefixKVConfig,
)
from hf_tokens_adapters.cache_compressor.pyramidkv import (
    PyramidKV,
    PyramidKVConfig,
)
from hf_tokens_adapters.cache_compressor.random import (
    Random,
    RandomConfig,
)
from hf_tokens_adapters.cache_compressor.razorattention import (
    RazorAttention,
    RazorAttentionConfig,
)
from hf_tokens_adapters.cache_compressor.snapkv import (
    SnapKV,
    SnapKVConfig,
)
from hf_tokens_adapters.cache_compressor.squeezeattention import (
    SqueezeAttention,
    SqueezeAttentionConfig,
)
from hf_tokens_adapters.cache_compressor.streaming_llm import (
    StreamingLLM,
    StreamingLLMConfig,
)
from hf_tokens_adapters.cache_compressor.tova import (
    TOVA,
    TOVAConfig,
)
from hf_tokens_adapters.feature_cache.cat_pruning import (
    CATPruning,
    CATPruningConfig,
)
from hf_tokens_adapters.feature_cache.first_block_cache import (
    FirstBlockCache,
    FirstBlockCacheConfig,
)
from hf_tokens_adapters.feature_cache.profilingdit import (
    ProfilingDiT,
    ProfilingDiTConfig,
)
from hf_tokens_adapters.feature_cache.teacache import (
    TeaCache,
    TeaCacheConfig,
)
from hf_tokens_adapters.feature_cache.toca import (
    ToCa,
    ToCaConfig,
)
from hf_tokens_adapters.layer_router.dr_llm import (
    DrLLM,
    DrLLMConfig,
)
from hf_tokens_adapters.layer_router.layerskip import (
    LayerSkip,
    LayerSkipConfig,
)
from hf_tokens_adapters.model_router.r2r import (
    R2R,
    R2RConfig,
)
from hf_tokens_adapters.objective.caft import (
    CAFT,
    CAFTConfig,
)
from hf_tokens_adapters.objective.diffusion_dpo import (
    DiffusionDPO,
    DiffusionDPOConfig,
)
from hf_tokens_adapters.objective.goldfish_loss import (
    GoldfishLoss,
    GoldfishLossConfig,
)
from hf_tokens_adapters.objective.simpo import (
    SimPO,
    SimPOConfig,
)
from hf_tokens_adapters.pooler.arc_encoder import (
    ARCEncoder,
    ARCEncoderConfig,
)
from hf_tokens_adapters.pooler.colbert_token_pooling import (
    ColBERTTokenPooling,
    ColBERTTokenPoolingConfig,
)
from hf_tokens_adapters.pooler.fdt import (
    FDT,
    FDTConfig,
)
from hf_tokens_adapters.pooler.ggem import (
    GGeM,
    GGeMConfig,
)
from hf_tokens_adapters.pooler.simpool import (
    SimPool,
    SimPoolConfig,
)
from hf_tokens_adapters.pooler.softpool import (
    SoftPool,
    SoftPoolConfig,
)
from hf_tokens_adapters.token_bank.atprompt import (
    ATPrompt,
    ATPromptConfig,
)
from hf_tokens_adapters.token_bank.cpt import (
    CPT,
    CPTConfig,
)
from hf_tokens_adapters.token_bank.csp import (
    CSP,
    CSPConfig,
)
from hf_tokens_adapters.token_bank.deep_prompt import (
    DeepPrompt,
    DeepPromptConfig,
)
from hf_tokens_adapters.token_bank.landmark_attention import (
    LandmarkAttention,
    LandmarkAttentionConfig,
)
from hf_tokens_adapters.token_bank.neti import (
    NeTI,
    NeTIConfig,
)
from hf_tokens_adapters.token_bank.pre import (
    PRE,
    PREConfig,
)
from hf_tokens_adapters.token_bank.prospect import (
    ProSpect,
    ProSpectConfig,
)
from hf_tokens_adapters.token_bank.safellava import (
    SafeLLaVA,
    SafeLLaVAConfig,
)
from hf_tokens_adapters.token_bank.token_prepending import (
    TokenPrepending,
    TokenPrependingConfig,
)
from hf_tokens_adapters.token_bank.vqt import (
    VQT,
    VQTConfig,
)
from hf_tokens_adapters.token_reducer.atc import (
    ATC,
    ATCConfig,
)
from hf_tokens_adapters.token_reducer.divprune import (
    DivPrune,
    DivPruneConfig,
)
from hf_tokens_adapters.token_reducer.dynamic_token_pooling import (
    DynamicTokenPooling,
    DynamicTokenPoolingConfig,
)
from hf_tokens_adapters.token_reducer.fastv import (
    FastV,
    FastVConfig,
)
from hf_tokens_adapters.token_reducer.fourier_vlm import (
    FourierVLM,
    FourierVLMConfig,
)
from hf_tokens_adapters.token_reducer.hicom import (
    HICom,
    HIComConfig,
)
from hf_tokens_adapters.token_reducer.importance_token_merge import (
    ImportanceTokenMerge,
    ImportanceTokenMergeConfig,
)
from hf_tokens_adapters.token_reducer.ppt import (
    PPT,
    PPTConfig,
)
from hf_tokens_adapters.token_reducer.recoverable_compression import (
    RecoverableCompression,
    RecoverableCompressionConfig,
)
from hf_tokens_adapters.token_reducer.selection_p import (
    SelectionP,
    SelectionPConfig,
)
from hf_tokens_adapters.token_reducer.tome import (
    ToMe,
    ToMeConfig,
)
from hf_tokens_adapters.token_reducer.tomesd import (
    ToMeSD,
    ToMeSDConfig,
)
from hf_tokens_adapters.token_reducer.transprune import (
    TransPrune,
    TransPruneConfig,
)
from hf_tokens_adapters.token_reducer.visionzip import (
    VisionZip,
    VisionZipConfig,
)
from hf_tokens_adapters.token_router.ftp import (
    FTP,
    FTPConfig,
)
from hf_tokens_adapters.token_router.mixture_of_depths import (
    MixtureOfDepths,
    MixtureOfDepthsConfig,
)
from hf_tokens_adapters.token_router.moe_plus_plus import (
    MoEPlusPlus,
    MoEPlusPlusConfig,
)
from hf_tokens_adapters.token_router.videollm_mod import (
    VideoLLMMoD,
    VideoLLMMoDConfig,
)
from hf_tokens_adapters.token_scorer.llmlingua2 import (
    LLMLingua2,
    LLMLingua2Config,
)
from hf_tokens_adapters.vocabulary_edit.omp_transplant import (
    OMPTransplant,
    OMPTransplantConfig,
)
from hf_tokens_adapters.weight_edit.mace import (
    MACE,
    MACEConfig,
)
from hf_tokens_adapters.weight_edit.rece import (
    RECE,
    RECEConfig,
)
from hf_tokens_adapters.weight_edit.ssd_unlearn import (
    SSDUnlearn,
    SSDUnlearnConfig,
)

from .api import (
    aux_loss,
    conclusions,
    get_token_model,
    objective_loss,
    set_progress,
    unload,
)
from .attention.call import (
    Attending,
)
from .commands.recipes import (
    recipe,
)
from .errors import (
    AdapterError,
    ConfigError,
    HFTokensError,
    UnsupportedError,
)
from .kv.formats import (
    Plain,
    Polar,
    Quantized,
    QuantizedTokens,
    angle_between,
)
from .model.anatomy import (
    anatomy,
)
from .model.streams import (
    Anatomy,
    Stream,
)
from .peft.config import (
    HFTokensConfig,
)
from .peft.tuner import (
    HFTokensModel,
)
from .roles import (
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
    SlackConfig,
    TextWords,
    TokenBank,
    TokenReducer,
    TokenRouter,
    TokenScorer,
    VocabularyEdit,
    WeightEdit,
    allowance,
    check_capacity,
    heavy_hitters,
    observed,
    protect,
    share_out,
    straight_through,
)
from .roles.config import (
    MethodConfig,
    option,
)
from .roles.registry import (
    list_methods,
    method_info,
    register,
)
from .roles.weight_edit import (
    closest_map,
)
from .tokens.matching import (
    match_ids,
    match_sequence,
)
from .tokens.token_map import (
    TokenMap,
    indices,
    rank,
)
from .tools.calibrate import (
    calibrate,
    set_method,
)
from .tools.contexts import (
    CompressedContext,
    compress_context,
)
from .tools.edits import (
    edit,
)
from .tools.export import (
    export,
)
from .tools.loading import (
    card,
    load,
    save_adapter,
)
from .tools.measure import (
    measure,
)
from .tools.model_routing import (
    label_routes,
    route_to,
)
from .tools.prompts import (
    compress_prompt,
    embed_prompt,
)
from .tools.search import (
    search_path,
    search_shares,
)
from .tools.summary import (
    RunRecord,
    Summary,
    record,
    summary,
)
from .tools.vocabulary import (
    transplant,
)

__version__: str
__all__ = [
    "APT",
    "APTConfig",
    "ARCEncoder",
    "ARCEncoderConfig",
    "ATC",
    "ATCConfig",
    "ATPrompt",
    "ATPromptConfig",
    "AdaKV",
    "AdaKVConfig",
    "AdapterError",
    "Anatomy",
    "Attending",
    "AttentionEdit",
    "CAFT",
    "CAFTConfig",
    "CATPruning",
    "CATPruningConfig",
    "CPT",
    "CPTConfig",
    "CSP",
    "CSPConfig",
    "CacheCompressor",
    "ColBERTTokenPooling",
    "ColBERTTokenPoolingConfig",
    "CompressedContext",
    "ConfigError",
    "CrossLMM",
    "CrossLMMConfig",
    "D2O",
    "D2OConfig",
    "DeepPrompt",
    "DeepPromptConfig",
    "DiffusionDPO",
    "DiffusionDPOConfig",
    "Dims",
    "DivPrune",
    "DivPruneConfig",
    "DrLLM",
    "DrLLMConfig",
    "DuoAttention",
    "DuoAttentionConfig",
    "DynamicTokenPooling",
    "DynamicTokenPoolingConfig",
    "ExpectedAttention",
    "ExpectedAttentionConfig",
    "FDT",
    "FDTConfig",
    "FTP",
    "FTPConfig",
    "FastV",
    "FastVConfig",
    "FeatureCache",
    "FirstBlockCache",
    "FirstBlockCacheConfig",
    "Folded",
    "FourierVLM",
    "FourierVLMConfig",
    "GGeM",
    "GGeMConfig",
    "GoldfishLoss",
    "GoldfishLossConfig",
    "H2O",
    "H2OConfig",
    "HFTokensConfig",
    "HFTokensError",
    "HFTokensModel",
    "HICom",
    "HIComConfig",
    "Holding",
    "ImportanceTokenMerge",
    "ImportanceTokenMergeConfig",
    "KIVI",
    "KIVIConfig",
    "KVzip",
    "KVzipConfig",
    "LLMLingua2",
    "LLMLingua2Config",
    "LandmarkAttention",
    "LandmarkAttentionConfig",
    "LayerRouter",
    "LayerSkip",
    "LayerSkipConfig",
    "MACE",
    "MACEConfig",
    "Method",
    "MethodConfig",
    "MiKV",
    "MiKVConfig",
    "MiniCache",
    "MiniCacheConfig",
    "MixtureOfDepths",
    "MixtureOfDepthsConfig",
    "MoEPlusPlus",
    "MoEPlusPlusConfig",
    "ModelRouter",
    "NeTI",
    "NeTIConfig",
    "OMPTransplant",
    "OMPTransplantConfig",
    "Objective",
    "PPT",
    "PPTConfig",
    "PRE",
    "PREConfig",
    "Plain",
    "Polar",
    "Pooler",
    "PrefixKV",
    "PrefixKVConfig",
    "ProSpect",
    "ProSpectConfig",
    "ProfilingDiT",
    "ProfilingDiTConfig",
    "PyramidKV",
    "PyramidKVConfig",
    "Quantized",
    "QuantizedTokens",
    "R2R",
    "R2RConfig",
    "RECE",
    "RECEConfig",
    "Random",
    "RandomConfig",
    "RazorAttention",
    "RazorAttentionConfig",
    "RecoverableCompression",
    "RecoverableCompressionConfig",
    "RunRecord",
    "SSDUnlearn",
    "SSDUnlearnConfig",
    "SafeLLaVA",
    "SafeLLaVAConfig",
    "SelectionP",
    "SelectionPConfig",
    "SimPO",
    "SimPOConfig",
    "SimPool",
    "SimPoolConfig",
    "SlackConfig",
    "SnapKV",
    "SnapKVConfig",
    "SoftPool",
    "SoftPoolConfig",
    "SqueezeAttention",
    "SqueezeAttentionConfig",
    "Stream",
    "StreamingLLM",
    "StreamingLLMConfig",
    "Summary",
    "TOVA",
    "TOVAConfig",
    "TeaCache",
    "TeaCacheConfig",
    "TextWords",
    "ToCa",
    "ToCaConfig",
    "ToMe",
    "ToMeConfig",
    "ToMeSD",
    "ToMeSDConfig",
    "TokenBank",
    "TokenMap",
    "TokenPrepending",
    "TokenPrependingConfig",
    "TokenReducer",
    "TokenRouter",
    "TokenScorer",
    "TransPrune",
    "TransPruneConfig",
    "UnsupportedError",
    "VQT",
    "VQTConfig",
    "VideoLLMMoD",
    "VideoLLMMoDConfig",
    "VisionZip",
    "VisionZipConfig",
    "VocabularyEdit",
    "WeightEdit",
    "allowance",
    "anatomy",
    "angle_between",
    "aux_loss",
    "calibrate",
    "card",
    "check_capacity",
    "closest_map",
    "compress_context",
    "compress_prompt",
    "conclusions",
    "edit",
    "embed_prompt",
    "export",
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
    "observed",
    "option",
    "protect",
    "rank",
    "recipe",
    "record",
    "register",
    "route_to",
    "save_adapter",
    "search_path",
    "search_shares",
    "set_method",
    "set_progress",
    "share_out",
    "straight_through",
    "summary",
    "transplant",
    "unload",
]
