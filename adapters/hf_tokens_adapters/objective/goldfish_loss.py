"""Goldfish loss: one token in k has no part in the loss, always the same one of a passage, so that no passage is learnt by heart.

Paper:   Be like a Goldfish, Don't Memorize! Mitigating Memorization in Generative LLMs (Hans et al., NeurIPS 2024), arXiv:2406.10209
Needs:   training
Maths:   L = -1/|G| sum_i G_i log p(x_i | x_<i);  static: G_i = 0 iff k divides i;  hash: G_i = 0 iff f(x_{i-h+1}, ..., x_i) < 1/k
Differs: the h tokens end with the one that is dropped, as in the authors' code; in the paper they stand in front of it (`window`). f is a
         polynomial of the ids in 64-bit integers, mixed, so that every machine and every run drops the same tokens; theirs looks the
         product of the ids up in a table of random numbers: in any order it is the same, and 0 with an id of 0 among them. Tokens with
         fewer than h before them stay. |G| counts a batch's own tokens; in a step of several batches each counts by its share of all
         labels, as the Trainer counts them. Evaluation is the model's own loss.
Checked: ahans30/goldfish-loss@35d29f96, `apply_goldfish`, its windows with our f in the place of its table, dropped places of rows of ids:
         largest difference 0.0; by its own table it drops 0.252 of random ids for 0.250 here. Its static mask begins with the second
         token, ours, as the paper's, with the k-th.

>>> import torch
>>> from hf_tokens import GoldfishLossConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llama")
>>> ids = specimen.inputs["input_ids"]
>>> plain = specimen.model.train()(input_ids=ids, labels=ids)
>>> fish = get_token_model(specimen.model, GoldfishLossConfig(k=3, context=4)).train()(input_ids=ids, labels=ids)
>>> torch.equal(fish.logits, plain.logits), torch.equal(fish.loss, plain.loss)
(True, False)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import MethodConfig, Objective, option, register

FACTOR, MIX, BITS = 0x9E3779B97F4A7C15, 0x94D049BB133111EB, 24


@dataclass(frozen=True)
class GoldfishLossConfig(MethodConfig):
    k: int = option(4, ge=0, zero=0, help="One token in k is dropped from the loss; 0 drops none.")
    context: int = option(13, ge=1, help="Tokens that decide whether one is dropped (paper: h).")
    window: str = option("ending", choices=("ending", "before"), was={1: "before"}, help="They end with that one, or stand in front of it.")
    mask: str = option("hash", choices=("hash", "static"), help="Drop by a hash of what stands in front, or every k-th token of a sample.")


def signed(number: int) -> int:
    """The 64-bit integer of the same bits."""
    return (number + 2**63) % 2**64 - 2**63


def chance(ids: Tensor, context: int) -> Tensor:
    """A number in [0, 2^24) for each token but the first ones, from it and those in front of it, (b n) to (b n - context + 1)."""
    powers = torch.tensor([signed(pow(FACTOR, i + 1, 2**64)) for i in range(context)], device=ids.device)
    mixed = ((ids.long().unfold(1, context, 1) + 1) * powers).sum(dim=-1)
    mixed = (mixed ^ (mixed >> 32)) * signed(MIX)
    return (mixed >> (64 - BITS)) & (2**BITS - 1)


@register("goldfish-loss", GoldfishLossConfig, version=2)
class GoldfishLoss(Objective):
    kinds = ("text",)
    causal = True
    needs_head = True
    replaces = True

    def loss(self, logps: Tensor, labels: Tensor, ids: Tensor, positions: Tensor) -> Tensor | None:
        if self.config.k == 0:
            return None
        kept = (labels != -100) & ~self.dropped(ids, positions)
        return -(logps * kept).sum() / kept.sum().clamp(min=1)

    def dropped(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Places whose target is dropped, (b n) bool: the target is the token behind the place."""
        k, context = self.config.k, self.config.context
        if self.config.mask == "static":
            return (positions + 2) % k == 0
        if ids.shape[1] < context:
            return torch.zeros_like(ids, dtype=torch.bool)
        early = self.config.window == "ending"
        low = torch.nn.functional.pad(chance(ids, context) * k < 2**BITS, (context - 1 - early, int(early)))
        return low[:, -ids.shape[1] :] & (positions >= context - 1)
