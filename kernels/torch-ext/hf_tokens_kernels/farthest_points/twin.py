"""The Triton twin: a launch a round, in which each program has a block of tokens.

A program first looks through what the blocks found in the round before, and so knows the token chosen last without another launch; it
then brings its block's distances up to date and leaves the farthest of them for the next round. Floor: k n d elements are read, from the
cache of the GPU where the tokens fit in, and 2 k n d operations done.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N, BLOCK_D = 128, 64


@triton.jit(do_not_specialize=["turn"])
def round_kernel(
    x, scale, near, far, place, chosen, n, d, k, turn, blocks, stride_b, stride_n, stride_d,
    COSINE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    found, parity = tl.arange(0, BLOCKS), turn % 2
    board = (sample * 2 + 1 - parity) * blocks
    high, at = tl.max(tl.load(far + board + found, found < blocks, float("-inf")), axis=0, return_indices=True)
    last = tl.load(place + board + at)
    if block == 0:
        tl.store(chosen + sample * k + turn, last)
    i, e = block * BN + tl.arange(0, BN), tl.arange(0, BD)
    real = i < n
    here, there = x + sample * stride_b + i.to(tl.int64) * stride_n, x + sample * stride_b + last.to(tl.int64) * stride_n
    sums = tl.full([BN], 0.0, tl.float32)
    for start in range(0, d, BD):
        f = start + e
        rows = tl.load(here[:, None] + f[None] * stride_d, real[:, None] & (f < d)[None], 0.0).to(tl.float32)
        point = tl.load(there + f * stride_d, f < d, 0.0).to(tl.float32)
        if COSINE:
            sums += tl.sum(rows * point[None], axis=1)
        else:
            apart = rows - point[None]
            sums += tl.sum(apart * apart, axis=1)
    if COSINE:
        sums = 1 - sums * tl.load(scale + sample * n + i, real, 0.0) * tl.load(scale + sample * n + last)
    held = tl.load(near + sample * n + i, real, float("-inf"))
    held = tl.where((held == float("-inf")) | (i == last), float("-inf"), tl.minimum(held, sums))
    tl.store(near + sample * n + i, held, real)
    high, at = tl.max(held, axis=0, return_indices=True)
    tl.store(far + (sample * 2 + parity) * blocks + block, high)
    tl.store(place + (sample * 2 + parity) * blocks + block, tl.minimum(block * BN + at, n - 1))


def select(x: Tensor, k: int, start: Tensor, valid: Tensor, metric: str) -> Tensor:
    """The chosen tokens, (b k); open where none is left."""
    (b, n, d), cosine = x.shape, metric == "cosine"
    scale = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).clamp(min=1e-12).reciprocal() if cosine else x
    near = torch.full((b, n), torch.inf, device=x.device).masked_fill_(~valid, -torch.inf)
    block = max(BLOCK_N, triton.next_power_of_2(triton.cdiv(n, 4096)))
    blocks = triton.cdiv(n, block)
    far = torch.full((b, 2, blocks), -torch.inf, device=x.device)
    place = torch.zeros(b, 2, blocks, dtype=torch.int32, device=x.device)
    far[:, 1, 0], place[:, 1, 0] = 0, start  # round 0 reads what stands where round -1 would have left it
    chosen = torch.empty(b, k, dtype=torch.int64, device=x.device)
    for turn in range(k):
        round_kernel[(blocks, b)](
            x, scale, near, far, place, chosen, n, d, k, turn, blocks, *x.stride(),
            COSINE=cosine, BN=block, BD=BLOCK_D, BLOCKS=triton.next_power_of_2(blocks), num_warps=4,
        )  # fmt: skip
    return chosen
