"""The torch reference, and the only form."""

from __future__ import annotations

import functools
import math
import operator

import torch
from torch import Tensor

from ..precision import accumulated


def cosine(size: int, k: int, i: int) -> float:
    """The orthonormal DCT-II at frequency k and place i."""
    return math.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt((2 if k else 1) / size)


@functools.cache
def table(size: int, left: int) -> tuple[tuple[float, ...], ...]:
    """From `size` places to `left` of them, by the lowest frequencies."""
    back, forth = ([[math.sqrt(left / size) ** (n == size) * cosine(n, k, i) for k in range(left)] for i in range(n)] for n in (left, size))
    return tuple(tuple(sum(map(operator.mul, b, f)) for f in forth) for b in back)


def filtered(size: int, left: int, like: Tensor) -> Tensor:
    """The same as a tensor, (left, size)."""
    return torch.tensor(table(size, left), dtype=like.dtype, device=like.device)


def low_pass(x: Tensor, height: int, width: int) -> Tensor:
    """Grids (p h w d) of fewer places, by their lowest frequencies, (p height width d)."""
    p, h, w, d = x.shape
    out = x.to(accumulated(x.dtype))
    if height != h:
        out = (filtered(h, height, out) @ out.reshape(p, h, w * d)).view(p, height, w, d)
    if width != w:
        out = filtered(w, width, out) @ out
    return out.to(x.dtype)
