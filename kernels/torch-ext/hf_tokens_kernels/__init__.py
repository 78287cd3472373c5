"""Operations behind hf-tokens: each in its own folder, with a torch reference that is the default and the oracle, and a Triton twin."""

from .agglomerate import agglomerate, cluster
from .attention_scores import attention_columns, attention_entropy, attention_lse, attention_rows, attention_with_columns
from .dispatch import Choice, backend, choose, picks
from .farthest_points import farthest_points
from .low_pass import low_pass
from .pooling import pool_max, pool_power, pool_softmax
from .quantized_kv import (
    Coded,
    Kept,
    Rounded,
    decode,
    encode,
    pack,
    pack_along,
    pack_bits,
    packed_attention,
    round_rows,
    unpack,
    unpack_bits,
)
from .ragged_attention import merge_attention, ragged_attention
from .routed import routed_gather, routed_scatter
from .similarity_match import match
from .token_merge import Slots, merge, take_rows, unmerge

__all__ = [
    "Choice",
    "Coded",
    "Kept",
    "Rounded",
    "Slots",
    "agglomerate",
    "attention_columns",
    "attention_entropy",
    "attention_lse",
    "attention_rows",
    "attention_with_columns",
    "backend",
    "choose",
    "cluster",
    "decode",
    "encode",
    "farthest_points",
    "low_pass",
    "match",
    "merge",
    "merge_attention",
    "pack",
    "pack_along",
    "pack_bits",
    "packed_attention",
    "picks",
    "pool_max",
    "pool_power",
    "pool_softmax",
    "ragged_attention",
    "round_rows",
    "routed_gather",
    "routed_scatter",
    "take_rows",
    "unmerge",
    "unpack",
    "unpack_bits",
]
