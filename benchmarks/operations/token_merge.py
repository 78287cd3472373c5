"""Merging pairs of tokens and bringing them back, against a scatter and a gather by an expanded index."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import merge, unmerge
from torch import Tensor

from .case import Case, nbytes


def scattered(x: Tensor, slot: Tensor, weights: Tensor, m: int) -> Tensor:
    """The weighted mean as public token merging has it."""
    index, wide = slot[..., None].expand_as(x), torch.float32
    total = torch.zeros(len(x), m, 1, dtype=wide, device=x.device).scatter_add(1, slot[..., None], weights[..., None])
    summed = torch.zeros(len(x), m, x.shape[2], dtype=wide, device=x.device).scatter_add(1, index, x.to(wide) * weights[..., None])
    return (summed / total).to(x.dtype)


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Half of the tokens join others, by chance."""
    b, d = (8, 1024) if device.type == "cuda" else (1, 256)
    make, m = torch.Generator(device).manual_seed(0), n // 2
    x = torch.randn(b, n, d, generator=make, device=device, dtype=dtype)
    slot = torch.randint(m, (b, n), generator=make, device=device)
    slot[:, :m] = torch.arange(m, device=device)
    slot = slot.gather(1, torch.rand(b, n, generator=make, device=device).argsort(dim=1))
    weights = torch.rand(b, n, generator=make, device=device) + 0.1
    moved = nbytes(x, slot) + nbytes(x) // 2
    yield Case(
        "merge, weighted mean",
        {"x": x, "slot": slot, "weights": weights},
        lambda x, slot, weights: merge(x, slot, m, weights),
        lambda x, slot, weights: scattered(x, slot, weights, m),
        moved + nbytes(weights),
        2 * b * n * d,
        backward=True,
    )
    y = x[:, :m].contiguous()
    yield Case(
        "unmerge",
        {"y": y, "slot": slot},
        unmerge,
        lambda y, slot: y.gather(1, slot[..., None].expand(-1, -1, d)),
        moved,
        0,
        backward=True,
    )
