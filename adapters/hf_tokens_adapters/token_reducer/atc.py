"""ATC: join the tokens whose keys are most alike, two clusters at a time, between attention and MLP of a few blocks.

Paper:   Agglomerative Token Clustering (Haurum et al., ECCV 2024), arXiv:2409.11923
Maths:   D(I, J) = min, max or mean of 1 - cos(k_i, k_j) over i in I, j in J;  the nearest two join until ceil(r n) are left
         x_I = sum s_i x_i / sum s_i,  s_I = sum s_i;  then softmax(q K^T / sqrt(d) + log s) V
Differs: all pairs of clusters nearest to each other join at once, which gives the same clusters; tokens come back behind each block as
         copies of their cluster, so that dense heads work; the paper names no single keep rate, 0.5 is the middle of those it tries.

>>> import torch
>>> from hf_tokens import ATCConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, ATCConfig(keep_rate=0.25, linkage="complete"))
>>> measure(model, **specimen.inputs).tokens < base.tokens
True
"""

import math
from dataclasses import dataclass

from hf_tokens_kernels import cluster
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, register


@dataclass(frozen=True)
class ATCConfig(MethodConfig):
    keep_rate: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of the tokens that each of its blocks keeps (paper: r).")
    merged: int = option(0, ge=0, zero=0, help="Tokens that each of its blocks merges away besides, as a count (paper: r off the shelf).")
    schedule: str = option("constant", choices=("constant", "decrease"), help="Whether `merged` is the same in each block or falls to 0.")
    linkage: str = option("average", choices=("single", "complete", "average"), help="What the distance of two clusters is.")
    proportional_attention: bool = option(True, help="Whether a key counts by the number of tokens behind it.")


@register("atc", ATCConfig)
class ATC(TokenReducer):
    site = "middle"
    exports = True
    kinds = ("vision",)

    @property
    def proportional(self) -> bool:
        return self.config.proportional_attention

    @classmethod
    def default_layers(cls, config: ATCConfig, layers: int) -> tuple[int, ...]:
        if config.merged:
            return tuple(range(layers))
        return tuple(sorted({layers * quarter // 4 for quarter in (1, 2, 3)}))  # 3, 6, 9 of 12

    def merged(self) -> int:
        config, along = self.config, self.dims.layer / max(1, self.dims.layers - 1)
        return config.merged if config.schedule == "constant" else int(2 * config.merged * (1 - along))

    def assign(
        self, keys: Tensor, mask: Tensor, positions: Tensor, fresh: Tensor, prefix: int, plain: int | None = None
    ) -> TokenMap | None:
        if self.config.keep_rate == 1 and self.merged() == 0:
            return None
        protected = (positions < prefix) | fresh  # b n
        if plain is None:
            target = ((mask & ~protected).sum(dim=1).double() * self.config.keep_rate - 1e-9).ceil().long() - self.merged()  # b
        else:
            target = max(1, math.ceil(plain * self.config.keep_rate - 1e-9) - self.merged())
        group = cluster(keys.mean(dim=1), target, self.config.linkage, valid=mask, protected=protected)
        return TokenMap.pool(group, gone=None if plain is None else max(0, plain - target))
