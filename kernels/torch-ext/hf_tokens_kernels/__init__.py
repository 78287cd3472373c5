"""Operations behind hf-tokens: each in its own folder, with a torch reference that is the default and the oracle, and a Triton twin."""

from .agglomerate import agglomerate, cluster
from .attention_scores import attention_columns, attention_entropy, attention_lse, attention_rows
from .dispatch import Choice, backend, choose, picks
from .farthest_points import farthest_points
from .similarity_match import match

__all__ = [
    "Choice",
    "agglomerate",
    "attention_columns",
    "attention_entropy",
    "attention_lse",
    "attention_rows",
    "backend",
    "choose",
    "cluster",
    "farthest_points",
    "match",
    "picks",
]
