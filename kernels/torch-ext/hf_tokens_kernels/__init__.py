"""Operations behind hf-tokens: each in its own folder, with a torch reference that is the default and the oracle, and a Triton twin."""

from .agglomerate import agglomerate
from .attention_scores import attention_columns, attention_entropy, attention_lse, attention_rows
from .dispatch import Choice, backend, choose, picks
from .routed import routed_gather, routed_scatter
from .token_merge import merge, unmerge

__all__ = [
    "Choice",
    "agglomerate",
    "attention_columns",
    "attention_entropy",
    "attention_lse",
    "attention_rows",
    "backend",
    "choose",
    "merge",
    "picks",
    "routed_gather",
    "routed_scatter",
    "unmerge",
]
