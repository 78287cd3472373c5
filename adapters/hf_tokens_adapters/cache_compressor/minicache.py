"""MiniCache: from the middle on, two adjacent layers hold one direction for each key and value, and only its two lengths apart.

Paper:   MiniCache: KV Cache Compression in Depth Dimension for Large Language Models (Liu et al., NeurIPS 2024), arXiv:2405.14366
Needs:   nothing
Maths:   for the states x of a token in the layers l-1 and l, at the angle W:
         e = sin((1 - t) W) / sin W x_l-1 / |x_l-1| + sin(t W) / sin W x_l / |x_l|;  they are read as |x_l-1| e and |x_l| e;
         d = W / pi;  tokens with d >= d_max - gamma (d_max - d_min) are retained unmerged
Differs: d is the larger one of the key's and the value's, d_min and d_max are those of the prompt, both for each key head and row.
         Layers make a pair with the next one whose attention reaches as far: a sliding one with a sliding one. The paper quantises what it
         merged in its best results; here it is not.
Checked: no public code found (2026-11-29); the paper leaves open whether d is of keys or values, and over what its least and most are
         taken.

>>> from hf_tokens import MiniCacheConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, MiniCacheConfig())
>>> 0.6 < measure(model, **base.inputs, use_cache=True).kv_bytes / (4 * 2 * 2 * 16 * 32 * 4) < 0.95
True
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_tokens import CacheCompressor, Holding, MethodConfig, Polar, angle_between, option, register


@dataclass(frozen=True)
class MiniCacheConfig(MethodConfig):
    t: float = option(0.6, ge=0, le=1, help="Way from the lower layer's direction to the upper one's (paper: t).")
    gamma: float = option(0.05, ge=0, le=1, zero=1.0, help="Part of the range of distances whose tokens stay unmerged (paper: gamma).")


@register("minicache", MiniCacheConfig)
class MiniCache(CacheCompressor):
    chunks = False
    decodes = True
    pairs = True

    @classmethod
    def default_layers(cls, config: MiniCacheConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(layers // 2, layers))

    def score(
        self,
        keys: Tensor,
        values: Tensor,
        keys_below: Tensor,
        values_below: Tensor,
        mask: Tensor,
        newer: Tensor,
        record: dict,
        prefill: bool,
    ) -> Tensor:
        pairs = ((keys_below, keys), (values_below, values))
        apart = [angle_between(normalize(a, dim=-1), normalize(b, dim=-1)) / math.pi for a, b in pairs]
        distance = torch.maximum(*apart).double()  # b k n
        if prefill or "threshold" not in record:
            mask = mask if mask.dim() == 3 else mask[:, None]
            high = distance.masked_fill(~mask, -torch.inf).amax(dim=-1)
            low = distance.masked_fill(~mask, torch.inf).amin(dim=-1)
            record["threshold"] = high - self.config.gamma * (high - low) if self.config.gamma < 1 else torch.zeros_like(high)
            return (distance >= record["threshold"][..., None]).double()
        known = newer if newer.dim() == 3 else newer[:, None]  # it was retained when it was new: its distance may be the threshold itself
        return ((distance >= record["threshold"][..., None]) | (known > 0)).double()

    def budget(self, length: int, seen: int) -> None:
        return None

    def hold(self) -> Holding:
        return Holding(Polar(self.config.t), Polar(self.config.t))
