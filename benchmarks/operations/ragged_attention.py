"""Decode attention over a cache in which a few key heads keep all tokens and the others a fifth of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import ragged_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .case import Case, nbytes

BATCH, HEADS, KV_HEADS, WIDTH = 4, 32, 8, 128
WHOLE = 2  # key heads that keep all tokens
MOST = 8192  # tokens up to which the padded cache of the peer is small on a CPU


def ragged(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the cells of each row and key head lie, and how many there are."""
    lengths = torch.full((BATCH, KV_HEADS), n // 5)
    lengths[:, :WHOLE] = n
    starts = (lengths.flatten().cumsum(0) - lengths.flatten()).view_as(lengths)
    return starts.to(device), lengths.to(device)


def padded(q: Tensor, keys: Tensor, values: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """What a user would call: the cells in a padded cache, with a mask."""
    place = torch.arange(int(lengths.max()), device=q.device)
    there = place < lengths[..., None]
    cells = torch.where(there, starts[..., None] + place, 0)
    mask = there.repeat_interleave(HEADS // KV_HEADS, dim=1)[:, :, None]
    return scaled_dot_product_attention(q, keys[cells], values[cells], attn_mask=mask, enable_gqa=True)


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The one case."""
    starts, lengths = ragged(n, device)
    total = int(lengths.sum())
    q = torch.randn(BATCH, HEADS, 1, WIDTH, device=device, dtype=dtype)
    keys, values = (torch.randn(total, WIDTH, device=device, dtype=dtype) for _ in range(2))
    inputs = {"q": q, "keys": keys, "values": values, "starts": starts, "lengths": lengths}
    yield Case(
        name="ragged_attention",
        inputs=inputs,
        call=lambda **given: ragged_attention(**given, scaling=WIDTH**-0.5, longest=n)[0],
        peer=padded if device.type != "cpu" or n <= MOST else None,
        bytes=nbytes(q, keys, values, q),
        flops=4 * total * WIDTH * HEADS // KV_HEADS,
    )
