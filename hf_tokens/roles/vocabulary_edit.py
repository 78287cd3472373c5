"""Rows of the embeddings and of the head for another tokenizer."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Dims, Method
from .config import MethodConfig


class VocabularyEdit(Method):
    """Rows of the embeddings and of the head for another tokenizer; `hf_tokens.transplant` calls it, there is no adapter.

    >>> class MeanOfShared(VocabularyEdit):
    ...     def rows(self, anchors, donor_rows):
    ...         return anchors.mean(dim=0).expand(len(donor_rows), -1)
    >>> MeanOfShared(MethodConfig()).rows(torch.tensor([[0.0, 2.0], [2.0, 4.0]]), torch.ones(1, 5))
    tensor([[1., 3.]])
    """

    role, verb, moves_tokens, placed, usual_kinds = "VocabularyEdit", "rows", False, False, ("text",)
    leaves, lost = ("checkpoint",), "the rows that it made"

    def __init__(self, config: MethodConfig, dims: Dims | None = None):
        super().__init__(config, dims)

    @abc.abstractmethod
    def rows(self, *signals: Any) -> Tensor:
        """The model's rows of the tokens that only the donor has, (u d)."""
