"""Codes of a few bits in bytes: one plane for each power of two in the number of bits, so that no code lies in two bytes.

In a plane of p bits a row of n codes takes w = ceil(n p / 8) bytes; byte j holds the codes j, j + w, j + 2 w ..., the first one lowest.
Thus unpacking is a shift and a mask of whole rows of bytes. In memory the first bytes of all rows lie one behind the other, then the second
ones: an attention reads rows of cells.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

MOST = 8


def planes(bits: int) -> list[int]:
    """Bits of each plane, from the lowest."""
    return [p for p in (1, 2, 4, 8) if bits & p]


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return sum(-(-width * p // 8) for p in planes(bits))


def strip_width(width: int, bits: int) -> int:
    """Channels of a strip: those of one place in their bytes, one behind the other; all of a row where a code lies in two planes."""
    return width if len(planes(bits)) > 1 else row_bytes(width, bits)


def strip_factors(bits: int) -> list[int]:
    """By how much the codes of each strip are too high where they stand in their bytes."""
    return [1] if len(planes(bits)) > 1 else [2**shift for shift in range(0, 8, bits)]


@functools.cache
def strip_shares(bits: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One by these factors, for each channel of all strips, (c): those of a row, and behind them what fills the last strip up."""
    with torch.inference_mode(False):
        shares = [1 / factor for factor in strip_factors(bits) for _ in range(strip_width(width, bits))]
        return torch.tensor(shares, dtype=dtype, device=device)


@functools.cache
def strip_masks(bits: int, device: torch.device) -> Tensor | None:
    """What finds the codes of each strip in their bytes, (s 1 1); None where a strip is a row of bytes, or codes lie in two planes."""
    if len(factors := strip_factors(bits)) == 1:
        return None
    with torch.inference_mode(False):
        return torch.tensor([(2**bits - 1) * factor for factor in factors], dtype=torch.uint8, device=device)[:, None, None]


@functools.cache
def places(p: int, device: torch.device) -> Tensor:
    """By how much each code of p bits in a byte counts, (8/p 1)."""
    with torch.inference_mode(False):
        return torch.tensor([2 ** (p * i) for i in range(8 // p)], dtype=torch.uint8, device=device)[:, None]


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (r n) below 2^bits, packed into bytes (r m), a column of which lies together."""
    out, shift, n = [], 0, codes.shape[1]
    codes = codes.to(torch.uint8)
    for p in planes(bits):
        w = -(-n * p // 8)
        strips = codes if len(planes(bits)) == 1 else (codes >> shift) & (2**p - 1)
        strips = (strips if w * (8 // p) == n else pad(strips, (0, w * (8 // p) - n))).unflatten(1, (8 // p, w))
        out.append(strips[:, 0] if p == MOST else (strips * places(p, codes.device)).sum(dim=1, dtype=torch.uint8))
        shift += p
    return torch.cat([byte.mT for byte in out]).mT


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Bytes (r m) back to their codes (r width), uint8."""
    out, shift, at = None, 0, 0
    for p in planes(bits):
        w = -(-width * p // 8)
        byte = packed[:, at : at + w]
        codes = byte if p == 8 else torch.cat([byte >> (p * i) for i in range(8 // p)], dim=1).bitwise_and_(2**p - 1)
        codes = codes[:, :width]
        out = codes if out is None else out | codes << shift
        shift, at = shift + p, at + w
    return out
