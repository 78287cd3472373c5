"""Cells of rows and heads that lie alike, which are read together without a copy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import accumulated

TOGETHER = 1 << 16  # cells of the rows and heads whose scores are held at a time


@dataclass(frozen=True)
class Cells:
    """Cells of some rows and heads: `count` of each, the first ones `stride` apart from `start` on."""

    start: int
    stride: int
    rows: int
    count: int

    def of(self, x: Tensor) -> Tensor:
        """Something of each cell (c ...), of these (r n ...), without a copy."""
        step = x.stride(0)
        where = (self.stride * step, step, *x.stride()[1:])
        return x.as_strided((self.rows, self.count, *x.shape[1:]), where, x.storage_offset() + self.start * step)

    def part(self, first: int, last: int) -> Cells:
        """The cells of each row and head from one to another."""
        return Cells(self.start + first, self.stride, self.rows, last - first)

    def chunks(self, most: int, multiple: int = 1) -> list[slice]:
        """Parts of no more than so many cells in all, as few and as alike as may be, each as many times some of a row and head."""
        widest = max(1, most // self.rows // multiple) * multiple
        step = -(-self.count // -(-self.count // widest) // multiple) * multiple  # as many parts, of one width
        return [slice(first, min(first + step, self.count)) for first in range(0, self.count, step)]


def together(starts: list[int], lengths: list[int]) -> Iterator[tuple[slice, Cells]]:
    """Rows and heads that follow each other, have cells, as many each, and lie at equal distances; no more than fit together."""
    first = 0
    while first < len(starts):
        n, last = lengths[first], first + 1
        step = starts[last] - starts[first] if last < len(starts) else 0
        while (
            last < len(starts) and lengths[last] == n and starts[last] - starts[last - 1] == step > 0 and (last - first + 1) * n <= TOGETHER
        ):
            last += 1
        if n:
            yield slice(first, last), Cells(starts[first], max(step, 1), last - first, n)
        first = last


def placed(found: list[tuple[slice | list[int], Tensor, Tensor]], shape: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
    """What was read of some rows and heads each, and the log of their sums of exponentials (r q 1), as those of all (r q f) and (r q).

    `like` (... f) tells how wide what is read is, where nothing was; zeros stand for it, and -inf for its log.
    """
    if len(found) == 1 and found[0][0] == slice(0, shape[0]):
        return found[0][1], found[0][2][..., 0]
    out, logs = like.new_zeros(*shape, like.shape[-1]), like.new_full(shape, -torch.inf, dtype=accumulated(like.dtype))
    for some, read, log in found:
        out[some], logs[some] = read, log[..., 0]
    return out, logs
