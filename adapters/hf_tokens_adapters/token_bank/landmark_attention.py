"""Landmark attention: a token behind each block of text stands for it, and opens or shuts it to the attention of later tokens.

Paper:   Landmark Attention: Random-Access Infinite Context Length for Transformers (Mohtashami and Jaggi, NeurIPS 2023), arXiv:2305.16300
Needs:   training
Maths:   p_j is the landmark of token j's block;  for query i, S_ij is a softmax of the scores in groups: the tokens of each other block
         are one, those of the query's own block and the landmarks p_j of the other blocks are one;  a_ij = S_ij in its own block,
         S_ij * S_i,p_j in another one, 0 for landmarks.  At inference, of the blocks behind the local ones the k with the highest
         S_i,p_j count, the others are not read.
Differs: of the title's unlimited context the places are here, not the room: all keys stay in the cache, where the release moves those
         of old blocks to the CPU. Blocks that are read lie in slots just in front of the local ones, and old landmarks at the place in
         front of these, to choose by ("stingy"); "own": where they stand; "shared": landmarks at the place of the token in front, for
         models that tell places otherwise. Local are the blocks that begin in the last `local` tokens, not those of a chunk. Of blocks
         whose log S_i,p_j agree to three decimals the later is read, in the release any: in the first layer old landmarks are alike. Heads
         that share keys choose by the largest of theirs. A landmark that stands for nothing is read itself. The paper trains the weights
         too: stack a LoRA. In a prompt blocks are hidden, not spared: SmolLM2 takes 4 times as long for 512 tokens, 15 for 1024.
Checked: epfml/landmark-attention@d963e504, a Llama with its `LlamaAttention`, section by section with its cache, 36 to 61 tokens, prompts
         and decoded ones: largest difference 2.3e-7 of 1.8, the single precision of tables, where ties are broken alike and logs not
         rounded; with them rounded up to 0.2, where another block is read. Offloading by reading.

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
    places: str = option("stingy", was={1: "shared"}, choices=("stingy", "own", "shared"), help="Places of landmarks and blocks read.")


def by_block(scores: Tensor, block: Tensor, count: int) -> Tensor:
    """log sum exp of the scores (b h m n) of each block's keys, block (b h n); -inf where there are none, (b h m c)."""
    into = block[:, :, None].clamp(0, count - 1).expand_as(scores)
    lowest = scores.new_full((*scores.shape[:3], count), torch.finfo(scores.dtype).min)
    top = lowest.scatter_reduce(3, into, scores.detach(), "amax")
    total = torch.zeros_like(top).scatter_add(3, into, (scores - top.gather(3, into)).exp())
    return torch.where(total > 0, top, -torch.inf) + torch.where(total > 0, total, 1).log()


