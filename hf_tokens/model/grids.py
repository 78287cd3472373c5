"""Tokens that lie on a picture: the grid that they form, and what lies over it for each of them."""

from __future__ import annotations

import math
from functools import cache

import torch.nn.functional as F
from torch import Tensor


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
