"""Tokens that lie on a picture: the grid that they form, what lies over it for each, and where pictures lie among the tokens of a text.

There each one is a grid, some of several sizes in one batch. The calls of the vision tower are noted, since `generate` calls it before the
model and passes on only what it returned.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError, explain
from ..tokens.ledger import TokenLedger
from . import families
from .anatomy import image_tokens
from .layouts import Grid, Picture
from .signatures import bound_arguments, read_once
from .streams import Anatomy

GRID_TABLES = ("grid_thw", "image_grid_thw", "video_grid_thw")  # frames, height and width of each picture, in patches
SHAPES = "spatial_shapes"  # height and width of each, in patches
SIZES = "image_sizes"  # height and width of each, in pixels: what lies beyond is padding
PIXELS = ("pixel_values", "pixel_values_videos")
ENCODED = "mm_encoder_outputs"  # what the tower returned, where it was called before
MODALITIES = ("image", "video")  # in it


def no_grid(got: str) -> UnsupportedError:
    """The error for visual tokens that form no grids."""
    remedy = "Give it pictures and text as its processor makes them, in one call, or choose a method that needs no grid."
    return UnsupportedError(explain("This method needs pictures whose tokens form a grid, row by row", got, remedy))


def layouts(model: nn.Module, tower: nn.Module | None) -> list[tuple[nn.Module, str]]:
    """The module that holds a model's vision tower, with each of its methods that lay out what that has returned."""
    names = () if tower is None else families.LAYING.get(model.config.model_type, ())
    return [(holder, name) for holder in model.modules() for name in names if any(child is tower for child in holder.children())]


def vision_tower(model_anatomy: Anatomy) -> nn.Module | None:
    """The outermost module that holds a vision stream and no stream of text; None if there is none, or it makes no grids of tokens."""
    if not forms_grids(model_anatomy.model):
        return None
    vision = next((s.paths[0] for s in model_anatomy.streams if s.kind == "vision"), None)
    text = [s.paths[0] for s in model_anatomy.streams if s.kind == "text"]
    if vision is None or not text:
        return None
    parts = vision.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    at = next((at for at in above if not any(path.startswith(f"{at}.") for path in text)), None)
    return None if at is None else model_anatomy.model.get_submodule(at)


def beside_text(arguments: dict[str, Any]) -> list[str]:
    """The arguments of a call that bring what is no text: pictures, videos, sound, or what a tower made of them."""
    others = {*families.MAIN_INPUTS} - {"input_ids"}
    return [
        name
        for name, value in arguments.items()
        if value is not None and (name in others or name == ENCODED or any(part in name for part in families.PICTURES))
    ]


def has_pictures(arguments: dict[str, Any]) -> bool:
    """Whether a call of a model brings pictures or videos, or what its tower made of them."""
    encoded = arguments.get(ENCODED) or {}
    given = any(value is not None and any(part in name for part in families.PICTURES) for name, value in arguments.items())
    return given or any(encoded.get(modality) is not None for modality in MODALITIES)


