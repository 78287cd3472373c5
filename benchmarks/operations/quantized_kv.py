"""Decode attention over keys and values that are held in 2 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hf_tokens_kernels import Rounded, pack, pack_along, packed_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .case import Case, nbytes

BATCH, HEADS, KV_HEADS, WIDTH, GROUP, TOKENS = 2, 32, 8, 128, 64, 32
MOST = 8192  # tokens up to which the unpacked cache of the peer is small on a CPU


def joined(inputs: dict[str, Tensor], name: str, bits: int) -> Rounded:
    """Packed cells of the keys or of the values."""
    index = inputs.get(f"{name}_index")
    group = GROUP if index is None else 1
    return Rounded(*(inputs[f"{name}_{part}"] for part in ("codes", "scale", "low")), bits, group, WIDTH, index)


def cases(n: int, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """One case for each number of bits, and one whose keys have a scale for each channel of a few tokens."""
    cells = BATCH * KV_HEADS * n
    starts = torch.arange(0, cells, n, device=device).view(BATCH, KV_HEADS)
    where = {"starts": starts, "lengths": torch.full_like(starts, n)}
    q = torch.randn(BATCH, HEADS, 1, WIDTH, device=device, dtype=dtype)
    for bits, along in ((2, False), (4, False), (2, True)):
        inputs = {"q": q, **where}
        for name in ("keys", "values"):
            parts = zip(*(pack(torch.randn(n, WIDTH, device=device, dtype=dtype), bits, GROUP) for _ in range(cells // n)), strict=True)
            inputs |= {f"{name}_{part}": torch.cat(t) for part, t in zip(("codes", "scale", "low"), parts, strict=True)}

        if along:
            index = torch.arange(cells, device=device) // TOKENS
            parts = pack_along(torch.randn(cells, WIDTH, device=device, dtype=dtype), index, bits)
            inputs |= dict(zip(("keys_codes", "keys_scale", "keys_low", "keys_index"), (*parts, index.int()), strict=True))

        def call(bits: int = bits, **given: Tensor) -> Tensor:
            k, v = joined(given, "keys", bits), joined(given, "values", bits)
            return packed_attention(given["q"], k, v, given["starts"], given["lengths"], scaling=WIDTH**-0.5, longest=n)[0]

        def peer(bits: int = bits, **given: Tensor) -> Tensor:
            k, v = (joined(given, name, bits).rows(slice(None)).view(BATCH, KV_HEADS, n, WIDTH) for name in ("keys", "values"))
            return scaled_dot_product_attention(given["q"], k, v, enable_gqa=True)

        yield Case(
            name=f"packed_attention, {bits} bits{', keys by channel' * along}",
            inputs=inputs,
            call=call,
            peer=peer if device.type != "cpu" or n <= MOST else None,
            bytes=nbytes(*inputs.values(), q),
            flops=4 * cells * WIDTH * HEADS // KV_HEADS,
        )
