"""What each token of a text is worth, and which of its words stay."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from .base import Method
from .config import MethodConfig


@dataclass(frozen=True)
class TextWords:
    """The words of some chunks of text, for a scorer that chooses among them.

    Attributes:
        of: The word in which each token stands, in their order, (b m); -1 for special tokens and padding.
        digits: Tokens with a digit, (b m) bool.
        real: Words that are there, (b w) bool.
        forced: Which of the forced texts each word is, -1 for the others, (b w); one of white space may have no token.
        counts: How many tokens of the budget each word is, (b w).
        share: Share of its chunk that stays, (b).
        text: The text whose chunk it is, (b): one that may go as a whole, or -1.

    Two words of one text, the second of two tokens:

    >>> words = torch.ones(1, 2, dtype=torch.bool)
    >>> none, all_ = torch.full((1, 2), -1), torch.ones(1, 2, dtype=torch.long)
    >>> text = TextWords(torch.tensor([[0, 1, 1]]), torch.zeros(1, 3).bool(), words, none, all_, torch.tensor([0.5]), torch.tensor([-1]))
    >>> int(text.real.sum())
    2
    """

    of: Tensor
    digits: Tensor
    real: Tensor
    forced: Tensor
    counts: Tensor
    share: Tensor
    text: Tensor


class TokenScorer(Method):
    """What each token of a text is worth: it sits in a token classifier, and `compress_prompt` brings the text and takes words away.

    A forward of the model is as without it. `share` of the tokens stay where a text names no share of its own; the model reads chunks of
    `chunk` tokens. One that `chooses` lets some of several texts go as a whole.

    >>> class Sure(TokenScorer):
    ...     def score(self, logits):
    ...         return logits.softmax(dim=-1)[..., 1]
    ...     def keep(self, scores, words):
    ...         return words.real
    >>> Sure(MethodConfig(), dims).score(torch.zeros(1, 2, 2))
    tensor([[0.5000, 0.5000]])
    """

    role, verb, moves_tokens, needs_head, packed, in_block, exports = "TokenScorer", "score", False, True, True, False, True
    saves = "tokens of the prompt"
    kinds, share, chunk, chooses = ("text",), 0.5, 512, False
    lost = "which words of a prompt go (`compress_prompt` gives what it leaves of one, as ids or text)"

    @abc.abstractmethod
    def score(self, *signals: Any) -> Tensor:
        """What each token is worth, (b m). It is called behind the model's head."""

    @abc.abstractmethod
    def keep(self, scores: Tensor, words: TextWords) -> Tensor:
        """The words of each chunk that stay, (b w) bool, by the scores of its tokens (b m)."""

    def worth(self, scores: Tensor, words: TextWords) -> Tensor:
        """If it `chooses`: what each word is worth, forced or not, (b w)."""
        raise UnsupportedError(explain("A scorer that chooses texts says what words are worth", type(self).__name__, "Define its `worth`."))

    def choose(self, worth: Tensor) -> Tensor:
        """If it `chooses`: of the texts that may go as a whole, those that stay, (t) bool, by the mean worth of their words (t)."""
        return torch.ones_like(worth, dtype=torch.bool)

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (layers - 1,)
