"""Diffusion-DPO: a denoiser learns from pairs of pictures to get better at the preferred one than a frozen copy of it is.

Paper:   Diffusion Model Alignment Using Direct Preference Optimization (Wallace et al., CVPR 2024), arXiv:2311.12908
Needs:   training
Maths:   L = -log sigmoid(-beta T w(t) [(|e - e_theta(x_w)|^2 - |e - e_ref(x_w)|^2) - (|e - e_theta(x_l)|^2 - |e - e_ref(x_l)|^2)])
Differs: beta stands for beta T w(t), which the paper takes for constant; squared errors are means over a picture, and halved, which is
         how the paper's 2000 (Stable Diffusion 1.5) and 5000 (SDXL) are meant. The target may be noise, velocity or flow. The frozen
         copy is the same denoiser without the adapter. Winners come first in the batch, their losers behind, with the same noise and
         timesteps. It has nothing to train by itself: put it beside a LoRA, `[LoraConfig(...), DiffusionDPOConfig()]`.
Checked: SalesforceAIResearch/DiffusionDPO@5233e759, the loss of its training step in float64, beta of 3 to 5000:
         largest difference 0.0; the frozen copy is a second network there.

>>> import math, torch
>>> from peft import LoraConfig
>>> from hf_tokens import DiffusionDPOConfig, get_token_model, objective_loss
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/SD3Transformer2DModel")
>>> model = get_token_model(specimen.model, [LoraConfig(target_modules=["to_q"]), DiffusionDPOConfig()]).train()
>>> prediction = model(**specimen.inputs).sample
>>> loss = objective_loss(model, torch.randn_like(prediction))  # in the place of mse_loss
>>> round(loss.item() - math.log(2), 5)  # a LoRA at its start is the reference
0.0
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from hf_tokens import MethodConfig, Objective, UnsupportedError, option, register


@dataclass(frozen=True)
class DiffusionDPOConfig(MethodConfig):
    beta: float = option(5000.0, ge=0, zero=0.0, help="How far the model may leave the reference (paper: beta T w); 0 is the plain loss.")


@register("diffusion-dpo", DiffusionDPOConfig)
class DiffusionDPO(Objective):
    kinds = ("denoiser",)
    replaces = True
    unit = "sample"
    evaluates = True

    def loss(self, prediction: Tensor, target: Tensor, reference: Tensor) -> Tensor | None:
        if self.config.beta == 0:
            return None
        if len(target) % 2:
            rule = "Diffusion-DPO needs the winners and, behind them, as many losers"
            raise UnsupportedError(f"{rule}, got a batch of {len(target)}. Give whole pairs.")
        error = lambda x: (x - target).square().flatten(1).mean(dim=1)
        winner, loser = (error(prediction) - error(reference)).chunk(2)
        return -F.logsigmoid(-self.config.beta / 2 * (winner - loser)).mean()
