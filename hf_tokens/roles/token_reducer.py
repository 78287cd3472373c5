"""Which tokens stay, join or vanish."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from ..tokens.token_map import TokenMap
from .base import Method


class TokenReducer(Method):
    """Which tokens stay, join or vanish: `before` the block, in the `middle` (between attention and MLP), or `after` it.

    At the site `sublayer` it is for the time of the block's `parts` only: each token keeps its own residual, and gets what its slot got.
    There and in the middle the verb is called without gradients: the map is a decision, and what it joins has the gradient.
    One that `spans` shortens the stream from its first block to its last, which must follow each other; `regain` returns what they become.

    >>> class EveryOther(TokenReducer):
    ...     def assign(self, positions):
    ...         return TokenMap.select(positions % 2 == 0)
    >>> EveryOther(MethodConfig(), dims).assign(torch.arange(6)[None]).source
    tensor([[0, 2, 4]])
    """

    role, verb, counts, site, sites = "TokenReducer", "assign", "kept", "after", ("before", "middle", "after", "sublayer")
    saves = "tokens: FLOPs, and entries of the cache behind them"
    lost = "which tokens leave, as it decides for each input (of a prompt alone `compress_prompt` gives what it leaves, as ids or text)"

    @abc.abstractmethod
    def assign(self, *signals: Any) -> TokenMap | None:
        """The map of the tokens at this site; None changes nothing."""

    def regain(self, before: Tensor, given: Tensor, got: Tensor) -> Tensor:
        """If it `spans`: the tokens behind the blocks, (b n d); by default each is what its slot is.

        Args:
            before: The tokens in front of the blocks, (b n d).
            given: What stood there in the slot that each token reads; the token itself where it reads none.
            got: What stands in that slot behind the blocks.
        """
        return got
