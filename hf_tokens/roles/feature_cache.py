"""What is computed again at a denoising step, and what is taken from an earlier one."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Method


class FeatureCache(Method):
    """What is computed again at a denoising step, and what is taken from an earlier one.

    The site is what is kept: what each `sublayer` returned for each token, or what a whole `block` added to its tokens (and to those
    of a second sequence).
    """

    role, verb, kinds, moves_tokens = "FeatureCache", "reuse", ("denoiser",), False
    site, sites = "sublayer", ("sublayer", "block")

    @abc.abstractmethod
    def reuse(self, *signals: Any) -> Tensor | None:
        """Tokens of this sublayer to compute at this step, indices (b r); None computes all of them. Of a block: all or none."""
