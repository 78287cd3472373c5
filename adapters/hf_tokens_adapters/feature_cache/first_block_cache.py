"""First-block cache: a step whose first block does much the same as before adds again what all other blocks added then.

Paper:   none; ParaAttention (Cheng, 2024), https://github.com/chengzeyi/ParaAttention, which makes TeaCache (arXiv:2411.19108) simpler
Needs:   nothing
Maths:   f = h_1 - h_0 of the first block;  mean |f - f'| < threshold mean |f'|:  h := h_1 + R
         else the others run,  R := h_L - h_1,  f' := f;  mean over all samples of the call, which decide together
Differs: The authors' function never skips unless a threshold is given; 0.08 is that of their examples for FLUX, and diffusers has 0.05. Two
         calls of guidance keep apart what they reuse by the context or the order of the calls; where they come in one batch they decide
         together, as theirs. What lies between two streams of blocks runs at each step, so that a U-Net keeps an R for each stream. Its
         TaylorSeer, which extrapolates R, is left out.
Checked: chengzeyi/ParaAttention@4de137c5, its cached blocks in a Flux over 10 steps, 5 thresholds, with and without warm-up and a factor:
         largest difference 0; diffusers 0.42 on tiny Flux, PixArt, DiT, CogVideoX, CogView4, HunyuanVideo, LTX and Wan models: largest
         difference 1.4e-14 in double precision, 9.5e-07 in single; its hook fails in SD3, whose last block drops the text.

>>> import torch
>>> from hf_tokens import FirstBlockCacheConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/SD3Transformer2DModel")
>>> model = get_token_model(specimen.model, FirstBlockCacheConfig(threshold=9.0))
>>> steps = [measure(model, **{**specimen.inputs, "timestep": torch.tensor([t, t])}).tokens for t in (900, 890)]
>>> steps[1] < steps[0]
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import FeatureCache, MethodConfig, option, register


@dataclass(frozen=True)
class FirstBlockCacheConfig(MethodConfig):
    threshold: float = option(
        0.08, ge=0, zero=0.0, example=9.0, help="Relative change of what the first block adds below which the others are reused."
    )
    warmup_steps: int = option(0, ge=0, help="First steps that are computed whole.")
    downsample_factor: int = option(1, ge=1, help="Every how manieth feature is compared.")


@register("first-block-cache", FirstBlockCacheConfig)
class FirstBlockCache(FeatureCache):
    site = "stack"
    leads = True

    def reuse(self, hidden: Tensor, entered: Tensor, step: int, memory: dict) -> Tensor | None:
        config = self.config
        added = (hidden - entered)[..., :: config.downsample_factor]
        before = memory.get("added")
        if before is not None and step >= config.warmup_steps:
            if bool((added - before).abs().mean() < config.threshold * before.abs().mean()):
                return torch.zeros(len(hidden), 0, dtype=torch.long, device=hidden.device)
        memory["added"] = added
        return None
