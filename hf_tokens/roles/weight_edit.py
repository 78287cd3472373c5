"""A closed-form change of weights."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Dims, Method
from .config import MethodConfig


class WeightEdit(Method):
    """A closed-form change of weights, found once on data by `hf_tokens.edit`.

    While the adapter acts, each call of the block sees W + delta in the place of W, which stays as it is; nothing of it is trained. The
    site is which weights: `block`, all of it; `context`, the projections of its cross-attention that read the context; `model`, all of the
    blocks and what is outside of them, embeddings and heads too, whose changes the instance in the first block holds; where the config
    names `layers` or a `stream`, it is those blocks alone.

    Class attributes:
        groups: Names of the groups of data that the verb needs.
        maybe: Names of those that it can do without.

    >>> class Halve(WeightEdit):
    ...     def edit(self, weights):
    ...         return {name: weight / 2 for name, weight in weights.items()}
    >>> Halve(MethodConfig(), dims).edit({"layers.0.q_proj.weight": torch.ones(1, 2)})
    {'layers.0.q_proj.weight': tensor([[0.5000, 0.5000]])}
    """

    role, verb, moves_tokens, packed, in_block, exports = "WeightEdit", "edit", False, True, False, True
    leaves, lost = ("checkpoint",), "the weights that it changed"
    site, sites = "block", ("block", "context", "model")
    groups: ClassVar[tuple[str, ...]] = ()
    maybe: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MethodConfig, dims: Dims):
        super().__init__(config, dims)
        self._warned = self._made = False
        self.register_buffer("made", torch.zeros((), dtype=torch.bool))
        for name, shape in dims.weights.items():
            self.register_buffer(self.slot(name), torch.zeros(shape))

    @classmethod
    def site_of(cls, config: MethodConfig) -> str:
        """The site, for a method whose config has a choice; its class says the widest."""
        return cls.site

    @staticmethod
    def slot(name: str) -> str:
        """Name of the buffer that holds the change of a weight."""
        return name.replace(".", "/")

    @property
    def is_made(self) -> bool:
        """Whether the edit has been found, here or before the adapter was saved; to a compiler, which reads no buffer, it adds 0 if not."""
        if not self._made and not torch.compiler.is_compiling():
            self._made = bool(self.made)  # once true the buffer is read no more: that would wait for the device
        return self._made or torch.compiler.is_compiling()

    @property
    def unready(self) -> str | None:
        return None if self.is_made else "Make the edit by `hf_tokens.edit` first."

    def warns(self) -> bool:
        """Whether to warn that the edit is not made: once."""
        warned, self._warned = self._warned, True
        return not warned

    def note(self, changes: dict[str, Tensor]) -> None:
        """Hold what the edit changes in this block, name -> (o i); empty means that it is not made."""
        for name in self.dims.weights:
            buffer = getattr(self, self.slot(name))
            buffer.copy_(changes[name]) if name in changes else buffer.zero_()
        self._made = bool(self.made.fill_(bool(changes)))

    def noted(self) -> dict[str, Tensor]:
        """A copy of what the edit changes in this block; empty where it is not made."""
        return {name: getattr(self, self.slot(name)).clone() for name in self.dims.weights} if bool(self.made) else {}

    @abc.abstractmethod
    def edit(self, *signals: Any) -> dict[str, Tensor]:
        """The new weights, name -> (o i), of all blocks at once; those left out stay."""


def closest_map(now: Tensor, start: Tensor, moment: Tensor, cross: Tensor, stay: float) -> Tensor:
    """The linear map nearest to one that sends inputs x to where another sends y: argmin_W sum |W x - start y|^2 + stay |W - now|^2.

    Args:
        now: The map (o i) to stay near.
        start: The map (o i) that sends y where x is to go.
        moment: Sum of x x^T over the pairs, (i i); a pair may be weighted here and in `cross`.
        cross: Sum of y x^T over the pairs, (i i).
        stay: Weight of the distance to `now`; at 0, of the maps that fit best the one nearest to `now`.
    """
    change = start @ cross - now @ moment
    if stay == 0:
        return now + change @ torch.linalg.pinv(moment, hermitian=True)
    ridge = moment.clone()
    ridge.diagonal().add_(stay)
    return now + torch.linalg.solve(ridge, change.mT).mT
