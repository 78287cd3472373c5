"""The torch reference, and the only form."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal DCT-II, (frequency, place)."""
    k, i = (torch.arange(size, dtype=torch.float64, device=like.device) for _ in range(2))
    waves = torch.cos(math.pi * (2 * i + 1) * k[:, None] / (2 * size)) * (2 / size) ** 0.5
    waves[0] /= 2**0.5
    return waves.to(like)


def filtered(size: int, left: int, like: Tensor) -> Tensor:
    """From `size` places to `left` of them, by the lowest frequencies, (left, size)."""
    return cosines(left, like).mT @ cosines(size, like)[:left] * (left / size) ** 0.5


def low_pass(x: Tensor, height: int, width: int) -> Tensor:
    """Grids (p h w d) of fewer places, by their lowest frequencies, (p height width d)."""
    p, h, w, d = x.shape
    out = x.to(torch.promote_types(x.dtype, torch.float32))
    if height != h:
        out = (filtered(h, height, out) @ out.reshape(p, h, w * d)).view(p, height, w, d)
    if width != w:
        out = filtered(w, width, out) @ out
    return out.to(x.dtype)
