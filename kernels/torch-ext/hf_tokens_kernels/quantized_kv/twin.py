"""The Triton twin: cells are unpacked in registers, and split as those of `ragged_attention` are."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from ..ragged_attention.twin import fold_in, leave, run, wide
from .forms import Kept, Packed, Rounded, code_bits

BLOCK = 64  # cells of a block


@triton.jit
def codes_of(codes, cell, number, inside, stride, step, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """The codes of cells (n 1) by their number in the row (1 e), as `bits` lays them."""
    out = tl.zeros(inside.shape, dtype=tl.int32)
    at = 0
    shift = 0
    for plane in tl.static_range(4):
        if (BITS >> plane) & 1:
            w = (WIDTH * (1 << plane) + 7) // 8
            byte = tl.load(codes + cell * stride + (at + number % w) * step, mask=inside, other=0).to(tl.int32)
            out |= ((byte >> ((1 << plane) * (number // w))) & ((1 << (1 << plane)) - 1)) << shift
            at += w
            shift += 1 << plane
    return out


@triton.jit
def rows_of(codes, first, second, index, cell, channel, inside, stride, step, N: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
            GROUP: tl.constexpr, CODED: tl.constexpr, SHARED: tl.constexpr):  # fmt: skip
    """Cells (n 1) at channels (1 e): as they are, integers by their scale and least value, or codes by what the codebook says of them."""
    if BITS == 0:
        out = tl.load(codes + cell * stride + channel * step, mask=inside, other=0.0).to(tl.float32)
    elif CODED:
        code = codes_of(codes, cell, channel // GROUP, inside, stride, step, N, BITS)
        spot = (channel // GROUP * WIDTH + code) * GROUP + channel % GROUP
        out = tl.load(first + spot, mask=inside, other=0.0).to(tl.float32)
    else:
        code = codes_of(codes, cell, channel, inside, stride, step, N, BITS).to(tl.float32)
        row = cell
        if SHARED:
            row = tl.load(index + tl.broadcast_to(cell, inside.shape), mask=inside, other=0).to(tl.int64)
        spot = row * WIDTH + channel // GROUP
        scale = tl.load(first + spot, mask=inside, other=0.0).to(tl.float32)
        out = code * scale + tl.load(second + spot, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit
def packed_kernel(
    q, k_codes, k_first, k_second, k_index, v_codes, v_first, v_second, v_index, starts, lengths, sizes, told, cells, out, tops, totals,
    scaling, softcap, per, splits, stride_k, step_k, stride_v, step_v,
    KN: tl.constexpr, KW: tl.constexpr, KB: tl.constexpr, KG: tl.constexpr, KC: tl.constexpr, KS: tl.constexpr,
    VN: tl.constexpr, VW: tl.constexpr, VB: tl.constexpr, VG: tl.constexpr, VC: tl.constexpr, VS: tl.constexpr,
    Q: tl.constexpr, E: tl.constexpr, F: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BE: tl.constexpr, BF: tl.constexpr,
    SIZES: tl.constexpr, CAP: tl.constexpr, TELLS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row, split = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + row).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    i, e, f = tl.arange(0, BQ), tl.arange(0, BE), tl.arange(0, BF)
    own = tl.load(q + (row.to(tl.int64) * Q + i)[:, None] * E + e[None, :], mask=(i < Q)[:, None] & (e < E)[None, :], other=0.0)
    if UPCAST:
        own = own.to(tl.float32)
    acc = tl.zeros([BQ, BF], dtype=tl.float32)
    top = tl.full([BQ], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BQ], dtype=tl.float32)
    end = tl.minimum(split * per + per, length)
    for first in range(split * per, end, BN):
        place = first + tl.arange(0, BN)
        there = place < end
        cell = start + place
        k_in, v_in = there[:, None] & (e < E)[None, :], there[:, None] & (f < F)[None, :]
        k = rows_of(k_codes, k_first, k_second, k_index, cell[:, None], e[None, :], k_in, stride_k, step_k, KN, KW, KB, KG, KC, KS)
        v = rows_of(v_codes, v_first, v_second, v_index, cell[:, None], f[None, :], v_in, stride_v, step_v, VN, VW, VB, VG, VC, VS)
        scores = tl.dot(own, tl.trans(k).to(own.dtype), input_precision="ieee") * scaling
        if CAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(2.0 * scores / softcap) + 1.0))
        if SIZES:
            scores += tl.log(tl.load(sizes + cell, mask=there, other=1.0).to(tl.float32))[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
        if TELLS:
            tl.store(told + i.to(tl.int64)[:, None] * cells + cell[None, :], scores, mask=(i < Q)[:, None] & there[None, :])
        acc, top, total = fold_in(scores, v.to(own.dtype), acc, top, total, UPCAST)
    leave(acc, top, total, out, tops, totals, row, split, splits, Q, F, BQ, BF)


def parts_of(states: Packed) -> tuple[tuple[Tensor, ...], tuple[int, int, int, int, bool, bool]]:
    """What the kernel reads of packed states, and codes of a row, entries of a table, bits and channels to know it by."""
    if isinstance(states, Rounded):
        codes, (scale, low, *index) = states.codes, (x.contiguous() for x in states.tensors()[1:])
        return (codes, scale, low, *(index or (codes,))), (states.width, scale.shape[1], states.bits, states.group, False, bool(index))
    if isinstance(states, Kept):
        return (states.codes,) * 4, (states.width, 1, 0, 1, False, False)
    codes, book = states.codes, states.codebook.contiguous()
    return (codes, book, book, codes), (book.shape[0], book.shape[1], code_bits(book), book.shape[2], True, False)


def packed_attention(
    q: Tensor,
    keys: Packed,
    values: Packed,
    starts: Tensor,
    lengths: Tensor,
    scaling: float,
    sizes: Tensor | None,
    softcap: float | None,
    longest: int | None,
    told: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See the reference."""
    q, starts, lengths = q.contiguous(), starts.contiguous(), lengths.contiguous()
    (k, k_is), (v, v_is) = parts_of(keys), parts_of(values)

    def partial(grid: tuple[int, int], part: Tensor, tops: Tensor, totals: Tensor, per: int, splits: int, queries: int) -> None:
        packed_kernel[grid](
            q, *k, *v, starts, lengths, k[0] if sizes is None else sizes.contiguous(), q if told is None else told, len(keys.codes),
            part, tops, totals,
            scaling, 1.0 if softcap is None else softcap, per, splits, *k[0].stride(), *v[0].stride(), *k_is, *v_is,
            Q=queries, E=keys.width, F=values.width, BQ=wide(queries), BN=BLOCK, BE=wide(keys.width), BF=wide(values.width),
            SIZES=sizes is not None, CAP=softcap is not None, TELLS=told is not None, UPCAST=interpreted(),
        )  # fmt: skip

    return run(partial, q, starts, lengths, values.width, len(keys.codes), BLOCK, longest)