@register("landmark-attention", LandmarkAttentionConfig, version=2)
class LandmarkAttention(TokenBank):
    site, packed, causal = "input", False, True
    kinds = ("text",)

    def __init__(self, config: LandmarkAttentionConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.is_first_block:
            self.mark = nn.Parameter(0.02 * torch.randn(1, dims.width))

    shifts = property(lambda self: self.config.places != "shared" and self.config.block > 0)
    turns = property(lambda self: self.config.places == "stingy" and self.config.block > 0)

    def follow(self, positions: Tensor) -> Tensor | None:
        ell = self.config.block
        return positions % ell == ell - 1 if ell else None

    def tokens(self) -> Tensor | None:
        return self.mark if self.is_first_block else None  # no later block writes them anew

    def shift(self, positions: Tensor, own_tokens: Tensor) -> Tensor:
        return positions.clamp(min=0) // self.config.block + own_tokens

    def attend(self, affinity: Callable, positions: Tensor, key_positions: Tensor, own_keys: Tensor) -> Attending | None:
        if not bool(own_keys.any()):
            return None
        block, at = key_positions // self.config.block, positions[:, None, :, None] // self.config.block  # b 1|g n and b 1 m 1
        count = int(block.max()) + 1
        if self.training:
            return Attending(None, gate(affinity(), block, own_keys, at, None, count))
        block, own = block.expand_as(own_keys), own_keys
        marked = torch.where(own, block, count).amin(dim=(1, 2))[:, None, None, None] < at  # else nothing stands for what is not local
        far = (at - self.config.local // self.config.block).clamp(min=0) * marked  # so many blocks are not local, b 1 m 1
        low = far - far.clamp(max=self.config.retrieve)  # those in front of the last that may be read lie in one place
        stingy = self.turns and int(low.max()) > 0
        if at.shape[2] > 1:
            scores = affinity()
            if stingy:
                return self.from_near(affinity, scores, block, own, at, far, count)
            return Attending(None, gate(scores, block, own, at, self.choose(scores, block, own, at, far, count), count))
        step, far, low = self.config.block + 1, far[:, :, 0], low[:, :, 0]
        first = indices(own | (block == at[..., 0]))
        c = block.gather(2, first)
        by = torch.where(c < low, low - 1 - c, 0) * step if stingy else None
        chosen = self.choose(affinity(first, by), c, own.gather(2, first), at, far[:, :, None], count)
        index = indices(chosen[:, :, 0].gather(2, block.clamp(min=0)))
        c = block.gather(2, index)
        if stingy:
            slot = slots(chosen, far[:, :, None], low[:, :, None])[:, :, 0].gather(2, c.clamp(min=0))
            by = torch.where(c < far, low - 1 + slot - c, 0) * step
        return Attending(index, gate(affinity(index, by), c, own.gather(2, index), at, chosen, count), by)

    def from_near(self, affinity: Callable, scores: Tensor, block: Tensor, own: Tensor, at: Tensor, far: Tensor, count: int) -> Attending:
        """How a prompt's queries attend: blocks lie in a slot if keys are turned to the first block, and queries by what is in front."""
        step, low = self.config.block + 1, far - far.clamp(max=self.config.retrieve)
        wide = block.repeat_interleave(scores.shape[1] // block.shape[1], dim=1)[:, :, None]  # b h 1 n
        at_slot = lambda s: affinity(None, -block * step, -((low - 1 + s) * step)[..., 0])
        chosen = self.choose(torch.where(wide < low, at_slot(0), scores), block, own, at, far, count)
        slot = slots(chosen, far, low).masked_fill(~chosen, -1).repeat_interleave(wide.shape[1] // block.shape[1], dim=1)
        slot = slot.gather(3, wide.clamp(min=0).expand_as(scores)).masked_fill(wide >= far, -1)
        moved = scores
        for s in range(self.config.retrieve + 1):
            moved = torch.where(slot == s, at_slot(s), moved)
        return Attending(None, gate(moved, block, own, at, chosen, count) + (moved - scores).masked_fill(scores == -torch.inf, 0))

    @torch.no_grad()
    def choose(self, scores: Tensor, block: Tensor, own: Tensor, at: Tensor, far: Tensor, count: int) -> Tensor:
        """Whether each query reads each of so many blocks, (b g m c), of which the first `far` are not local, by these scores (b h m n)."""
        shared = scores.shape[1] // block.shape[1]
        wide, mark = (t.repeat_interleave(shared, dim=1) for t in (block, own))
        other = wide[:, :, None] != at
        beside = scores.masked_fill(mark[:, :, None] != other, -torch.inf).logsumexp(dim=-1, keepdim=True)
        share = by_block(scores.masked_fill(~(mark[:, :, None] & other), -torch.inf), wide, count) - beside  # b h m c
        share = share.unflatten(1, (-1, shared)).amax(dim=2)
        near = torch.arange(count, device=at.device) >= far
        share = share.masked_fill(near, -torch.inf).round(decimals=3)  # rounding must not tell apart what is the same
        return near | (rank(share.flip(-1)).flip(-1) < self.config.retrieve) & (share > -torch.inf)


def slots(chosen: Tensor, far: Tensor, low: Tensor) -> Tensor:
    """The slot of each block that a query reads of the far ones, chosen (b g m c), 0 for the one `low` blocks are held to be at."""
    place = torch.arange(chosen.shape[-1], device=chosen.device)
    return (chosen & (place < far)).long().cumsum(dim=-1) - 1 + (place >= low)


def gate(scores: Tensor, block: Tensor, own: Tensor, at: Tensor, chosen: Tensor | None, count: int) -> Tensor:
    """What makes of a softmax over all keys the grouped one, added to scores (b h m n)."""
    wide, mark = (t.repeat_interleave(scores.shape[1] // t.shape[1], dim=1) for t in (block, own))
    mark = mark[:, :, None]  # b h 1 n
    door = by_block(scores.masked_fill(~mark, -torch.inf), wide, count)
    within = by_block(scores.masked_fill(mark, -torch.inf), wide, count)
    open_ = torch.where((door == -torch.inf) | (within == -torch.inf), 0, door - within)  # b h m c
    if chosen is not None:
        open_ = open_.masked_fill(~chosen.repeat_interleave(scores.shape[1] // chosen.shape[1], dim=1), -torch.inf)
    each, rest = (t.gather(3, wide[:, :, None].clamp(min=0).expand_as(scores)) for t in (open_, within))
    return torch.where(wide[:, :, None] == at, 0, each).masked_fill(mark & (rest > -torch.inf), -torch.inf)
