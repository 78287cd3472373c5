"""One pass through a stream: what is known of it from its first block to its last."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .books import Books, Stored
from .cache import TokenCacheLayer
from .roles import Method
from .signals import Moment
from .token_map import TokenMap


def first_real(now: Pass, books: Books) -> Tensor:
    """Index of each row's first real token among those that are left, (b)."""
    flags = books.flags(books.filled, True)
    flags = flags if now.padding is None else flags & now.padding.gather(1, books.rows)
    return flags.long().argmax(dim=1)


class Memory(dict):
    """What blocks of one stream tell each other. `tokens` holds (b m ...) tensors that follow the tokens through every map."""

    def __init__(self):
        super().__init__()
        self.tokens: dict[str, Tensor] = {}
        self.prompted, self.end = False, 0  # whether the last pass of the sequence brought a prompt, and where it ended

    def move(self, tokens: TokenMap) -> None:
        """Let the per-token entries follow a map."""
        self.tokens = {name: tokens.gather(value) for name, value in self.tokens.items()}


@dataclass
class Entry:
    """What a block needs to be run again in a backward pass."""

    came: weakref.ref
    books: Books
    inside: Tensor | None
    given: Tensor | None
    tokens: dict[str, Tensor]


@dataclass
class Pass:
    """One pass through the stream.

    Attributes:
        books: The tokens that are left.
        padding: Real tokens of the sequence that entered, (b n) bool; None if all are.
        first: Place of each row's first real token in the whole sequence, (b), behind its end if none came yet; None if it is 0.
        apart: The first token that each real one sees, -1 for the others, (b n); None if all see the same.
        segments: Where each sample begins in a packed row, (s); None if each has a row of its own.
        inside: The tokens that are left, behind the last block that ran, (b m d).
        given: What the model got from that block.
        lent: By the type of block, the tokens whose keys later blocks may read, and what was stored before them.
    """

    books: Books
    padding: Tensor | None
    first: Tensor | None
    memory: Memory
    at: int = -1
    layers: list[TokenCacheLayer] = field(default_factory=list)
    apart: Tensor | None = None
    segments: Tensor | None = None
    inside: Tensor | None = None
    given: Tensor | None = None
    lent: dict[str | None, tuple[Books, Stored | None]] = field(default_factory=dict)
    waiting: dict[str, list[tuple[Method, Moment, Tensor]]] = field(default_factory=dict)

    def starts(self, books: Books) -> Tensor:
        """Where each sample of a packed row begins among the tokens that are left, (1 s)."""
        return torch.searchsorted(books.rows[0].contiguous(), self.segments)[None]

    @property
    def prefill(self) -> bool:
        """Whether this pass brings a prompt or a whole sequence, and not one token of generation."""
        return self.books.n > 1 or self.books.start == 0

    def seen(self) -> Tensor:
        """Real tokens of each row up to the end of this pass, (b)."""
        here = self.books.rows.new_full((self.books.batch,), self.books.n) if self.padding is None else self.padding.sum(dim=1)
        before = self.books.start if self.first is None or not self.books.start else self.books.start - self.first
        return here + before
