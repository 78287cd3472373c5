"""ATC: join the tokens whose keys are most alike, two clusters at a time, between attention and MLP of a few blocks.

Paper:   Agglomerative Token Clustering (Haurum et al., ECCV 2024), arXiv:2409.11923
Needs:   nothing
Maths:   D(I, J) = min, max or mean of 1 - cos(k_i, k_j) over i in I, j in J;  the nearest two join until floor(r^k n) are left behind the
         k-th of its blocks, of n patches in all;
         x_I = sum s_i x_i / sum s_i,  s_I = sum s_i;  then softmax(q K^T / sqrt(d) + log s) V
Differs: all pairs of clusters nearest to each other join at once, which gives the same clusters; tokens come back behind each block as
         copies of their cluster, so that dense heads work; the paper names no single keep rate, 0.5 is the middle of those it tries.
Checked: JoakimHaurum/ATC@227c94b5, clusters and means of three stages, 30 random pictures under each linkage, keys alike for alike
         clusters: largest difference 3e-16; its counts are those of all patches.

>>> import torch
>>> from hf_tokens import ATCConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, ATCConfig(keep_rate=0.25, linkage="complete"))
>>> measure(model, **specimen.inputs).tokens < base.tokens
True
"""

from dataclasses import dataclass

from hf_tokens_kernels import cluster
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, register


@dataclass(frozen=True)
class ATCConfig(MethodConfig):
    keep_rate: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of the tokens that each of its blocks keeps (paper: r).")
    merged: int = option(0, ge=0, zero=0, help="Tokens that each of its blocks merges away besides, as a count (paper: r off the shelf).")
    schedule: str = option("constant", choices=("constant", "decrease"), help="Whether `merged` is the same in each block or falls to 0.")
    of: str = option("all", choices=("all", "left"), was={1: "left"}, help="left: each block keeps the share of what is left, rounded up.")
    linkage: str = option("average", choices=("single", "complete", "average"), help="What the distance of two clusters is.")
    proportional_attention: bool = option(True, help="Whether a key counts by the number of tokens behind it.")


@register("atc", ATCConfig, version=2)
class ATC(TokenReducer):
    site = "middle"
    exports = True
    kinds = ("vision", "audio")
    causal = False

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
        self, keys: Tensor, mask: Tensor, positions: Tensor, fresh: Tensor, prefix: int, memory: dict, plain: int | None = None
    ) -> TokenMap | None:
        c = self.config
        if c.keep_rate == 1 and self.merged() == 0:
            return None
        protected = (positions < prefix) | fresh  # b n
        count, held = ((mask & ~protected).sum(dim=1), memory.rows) if plain is None else (plain, memory)  # (b), or of each row
        whole = count.double() if plain is None else float(plain)
        if c.of == "all":
            held[self.key] = whole = held.get(self.key, whole) * c.keep_rate
            share = (whole + 1e-9) // 1
        else:
            share = -((1e-9 - whole * c.keep_rate) // 1)
        target = share.long().minimum(count) - self.merged() if plain is None else max(1, min(plain, int(share)) - self.merged())
        group = cluster(keys.mean(dim=1), target, c.linkage, valid=mask, protected=protected)
        return TokenMap.pool(group, gone=None if plain is None else max(0, plain - target))
