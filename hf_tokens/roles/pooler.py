"""What the tokens of a stream become as they leave it."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Method
from .config import MethodConfig


class Pooler(Method):
    """What the tokens of a stream become as they leave it.

    The site is where they are read: at `stream` one vector is given to all that reads the stream, the model's own head among it; at
    `output` a few are returned to the caller, in the place of `last_hidden_state`. One that defines `ask` may let tokens of its own read
    the others in the last block; no other token sees them.

    >>> class Mean(Pooler):
    ...     def pool(self, hidden, mask):
    ...         return (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    >>> Mean(MethodConfig(), dims).pool(torch.ones(1, 3, 4), torch.tensor([[True, True, False]]))
    tensor([[1., 1., 1., 1.]])
    """

    role, verb, counts, site, sites, further = "Pooler", "pool", "pooled", "stream", ("stream", "output"), ("examine", "ask")
    saves = "vectors behind the model"
    kinds, moves_tokens, caches = ("text", "vision", "video", "audio"), False, False
    lost = "how it pools what leaves the last block"

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        """The last block: a pooler acts behind it, and behind the norm that follows."""
        return (layers - 1,)

    @abc.abstractmethod
    def pool(self, *signals: Any) -> Tensor | None:
        """One vector for each row, (b d); at the site `output` some, (b p d), with zeros behind those of a row that has fewer.

        None changes nothing.
        """

    def ask(self) -> tuple[Tensor, Tensor] | None:
        """Tokens that only read the others in the last block that runs, (b k d), and the token in whose place each stands, (b k).

        It is called in front of that block; `hidden` are the tokens that enter it. What the tokens gathered is the signal `answers`.
        """
