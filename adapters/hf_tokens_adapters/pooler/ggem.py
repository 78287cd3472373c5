"""GGeM: the channels fall into groups, one for each attention head, and the head reads a generalised mean with a learned exponent a group.

Paper:   Group Generalized Mean Pooling for Vision Transformer (Ko et al., 2022), arXiv:2212.04114
Needs:   training
Maths:   y_c = (1/N sum_i x_ic^p_g)^(1 / p_g) for each channel c of group g, over the N patch tokens
Differs: values below `eps` count as `eps`, as in every GeM, since a power of a negative number is none; the exponents start at 3, as is
         usual for GeM. Special tokens in front are left out, as in the paper; a token that stands for several counts as many times.
Checked: no public code found (2026-11-29); what the paper leaves open: where the exponents start, and the least value of an activation.

>>> from hf_tokens import GGeMConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> model = get_token_model(specimen.model, GGeMConfig())
>>> sum(p.numel() for p in model.parameters() if p.requires_grad)
4
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import pool_power
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, Pooler, option, register


@dataclass(frozen=True)
class GGeMConfig(MethodConfig):
    groups: int | None = option(None, ge=1, help="Groups of channels (paper: G); None takes one for each attention head.")
    p: float = option(3.0, gt=0, le=100, help="Exponent that every group starts from (paper: p); 1 is the mean, infinity the maximum.")
    eps: float = option(1e-6, gt=0, le=1, help="Least value of an activation.")
    strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share of the pooled vector in what the head reads.")


@register("ggem", GGeMConfig)
class GGeM(Pooler):
    exports = True

    def __init__(self, config: GGeMConfig, dims: Dims):
        super().__init__(config, dims)
        groups = config.groups or dims.heads
        if dims.width % groups:
            raise ConfigError(f"GGeMConfig.groups must divide the {dims.width} channels of the stream, got {groups}. Choose a divisor.")
        self.p = nn.Parameter(torch.full((groups,), config.p))

    @property
    def strength(self) -> float:
        return self.config.strength

    def pool(self, hidden: Tensor, mask: Tensor, sizes: Tensor, positions: Tensor, prefix: int) -> Tensor:
        counted = mask & (positions >= prefix)  # b n
        return pool_power(hidden, self.p, counted.long() - 1, 1, sizes, eps=self.config.eps)[:, 0]
