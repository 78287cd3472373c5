"""The best destination of every token against the matrix of all cosines: the sizes of token merging in a denoiser."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import match
from torch.nn.functional import normalize

from .case import Case, nbytes


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Two samples of 640 features on a GPU, one of 64 on a CPU; a quarter of n destinations."""
    b, d = (2, 640) if device.type == "cuda" else (1, 64)
    make = torch.Generator(device).manual_seed(0)
    src, dst = (torch.randn(b, count, d, generator=make, device=device, dtype=dtype) for count in (n, max(1, n // 4)))
    t = dst.shape[1]
    fits = 8 * b * n * t < 2**31 * (16 if device.type == "cuda" else 1)
    yield Case(
        "match, cosine",
        {"src": src, "dst": dst},
        lambda src, dst: match(src, dst)[0],
        (lambda src, dst: (normalize(src, dim=-1) @ normalize(dst, dim=-1).mT).amax(dim=-1)) if fits else None,
        nbytes(src, dst) + 12 * b * n,
        2 * b * n * t * d,
        backward=True,
    )
    size = torch.randint(1, 9, (b, n), generator=make, device=device).to(torch.float32)
    yield Case(
        "match, ward, with itself",
        {"x": src, "size": size},
        lambda x, size: match(x, x, metric="ward", src_sizes=size, dst_sizes=size, same=True)[0],
        None,
        nbytes(src, size) + 12 * b * n,
        2 * b * n * n * d,
    )
