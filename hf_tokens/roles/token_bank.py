"""Tokens put into the stream."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from torch import Tensor

from ..attention.call import Attending
from ..errors import UnsupportedError, explain
from .base import Method
from .config import MethodConfig
from .signals import AT_SITE


class TokenBank(Method):
    """Tokens put into the stream.

    The site is where they go, and for how long: `input` inserts them once and keeps them until the stream ends, and calls the verb again
    at each later block it sits in to rewrite them; `block` gives them to one block and takes them out behind it; `query` lets them only
    read: no token sees them, and what they gathered goes to `read`; `embedding` inserts none, they take the place of embeddings that the
    model looks up, before it adds positions, as `find` returns: what stands in the prompt is the caller's. There, a bank sits in the
    first block; if it is `deep`, its verb is called again at each later block it sits in, to rewrite its first tokens. `prompt` puts them
    behind the prompt that a denoiser is given, before the model reads it, in the samples that `takes` returns; there, the signals `hidden`
    and `mask` are of the prompt. If it is `deep`, each block reads the tokens of its own instance only, as the model made them of what
    the verb returned. Where `word` names a word of the prompt, they take the place of its embeddings instead, before the text encoders of
    the pipeline read it, again in each call of the denoiser and for each block that reads its own; `hidden` is then the word's embeddings,
    side by side for several encoders, and the samples that take them are those whose prompt holds it, be it the negative one.

    At the site `input` a method may define four more words: `follow` returns behind which tokens they go, `shift` how far tokens have moved
    on by them, `attend` how the attention of each block that it sits in reads them and all others, `conclude` what has become of them.

    >>> class Prompt(TokenBank):
    ...     def __init__(self, config, dims):
    ...         super().__init__(config, dims)
    ...         self.bank = torch.nn.Parameter(torch.zeros(2, dims.width))
    ...     def tokens(self):
    ...         return self.bank
    >>> Prompt(MethodConfig(), dims).tokens().shape
    torch.Size([2, 4])
    """

    role, verb, counts, site, sites = "TokenBank", "tokens", "inserted", "block", ("input", "block", "query", "embedding", "prompt")
    further = ("follow", "shift", "attend", "conclude", "examine", "takes")
    packed, lost = True, "the tokens that it puts in behind the embeddings, or writes anew in later blocks"
    deep: ClassVar[bool] = False

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        """Blocks that the bank acts in when the config does not name them: at embeddings and prompt the first, unless it is deep."""
        once = cls.site == "embedding" or cls.site == "prompt" and not cls.deep
        return (0,) if once else super().default_layers(config, layers)

    @classmethod
    def leaves_as(cls, config: MethodConfig) -> tuple[str, ...]:
        """Tokens in the place of embeddings, which read nothing and are written once, leave as embeddings."""
        once = len(cls.default_layers(config, 2) if config.layers is None else config.layers) == 1
        return ("prompt-embeds",) if cls.site == "embedding" and once and not cls.signals else ()

    @property
    def in_block(self) -> bool:
        """Whether it does anything around a block."""
        return self.site not in AT_SITE or self.site == "embedding" and self.deep

    @abc.abstractmethod
    def tokens(self, *signals: Any) -> Tensor | tuple[Tensor, Tensor] | None:
        """The tokens for this block, (k d) or (b k d); None leaves the stream alone.

        For a word of the prompt, also a pair: the tokens, and what the values of a block's attention read besides, added to what the text
        encoder makes of each (before its last norm), in units of the length that this has.
        """

    def place(self, start: Tensor, end: Tensor) -> Tensor:
        """Index of the token in front of which they go, (b), given each row's first real token and the end of its real tokens."""
        return start

    def follow(self) -> Tensor | None:
        """The tokens of this pass that each have the bank's tokens behind them, (b m) bool; called in every pass, in the first block."""

    def shift(self) -> Tensor:
        """If `shifts`: how many places further on than its `positions` each token stands, (b m); called in every pass, in the first block.

        The blocks behind turn queries and keys by these places.
        """
        raise UnsupportedError(explain("A bank that sets `shifts` says how", type(self).__name__, "Define its `shift`."))

    def attend(self) -> Attending | None:
        """How the attention of a block reads its keys; None leaves it alone."""

    def conclude(self) -> Tensor | None:
        """What the bank's tokens amount to, (b ...), for `conclusions`; called in the first block's instance, behind the last block."""

    def find(self, ids: Tensor) -> Tensor:
        """If the site is `embedding`: which of the tokens takes the place of each embedding, -1 where none does, for token ids (b n)."""
        raise UnsupportedError(explain("A bank at the embeddings says where its tokens go", type(self).__name__, "Define its `find`."))

    def takes(self) -> Tensor | None:
        """If the site is `prompt`: which samples take the tokens, (b) bool; None is all but those of the negative prompt."""

    @classmethod
    def word(cls, config: MethodConfig) -> str | None:
        """If the site is `prompt`: the word of the prompt for which the tokens stand; None puts them behind the prompt."""
        return None

    def read(self, summary: Tensor) -> Tensor | None:
        """What the head's output gains from what the query tokens gathered in this block, summary (b k d) to (b o)."""
        return None
