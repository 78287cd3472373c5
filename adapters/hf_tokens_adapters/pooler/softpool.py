"""SoftPool: each channel of the pooled vector is the sum of its activations, weighted by their softmax, with nothing to learn.

Paper:   Refining Activation Downsampling with SoftPool (Stergiou et al., ICCV 2021), arXiv:2101.00440
Needs:   nothing
Maths:   w_i = exp(a_i) / sum_{j in R} exp(a_j),  y_R = sum_{i in R} w_i a_i,  for each channel and each kernel region R of k x k places
Differs: the paper pools feature maps inside of a network; here the region is the whole stream, or, with `region`, the windows of the patch
         grid that touch each other, the rest at its edge too, whose results are averaged as a network's last layer averages its map.
         Text has a grid of one row. Special tokens in front are left out; a token that stands for several counts as many times.
Checked: alexandrosstergiou/SoftPool@e11dee7e, `soft_pool2d` of single channels above 0 in float64, regions of 2, 3 and 4:
         largest difference 8.9e-16; its form for a CPU gives all channels the weights of their sum (up to 0.67 away) and cuts off below
         0, the CUDA form (by reading) does neither.

>>> from hf_tokens import SoftPoolConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> model = get_token_model(specimen.model, SoftPoolConfig(region=2)).eval()
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
0
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import pool_softmax
from torch import Tensor

from hf_tokens import MethodConfig, Pooler, TokenMap, UnsupportedError, option, register


@dataclass(frozen=True)
class SoftPoolConfig(MethodConfig):
    region: int | None = option(None, ge=1, help="Side of a kernel region in patches (paper: k); None takes the whole stream for one.")
    strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share of the pooled vector in what the head reads.")


@register("softpool", SoftPoolConfig)
class SoftPool(Pooler):
    @property
    def strength(self) -> float:
        return self.config.strength

    def pool(self, hidden: Tensor, mask: Tensor, sizes: Tensor, positions: Tensor, prefix: int, grid: tuple[int, int] | None) -> Tensor:
        place, counted = (positions - prefix).clamp(min=0), mask & (positions >= prefix)  # b n
        window = torch.zeros_like(place)
        if self.config.region is not None:
            if grid is None:
                raise UnsupportedError("SoftPoolConfig.region needs a picture (b c h w), got another input. Leave out `region`.")
            (_, across), k = grid, self.config.region
            window = place // across // k * -(-across // k) + place % across // k
        windows = TokenMap.pool(torch.where(counted, window, -1))
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        each = pool_softmax(x, x, windows.slot, windows.m, sizes)  # b w d
        there = windows.count(sizes)[..., None] > 0
        return (each.sum(dim=1) / there.sum(dim=1).clamp(min=1)).to(hidden.dtype)
