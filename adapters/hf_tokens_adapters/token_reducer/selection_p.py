"""Selection-p: a head on a language model's token states says how likely each token of a prompt is to be kept; the least likely go.

Paper:   Selection-p: Self-Supervised Task-Agnostic Prompt Compression for Faithfulness and Transferability (Chung et al., EMNLP 2024),
         arXiv:2410.11786
Needs:   training
Maths:   p_i = sigmoid(w h_i + b), h_i what a block makes of token i;  the floor(keep n) tokens with the highest p stay, in their order;
         L = L_LM(text behind the prompt | what stays of it) + lambda mean_i p_i
Differs: h is the paper's, of the last block, for `layers=(-1,)`: then `compress_prompt` gives the short prompt for any model. By default
         the head sits behind a third of the blocks, so that the model itself is spared the rest; places stay what they were. The authors'
         mask of the highest tenth lets no gradient of L_LM through to w: here a kept token is c + p (x - c), with c the row's mean,
         straight through, so that w hears what the token is worth. Their weights are 1 / (100 mean p) for L_LM and 100 for mean p. The
         LoRA that they train beside w is one in the same stack. The first token stays, for attention sinks into it, and the last, which
         tells the next one; a compressed prompt for another model needs neither.
Checked: no public code found (2026-11-29); the paper leaves open how a gradient of the loss of the text reaches w through the mask, and
         what is kept at the ends.

>>> from hf_tokens import SelectionPConfig, compress_prompt, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llama")
>>> model = get_token_model(specimen.model, SelectionPConfig(keep=0.25, layers=(-1,)))
>>> [len(ids) for ids in compress_prompt(model, specimen.inputs["input_ids"])]  # a quarter of 14, and both ends
[5, 5]
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, TokenMap, TokenReducer, option, rank, register, straight_through


@dataclass(frozen=True)
class SelectionPConfig(MethodConfig):
    keep: float = option(0.1, ge=0, le=1, zero=1.0, help="Share of the prompt that stays (paper: one over the compression rate).")
    first: int = option(1, ge=0, help="Tokens in front that stay and do not count; the others' attention sinks into the first.")
    recent: int = option(1, ge=0, help="Tokens at the end that stay and do not count, such as a question.")
    sparsity: float = option(1.0, ge=0, help="Weight of the mean p in the loss (lambda).")


@register("selection-p", SelectionPConfig)
class SelectionP(TokenReducer):
    site = "after"
    kinds = ("text",)
    causal = True
    chunks = False
    decodes = False

    def __init__(self, config: SelectionPConfig, dims: Dims):
        super().__init__(config, dims)
        self.head = nn.Linear(dims.width, 1)

    @classmethod
    def default_layers(cls, config: SelectionPConfig, layers: int) -> tuple[int, ...]:
        return (max(0, layers // 3 - 1),)

    def assign(self, hidden: Tensor, mask: Tensor, fresh: Tensor) -> TokenMap | None:
        if self.config.keep == 1:
            return None
        x = hidden.to(self.head.weight.dtype)
        chance = self.head(x)[..., 0].sigmoid()  # b m
        own = mask & ~fresh
        older, newer = own.cumsum(dim=1), own.flip(1).cumsum(dim=1).flip(1)
        free = own & (older > self.config.first) & (newer > self.config.recent)  # b m
        count = free.sum(dim=1, keepdim=True)
        stays = torch.floor(self.config.keep * count + 1e-9)
        kept = mask & (~free | (rank(chance.masked_fill(~free, -1)) < stays))
        found = TokenMap.select(kept)
        if not (self.training and torch.is_grad_enabled()):
            return found
        mean = (chance * free).sum(dim=1) / count[:, 0].clamp(min=1)
        self.add_loss(self.config.sparsity * mean.mean())
        centre = ((x * own[..., None]).sum(dim=1) / own.sum(dim=1, keepdim=True).clamp(min=1))[:, None].detach()  # b 1 d
        gate = torch.where(free, straight_through(torch.ones_like(chance), chance), 1)[..., None]
        return found.holding(found.gather(centre + gate * (x - centre)).to(hidden.dtype))
