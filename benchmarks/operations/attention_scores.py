"""Column scores against the eager matrix, and beside a fused attention forward on the same queries and keys."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import attention_columns
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .case import Case, nbytes

WINDOW = 32


def matrix(q: Tensor, k: Tensor, first: int) -> Tensor:
    """Column sums of the last queries, from `first` on, by way of the matrix, as the eager attention of a model has it."""
    m, n = q.shape[2] - first, k.shape[2]
    scores = q[:, :, first:] @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT * q.shape[3] ** -0.5
    seen = torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m)
    return scores.float().masked_fill(~seen, -torch.inf).softmax(dim=-1).sum(dim=2)


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Llama's heads on a GPU, a single pair on a CPU."""
    h, g, e = (32, 8, 128) if device.type == "cuda" else (2, 1, 64)
    make = torch.Generator(device).manual_seed(0)
    q, k = (torch.randn(1, heads, n, e, generator=make, device=device, dtype=dtype) for heads in (h, g))
    scaling, out = e**-0.5, 4 * h * n
    fits = 8 * h * n * n < 2**31 * (16 if device.type == "cuda" else 1)
    yield Case(
        "column sums, causal",
        {"q": q, "k": k},
        lambda q, k: attention_columns(q, k, scaling=scaling, causal=True),
        (lambda q, k: matrix(q, k, 0)) if fits else None,
        nbytes(q, k) + out,
        h * n * n * e,
        backward=True,
        yardstick=lambda q, k: scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True),
    )
    yield Case(
        f"column sums of the last {WINDOW} queries",
        {"q": q, "k": k},
        lambda q, k: attention_columns(q, k, scaling=scaling, causal=True, window=WINDOW),
        lambda q, k: matrix(q, k, n - WINDOW),
        nbytes(k) + out,
        2 * h * WINDOW * n * e,
    )
