"""The Triton twin: a program has a block of sources and goes over the destinations, of which it keeps the best so far.

The destinations may be split among several programs, so that few sources fill a GPU too; what each of them found is compared behind it.
Floor: src and dst are read once, 2 b s t d operations.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
from .reference import sizes

BLOCK_T, BLOCK_D = 128, 64
PROGRAMS = 264  # at least so many, two for each multiprocessor of a large GPU


@triton.jit
def search_kernel(
    src, dst, scale, bias, offset, src_size, dst_size, src_group, dst_group, score, index,
    s, t, d, part, src_b, src_s, src_d, dst_b, dst_t, dst_d,
    GROUPS: tl.constexpr, WARD: tl.constexpr, UPCAST: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    split, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i, e = tl.program_id(0) * BS + tl.arange(0, BS), tl.arange(0, BD)
    real = i < s
    x_at = src + sample * src_b + i[:, None].to(tl.int64) * src_s
    away = tl.load(offset + sample * s + i, real, 0.0)
    one = tl.load(src_size + sample * s + i, real, 1.0) if WARD else away
    mine = tl.load(src_group + sample * s + i, real, 0) if GROUPS else i
    best, where = tl.full([BS], float("-inf"), tl.float32), tl.full([BS], 0, tl.int32)
    for first in range(split * part, tl.minimum(t, (split + 1) * part), BT):
        j = first + tl.arange(0, BT)
        there = j < tl.minimum(t, (split + 1) * part)
        y_at = dst + sample * dst_b + j[None].to(tl.int64) * dst_t
        dots = tl.full([BS, BT], 0.0, tl.float32)
        for start in range(0, d, BD):
            f = start + e
            x = tl.load(x_at + f[None] * src_d, real[:, None] & (f < d)[None], 0.0)
            y = tl.load(y_at + f[:, None] * dst_d, (f < d)[:, None] & there[None], 0.0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            dots = tl.dot(x, y, dots, input_precision="ieee")
        level = tl.load(bias + sample * t + j, there, float("-inf"))
        got = dots * tl.load(scale + sample * t + j, there, 0.0)[None] + level[None] - away[:, None]
        there = (level > float("-inf"))[None]
        if WARD:
            other = tl.load(dst_size + sample * t + j, j < t, 1.0)
            got = got * (one[:, None] * other[None] / (one[:, None] + other[None]))
        if GROUPS:
            there = there & (mine[:, None] != tl.load(dst_group + sample * t + j, j < t, 0)[None])
        high, at = tl.max(tl.where(there, got, float("-inf")), axis=1, return_indices=True)
        better = high > best
        best, where = tl.where(better, high, best), tl.where(better, first + at, where)
    out = (split * tl.num_programs(2) + sample) * s + i
    tl.store(score + out, best, real)
    tl.store(index + out, where, real)


def search(
    src: Tensor,
    dst: Tensor,
    metric: str,
    given: tuple[Tensor | None, Tensor | None],
    masks: tuple[Tensor | None, Tensor | None],
    groups: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """The scores and the destinations, (b s) each; the index of a score of -inf is 0."""
    (b, s, d), t = src.shape, dst.shape[1]
    if b * s == 0:
        return src.new_empty(b, s, dtype=torch.float32), torch.empty(b, s, dtype=torch.long, device=src.device)
    x_norm = torch.linalg.vector_norm(src, dim=-1, dtype=torch.float32) if metric != "dot" else None
    y_norm = torch.linalg.vector_norm(dst, dim=-1, dtype=torch.float32) if metric != "dot" else None
    zeros, apart = src.new_zeros(b, s, dtype=torch.float32), metric in ("euclidean", "ward")
    scale = y_norm.clamp(min=1e-12).reciprocal() if metric == "cosine" else dst.new_full((b, t), 2.0 if apart else 1.0, dtype=torch.float32)
    bias = -y_norm.square() if apart else torch.zeros_like(scale)
    if masks[1] is not None:
        bias = bias.masked_fill(~masks[1], -torch.inf)
    offset = x_norm.square() if apart else zeros
    one, other = (x.contiguous() for x in sizes(src, dst, given)) if metric == "ward" else (zeros, zeros)
    mine, theirs = (zeros if g is None else g.contiguous() for g in groups)
    wide = src.dtype == torch.float32 or interpreted()  # what no tensor core multiplies takes smaller blocks
    block = 64 if wide or s <= 64 else 128
    blocks = triton.cdiv(s, block) * b
    wanted = 2 if interpreted() else triton.cdiv(PROGRAMS, blocks)
    part = triton.cdiv(triton.cdiv(t, BLOCK_T), min(wanted, triton.cdiv(t, BLOCK_T))) * BLOCK_T
    splits = triton.cdiv(t, part)
    score = src.new_empty(splits, b, s, dtype=torch.float32)
    index = torch.empty(splits, b, s, dtype=torch.int32, device=src.device)
    search_kernel[(triton.cdiv(s, block), splits, b)](
        src, dst, scale, bias, offset, one, other, mine, theirs, score, index, s, t, d, part, *src.stride(), *dst.stride(),
        GROUPS=groups[0] is not None, WARD=metric == "ward", UPCAST=interpreted(), BS=block, BT=BLOCK_T, BD=BLOCK_D,
        num_warps=block // 16,
    )  # fmt: skip
    score, split = score.max(dim=0)  # of equals the first
    index = index.gather(0, split[None])[0].long()
    if metric == "cosine":
        score = score * x_norm.clamp(min=1e-12).reciprocal()
    return (score if masks[0] is None else score.masked_fill(~masks[0], -torch.inf)), index
