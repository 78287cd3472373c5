"""TOVA: what the newest token attends to least leaves the cache, the same in all heads of a block, behind the prompt and each token.

Paper:   Transformers are Multi-State RNNs (Oren et al., EMNLP 2024), arXiv:2401.06104
Needs:   nothing
Maths:   behind each pass s_j = mean_h softmax(q_h k_j / sqrt(e)) of the last query; if a block holds more than S entries, the S of the
         highest s_j stay, in all of its heads
Differs: beside a compressor that leaves other tokens to each head, a token's score is the mean of the key heads that hold it, and each
         keeps the S highest of its own. Of equal scores the earlier stays. As in the release a prompt attends to all of itself and falls
         to S at once, by its last query; the paper lets one token go at a time. Nothing is protected, not even the newest;
         `keep_newest` keeps that.
Checked: schwartz-lab-NLP/TOVA@9c7d09bf, the entries that TOVACache.reduce keeps of 33 to 61, batches and shared keys: largest difference
         0 entries. NVIDIA/kvpress@8bb29b9c by reading: it keeps the newest, and leaves it out behind the softmax.

>>> from hf_tokens import TOVAConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, TOVAConfig(capacity=6))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 6 * 32 * 4
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, option, protect, register


@dataclass(frozen=True)
class TOVAConfig(MethodConfig):
    capacity: int = option(512, ge=1, size=True, help="Entries that a block keeps (paper: multi-state size).")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    keep_newest: bool = option(False, help="Keep the newest entry whatever it gets.")


def mean_of_holders(got: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """What each token gets in the heads that hold it, on average: got, mask and positions (b k n)."""
    place = positions.clamp(min=0).flatten(1)
    held = torch.stack([got * mask, mask.to(got.dtype)]).flatten(2)  # 2 b k*n
    total, count = got.new_zeros(*held.shape[:2], int(place.max()) + 1).scatter_add_(2, place.expand_as(held), held)
    return (total / count.clamp(min=1)).gather(1, place).view_as(got)


@register("tova", TOVAConfig)
class TOVA(CacheCompressor):
    chunks = False
    decodes = True

    def score(self, scores: object, mask: Tensor, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        got = scores.of_last(1)  # b k n
        got = got.mean(dim=1) if mask.dim() == 2 else mean_of_holders(got, mask, positions.expand_as(mask))
        return protect(got, positions, newer, budget, newest=int(self.config.keep_newest))

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, self.config.capacity, self.config.budget)
