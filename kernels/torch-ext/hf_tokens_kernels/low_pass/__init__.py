"""Fewer tokens of a grid, by its lowest frequencies."""

from __future__ import annotations

from torch import Tensor

from . import reference

__all__ = ["low_pass"]


def low_pass(x: Tensor, height: int, width: int) -> Tensor:
    """The lowest frequencies of each grid of tokens, as a smaller grid: a truncated 2-D DCT and its inverse.

    A side of n places becomes one of m by sqrt(m / n) C_m^T [C_n]_m, with C the orthonormal DCT-II. There is no twin: these are two matrix
    products, and the vendor's are the fastest.

    Args:
        x: Grids, (p h w d).
        height: Rows that are left.
        width: Columns that are left.

    Returns:
        (p height width d) of the dtype of x; a side that stays as long as it is keeps its bits.

    Raises:
        ValueError: x is no grid, or there would be more places than before.

    >>> import torch
    >>> from hf_tokens_kernels import low_pass
    >>> low_pass(torch.ones(1, 4, 6, 1), 2, 3).shape
    torch.Size([1, 2, 3, 1])
    """
    if x.dim() != 4 or not 1 <= height <= x.shape[1] or not 1 <= width <= x.shape[2]:
        rule = "low_pass needs grids (p h w d), of which it leaves some of the h rows and w columns"
        raise ValueError(f"{rule}, got {tuple(x.shape)}, {height} rows and {width} columns. Ask for fewer places.")
    return reference.low_pass(x, height, width)
