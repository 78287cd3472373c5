"""FastV: behind the second block of a multimodal LLM half of the image tokens leave, those that the prompt's last token attends to least.

Paper:   An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models (Chen et al.,
         ECCV 2024), arXiv:2403.06764
Needs:   nothing
Maths:   a_j = mean over heads of softmax(q_last K^T / sqrt(d))_j in block K;  of n image tokens the round((1 - R) n) with the highest a_j
         stay for the blocks behind it, in their order and with their positions
Differs: Each row of a batch ranks the image tokens of all its pictures together, from its own last token; the release knows one row and one
         picture. A pass that brings a picture to a conversation ranks those of that picture. Without a cache each token that is written
         ranks them anew, as there.
Checked: pkunlp-icler/FastV@d1659729, its `fastv_forward` without a cache over the blocks of 40 random models of 4 to 6 blocks, K from 1
         to 3: largest difference 2e-15 of their logits. By reading: with a cache it decodes as ours does.

>>> from hf_tokens import FastVConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llava")
>>> model = get_token_model(base.model, FastVConfig(ratio=0.75))
>>> cache = model(**base.inputs, use_cache=True).past_key_values
>>> [layer.length for layer in cache.layers]
[32, 32, 20, 20]
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tokens import ConfigError, MethodConfig, TokenMap, TokenReducer, option, rank, register


@dataclass(frozen=True)
class FastVConfig(MethodConfig):
    k: int = option(2, ge=1, help="Blocks that see every image token (paper: K).")
    ratio: float = option(0.5, ge=0, le=1, zero=0.0, help="Share of the image tokens that leave behind them (paper: R).")


@register("fastv", FastVConfig)
class FastV(TokenReducer):
    site = "after"
    kinds = ("text",)
    causal = True
    chunks = False
    decodes = False

    @classmethod
    def check(cls, config: FastVConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.layers is None and config.k > layers:
            rule = f"FastVConfig.k must lie in [1, {layers}], as the stream is deep"
            raise ConfigError(f"{rule}, got {config.k}. Name a block that exists.")

    @classmethod
    def default_layers(cls, config: FastVConfig, layers: int) -> tuple[int, ...]:
        return (min(config.k, layers) - 1,)

    def assign(self, scores: Any, visual: Tensor, mask: Tensor) -> TokenMap | None:
        image = visual & mask  # b m
        if self.config.ratio == 0 or not bool(image.any()):
            return None
        last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), 0).amax(dim=1, keepdim=True)  # b 1
        heed = scores.columns(torch.ones_like(last, dtype=torch.float32), heads="mean", queries=last)
        stays = ((1 - self.config.ratio) * image.sum(dim=1, keepdim=True).double()).round()
        return TokenMap.select(mask & (~image | (rank(heed.masked_fill(~image, -torch.inf)) < stays)))
