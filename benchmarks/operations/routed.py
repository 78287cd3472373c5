"""A quarter of the tokens taken out, and put back with the router's weight, against a gather and a scatter by an expanded index."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import routed_gather, routed_scatter
from torch import Tensor

from .case import Case, nbytes


def scattered(x: Tensor, y: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The weighted mixture as public mixtures of depths have it."""
    wide = index[..., None].expand_as(y)
    old = x.gather(1, wide)
    return x.scatter(1, wide, old + weights[..., None].to(x.dtype) * (y - old))


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The tokens of a row are chosen by chance, and stay in their order."""
    b, d = (8, 2048) if device.type == "cuda" else (1, 256)
    make, r = torch.Generator(device).manual_seed(0), n // 4
    x = torch.randn(b, n, d, generator=make, device=device, dtype=dtype)
    y = torch.randn(b, r, d, generator=make, device=device, dtype=dtype)
    index = torch.rand(b, n, generator=make, device=device).argsort(dim=1)[:, :r].sort(dim=1).values
    weights = torch.rand(b, r, generator=make, device=device)
    yield Case(
        "routed gather",
        {"x": x, "index": index},
        routed_gather,
        lambda x, index: x.gather(1, index[..., None].expand(-1, -1, d)),
        2 * nbytes(y) + nbytes(index),
        0,
        backward=True,
    )
    yield Case(
        "routed scatter, with weight and residual",
        {"x": x, "y": y, "index": index, "weights": weights},
        routed_scatter,
        scattered,
        2 * nbytes(x) + nbytes(y, index, weights),
        3 * b * r * d,
        backward=True,
    )
