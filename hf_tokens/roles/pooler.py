"""What the tokens of a stream become as they leave it."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Method
from .config import MethodConfig


class Pooler(Method):
    """What the tokens of a stream become as they leave it.

    The site says for whom: `stream` gives one vector to whoever reads the stream, the model's own head among them; `output` gives a few
    to whoever called the model, in the place of `last_hidden_state`. One that defines `ask` may let the last block answer tokens of its
    own, which no other token sees.
    """

    role, verb, site, sites, further = "Pooler", "pool", "stream", ("stream", "output"), ("examine", "ask")
    kinds, moves_tokens, caches = ("text", "vision", "video", "audio"), False, False

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
        """Tokens that only ask in the last block that runs, (b k d), and the token of the stream in whose place each stands, (b k).

        It is called in front of that block; `hidden` are the tokens that enter it. What the tokens gathered is the signal `answers`.
        """
