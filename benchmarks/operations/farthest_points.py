"""Farthest-point selection against the matrix of all distances, as DivPrune has it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import farthest_points
from torch import Tensor
from torch.nn.functional import normalize

from .case import Case, nbytes

CHOSEN = 64


def matrix(x: Tensor) -> Tensor:
    """The chosen tokens, by way of the matrix."""
    unit = normalize(x.float(), dim=-1)
    apart = 1 - unit @ unit.mT
    index = torch.zeros(len(x), CHOSEN, dtype=torch.long, device=x.device)
    for turn in range(1, CHOSEN):
        rows = apart.gather(1, index[:, :turn, None].expand(-1, -1, x.shape[1]))
        index[:, turn] = rows.amin(dim=1).argmax(dim=1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The floor reads all tokens once for each that is chosen; where they fit into the cache of a GPU, that is faster than its memory."""
    b, d = (4, 1024) if device.type == "cuda" else (1, 64)
    x = torch.randn(b, n, d, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    fits = 12 * b * n * n < 2**31 * (16 if device.type == "cuda" else 1)
    yield Case(
        f"farthest points, {CHOSEN}",
        {"x": x},
        lambda x: x.gather(1, farthest_points(x, CHOSEN)[..., None].expand(-1, -1, x.shape[2])),
        matrix if fits else None,
        CHOSEN * nbytes(x) + 8 * b * CHOSEN,
        2 * CHOSEN * b * n * d,
    )
