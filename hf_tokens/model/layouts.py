"""How the tokens of one picture or video lie: its grids, and the tokens among them that stand for no part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import families

Grid = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Picture:
    """One picture or video among its tokens.

    Attributes:
        grids: Its grids in tokens, one behind the other.
        beside: Which of its tokens have no place in them, such as those that end a row.
    """

    grids: tuple[Grid, ...]
    beside: tuple[int, ...] = ()

    def __len__(self) -> int:
        return sum(map(prod, self.grids)) + len(self.beside)


def in_tokens(config: Any, grids: Sequence[Grid]) -> list[Picture]:
    """The pictures that a vision tower was called with, in patches, as a model of such a config lays them out."""
    side = families.TOKEN_SIDES[config.model_type](config)
    front, end, behind = families.ROW_ENDS.get(config.model_type, (0, 0, 0))
    pictures = []
    for t, h, w in grids:
        grid, row = (t, h // side, w // side), w // side + end
        last = front + t * (h // side) * row
        ends = (front + row * i + w // side + j for i in range(t * (h // side)) for j in range(end))
        pictures.append(Picture((grid,), (*range(front), *ends, *range(last, last + behind))))
    return pictures


def laid_tiles(pack: Callable[..., Any], given: dict[str, Any], tile: Picture, config: Any) -> list[Picture]:
    """Pictures of which each is a small one and the rows of tiles: where a model puts the tokens that end its rows, seen on zeros.

    Args:
        pack: The model's method that lays out the tiles of each picture, (tiles n d).
        given: What it is called with.
        tile: Each of them.
        config: The model's.
    """
    tiles = [one.shape[:2] for one in given["image_features"]]
    if any(n != len(tile) for _, n in tiles):  # a tile is not its grid
        return []
    marks = pack(**given | {"image_features": [torch.zeros(*shape, 1) for shape in tiles], "image_newline": torch.ones(1)})
    marks = marks[0] if isinstance(marks, tuple) else marks
    return [_small_and_rows(picture[:, 0] > 0, tile) for picture in marks]


def _small_and_rows(ends: Tensor, tile: Picture) -> Picture:
    """A picture of a tile and, behind it, rows with a token at the end of each, (n) bool."""
    beside = ends.nonzero()[:, 0].tolist()
    height, width = len(beside), beside[0] - len(tile)
    return Picture((*tile.grids, *([(1, height, width)] if width else [])), tuple(beside))


def laid_frames(pack: Callable[..., Any], given: dict[str, Any], tile: Picture, config: Any) -> list[Picture]:
    """Videos of which each is its frames, made smaller: what a model's method makes of the frames (b t c h w) that it is called with."""
    videos, frames = given["pixel_values_videos"].shape[:2]
    smaller, ends = families.SMALLER_FRAMES[config.model_type]
    _, h, w = tile.grids[0]
    grid = (frames, smaller(config, h), smaller(config, w))
    return [Picture((grid,), tuple(range(prod(grid), prod(grid) + ends)))] * videos


# method of the module that holds a vision tower, which lays out what the tower has returned -> how
PACKERS: dict[str, Callable[[Callable[..., Any], dict[str, Any], Picture, Any], list[Picture]]] = {
    "pack_image_features": laid_tiles,
    "get_video_features": laid_frames,
}
