"""Groups of sixteen neighbours pooled, against a table of groups by tokens where that fits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import pool_max, pool_power, pool_softmax
from torch import Tensor

from .case import Case, nbytes

SIZE = 16


def members(slot: Tensor, m: int) -> Tensor:
    """Which token is in which group, (b m n) bool."""
    return slot[:, None] == torch.arange(m, device=slot.device)[:, None]


def softmax(x: Tensor, scores: Tensor, slot: Tensor, m: int) -> Tensor:
    masked = scores[:, None].masked_fill(~members(slot, m), -torch.inf)
    return masked.softmax(dim=-1).to(x.dtype) @ x


def power(x: Tensor, p: Tensor, slot: Tensor, m: int) -> Tensor:
    share = members(slot, m).to(torch.float32)
    return ((share @ x.float().clamp(min=1e-6) ** p / share.sum(dim=2, keepdim=True)) ** (1 / p)).to(x.dtype)


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Tokens above zero, so that each exponent is defined."""
    b, d = (8, 1024) if device.type == "cuda" else (1, 256)
    make, m = torch.Generator(device).manual_seed(0), -(-n // SIZE)
    x = torch.rand(b, n, d, generator=make, device=device, dtype=dtype) + 0.5
    scores = torch.randn(b, n, generator=make, device=device)
    slot = (torch.arange(n, device=device) // SIZE).expand(b, n).contiguous()
    p = torch.tensor([3.0], device=device)
    fits = 8 * b * m * n < 2**31
    moved = nbytes(x, slot) + nbytes(x) // SIZE
    yield Case(
        "softmax over groups",
        {"x": x, "scores": scores, "slot": slot},
        lambda x, scores, slot: pool_softmax(x, scores, slot, m),
        (lambda x, scores, slot: softmax(x, scores, slot, m)) if fits else None,
        moved + nbytes(scores),
        2 * b * n * d,
        backward=True,
    )
    yield Case(
        "generalised mean of groups",
        {"x": x, "p": p, "slot": slot},
        lambda x, p, slot: pool_power(x, p, slot, m),
        (lambda x, p, slot: power(x, p, slot, m)) if fits else None,
        moved,
        6 * b * n * d,
        backward=True,
    )
    yield Case(
        "maximum of groups",
        {"x": x, "slot": slot},
        lambda x, slot: pool_max(x, slot, m),
        lambda x, slot: x.new_full((b, m, d), -torch.inf).scatter_reduce(1, slot[..., None].expand_as(x), x, "amax"),
        moved,
        b * n * d,
        backward=True,
    )
