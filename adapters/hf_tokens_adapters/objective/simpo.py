"""SimPO: the chosen answer shall be likelier than the rejected one, per token and by a margin, with no reference model.

Paper:   SimPO: Simple Preference Optimization with a Reference-Free Reward (Meng et al., NeurIPS 2024), arXiv:2405.14734
Needs:   training
Maths:   L = -log sigmoid(beta/|y_w| log p(y_w | x) - beta/|y_l| log p(y_l | x) - gamma)
         or, as in the authors' code, max(0, 1 - r) for the same r, the first with a share of -log sigmoid(-r), plus a share of the
         chosen answers' own loss
Differs: beta and gamma are the defaults of the authors' config (gamma / beta of 0.25); their recipes tune them for each model, from 2 and 1
         (Llama-3-8B) to 10 and 5 (Gemma 2). The batch holds the chosen rows first and their rejected ones behind, as TRL lays it out; what
         is no answer has the label -100. In a step of several batches each counts alike. A pair of which one answer is empty has no winner,
         and no part in the mean: that is said once. It is asked in evaluation too.
Checked: princeton-nlp/SimPO@1b3e8f35, `simpo_loss` and its SFT term on log-probabilities in float64, both losses, smoothed too:
         largest difference 1.8e-15; an empty answer is NaN there.

>>> import math
>>> from hf_tokens import SimPOConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llama")
>>> model = get_token_model(specimen.model, SimPOConfig(beta=2.0, gamma=1.0))
>>> chosen = specimen.inputs["input_ids"][:1]
>>> loss = model(input_ids=chosen.repeat(2, 1), labels=chosen.repeat(2, 1)).loss  # rejected the same: only the margin is left
>>> round(loss.item() - math.log(1 + math.exp(1.0)), 5)
0.0
"""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_tokens import ConfigError, MethodConfig, Objective, UnsupportedError, option, register


@dataclass(frozen=True)
class SimPOConfig(MethodConfig):
    beta: float = option(2.0, ge=0, zero=0.0, help="Scale of the reward (paper: beta); 0 leaves the model's own loss alone.")
    gamma: float = option(0.5, ge=0, was={1: 1.0}, help="Margin by which the chosen answer shall win (paper: gamma; TRL: simpo_gamma).")
    loss_type: str = option("sigmoid", choices=("sigmoid", "hinge"), help="The paper's loss, or a hinge at 1.")
    label_smoothing: float = option(0.0, ge=0, le=1, help="Share of the pairs that are taken for labelled the wrong way; of the sigmoid.")
    sft_weight: float = option(0.0, ge=0, help="Weight of the chosen answers' own loss, a mean over their tokens, beside it.")


@register("simpo", SimPOConfig, version=2)
class SimPO(Objective):
    kinds = ("text",)
    causal = True
    needs_head = True
    replaces = True
    unit = "sample"
    evaluates = True
    warned = False

    @classmethod
    def check(cls, config: SimPOConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.loss_type == "hinge" and config.label_smoothing:
            rule = "SimPOConfig.label_smoothing is for the loss_type 'sigmoid'"
            raise ConfigError(f"{rule}, got {config.label_smoothing} for 'hinge'. Leave one of them out.")

    def loss(self, logps: Tensor, labels: Tensor) -> Tensor | None:
        if self.config.beta == 0:
            return None
        if len(logps) % 2:
            rule = "SimPO needs the chosen rows and, behind them, as many rejected ones"
            raise UnsupportedError(f"{rule}, got a batch of {len(logps)}. Let the collator lay out whole pairs.")
        length = (labels != -100).sum(dim=1)
        whole = (length > 0).view(2, -1).all(dim=0)
        self.warn_of_empty(whole)
        chosen, rejected = (self.config.beta * logps.sum(dim=1) / length.clamp(min=1)).chunk(2)
        losses = self.of_margin(chosen - rejected - self.config.gamma)
        loss = losses.masked_fill(~whole, 0).sum() / whole.sum().clamp(min=1)
        if self.config.sft_weight == 0:
            return loss
        own = -logps[: len(logps) // 2].sum() / length[: len(logps) // 2].sum().clamp(min=1)
        return loss + self.config.sft_weight * own

    def of_margin(self, margin: Tensor) -> Tensor:
        """The loss of each pair, (b)."""
        if self.config.loss_type == "hinge":
            return (1 - margin).relu()
        share = self.config.label_smoothing
        return -(1 - share) * F.logsigmoid(margin) - share * F.logsigmoid(-margin)

    def warn_of_empty(self, whole: Tensor) -> None:
        """Say once that a pair of a batch is not whole."""
        if not self.warned and not torch.compiler.is_compiling() and not bool(whole.all()):
            self.warned = True
            empty = (~whole).nonzero()[:, 0].tolist()
            warnings.warn(f"hf-tokens: SimPO leaves out pairs of which one answer has no token, such as {empty} of a batch.", stacklevel=2)
