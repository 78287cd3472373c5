"""Mixture-of-Depths: in every other block a router lets the top eighth of the tokens of a sequence run; the others skip it.

Paper:   Mixture-of-Depths: Dynamically allocating compute in transformer-based language models (Raposo et al., 2024), arXiv:2404.02258
Needs:   training
Maths:   r_i = w x_i;  x_i + r_i f(X)_i if r_i is among the k = capacity n highest of its sequence, else x_i; X are the tokens that run;
         that looks ahead, so outside of training a token runs iff sigmoid(z_i) > 1/2, with z a small MLP of x, behind a stop of the
         gradient, or z = r;  L = BCE(z, whether r_i was among the k)
Differs: the paper trains from scratch. On a trained model r near 0 would take every update away, so that r and z get a bias, and start at
         exactly 1: an untrained router is the base model outside of training, and in training lets the first k tokens run. It needs more
         training than a moment: SmolLM2-135M with a LoRA, capacity 0.5, 40 steps of 128 tokens: loss 4.43 for 2.68 on other text, with
         0.89 of the blocks' tokens. capacity = 1 is the base model, without r. `warmup` is ours. k is rounded down, at least 1; of equal
         r the earlier token runs. Padding takes no place among the k. L is a mean over the tokens of a sample, the samples and the
         blocks; for its weight, the predictor's width and all starts no figure of the authors was found. A skipped token leaves no entry
         in a block's cache.
Checked: astramind-ai/Mixture-of-depths@aff9e74f, the unofficial `MoD` (no code of the authors is public) beside our routes with its
         weights in float64, given its k - 1 tokens and its r times the block's whole output: largest difference 6.0e-7 of 7.9, as its
         router is in float32; from the paper's x + r f it is up to 3.4 away, and it looks ahead in sampling. By reading,
         sramshetty/mixture-of-depths@57cc3823 has one router for all blocks, and sigmoid(r) on the MLP's update alone.

>>> from hf_tokens import MixtureOfDepthsConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, MixtureOfDepthsConfig(capacity=0.25)).train()
>>> measure(model, **base.inputs).tokens / (2 * 16)  # of 4 blocks two are routed
2.5
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, silu

from hf_tokens import Dims, MethodConfig, TokenRouter, option, rank, register


@dataclass(frozen=True)
class MixtureOfDepthsConfig(MethodConfig):
    capacity: float = option(
        0.125, gt=0, le=1, zero=1.0, example=0.75, help="Share of a sequence's tokens that run a block in training (paper: C)."
    )
    every: int = option(2, ge=1, help="One block in so many is routed, the last of them.")
    sampling: str = option("predictor", choices=("predictor", "router"), help="Whose logit says what runs outside of training.")
    hidden: int | None = option(None, ge=1, help="Width of the predictor's hidden layer; None is half of the model's.")
    weight: float = option(1.0, ge=0, help="Weight of the loss of that logit.")
    warmup: float = option(0.0, ge=0, le=1, help="Share of the training over which the capacity falls from 1.")

    def capacity_at(self, progress: float) -> float:
        """The share of tokens that run when so much of the training is done."""
        done = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return 1 - (1 - self.capacity) * done


@register("mixture-of-depths", MixtureOfDepthsConfig)
class MixtureOfDepths(TokenRouter):
    kinds = ("text",)
    causal = True

    def __init__(self, config: MixtureOfDepthsConfig, dims: Dims):
        super().__init__(config, dims)
        if config.capacity == 1:
            return
        self.w, self.b = nn.Parameter(torch.zeros(1, dims.width)), nn.Parameter(torch.ones(1))
        if config.sampling == "predictor":
            inner = nn.Linear(dims.width, config.hidden or max(1, dims.width // 2))
            self.w1, self.b1 = inner.weight, inner.bias
            self.w2, self.b2 = nn.Parameter(torch.zeros(1, len(self.b1))), nn.Parameter(torch.ones(1))

    @classmethod
    def default_layers(cls, config: MixtureOfDepthsConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(config.every - 1, layers, config.every)) or (layers - 1,)

    def route(self, hidden: Tensor, mask: Tensor, prefill: bool, progress: float) -> Tensor | None:
        if self.config.capacity == 1:
            return None
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        r = linear(x, self.w.to(x.dtype), self.b.to(x.dtype))[..., 0]  # b m
        z = r if self.config.sampling == "router" else self.predict(x.detach())
        if self.training and prefill:
            count = mask.sum(dim=1, keepdim=True)
            k = torch.floor(self.config.capacity_at(progress) * count + 1e-9).clamp(min=1)
            runs = mask & (rank(r.detach().masked_fill(~mask, -torch.inf)) < k)
            if torch.is_grad_enabled():
                self.blame(z, runs, mask)
        else:
            runs = mask & (z > 0)
        return torch.where(runs, r, 0).to(hidden.dtype)

    def predict(self, x: Tensor) -> Tensor:
        """The predictor's logit of each token, (b m)."""
        w1, b1, w2, b2 = (p.to(x.dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        return linear(silu(linear(x, w1, b1)), w2, b2)[..., 0]

    def blame(self, z: Tensor, runs: Tensor, mask: Tensor) -> None:
        """The loss of this block's logit, which is to tell the tokens that run."""
        each = binary_cross_entropy_with_logits(z, runs.to(z.dtype), reduction="none").masked_fill(~mask, 0)
        routed = self.dims.places
        self.add_loss(self.config.weight / routed * (each.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean())
