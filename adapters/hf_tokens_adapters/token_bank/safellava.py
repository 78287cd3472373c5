"""SafeLLaVA: a safety meta token reads the picture inside the language model, steers the answer, and tells what harm it saw.

Paper:   HoliSafe: Holistic Safety Benchmarking and Modeling with Safety Meta Token for Vision-Language Model (Lee et al., 2025),
         arXiv:2506.04704
Needs:   training
Maths:   [visual tokens, s, text] -> language model;  p = softmax(head(h_s)), h_s what has become of s;  loss = LM + weight * CE(p, label)
Differs: the place (behind the last picture of a prompt), the width of the head, its norm and the weight of its loss are ours: the
         abstract leaves them open. s takes the position of the token before it. `conclusions(model)` has the logits (b c); labels come
         in the column hf_tokens_targets (b), -100 where there is none. The paper trains the model too: stack a LoRA.
Checked: no public code found (2026-11-29), youngwanLEE/holisafe has the benchmark and answers alone; the place of the token, the head and
         the weight of its loss are open.

>>> from hf_tokens import SafeLLaVAConfig, conclusions, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> model = get_token_model(specimen.model, SafeLLaVAConfig(categories=20))
>>> output = model(**specimen.inputs)
>>> conclusions(model)["default.0"].shape  # two pictures
torch.Size([2, 20])
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, TokenBank, option, register

UNKNOWN = -100


@dataclass(frozen=True)
class SafeLLaVAConfig(MethodConfig):
    tokens: int = option(1, ge=0, zero=0, help="Safety meta tokens; what becomes of several is averaged.")
    categories: int = option(20, ge=2, help="Categories that the head tells apart, safe among them.")
    hidden: int = option(256, ge=1, size=True, help="Width of the head's hidden layer.")
    weight: float = option(1.0, ge=0, help="Factor on the loss of the head.")


@register("safellava", SafeLLaVAConfig)
class SafeLLaVA(TokenBank):
    site, packed = "input", False
    kinds = ("text",)
    causal = True

    def __init__(self, config: SafeLLaVAConfig, dims: Dims):
        super().__init__(config, dims)
        self.token = nn.Parameter(0.02 * torch.randn(config.tokens, dims.width))
        outer = nn.Linear(config.hidden, config.categories)
        self.head = nn.Sequential(nn.LayerNorm(dims.width), nn.Linear(dims.width, config.hidden), nn.GELU(), outer)

    @classmethod
    def default_layers(cls, config: SafeLLaVAConfig, layers: int) -> tuple[int, ...]:
        return (0,)

    def follow(self, visual: Tensor) -> Tensor:
        return visual & (visual.flip(1).cumsum(dim=1).flip(1) == 1)  # the last of each row

    def tokens(self) -> Tensor:
        return self.token

    def conclude(self, own: Tensor, targets: Tensor | None) -> Tensor:
        logits = self.head(own.mean(dim=1).to(self.token.dtype))  # b c
        if targets is not None:
            if targets.shape != logits.shape[:1] or bool((targets >= self.config.categories).any()):
                rule = f"The column hf_tokens_targets must hold one of {self.config.categories} categories for each sample, or {UNKNOWN}"
                raise ConfigError(f"{rule}, got {tuple(targets.shape)} up to {int(targets.max())}. Number the categories from 0.")
            known = targets.to(logits.device).clamp(min=UNKNOWN) != UNKNOWN
            losses = F.cross_entropy(logits, targets.to(logits.device), ignore_index=UNKNOWN, reduction="sum")
            self.add_loss(self.config.weight * losses / known.sum().clamp(min=1))
        return logits
