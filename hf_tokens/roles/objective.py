"""What the model is to learn beside its own loss, or in the place of it."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Method
from .config import MethodConfig
from .signals import JUDGES, OF_ALL_OBJECTIVES


class Objective(Method):
    """What the model is to learn: a loss of what it returns, beside its own loss or in the place of it.

    It stands in one block, so that it is saved and switched like any method, but touches no token: the model's outputs stay as they are. A
    text model's objective is called behind each forward that has labels; a denoiser's by `hf_tokens.objective_loss`. An objective need not
    know of accumulation: the engine lets each batch count by its share of the optimizer step.

    >>> class Unsure(Objective):
    ...     kinds, causal, needs_head = ("text",), True, True
    ...     def loss(self, logps, labels):
    ...         return (logps.exp() * (labels != -100)).mean()
    >>> Unsure(MethodConfig(), dims).loss(torch.zeros(1, 2), torch.tensor([[7, -100]]))
    tensor(0.5000)
    """

    role, verb, moves_tokens, packed, in_block, exports = "Objective", "loss", False, True, False, True
    lost = ""  # it acts in training alone
    vocabulary = JUDGES | OF_ALL_OBJECTIVES

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (layers - 1,)

    @abc.abstractmethod
    def loss(self, *signals: Any) -> Tensor | None:
        """The loss of this batch, a scalar; None leaves the model's own alone."""
