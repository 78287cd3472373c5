"""What is computed again at a denoising step, and what is taken from an earlier one."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from torch import Tensor

from .base import Method


class FeatureCache(Method):
    """What is computed again at a denoising step, and what is taken from an earlier one.

    The site is what is kept: what each `sublayer` returned for each token, or what a whole `block` added to its tokens (and to those
    of a second sequence), or what the `stack` of all its blocks in a stream added to them together. Of a stack it is asked once in a call
    of the model, for all streams: in front of its first block, inside of that where it names `attention_input`, behind it if that `leads`.

    Class attributes:
        leads: Its first block is no part of the stack, and always runs.

    >>> class EveryOtherStep(FeatureCache):
    ...     site = "block"
    ...     def reuse(self, hidden, step):
    ...         return None if step % 2 == 0 else torch.zeros(len(hidden), 0, dtype=torch.long)
    >>> [EveryOtherStep(MethodConfig(), dims).reuse(torch.ones(1, 3, 4), step) is None for step in range(3)]
    [True, False, True]
    """

    role, verb, counts, kinds, moves_tokens = "FeatureCache", "reuse", "computed", ("denoiser",), False
    saves = "FLOPs of steps and blocks"
    lost = "what it spares a denoiser at each step"
    site, sites = "sublayer", ("sublayer", "block", "stack")
    leads: ClassVar[bool] = False

    @abc.abstractmethod
    def reuse(self, *signals: Any) -> Tensor | None:
        """Tokens of this sublayer to compute at this step, indices (b r); None computes all of them. Of a block or a stack: all or none."""
