"""How a block turns its keys by their places: which channels turn together, and by which table. Found by trying, never assumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from .signatures import CACHES

TABLE_GIVEN = "position_embeddings"  # how attentions call the table that a model hands them
TABLE_PLACES, TABLE_KIND = "position_ids", "rope_type"  # an argument and an attribute of the modules that make such tables
CACHES_OF_ATTENTION = (*CACHES, "layer_past")  # how they call their cache
STEADY = ("default", "linear", "llama3", "proportional", "yarn")  # kinds whose angles grow with the place, whatever the sequence
TRIED = (0, 1, 6, 200)  # places at which a rotation is tried
FARTHEST = 1e-3

MakeTable = Callable[[Tensor], tuple[Tensor, Tensor]]  # places (n) -> cosines and sines (n c), as the model makes them


class Pairing(NamedTuple):
    """Which channels turn together.

    Attributes:
        apart: Whether the two of a pair lie half of all that turn apart, and not side by side.
        columns: The columns of a table of which each pair has one.
    """

    apart: bool
    columns: Callable[[Tensor], Tensor]


def in_halves(t: Tensor) -> Tensor:
    """Of a table in which each pair stands once in either half."""
    return t[..., : t.shape[-1] // 2]


def in_pairs(t: Tensor) -> Tensor:
    """Of a table in which each pair stands twice, side by side."""
    return t[..., ::2]


def once(t: Tensor) -> Tensor:
    """Of a table in which each pair stands once."""
    return t


PAIRINGS = tuple(Pairing(apart, columns) for apart in (True, False) for columns in (in_halves, in_pairs, once))


@dataclass(frozen=True)
class Rotation:
    """What a block does to the first channels of a key that stands at a place; the others stay.

    Attributes:
        pairing: Which of them turn together; None if the block turns none.
        table: By what.
    """

    pairing: Pairing | None
    table: MakeTable

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Keys or queries (b h r e), as the block had turned them, so many places further on, (b|1 h|1 r|1)."""
        return x if self.pairing is None else self.turned(x, *self.angles(by))

    def ahead(self, x: Tensor, count: int) -> Tensor:
        """The same (... e), the mean of the next `count` places."""
        if self.pairing is None:
            return x
        return self.turned(x, *(t.mean(dim=0) for t in self.angles(torch.arange(1, count + 1, device=x.device))))

    def angles(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angle of each pair, (... p). Tables may hold them times a factor, which stands alone at place 0."""
        cos, sin = map(self.pairing.columns, self.table(torch.cat([places.new_zeros(1), places.flatten()])))
        return (cos[1:] / cos[:1]).unflatten(0, places.shape), (sin[1:] / cos[:1]).unflatten(0, places.shape)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Keys or queries (b h r e) turned on by the angles of each pair, whose cosine and sine these are."""
        width = 2 * cos.shape[-1]
        first, rest = x[..., :width], x[..., width:]
        a, b = first.chunk(2, dim=-1) if self.pairing.apart else first.unflatten(-1, (-1, 2)).unbind(dim=-1)
        pair = a * cos - b * sin, a * sin + b * cos
        turned = torch.cat(pair, dim=-1) if self.pairing.apart else torch.stack(pair, dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    def misses(self, keys: Tensor) -> float:
        """How far off it is for the keys of one token at the places that are tried, (k n e), as a share of the largest entry."""
        by = torch.tensor(TRIED, device=keys.device)[None, None]
        return float((self.turn(keys[None, :, :1].expand(-1, -1, len(TRIED), -1), by) - keys).abs().max() / keys.abs().max())


def find_rotation(keys: Tensor, table: MakeTable, where: str) -> Rotation:
    """The rotation that a block's own keys of one token show, at the places that are tried, (k n e).

    Raises:
        UnsupportedError: It is none of those that are known.
    """
    columns = table(torch.tensor(TRIED, device=keys.device))[0].shape[-1]
    pairings = [pairing for pairing in PAIRINGS if 2 * pairing.columns(torch.empty(1, columns)).shape[-1] <= keys.shape[-1]]
    rotation = min((Rotation(pairing, table) for pairing in (None, *pairings)), key=lambda rotation: rotation.misses(keys))
    if not rotation.misses(keys) < FARTHEST:
        rule = "A method that turns keys to other places needs a block that turns pairs of their first channels by the table it is handed"
        got = f"{where}, whose keys differ by {rotation.misses(keys):.1g} of the largest from that"
        raise UnsupportedError(explain(rule, got, "Choose other layers or another model, or a setting that leaves keys as they are."))
    return rotation
