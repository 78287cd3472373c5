"""Pictures at half their sides by the lowest frequencies, against the same by one einsum."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import low_pass
from hf_tokens_kernels.low_pass.reference import filtered

from .case import Case, nbytes

SIDE = 16


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Pictures of 16 x 16 tokens, n tokens in all or a few more."""
    d, left = 1024 if device.type == "cuda" else 256, SIDE // 2
    make = torch.Generator(device).manual_seed(0)
    x = torch.randn(-(-n // SIDE**2), SIDE, SIDE, d, generator=make, device=device, dtype=dtype)
    waves = filtered(SIDE, left, x.float())
    yield Case(
        "low pass",
        {"x": x},
        lambda x: low_pass(x, left, left),
        lambda x: torch.einsum("rh,phwd,cw->prcd", waves, x.float(), waves).to(x.dtype),
        nbytes(x) * 5 // 4,
        2 * n * d * left + n * d * left,
        backward=True,
    )
