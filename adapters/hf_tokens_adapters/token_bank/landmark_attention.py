"""Landmark attention: a token behind each block of text stands for it, and opens or shuts it to the attention of later tokens.

Paper:   Landmark Attention: Random-Access Infinite Context Length for Transformers (Mohtashami and Jaggi, NeurIPS 2023), arXiv:2305.16300
Maths:   p_j is the landmark of token j's block;  for query i, S_ij is a softmax of the scores in groups: the tokens of each other block
         are one, those of the query's own block and the landmarks p_j of the other blocks are one;  a_ij = S_ij in its own block,
         S_ij * S_i,p_j in another one, 0 for landmarks.  At inference, of the blocks behind the local ones the k with the highest
         S_i,p_j count, the others are not read.
Differs: two parts are missing for the unlimited context of the title. The release reads a block at the places just in front of the local
         ones, whatever its own were (stingy positions); here a landmark has the place of the token that it follows, cached keys keep
         theirs, and a longer context is the base model's own affair. It moves the keys of old blocks out of the cache, to the CPU, and
         brings back those that are read; here all keys stay cached. Local are the blocks that begin in the
         last `local` tokens, not those of a chunk of the prompt. Of blocks whose log S_i,p_j agree to three decimals the later is read;
         heads that share their keys choose by the largest of theirs.
         Landmark and weights are trained together in the paper: stack a LoRA. In a prompt each query chooses for itself, so blocks
         are hidden, not spared; a token that is decoded reads the landmarks and the keys of its blocks only.
Checked: epfml/landmark-attention@d963e504, `landmark_grouped_softmax` at the queries that are no landmark, 25 tokens in
         float64: largest difference 3.3e-16; retrieval, positions and cache by reading.

>>> from hf_tokens import LandmarkAttentionConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llama")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, LandmarkAttentionConfig(block=4))
>>> measure(model, **specimen.inputs).tokens > base.tokens  # a landmark behind each fourth token
True
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import Attending, Dims, MethodConfig, TokenBank, indices, option, rank, register


@dataclass(frozen=True)
class LandmarkAttentionConfig(MethodConfig):
    block: int = option(50, ge=0, zero=0, example=3, help="Tokens of a block (paper: l_block); 0 makes none.")
    local: int = option(250, ge=0, example=3, help="Tokens before the query whose blocks it reads anyway (paper: l_local).")
    retrieve: int = option(4, ge=1, example=1, help="Blocks that it reads of the others, out of training (paper: k).")


def by_block(scores: Tensor, block: Tensor, count: int) -> Tensor:
    """log sum exp of the scores (b h m n) of each block's keys, block (b h n); -inf where there are none, (b h m c)."""
    into = block[:, :, None].clamp(0, count - 1).expand_as(scores)
    lowest = scores.new_full((*scores.shape[:3], count), torch.finfo(scores.dtype).min)
    top = lowest.scatter_reduce(3, into, scores.detach(), "amax")
    total = torch.zeros_like(top).scatter_add(3, into, (scores - top.gather(3, into)).exp())
    return torch.where(total > 0, top, -torch.inf) + torch.where(total > 0, total, 1).log()


@register("landmark-attention", LandmarkAttentionConfig)
class LandmarkAttention(TokenBank):
    site, packed = "input", False
    kinds = ("text",)
    causal = True

    def __init__(self, config: LandmarkAttentionConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.is_first_block:
            self.mark = nn.Parameter(0.02 * torch.randn(1, dims.width))

    def follow(self, positions: Tensor) -> Tensor | None:
        ell = self.config.block
        return positions % ell == ell - 1 if ell else None

    def tokens(self) -> Tensor | None:
        return self.mark if self.is_first_block else None  # no later block writes them anew

    def attend(self, affinity: Callable, positions: Tensor, key_positions: Tensor, own_keys: Tensor) -> Attending | None:
        if not bool(own_keys.any()):
            return None
        block, at = key_positions // self.config.block, positions[:, None, :, None] // self.config.block  # b 1|g n and b 1 m 1
        count = int(block.max()) + 1
        if self.training:
            return Attending(None, gate(affinity(), block, own_keys, at, None, count))
        block, own = block.expand_as(own_keys), own_keys
        if at.shape[2] > 1:
            scores = affinity()
            return Attending(None, gate(scores, block, own, at, self.choose(scores, block, own, at, count), count))
        first = indices(own | (block == at[..., 0]))
        chosen = self.choose(affinity(first), block.gather(2, first), own.gather(2, first), at, count)
        index = indices(chosen[:, :, 0].gather(2, block.clamp(min=0)))
        return Attending(index, gate(affinity(index), block.gather(2, index), own.gather(2, index), at, chosen, count))

    @torch.no_grad()
    def choose(self, scores: Tensor, block: Tensor, own: Tensor, at: Tensor, count: int) -> Tensor:
        """Whether each query reads each of so many blocks, (b g m c), given scores (b h m n) of the landmarks and of its own block."""
        shared = scores.shape[1] // block.shape[1]
        wide, mark = (t.repeat_interleave(shared, dim=1) for t in (block, own))
        other = wide[:, :, None] != at
        beside = scores.masked_fill(mark[:, :, None] != other, -torch.inf).logsumexp(dim=-1, keepdim=True)
        share = by_block(scores.masked_fill(~(mark[:, :, None] & other), -torch.inf), wide, count) - beside  # b h m c
        share = share.unflatten(1, (-1, shared)).amax(dim=2)
        near = at - torch.arange(count, device=at.device) <= self.config.local // self.config.block
        share = share.masked_fill(near, -torch.inf).round(decimals=3)  # rounding must not tell apart what is the same
        return near | (rank(share.flip(-1)).flip(-1) < self.config.retrieve) & (share > -torch.inf)


def gate(scores: Tensor, block: Tensor, own: Tensor, at: Tensor, chosen: Tensor | None, count: int) -> Tensor:
    """What makes of a softmax over all keys the grouped one, added to scores (b h m n)."""
    wide, mark = (t.repeat_interleave(scores.shape[1] // t.shape[1], dim=1) for t in (block, own))
    mark = mark[:, :, None]  # b h 1 n
    door = by_block(scores.masked_fill(~mark, -torch.inf), wide, count)
    within = by_block(scores.masked_fill(mark, -torch.inf), wide, count)
    open_ = torch.where((door == -torch.inf) | (within == -torch.inf), 0, door - within)  # b h m c
    if chosen is not None:
        open_ = open_.masked_fill(~chosen.repeat_interleave(scores.shape[1] // chosen.shape[1], dim=1), -torch.inf)
    each = open_.gather(3, wide[:, :, None].clamp(min=0).expand_as(scores))
    return torch.where(wide[:, :, None] == at, 0, each).masked_fill(mark, -torch.inf)
