"""ToMe: in every block the r most alike pairs of tokens become one, between attention and MLP.

Paper:   Token Merging: Your ViT but Faster (Bolya et al., ICLR 2023), arXiv:2210.09461
Needs:   nothing
Maths:   A = tokens in even places, B = those in odd ones;  b(i) = argmax_{j in B} cos(k_i, k_j),  k the heads' mean key;  the r most alike
         i in A join their b(i): x = sum s_i x_i / sum s_i, s = sum s_i;  then softmax(q K^T / sqrt(d) + log s) V.  The rest of A, then B,
         are the next block's places; special tokens stand in front, and neither join nor are joined
Differs: Tokens come back behind the last block as copies of what they became, so that dense heads work. Of more than two special tokens
         the release knows nothing: they are as its two. Where positions rotate the keys, these are the keys that the attention compares.
Checked: facebookresearch/ToMe@af95e4b1, matching, merge and schedule over the weights of 9 random ViT, DeiT and SigLIP of 4 to 6 blocks,
         r up to 40 of 25 tokens, with and without sizes in the scores: largest difference 2e-15 of any token's last state.

>>> from hf_tokens import ToMeConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, ToMeConfig(r=2))
>>> base.tokens - measure(model, **specimen.inputs).tokens  # two samples, four blocks: 2 behind the first, 4 and 6 behind the others
24
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import match, take_rows
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, rank, register


@dataclass(frozen=True)
class ToMeConfig(MethodConfig):
    r: int = option(13, ge=0, zero=0, help="Tokens that each of its blocks loses, half of them at most (paper: r).")
    inflect: float = option(0.0, ge=-1, le=1, help="Slope of r over the depth: at -1 it falls from 2 r to 0, at 1 it rises so.")
    schedule: tuple[int, ...] | None = option(
        None, ge=0, zero=(), help="Tokens that each block of the stream loses, in place of r; those behind its end lose none."
    )
    proportional_attention: bool = option(True, help="Whether a key counts by the number of tokens behind it.")

    def loses(self, layer: int, layers: int) -> int:
        """Tokens that a block of so many loses."""
        if self.schedule is not None:
            return self.schedule[layer] if layer < len(self.schedule) else 0
        first = int(self.r * (1 - self.inflect))
        return int(first + 2 * (self.r - first) / max(1, layers - 1) * layer)


@register("tome", ToMeConfig)
class ToMe(TokenReducer):
    site = "middle"
    exports = True
    kinds = ("vision", "audio")
    causal = False

    @property
    def proportional(self) -> bool:
        return self.config.proportional_attention

    def assign(
        self, keys: Tensor, mask: Tensor, positions: Tensor, fresh: Tensor, prefix: int, memory: dict, plain: int | None = None
    ) -> TokenMap | None:
        r = self.config.loses(self.dims.layer, self.dims.layers)
        if r == 0 or mask.shape[1] < 2:
            return None
        index = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)  # b n
        places, free = memory.tokens.get(self.key, index), mask & ~fresh & (positions >= prefix)
        order = torch.where(mask & ~fresh, places, torch.iinfo(torch.long).max).argsort(dim=1, stable=True)
        a, b = order[:, ::2], order[:, 1::2]
        features, joinable = keys.mean(dim=1), [free.gather(1, part) for part in (a, b)]
        best, mate = match(take_rows(features, a), take_rows(features, b), src_mask=joinable[0], dst_mask=joinable[1])
        likeness = rank(best)  # of each in A, b a
        most = (free.sum(dim=1, keepdim=True) // 2).clamp(max=r) if plain is None else min(r, plain // 2)
        joins = (likeness < most) & joinable[0]
        place = torch.arange(a.shape[1] + b.shape[1], device=mask.device).expand_as(order)
        rest = place[:, : a.shape[1]] if prefix else likeness
        behind = places.scatter(1, a, rest).scatter(1, b, place[:, a.shape[1] :])
        memory.tokens[self.key] = torch.where(free, behind, places - mask.shape[1])
        group = index.scatter(1, a, torch.where(joins, b.gather(1, mate), a))
        return TokenMap.pool(torch.where(mask, group, -1), gone=None if plain is None else most)
