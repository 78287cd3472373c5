"""SimPool: one query, made of the mean of the tokens, attends to all of them; the head reads their generalised mean, so weighted.

Paper:   Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit? (Psomas et al., ICCV 2023), arXiv:2309.06891
Needs:   training
Maths:   u_0 = X 1 / p,  q = W_Q u_0,  K = W_K LN(X),  a = softmax(K^T q / sqrt(d)),  V = LN(X) - min LN(X),  u = (V^gamma a)^(1/gamma)
         + beta, one number for all channels that is learnt from 0, which the authors' code adds in a ViT and the paper leaves out
Differs: the base model is pretrained, so W_Q and W_K start from N(0, 0.02^2), which is near the plain mean; the minimum is that of each
         sample, as in the paper, where the authors' code takes that of the batch. Special tokens in front are left out; a token that
         stands for several counts as many times.
Checked: billpsomas/simpool@fac22635, one sample at a time in float64, gamma 1.25 and 2, with and without beta:
         largest difference 1e-06, which is what it adds to V (1.3e-08 without that); in a batch its minimum is the batch's.

>>> from hf_tokens import SimPoolConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> model = get_token_model(specimen.model, SimPoolConfig())
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
2113
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import pool_power
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, Pooler, option, register


@dataclass(frozen=True)
class SimPoolConfig(MethodConfig):
    gamma: float = option(1.25, gt=0, le=10, help="Exponent of the generalised mean (paper: gamma = (1 - alpha) / 2).")
    beta: bool = option(True, was={1: False}, help="Whether a learnt number is added to what is pooled.")
    strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share of the pooled vector in what the head reads.")


@register("simpool", SimPoolConfig, version=2)
class SimPool(Pooler):
    exports = True

    def __init__(self, config: SimPoolConfig, dims: Dims):
        super().__init__(config, dims)
        self.to_query, self.to_key = (nn.Linear(dims.width, dims.width, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(dims.width, eps=1e-6)
        for layer in (self.to_query, self.to_key):
            nn.init.normal_(layer.weight, std=0.02)
        if config.beta:
            self.beta = nn.Parameter(torch.zeros(1))

    @property
    def strength(self) -> float:
        return self.config.strength

    def pool(self, hidden: Tensor, mask: Tensor, sizes: Tensor, positions: Tensor, prefix: int) -> Tensor:
        counted = mask & (positions >= prefix)  # b n
        weight = (sizes * counted).to(hidden.dtype)
        mean = torch.einsum("bn,bnd->bd", weight / weight.sum(dim=1, keepdim=True).clamp(min=1), hidden)
        normed = self.norm(hidden)
        scores = torch.einsum("bnd,bd->bn", self.to_key(normed), self.to_query(mean)) * hidden.shape[-1] ** -0.5
        attention = (scores + sizes.log().to(scores.dtype)).masked_fill(~counted, torch.finfo(scores.dtype).min).softmax(dim=1)
        least = normed.masked_fill(~counted[..., None], torch.inf).amin(dim=(1, 2), keepdim=True)
        values = normed - least  # from 1e-6 on: the gradient of a power has no limit at zero
        pooled = pool_power(values, self.config.gamma, counted.long() - 1, 1, attention)[:, 0]
        return pooled + self.beta.to(pooled.dtype) if self.config.beta else pooled
