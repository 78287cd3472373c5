"""PPT: a few blocks each lose r tokens; where the class token tells them apart the least looked at go, else the most alike join.

Paper:   PPT: Token Pruning and Pooling for Efficient Vision Transformers (Wu et al., 2023), arXiv:2310.01812
Needs:   nothing
Maths:   S_j = a_j |v_j| / sum_i a_i |v_i|,  a the class token's attention summed over heads, i and j image tokens
         Var(S) >= tau: the r lowest of S go;  else every second token may join its most alike other one (cosine of the heads' mean key):
         the r most alike pairs do, x = sum s_i x_i / sum s_i;  then softmax(q K^T / sqrt(d) + log s) V
Differs: without a class token a is the mean over all tokens; more special tokens than two are counted too, and stay alone.
Checked: xjwu1024/PPT@706bcdd4, what is pruned and pooled over 60 random pictures, of one class token: largest difference 4e-16.

>>> from hf_tokens import PPTConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, PPTConfig(r=4, layers=(1, 2)))
>>> base.tokens - measure(model, **specimen.inputs).tokens  # two blocks, two samples: 4 behind one block and 8 behind both
24
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from hf_tokens_kernels import match, take_rows
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, indices, option, rank, register


@dataclass(frozen=True)
class PPTConfig(MethodConfig):
    r: int = option(50, ge=0, zero=0, help="Tokens that each of its blocks loses, half of them at most (paper: r).")
    tau: float = option(7e-5, ge=0, help="Variance of the significance scores from which on tokens are pruned, not pooled (paper: tau).")
    counted: str = option(
        "all", choices=("all", "picture"), was={1: "picture"}, help="Whether every second token of all may join, or of the picture's alone."
    )
    proportional_attention: bool = option(True, help="Whether a key counts by the number of tokens behind it.")


@register("ppt", PPTConfig, version=2)
class PPT(TokenReducer):
    site = "middle"
    exports = True
    kinds = ("vision", "audio")
    causal = False

    @property
    def proportional(self) -> bool:
        return self.config.proportional_attention

    @property
    def ignores(self) -> tuple[str, ...]:
        return ("scores", "values") if self.config.tau >= 1 else ()  # no variance of shares is so large

    @classmethod
    def default_layers(cls, config: PPTConfig, layers: int) -> tuple[int, ...]:
        return tuple(sorted({layers * quarter // 4 for quarter in (1, 2, 3)}))  # 3, 6, 9 of 12

    def assign(
        self,
        keys: Tensor,
        values: Tensor | None,
        scores: object | None,
        mask: Tensor,
        positions: Tensor,
        fresh: Tensor,
        prefix: int,
        plain: int | None = None,
    ) -> TokenMap | None:
        if self.config.r == 0:
            return None
        index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        free = mask & (positions >= prefix) & ~fresh  # b n
        count = free.sum(dim=1, keepdim=True)
        r = (count // 2).clamp(max=self.config.r)
        partner, paired = self.partners(keys, free, r, plain, prefix % 2 if self.config.counted == "all" else 0)
        group = torch.where(paired, partner, index)
        if scores is not None:
            first = (mask & (positions == 0) & ~fresh).long().argmax(dim=1, keepdim=True)  # b 1
            got = scores.rows(first)[:, :, 0] if prefix else scores.columns()
            significance = (got.sum(dim=1) * rearrange(values, "b h n d -> b n (h d)").norm(dim=-1)).masked_fill(~free, 0)
            share = significance / significance.sum(dim=1, keepdim=True).clamp(min=torch.finfo(significance.dtype).tiny)
            spread = (share - 1 / count).square().masked_fill(~free, 0).sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
            pruned = free & (rank(share.masked_fill(~free, torch.inf)) >= mask.shape[1] - r)
            group = torch.where(spread >= self.config.tau, torch.where(pruned, -1, index), group)
        return TokenMap.pool(torch.where(mask, group, -1), gone=None if plain is None else min(plain // 2, self.config.r))

    @staticmethod
    def partners(keys: Tensor, free: Tensor, r: Tensor, plain: int | None = None, lead: int = 0) -> tuple[Tensor, Tensor]:
        """The token that each free one is most alike, and whether it joins that one, (b n) each; the first `lead` may be joined."""
        features, order = keys.mean(dim=1), indices(free, plain)  # b n d, b f
        there = torch.arange(order.shape[1], device=keys.device) < free.sum(dim=1, keepdim=True)
        index = torch.arange(free.shape[1], device=keys.device).expand_as(free)
        if order.shape[1] < 2:
            return index, torch.zeros_like(free)
        (first, firsts), (second, seconds) = ((order[:, at::2], there[:, at::2]) for at in (lead, 1 - lead))
        best, mate = match(take_rows(features, first), take_rows(features, second), src_mask=firsts, dst_mask=seconds)
        best = best.new_full(free.shape, -torch.inf).scatter(1, first, best)
        return index.scatter(1, first, second.gather(1, mate)), free & (rank(best) < r)
