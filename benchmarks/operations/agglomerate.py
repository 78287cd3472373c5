"""Agglomerative clustering into half as many clusters, by features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import cluster

from .case import Case, nbytes


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The floor compares all tokens once; a library for clusters on a GPU is not to be had with torch alone."""
    b, d = (4, 64) if device.type == "cuda" else (1, 32)
    x = torch.randn(b, n, d, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    for linkage in ("average", "ward"):
        yield Case(
            f"cluster, {linkage}",
            {"x": x},
            lambda x, linkage=linkage: x.gather(1, cluster(x, n // 2, linkage)[..., None].expand_as(x)),
            None,
            nbytes(x) + 8 * b * n,
            2 * b * n * n * d,
        )
