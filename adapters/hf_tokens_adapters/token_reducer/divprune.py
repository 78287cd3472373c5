"""DivPrune: of the image tokens that enter an LLM only a tenth stay, those that lie farthest from each other.

Paper:   DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (Alvar et al., CVPR 2025), arXiv:2503.02175
Needs:   nothing
Maths:   D(i, j) = 1 - cos(x_i, x_j);  first argmax_j min_{i != j} D(i, j), then round(r n) - 1 times argmax_j min_{i in S} D(i, j) joins S:
         a subset of the n image tokens whose two nearest are as far apart as can be
Differs: Each row of a batch chooses among the image tokens of all its pictures together, and one stays at least. No position moves, where
         the release counts those that are left anew. Equal tokens are not chosen twice, which the release does once all that is left
         equals one that is chosen.
Checked: vbdi/divprune@799e2d95, its selection in float64 on 94 random pictures of 2 to 576 tokens: largest difference 0; on one of 100
         tokens of which 4 are equal the same 10 of 10, and 98 where it chooses 97 and one of them twice.

>>> from hf_tokens import DivPruneConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, DivPruneConfig(ratio=0.25))
>>> base.tokens - measure(model, **specimen.inputs).tokens  # two rows, four blocks: 4 of 16 image tokens stay
96
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import farthest_points, match, take_rows
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, indices, option, register


@dataclass(frozen=True)
class DivPruneConfig(MethodConfig):
    ratio: float = option(0.098, gt=0, le=1, zero=1.0, help="Share of the image tokens that stays (r).")


@register("divprune", DivPruneConfig)
class DivPrune(TokenReducer):
    site = "before"
    kinds = ("text",)
    causal = True
    chunks = False
    decodes = False

    @classmethod
    def default_layers(cls, config: DivPruneConfig, layers: int) -> tuple[int, ...]:
        return (0,)

    def assign(self, hidden: Tensor, visual: Tensor, mask: Tensor) -> TokenMap | None:
        image = visual & mask  # b m
        if self.config.ratio == 1 or not bool(image.any()):
            return None
        count = image.sum(dim=1, keepdim=True)
        index, stays = indices(image), (self.config.ratio * count.double()).round().clamp(min=1)  # b v, b 1
        x, there = take_rows(hidden.detach(), index), torch.arange(index.shape[1], device=index.device) < count
        likeness = match(x, x, src_mask=there, dst_mask=there, same=True)[0].masked_fill(~there, torch.inf)
        chosen = farthest_points(x, int(stays.max()), start=likeness.argmin(dim=1), valid=there)  # b k
        among = (torch.arange(chosen.shape[1], device=index.device) < stays) & (chosen >= 0)
        place = torch.where(among, index.gather(1, chosen.clamp(min=0)), mask.shape[1])
        kept = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.bool, device=mask.device).scatter(1, place, True)[:, :-1]
        return TokenMap.select(mask & (~image | kept))
