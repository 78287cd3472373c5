"""Operations behind hf-tokens: each in its own folder, with a torch reference that is the default and the oracle."""

from .agglomerate import agglomerate
from .attention_scores import attention_columns, attention_entropy, attention_rows

__all__ = ["agglomerate", "attention_columns", "attention_entropy", "attention_rows"]
