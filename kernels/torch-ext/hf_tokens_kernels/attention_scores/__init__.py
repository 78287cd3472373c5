"""Sums and rows of attention probabilities, without the attention matrix."""

from .reference import attention_columns, attention_entropy, attention_rows

__all__ = ["attention_columns", "attention_entropy", "attention_rows"]
