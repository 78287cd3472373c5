"""Tokens that lie on a picture: the grid that they form, what lies over it for each, and where pictures lie among the tokens of a text.

There each one is a grid, some of several sizes in one batch. The calls of the vision tower are noted, since `generate` calls it before the
model and passes on only what it returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError, explain
from ..tokens.ledger import TokenLedger
from .signatures import bound_arguments
from .streams import Anatomy

GRID_TABLES = ("grid_thw", "image_grid_thw", "video_grid_thw")  # frames, height and width of each picture, in patches
PIXELS = ("pixel_values", "pixel_values_videos")
ENCODED = "mm_encoder_outputs"  # what the tower returned, where it was called before
Grid = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Shapes:
    """The pictures of one call of a vision tower: frames, height and width of each, in patches or in pixels."""

    pictures: list[Grid]
    patches: bool


def no_grid(got: str) -> UnsupportedError:
    """The error for visual tokens that form no grids."""
    remedy = "Give the model pictures of one size, or choose a method that needs no grid."
    return UnsupportedError(explain("This method needs pictures whose tokens form a grid, row by row", got, remedy))


def vision_tower(model_anatomy: Anatomy) -> nn.Module | None:
    """The outermost module that holds a vision stream and no stream of text; None if there is none."""
    vision = next((s.paths[0] for s in model_anatomy.streams if s.kind == "vision"), None)
    text = [s.paths[0] for s in model_anatomy.streams if s.kind == "text"]
    if vision is None or not text:
        return None
    parts = vision.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    at = next((at for at in above if not any(path.startswith(f"{at}.") for path in text)), None)
    return None if at is None else model_anatomy.model.get_submodule(at)


def picture_shapes(module: nn.Module, args: tuple, kwargs: dict) -> Shapes | None:
    """The pictures that a vision tower is called with; None if its arguments do not show them."""
    arguments = bound_arguments(module, args, kwargs)
    tables = [arguments[name] for name in GRID_TABLES if isinstance(arguments.get(name), Tensor)]
    if tables:
        return Shapes([tuple(row) for row in tables[0].tolist()], patches=True)
    pixels = [arguments[name] for name in PIXELS if isinstance(arguments.get(name), Tensor) and arguments[name].dim() == 4]
    return Shapes([(1, *pixels[0].shape[-2:])] * len(pixels[0]), patches=False) if pixels else None


def square_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """The grid of so many tokens that has exactly the shape of the picture."""
    rows = round((tokens * height / width) ** 0.5)
    if rows == 0 or tokens % rows or rows * width != tokens // rows * height:
        raise no_grid(f"{tokens} tokens for a picture of {height} x {width}")
    return rows, tokens // rows


def find_grids(calls: list[Shapes], config: Any, arguments: dict[str, Any], visual: Tensor) -> list[Grid]:
    """Frames, height and width in tokens of each picture or video, in the order in which they stand among the visual tokens.

    Args:
        calls: The calls of the vision tower that these tokens come from.
        config: The model's.
        arguments: The model's.
        visual: Visual tokens, (b n) bool.

    Raises:
        UnsupportedError: The calls do not show them.
    """
    if len(calls) != 1:
        raise no_grid(f"{len(calls)} calls of a vision tower with pictures in rows and columns")
    pictures = calls[0].pictures
    encoded = [output.pooler_output for output in (arguments.get(ENCODED) or {}).values()]
    repeats = len(encoded[0]) // len(pictures) if encoded else 1  # beams have pictures of their own
    if calls[0].patches:
        merge = config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in pictures]
    else:
        tokens = int(visual.sum()) // (len(pictures) * repeats)
        grids = [(t, *square_grid(tokens, h, w)) for t, h, w in pictures]
    out: list[Grid] = []
    for count in visual.sum(dim=1)[::repeats].tolist():
        row: list[Grid] = []
        while grids and sum(map(prod, row)) < count:
            row.append(grids.pop(0))
        out += row * repeats
    if sum(map(prod, out)) != int(visual.sum()):
        raise no_grid(f"{int(visual.sum())} visual tokens of {len(pictures)} pictures")
    return out


def picture_places(visual: Tensor, grids: list[Grid], ledger: TokenLedger) -> list[Tensor]:
    """For each size of grid the tokens of its pictures, indices (p t h w) into the tokens (b m) laid end to end.

    Args:
        visual: Visual tokens of the sequence that entered, (b n) bool.
        grids: The grid of each picture, in the order in which they stand.
        ledger: The tokens at hand.

    Raises:
        UnsupportedError: A picture is not whole any more, or stands in two rows.
    """
    flat = visual.flatten().nonzero()[:, 0]  # of all rows, one after the other
    pieces = flat.split([prod(shape) for shape in grids])
    rows = torch.arange(ledger.batch, device=ledger.slot.device)[:, None]
    slot = torch.where(ledger.slot < 0, -1, ledger.slot + ledger.m * rows).flatten()
    sizes: dict[Grid, list[Tensor]] = {}
    for shape, piece in zip(grids, pieces, strict=True):
        if int(piece[0]) // ledger.n != int(piece[-1]) // ledger.n:
            raise no_grid("a picture that stands in two rows")
        sizes.setdefault(shape, []).append(slot[piece].view(shape))
    out = [torch.stack(pictures) for pictures in sizes.values()]
    if any(bool((index < 0).any()) or index.unique().numel() < index.numel() for index in out):
        raise no_grid("a picture of which another method has taken tokens before")
    return out


def over_tokens(x: Tensor, n: int) -> Tensor | None:
    """What lies over a picture or a video, for each of n tokens, (b n f): its patch of it. None where they lie otherwise.

    Where patches would be cut, it is the mean of what lies around a token.
    """
    if x.dim() == 3:
        return x if x.shape[1] == n else None
    if x.dim() == 5:
        b, c, t = x.shape[:3]
        frames = None if n % t else over_tokens(x.movedim(2, 1).flatten(0, 1), n // t)
        return None if frames is None else frames.unflatten(0, (b, t)).flatten(1, 2)
    if x.dim() != 4:
        return None
    height, width = grid(n, tuple(x.shape[-2:]))
    if x.shape[-2] % height or x.shape[-1] % width:
        return F.adaptive_avg_pool2d(x, (height, width)).flatten(2).transpose(1, 2)
    x = x.unflatten(-1, (width, -1)).unflatten(-3, (height, -1))  # b c h p w q
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


@cache
def grid(n: int, picture: tuple[int, ...] | None) -> tuple[int, int]:
    """Height and width of n tokens that share the picture's shape as nearly as n allows; frames of a video stand below each other."""
    if picture is None:
        return 1, n
    if len(picture) == 3:
        frames = picture[0] if n % picture[0] == 0 else 1
        height, width = grid(n // frames, picture[1:])
        return frames * height, width
    ratio = picture[1] / picture[0]
    width = min((w for w in range(1, n + 1) if n % w == 0), key=lambda w: abs(math.log(w * w / n / ratio)))
    return n // width, width
