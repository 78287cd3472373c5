"""What the self-attention of a block returns for each token."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Method


class AttentionEdit(Method):
    """What the self-attention of a block returns for each token, before it is added to the residual.

    >>> class Louder(AttentionEdit):
    ...     def edit(self, attention_output):
    ...         return 2 * attention_output
    >>> Louder(MethodConfig(), dims).edit(torch.ones(1, 1, 4))
    tensor([[[2., 2., 2., 2.]]])
    """

    role, verb, counts, moves_tokens = "AttentionEdit", "edit", "edited", False
    lost = "what it adds to the attention of its blocks"

    @abc.abstractmethod
    def edit(self, *signals: Any) -> Tensor | None:
        """The output of the attention, (b m d), for the tokens that ran the block; None leaves it as it is."""
