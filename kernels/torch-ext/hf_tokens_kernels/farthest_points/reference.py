"""The torch reference: a product of a matrix and a vector for each sample and round, and a running minimum."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..precision import accumulated


def select(x: Tensor, k: int, start: Tensor, valid: Tensor, metric: str) -> Tensor:
    """The chosen tokens, (b k); open where none is left."""
    b, n, d = x.shape
    x = x.to(accumulated(x.dtype)).masked_fill(~valid[..., None], 0)
    x = normalize(x, dim=-1) if metric == "cosine" else x.contiguous()
    flat, before = x.view(b * n, d), n * torch.arange(b, device=x.device)
    # nearest chosen one: 1 - x.p, or |x|^2 - 2 x.p + |p|^2
    level = x.new_ones(b, n) if metric == "cosine" else x.square().sum(dim=-1)
    alpha = -1 if metric == "cosine" else -2
    near = torch.full_like(level, torch.inf).masked_fill_(~valid, -torch.inf)
    chosen = start[:, None].repeat(1, k)
    for turn in range(1, k):
        last = before + chosen[:, turn - 1]
        gap = torch.baddbmm(level[..., None], x, flat.index_select(0, last)[..., None], alpha=alpha)[..., 0]
        gap = gap if metric == "cosine" else gap.add_(level.view(-1).index_select(0, last)[:, None])
        near = torch.minimum(near, gap, out=near)
        near.view(-1).index_fill_(0, last, -torch.inf)
        chosen[:, turn] = near.argmax(dim=1)
    return chosen
