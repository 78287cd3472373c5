"""How the queries of an attention look at its keys."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

FAR = torch.iinfo(torch.int32).max  # the position of a key that no query sees


@dataclass(frozen=True)
class Look:
    """What shapes the probabilities of queries (b h m e) and keys (b g n e).

    Attributes:
        scaling: Factor on the dot products.
        mask: Bool (True is seen) or additive mask, (b|1 h|1 m|1 n).
        causal: Whether query i sees only the keys up to its own place, where the last query stands at the last key.
        query_positions, key_positions: Query i sees the keys whose position is not above its own, (b m) and (b g|1 n) int32; in the
            place of `causal`.
        softcap: The scores become softcap * tanh(score / softcap), before the mask.
        sinks: The score of a key that every query sees and that is not returned, (h).
    """

    scaling: float
    mask: Tensor | None = None
    causal: bool = False
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The tensors among these."""
        return [t for t in (self.mask, self.query_positions, self.key_positions, self.sinks) if t is not None]

    def skips(self) -> bool:
        """Whether no query of a chunk sees what stands behind its last one."""
        return self.causal and self.mask is None and self.query_positions is None

    def reach(self, last: int, m: int, n: int) -> int:
        """Keys that the queries before `last` may see."""
        return n - m + last if self.skips() else n

    def heads(self, own: slice, keys: slice) -> Look:
        """The same for some query heads and their key heads."""
        some = lambda t, part: t if t is None or t.shape[1] == 1 else t[:, part]
        sinks = None if self.sinks is None else self.sinks[own]
        return replace(self, mask=some(self.mask, own), key_positions=some(self.key_positions, keys), sinks=sinks)

    def last(self, w: int) -> Look:
        """The same for the last w queries."""
        mask, places = self.mask, self.query_positions
        mask = mask if mask is None or mask.shape[2] == 1 else mask[:, :, -w:]
        return replace(self, mask=mask, query_positions=None if places is None else places[:, -w:])

    def rows(self, index: Tensor, m: int, n: int) -> Look:
        """The same for chosen queries, (b r) of m."""
        b, r = index.shape
        mask = self.mask
        if mask is not None and mask.shape[2] > 1:
            heads = mask.shape[1]
            mask = mask.expand(b, heads, m, n).gather(2, index[:, None, :, None].expand(b, heads, r, n))
        queries, keys = self.query_positions, self.key_positions
        if queries is not None:
            queries = queries.gather(1, index)
        elif self.skips():
            queries, keys = (index + (n - m)).int(), torch.arange(n, device=index.device, dtype=torch.int32).expand(b, 1, n)
        return replace(self, mask=mask, causal=False, query_positions=queries, key_positions=keys)


def look(
    q: Tensor,
    k: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Look:
    """Check what an operation was given, and bring positions and key masks into one form.

    Raises:
        ValueError: Shapes do not fit.
    """
    (b, h, m, e), (_, g, n, _) = q.shape, k.shape
    fits = k.shape[0] == b and k.shape[3] == e and h % g == 0
    _demand(fits, "q (b h m e) and k (b g n e) must have the same b and e, and h must be a multiple of g", (q, k))
    if mask is not None:
        fits = mask.dim() == 4 and all(size in (1, full) for size, full in zip(mask.shape, (b, h, m, n), strict=True))
        _demand(fits and mask.shape[3] == n, f"mask must be (b|1 h|1 m|1 n), here {(b, h, m, n)}", (mask,))
    if query_positions is None and key_mask is None:
        _demand(key_positions is None, "key_positions need query_positions", (key_positions,))
        return Look(scaling, mask, causal, softcap=softcap, sinks=sinks)
    device = q.device
    ascending = torch.arange(n, device=device)
    if query_positions is None:
        query_positions = (ascending[n - m :] if causal else torch.zeros(m, dtype=torch.long, device=device)).expand(b, m)
        key_positions = ascending.expand(b, n) if causal else torch.zeros(b, n, dtype=torch.long, device=device)
    _demand(tuple(query_positions.shape) == (b, m), f"query_positions must be (b m), here {(b, m)}", (query_positions,))
    _demand(key_positions is not None, "query_positions need key_positions", (query_positions,))
    queries, keys = query_positions.int(), _by_head(key_positions, b, g, n, "key_positions").int()
    if key_mask is not None:
        key_mask = _by_head(key_mask, b, g, n, "key_mask")
        keys = keys.expand(b, max(keys.shape[1], key_mask.shape[1]), n).masked_fill(~key_mask, FAR)
    return Look(scaling, mask, False, queries, keys, softcap, sinks)


def _by_head(x: Tensor, b: int, g: int, n: int, name: str) -> Tensor:
    """Something of each key, (b n) or (b g n), as (b 1|g n)."""
    x = x[:, None] if x.dim() == 2 else x
    fits = x.dim() == 3 and x.shape[0] == b and x.shape[1] in (1, g) and x.shape[2] == n
    _demand(fits, f"{name} must be (b n) or (b g n), here {(b, g, n)}", (x,))
    return x


def _demand(fits: bool, rule: str, came: tuple[Tensor, ...]) -> None:
    if not fits:
        raise ValueError(f"{rule}, got {' and '.join(str(tuple(t.shape)) for t in came)}. Pass tensors of these shapes.")
