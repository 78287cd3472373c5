"""A static layer of a cache with tokens of a surgery in front, which take none of its places."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from ..errors import UnsupportedError, explain


class FrontedLayer(StaticLayer):
    """A static layer that keeps the keys and values of inserted tokens apart (b k p e), and hands them out in front of its own.

    It is as long as it was, and so are masks and positions of the model; the block's mask is widened where it reads the layer.
    """

    def __init__(self, layer: StaticLayer):
        vars(self).update(vars(layer))
        self.front: tuple[Tensor, Tensor] | None = None
        self.column: Tensor | None = None  # of the model's mask, that of each row's first real token, (b)
        self.arriving: int | None = None  # tokens of a surgery among those of the next `update`, in front

    def expect(self, arriving: int, column: Tensor | None = None) -> None:
        """Announce the tokens of the next `update`: so many in front that a surgery inserted, to be seen as that place of each row (b)."""
        self.arriving = arriving
        self.column = self.column if column is None else column

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b k m e); returns those of the front and all places of the layer."""
        arriving, self.arriving = self.arriving, None
        if arriving is None and self.front is not None:
            rule = "A cache that a surgery changed is read by that surgery only"
            got = f"one with {self.front[0].shape[2]} tokens in front and a model without it"
            raise UnsupportedError(explain(rule, got, "Start a new cache after switching the adapter off."))
        if arriving:
            self.front = key_states[:, :, :arriving], value_states[:, :, :arriving]
            key_states, value_states = key_states[:, :, arriving:], value_states[:, :, arriving:]
        stored = super().update(key_states, value_states, *args, **kwargs)
        return stored if self.front is None else tuple(torch.cat(pair, dim=2) for pair in zip(self.front, stored, strict=True))

    def widened(self, mask: Tensor) -> Tensor:
        """The block's mask (b|1 h|1 m n), with the columns of the front."""
        index = self.column[:, None, None, None].expand(-1, *mask.shape[1:3], self.front[0].shape[2])
        mask = mask.expand(len(index), *mask.shape[1:])
        return torch.cat([mask.gather(3, index), mask], dim=3)

    def reset(self) -> None:
        """Forget all tokens."""
        super().reset()
        self.front = self.column = self.arriving = None

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.front = None if self.front is None else tuple(change(t) for t in self.front)
        self.column = None if self.column is None else change(self.column)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        super().reorder_cache(beam_idx)
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))


def is_static(cache: Any) -> bool:
    """Whether all layers of a cache are static, and none has a window."""
    return bool(cache.layers) and all(type(layer) in (StaticLayer, FrontedLayer) for layer in cache.layers)


def front(cache: Any, slots: Iterable[int]) -> None:
    """Put such layers into a static cache, in place.

    Raises:
        UnsupportedError: It has seen tokens already.
    """
    for slot in slots:
        layer = cache.layers[slot]
        if isinstance(layer, FrontedLayer):
            continue
        if int(layer.get_seq_length()):
            rule, got = "Tokens go in front of a prompt in its first pass", f"a static cache of {int(layer.get_seq_length())} tokens"
            raise UnsupportedError(explain(rule, got, "Start a new cache."))
        cache.layers[slot] = FrontedLayer(layer)
