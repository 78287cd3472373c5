"""Importance-based token merging: attention runs on fewer tokens, and those that the prompt changes most are the last to be merged.

Paper:   Importance-Based Token Merging for Efficient Image and Video Generation (Wu et al., ICCV 2025), arXiv:2411.16720
Maths:   s_i = |eps_cond - eps_uncond| of token i;  P = the tokens of highest s;  D = some of P at random;  p_i = max_{j in D} cos(x_i, x_j)
         of the tokens outside D, those outside P join their most alike in D, and so do those of P with the highest p_i, r n in all;
         y = f(mean of each group), and each token gets its group's y
Differs: s comes from the step before; at the first, and without guidance, all tokens are alike important. The size of P is not in what
         we could read: three quarters. The draw is the same in each sample. A U-Net is merged at each resolution: name a stream to choose.

>>> import torch
>>> from hf_tokens import ImportanceTokenMergeConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/FluxTransformer2DModel")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, ImportanceTokenMergeConfig(ratio=0.5))
>>> measure(model, **specimen.inputs).flops < base.flops
True
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import match, take_rows
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, rank, register


@dataclass(frozen=True)
class ImportanceTokenMergeConfig(MethodConfig):
    ratio: float = option(0.5, ge=0, lt=1, zero=0.0, help="Share of the tokens that is merged away (r).")
    pool: float = option(0.75, gt=0, le=1, help="Share of the tokens that counts as important (P).")
    targets: float = option(0.25, gt=0, le=1, help="Share of the tokens that the others are merged into (D).")
    cross_attention: bool = option(False, help="Whether the cross-attention runs on merged tokens too.")
    mlp: bool = option(False, help="Whether the MLP runs on merged tokens too.")
    seed: int = option(0, ge=0, help="Seed of the draw of D, which is another one in each block and at each step.")


@register("importance-token-merge", ImportanceTokenMergeConfig)
class ImportanceTokenMerge(TokenReducer):
    site = "sublayer"
    kinds = ("denoiser",)

    @property
    def parts(self) -> tuple[str, ...]:
        config = self.config
        return ("attention", *["cross_attention"] * config.cross_attention, *["mlp"] * config.mlp)

    def draw(self, n: int, step: int) -> Tensor:
        """The order in which tokens are drawn, a permutation (n)."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.dims.place)
        return torch.randperm(n, generator=generator)

    def assign(self, hidden: Tensor, guidance: Tensor | None, mask: Tensor, fresh: Tensor, step: int) -> TokenMap | None:
        config, (b, m) = self.config, mask.shape
        mine = mask & ~fresh
        n = int(mine.sum(dim=1).min())
        merged = int(config.ratio * n + 1e-9)
        if merged == 0 or n < 2:
            return None
        targets = max(1, min(int(config.targets * n), n - merged))
        pool = max(int(config.pool * n + 1e-9), n - merged)  # what is left of the pool when all is merged must fill it up
        turn = self.draw(m, step).to(hidden.device).argsort().expand(b, m)  # b m
        important = guidance if guidance is not None else -turn.to(hidden.dtype)
        inside = (rank(important.masked_fill(~mine, -torch.inf)) < pool) if guidance is not None else mine
        dst = turn.masked_fill(~(inside & mine), m).argsort(dim=1)[:, :targets]  # b t
        x = hidden.detach()
        alike, partner = match(x, take_rows(x, dst))  # b m
        last = torch.zeros_like(mine).scatter(1, dst, True) | ~mine
        eager = torch.where(inside, alike, alike + 4).masked_fill(last, -torch.inf)  # what is not important goes first
        src = eager.argsort(dim=1, descending=True, stable=True)[:, :merged]
        return TokenMap.merge(m, src, dst.gather(1, partner.gather(1, src)))
