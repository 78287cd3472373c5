"""Random eviction: the first and the newest tokens stay, and of the others a sample drawn by chance: what any score must beat.

Paper:   none of its own: a baseline, with the ends that must stay after Efficient Streaming Language Models with Attention Sinks (Xiao et
         al., ICLR 2024), arXiv:2309.17453
Needs:   nothing
Maths:   score_j = u(seed, block, key head, place j) in [0, 1);  the first s, the w newest and those of the highest scores stay
Differs: kvpress protects nothing (`sinks=0`, `window=0` here), and with a seed draws the same numbers in every block.
Checked: NVIDIA/kvpress@8bb29b9c, how often RandomPress keeps each of 64 places in 6000 draws of half of them: largest difference 0.03,
         where 0.009 is a standard deviation and the largest of 64 is expected at 0.02 to 0.03; the draws themselves share no generator.

>>> from hf_tokens import RandomConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, RandomConfig(budget=0.5))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 8 * 32 * 4
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, check_capacity, option, protect, register

WORD = 0xFFFFFFFF  # integers below 2 ** 32


@dataclass(frozen=True)
class RandomConfig(MethodConfig):
    capacity: int = option(1024, ge=1, size=True, help="Entries that a head keeps.")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    sinks: int = option(4, ge=0, help="First tokens that stay.")
    window: int = option(8, ge=0, help="Newest tokens that stay.")
    seed: int = option(0, ge=0, lt=2**31, help="Seed of the draw; each block and key head has its own.")


def scatter(x: Tensor) -> Tensor:
    """Integers in [0, 2 ** 32) that bear no likeness to those they are made of (the last steps of MurmurHash3)."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & WORD
    return x ^ (x >> 16)


@register("random", RandomConfig)
class Random(CacheCompressor):
    chunks = False
    decodes = True
    by_head = True

    @classmethod
    def check(cls, config: RandomConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        check_capacity(config, config.capacity, config.budget, config.sinks + config.window)

    def score(self, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        head = torch.arange(self.dims.kv_heads, device=positions.device)
        own = scatter(scatter(scatter(head + 1) + self.dims.layer + 1 & WORD) + self.config.seed & WORD)  # k
        place = positions if positions.dim() == 3 else positions[:, None]
        drawn = scatter((own[:, None] ^ place.clamp(min=0)) & WORD).double() / 2**32
        return protect(drawn, positions, newer, budget, first=self.config.sinks, newest=self.config.window)

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, self.config.capacity, self.config.budget)
