"""SSD: forget a part of the training data by shrinking the weights that matter far more to it than to the rest.

Paper:   Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening (Foster et al., AAAI 2024), arXiv:2308.07707
Needs:   an edit: the data to forget and the rest, told to `hf_tokens.edit`
Maths:   F_i = E[(dL / dw_i)^2] over the data to forget (f) and over the training data (d)
         w_i := min((lambda F_d,i / F_f,i)^b, 1) w_i  where F_f,i > alpha F_d,i
Differs: as in the authors' code the expectation is a mean over batches of the squared gradient of their mean loss, which is the paper's
         for batches of one, and F_d is that of the whole training set: let the group `retain` hold it, the data to forget too. alpha 10
         is theirs for a ResNet; for a ViT it is 5 to forget a class and 25 to forget a part of one.
Checked: if-loops/selective-synaptic-dampening@cdfdc0e3, importances and dampened weights of a ViT, all 40 of its tensors in float64:
         largest difference 5.6e-17; weights that matter to nothing stay in both.

>>> import torch
>>> from hf_tokens import SSDUnlearnConfig, edit, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> forget, retain = ([{**specimen.inputs, "labels": torch.tensor(labels)}] for labels in ([0, 0], [1, 1]))
>>> model = get_token_model(specimen.model, SSDUnlearnConfig(alpha=2))
>>> moved = edit(model, {"forget": forget, "retain": retain})["default.0"]
>>> 0 < max(moved.values()) <= 1
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import MethodConfig, WeightEdit, option, register


@dataclass(frozen=True)
class SSDUnlearnConfig(MethodConfig):
    alpha: float = option(10.0, ge=0, help="How many times more a weight must matter to the forget data to be dampened (alpha).")
    lam: float = option(1.0, ge=0, help="Share of its value that a weight keeps, times the ratio of both importances (lambda).")
    exponent: float = option(1.0, ge=0, zero=0.0, help="Exponent of the dampening factor (b in the authors' code).")
    weights: str = option(
        "model", choices=("model", "block"), was={1: "block"}, help="All weights, embeddings and heads too, or those of the blocks alone."
    )


@register("ssd-unlearn", SSDUnlearnConfig, version=2)
class SSDUnlearn(WeightEdit):
    site = "model"
    groups = ("forget", "retain")

    @classmethod
    def site_of(cls, config: SSDUnlearnConfig) -> str:
        return config.weights

    def edit(self, weights: dict[str, Tensor], fisher: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: self.dampen(w, fisher["forget"][name], fisher["retain"][name]) for name, w in weights.items()}

    def dampen(self, weight: Tensor, forget: Tensor, retain: Tensor) -> Tensor:
        """One weight, smaller where it matters to what is to be forgotten."""
        factor = (self.config.lam * retain / forget).clamp(max=1) ** self.config.exponent
        return torch.where(forget > self.config.alpha * retain, factor * weight, weight)