def visual_tokens(model: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """Tokens that stand for pictures; None where pictures are given and no token stands for them, or where it is not known."""
    tokens, ids = image_tokens(model), arguments.get("input_ids")
    if not tokens or not isinstance(ids, Tensor) or ids.is_floating_point():
        return None
    spans = torch.isin(ids, torch.tensor(tokens, device=ids.device))
    return spans if not has_pictures(arguments) or bool(spans.any()) else None


def forms_grids(model: nn.Module) -> bool:
    """Whether the visual tokens of a model are known to lie row by row."""
    return getattr(getattr(model, "config", None), "model_type", None) in families.TOKEN_SIDES


def block_that_is_read(model_anatomy: Anatomy) -> int | None:
    """The block of a model's vision tower whose output its projector reads, patch by patch; None if none is known to be."""
    config = getattr(model_anatomy.model, "config", None)
    length = next((len(stream) for stream in model_anatomy.streams if stream.kind == "vision"), 0)
    state = families.READ_STATES.get(getattr(config, "model_type", None), lambda config: None)(config)
    if not isinstance(state, int) or not state:
        return None
    index = state - 1 if state > 0 else length + state
    return index if 0 <= index < length else None


def patch_grids(tower: nn.Module, args: tuple, kwargs: dict) -> list[Grid] | None:
    """Frames, height and width in patches of the pictures that a vision tower is called with; None if its arguments do not show them."""
    arguments = {name: value for name, value in bound_arguments(tower, args, kwargs).items() if value is not None}
    table = next((arguments[name] for name in GRID_TABLES if name in arguments), None)
    if table is not None:
        return [(t, h, w) for t, h, w in table.tolist()]
    if SHAPES in arguments:
        return [(1, h, w) for h, w in arguments[SHAPES].tolist()]
    pixels = next((arguments[name] for name in PIXELS if name in arguments), None)
    size = getattr(getattr(tower, "config", None), "patch_size", None)
    if size is None or pixels is None or pixels.dim() != 4:
        return None
    sizes = torch.as_tensor(arguments[SIZES]).tolist() if SIZES in arguments else [pixels.shape[-2:]] * len(pixels)
    patch = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return [(1, h // patch[0], w // patch[1]) for h, w in sizes]


@dataclass(frozen=True)
class TowerCall:
    """A call of the vision tower: the pictures in it, and the first tensor that it returned, while that lives."""

    pictures: list[Picture]
    returned: Callable[[], Tensor | None]


class SeenPictures:
    """The calls of the vision tower, until the model has run on them, and those whose outcome someone still holds."""

    def __init__(self):
        self.calls: list[TowerCall] = []
        self.held: list[TowerCall] = []

    def __reduce__(self) -> tuple[type[SeenPictures], tuple]:
        return SeenPictures, ()

    def note(self, pictures: list[Picture], output: Any) -> None:
        """The tower was called with these pictures."""
        tensor = first_state(output)
        self.calls.append(TowerCall(pictures, (lambda: None) if tensor is None else weakref.ref(tensor)))
        self._hold(self.calls[-1])

    def lay(self, layout: Callable[[Picture], list[Picture]]) -> None:
        """What it returned last lies so, by how each of what it was called with does."""
        call = self.calls[-1] if self.calls else None
        if call is not None and call.pictures:
            self.calls[-1] = TowerCall(layout(call.pictures[0]), call.returned)
            self.held = [self.calls[-1] if known is call else known for known in self.held]

    def clear(self) -> None:
        """The model has run on what the tower was called for."""
        self.calls.clear()

    def _hold(self, call: TowerCall) -> None:
        self.held = [*(known for known in self.held if known.returned() is not None), call]

    def of(self, modality: str, arguments: dict[str, Any]) -> list[list[Picture]]:
        """The calls whose pictures a call of the model brings for a modality: in the order of these, or by what was passed on of one.

        Transformers encodes pictures before videos.
        """
        encoded = arguments.get(ENCODED) or {}
        given = encoded or {m: arguments.get(pixels) for m, pixels in zip(MODALITIES, PIXELS, strict=True)}
        brought = [m for m in MODALITIES if given.get(m) is not None]
        tensor = first_state(encoded.get(modality))
        known = [call.pictures for call in self.held if tensor is not None and call.returned() is tensor]
        if known:
            return known[:1]
        calls = [call.pictures for call in self.calls]
        if len(brought) > 1 and len(calls) == len(brought) and modality in brought:
            calls = [calls[brought.index(modality)]]
        if len(calls) == 1 and tensor is not None:
            self._hold(TowerCall(calls[0], weakref.ref(tensor)))
        return calls


def first_state(output: Any) -> Tensor | None:
    """The first tensor of what an encoder returned."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)


def grids_in_text(seen: SeenPictures, model: nn.Module, arguments: dict[str, Any], visual: Tensor) -> tuple[Tensor, list[Grid]]:
    """Those of the visual tokens (b n) that have a place in a grid, and the grids of all pictures and videos in their order.

    Raises:
        UnsupportedError: The calls of the vision tower do not show them.
    """
    config, ids = model.config, arguments["input_ids"].to(visual.device)
    placed: list[tuple[int, Picture]] = []
    for modality in MODALITIES:
        own = [value for name, value in vars(config).items() if name in families.IMAGE_TOKENS and name.startswith(modality)]
        tokens = visual & torch.isin(ids, torch.tensor([i for i in own if isinstance(i, int)], device=ids.device))
        if not bool(tokens.any()):
            continue
        places = tokens.flatten().nonzero()[:, 0].tolist()
        for picture in find_pictures(seen.of(modality, arguments), arguments, tokens):
            placed.append((places[0], picture))
            places = places[len(picture) :]
    pictures = [picture for _, picture in sorted(placed, key=lambda one: one[0])]
    return on_grids(visual, pictures), [shape for picture in pictures for shape in picture.grids]


def find_pictures(calls: list[list[Picture]], arguments: dict[str, Any], visual: Tensor) -> list[Picture]:
    """Each picture or video, in the order in which they stand among the visual tokens.

    Args:
        calls: The calls of the vision tower that these tokens come from: the pictures of each.
        arguments: The model's.
        visual: Visual tokens, (b n) bool.

    Raises:
        UnsupportedError: The calls do not show them, or the tokens are others.
    """
    if len(calls) != 1:
        raise no_grid(f"{len(calls)} calls of a vision tower with pictures in rows and columns")
    pictures = [*calls[0]]
    grids, beside = [shape for one in pictures for shape in one.grids], sum(len(one.beside) for one in pictures)
    told = sum(map(len, pictures))
    repeats = int(visual.sum()) // told if told and arguments.get(ENCODED) else 1  # beams have pictures of their own
    more = f", and {beside} beside them" if beside else ""
    wrong = no_grid(f"{int(visual.sum())} visual tokens for pictures of {grids} tokens (frames, height, width){more}")
    if not repeats or len(visual) % repeats:
        raise wrong
    rows = visual.unflatten(0, (-1, repeats))
    out: list[Picture] = []
    for count in rows[:, 0].sum(dim=1).tolist():
        row: list[Picture] = []
        while pictures and sum(map(len, row)) < count:
            row.append(pictures.pop(0))
        if sum(map(len, row)) != count:
            raise wrong
        out += row * repeats
    if pictures or not torch.equal(rows, rows[:, :1].expand_as(rows)) or not whole_rows(visual, out):
        raise wrong
    return out


def on_grids(visual: Tensor, pictures: list[Picture]) -> Tensor:
    """Those of the visual tokens (b n) that have a place in a grid of the pictures that they stand for."""
    starts = itertools.accumulate(map(len, pictures), initial=0)
    beside = [start + i for start, picture in zip(starts, pictures, strict=False) for i in picture.beside]
    if not beside:
        return visual
    place = visual.flatten().nonzero()[:, 0]
    return visual.flatten().index_fill(0, place[torch.tensor(beside, device=place.device)], False).view_as(visual)


def whole_rows(visual: Tensor, pictures: list[Picture]) -> bool:
    """Whether other tokens stand between visual ones, (b n), at the ends of the rows of grids alone."""
    grids = [shape for picture in pictures for shape in picture.grids]
    place = on_grids(visual, pictures).flatten().nonzero()[:, 0]
    seams = (place.diff() > 1).nonzero()[:, 0] + 1
    widths = torch.tensor([w for t, h, w in grids for _ in range(t * h)], device=place.device)
    return bool(torch.isin(seams, widths.cumsum(dim=0)).all())


def picture_places(visual: Tensor, grids: list[Grid], ledger: TokenLedger) -> list[Tensor]:
    """For each size of grid the tokens of its pictures, indices (p t h w) into the tokens (b m) laid end to end.

    Args:
        visual: Those of the visual tokens of the sequence that entered, (b n) bool, that have a place in a grid.
        grids: The grids of the pictures, in the order in which they stand.
        ledger: The tokens at hand.

    Raises:
        UnsupportedError: A picture is not whole any more.
    """
    flat = visual.flatten().nonzero()[:, 0]  # of all rows, one after the other
    pieces = flat.split([prod(shape) for shape in grids])
    rows = torch.arange(ledger.batch, device=ledger.slot.device)[:, None]
    slot = torch.where(ledger.slot < 0, -1, ledger.slot + ledger.m * rows).flatten()
    sizes: dict[Grid, list[Tensor]] = {}
    for shape, piece in zip(grids, pieces, strict=True):
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


@read_once
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
