"""Rows of keys or values in few bits: integers with a scale and a least value for each group of channels, or codes of a codebook."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..precision import accumulated
from .bits import MOST, pack_bits, row_bytes, unpack_bits

DISTANCES = 1 << 22  # held at a time while codes are looked for


@dataclass(frozen=True)
class Rounded:
    """Cells rounded to integers.

    Attributes:
        codes: Their bytes, (c w).
        scale, low: Of each group of channels, (c g): a row is code * scale + low. Or (t g), which several cells share.
        bits: Bits of an integer.
        group: Channels of a group; the last one may be smaller.
        width: Channels of a row.
        index: Which row of the scales and least values is that of each cell, (c); None if each has its own.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int
    group: int
    width: int
    index: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return (self.codes, self.scale, self.low, *(() if self.index is None else (self.index,)))

    def rows(self, cells: slice) -> Tensor:
        """Some of the cells, as they are read."""
        at = cells if self.index is None else self.index[cells].long()
        return unpack(self.codes[cells], self.scale[at], self.low[at], self.bits, self.group, self.width)


@dataclass(frozen=True)
class Coded:
    """Cells as codes of a codebook, one for several channels.

    Attributes:
        codes: Their bytes, (c w).
        codebook: What each code of each run of channels stands for, (s k e/s).
    """

    codes: Tensor
    codebook: Tensor

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.codebook.shape[0] * self.codebook.shape[2]

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return self.codes, self.codebook

    def rows(self, cells: slice) -> Tensor:
        """Some of the cells, as they are read."""
        return decode(self.codes[cells], self.codebook)


@dataclass(frozen=True)
class Kept:
    """Cells as they are.

    Attributes:
        codes: The cells themselves, (c e).
    """

    codes: Tensor

    @property
    def width(self) -> int:
        """Channels of a row."""
        return self.codes.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        """What is stored."""
        return (self.codes,)

    def rows(self, cells: slice) -> Tensor:
        """Some of the cells."""
        return self.codes[cells]


Packed = Rounded | Coded | Kept


def pack(rows: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows (r e) to integers: their bytes (r w), scales and least values (r g) of each group of channels.

    Raises:
        ValueError: There is no such number of bits or channels.
    """
    check(rows, bits, group)
    low, high = in_groups(rows, group).aminmax(dim=-1)
    scale = (high - low) / (2**bits - 1)
    return round_rows(rows, scale, low, bits, group), scale, low


def pack_along(rows: Tensor, index: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows (r e) to integers, each channel by the rows of a group: their bytes (r w), scales and least values (t e) of the groups.

    Args:
        rows: The rows.
        index: The group of each, (r), from 0; none is left out.
        bits: Bits of an integer.

    Raises:
        ValueError: There is no such number of bits.
    """
    check(rows, bits, 1)
    many, where = int(index.max()) + 1 if len(index) else 0, index[:, None].expand_as(rows)
    blank = rows.new_zeros(many, rows.shape[1])
    low, high = (blank.scatter_reduce(0, where, rows, best, include_self=False) for best in ("amin", "amax"))
    scale = (high - low) / (2**bits - 1)
    return round_rows(rows, scale[index], low[index], bits, 1), scale, low


def in_groups(rows: Tensor, group: int) -> Tensor:
    """Rows (r e) as groups of channels (r g c), the last one filled up with its last channel."""
    lack = -rows.shape[1] % group
    rows = torch.cat([rows, rows[:, -1:].expand(-1, lack)], dim=1) if lack else rows
    return rows.unflatten(1, (-1, group))


def round_rows(rows: Tensor, scale: Tensor, low: Tensor, bits: int, group: int) -> Tensor:
    """Bytes (r w) of rows (r e), rounded by scales and least values (r g) that are given; what lies beyond them goes to their ends."""
    steps = (in_groups(rows, group) - low[..., None]) / torch.where(scale > 0, scale, 1)[..., None]
    return pack_bits(steps.round().clamp(0, 2**bits - 1).flatten(1)[:, : rows.shape[1]], bits)


def unpack(codes: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, width: int) -> Tensor:
    """The rows (r e) of what `pack` gave, each within half a scale of what it was.

    Raises:
        ValueError: The bytes are not those of such rows.
    """
    check(codes, bits, group)
    if codes.shape[1] != row_bytes(width, bits):
        rule = f"A row of {width} channels in {bits} bits has {row_bytes(width, bits)} bytes"
        raise ValueError(f"{rule}, got {codes.shape[1]}. Unpack with the numbers that it was packed with.")
    numbers = pad(unpack_bits(codes, bits, width).to(scale.dtype), (0, -width % group)).unflatten(1, (-1, group))
    return torch.addcmul(low[..., None], numbers, scale[..., None]).flatten(1)[:, :width]


def check(rows: Tensor, bits: int, group: int) -> None:
    """Refuse what cannot be packed.

    Raises:
        ValueError: There is no such number of bits or channels.
    """
    if rows.dim() != 2 or not 1 <= bits <= MOST or group < 1:
        came = f"{tuple(rows.shape)}, {bits} bits and groups of {group}"
        raise ValueError(f"Rows (r, e) are packed in 1 to {MOST} bits, in groups of 1 channel or more, got {came}. Choose others.")


def code_bits(codebook: Tensor) -> int:
    """Bits of a code.

    Raises:
        ValueError: The codebook has too many codes for a byte.
    """
    if codebook.dim() != 3 or not 2 <= codebook.shape[1] <= 2**MOST:
        rule = f"A codebook is (runs, codes, channels) with 2 to {2**MOST} codes"
        raise ValueError(f"{rule}, got {tuple(codebook.shape)}. Couple fewer channels, or take fewer codes.")
    return (codebook.shape[1] - 1).bit_length()


def encode(rows: Tensor, codebook: Tensor) -> Tensor:
    """The nearest code of each run of channels: rows (r e) and a codebook (s k e/s) to bytes (r w); of two as near the first.

    Raises:
        ValueError: The codebook is not one of such rows.
    """
    bits, (runs, many, channels) = code_bits(codebook), codebook.shape
    if rows.dim() != 2 or rows.shape[1] != runs * channels:
        rule = f"Rows of this codebook have {runs} runs of {channels} channels"
        raise ValueError(f"{rule}, got {tuple(rows.shape)}. Flatten the rows, or choose another codebook.")
    exact = accumulated(rows.dtype)
    book = codebook.to(exact)
    lengths, step = book.square().sum(dim=-1)[:, None], max(1, DISTANCES // (runs * many))
    found = []
    for part in rows.split(step):
        run = part.to(exact).unflatten(1, (runs, channels)).transpose(0, 1)  # s r c
        found.append(torch.baddbmm(lengths, run, book.mT, alpha=-2).argmin(dim=-1).T)
    return pack_bits(torch.cat(found) if found else rows.new_zeros(0, runs), bits)


def decode(codes: Tensor, codebook: Tensor) -> Tensor:
    """The rows (r e) of what `encode` gave."""
    runs, many, _ = codebook.shape
    numbers = unpack_bits(codes, code_bits(codebook), runs).int()
    numbers += torch.arange(0, runs * many, many, dtype=torch.int32, device=codes.device)
    return codebook.flatten(0, 1).index_select(0, numbers.flatten()).view(len(codes), -1)
