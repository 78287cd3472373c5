"""Operations behind hf-tokens: each in its own folder, with a torch reference that is the default and the oracle, and a Triton twin."""

from .agglomerate import agglomerate
from .attention_scores import attention_columns, attention_entropy, attention_lse, attention_rows
from .dispatch import Choice, backend, choose, picks
from .quantized_kv import Coded, Rounded, decode, encode, pack, pack_bits, packed_attention, unpack, unpack_bits
from .ragged_attention import merge_attention, ragged_attention

__all__ = [
    "Choice",
    "Coded",
    "Rounded",
    "agglomerate",
    "attention_columns",
    "attention_entropy",
    "attention_lse",
    "attention_rows",
    "backend",
    "choose",
    "decode",
    "encode",
    "merge_attention",
    "pack",
    "pack_bits",
    "packed_attention",
    "picks",
    "ragged_attention",
    "unpack",
    "unpack_bits",
]
