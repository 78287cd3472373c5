"""CAFT: auxiliary heads tell the tokens behind the next one while a model is tuned, so that it learns concepts longer than a token.

Paper:   Improving large language models with concept-aware fine-tuning (Chen et al., 2025), arXiv:2506.07833
Needs:   training
Maths:   L = L_1 + alpha gamma sum_{k=2}^{n} beta^{k-1} L_k,  L_k = -log p_k(x_{t+k} | x_<=t),  p_k = softmax(F_u(F_hk(x)));
         gamma falls along a quarter of a sine, sin(pi/2 (1 - progress))
Differs: a head is `depth` blocks like the model's last but one, called as that was, mask and places too, so a model of any family has
         them, and none sees padding, as the release's do; they start as copies of it, as where the release trains its heads beforehand.
         `layer="linear"` is its other head: layers x + silu(W x + b), W = 0 at first. Both read what the model's own head reads. The
         paper trains its heads beforehand on answers of the model itself: train an adapter with this method alone and
         schedule="constant", alpha=1, freeze it, put a LoRA around it; the release then reads the states in front of the last block.
         A target in another packed sample does not count, though a head may read that sample's tokens where the block may; L_k is a mean
         over a batch's own labels, and a batch counts by its share of the step's next tokens.
Checked: michaelchen-lab/caft-llm@d10c79e7, the auxiliary losses of its decoder layers and of its linear heads in float64, each schedule,
         one and two layers deep: largest difference 5.6e-17; its mean of no label is NaN, and 0 here.

>>> from hf_tokens import CAFTConfig, aux_loss, get_token_model, set_progress
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llama")
>>> model = get_token_model(specimen.model, CAFTConfig(heads=2)).train()
>>> set_progress(model, 0.0)
>>> out = model(**specimen.inputs, labels=specimen.inputs["input_ids"])
>>> sum(p.requires_grad for p in model.parameters()), aux_loss(model).item() > 0  # the weights of a block, each twice
(9, True)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, Objective, option, register

SCHEDULES = ("rsine", "sine", "linear", "constant")


@dataclass(frozen=True)
class CAFTConfig(MethodConfig):
    heads: int = option(4, ge=1, help="Auxiliary heads: they tell the 2nd to the n-th token ahead (paper: n - 1).")
    depth: int = option(1, ge=1, help="Layers of a head.")
    layer: str = option(
        "transformer", was={2: "linear"}, choices=("transformer", "linear"), help="What a layer is: a block like the model's."
    )
    bias: bool = option(True, was={1: False}, help="Whether a linear layer adds a learnt bias, drawn as such a layer's.")
    alpha: float = option(0.01, ge=0, zero=0.0, help="Weight of the auxiliary losses beside the model's own.")
    beta: float = option(0.8, ge=0, le=1, help="Each further token weighs by this factor less.")
    schedule: str = option(
        "rsine", choices=SCHEDULES, help="How that weight goes with the training: a falling or rising quarter of a sine."
    )

    def gamma(self, progress: float) -> float:
        """The schedule's factor."""
        angle = math.pi / 2
        return {"rsine": math.sin(angle * (1 - progress)), "sine": math.sin(angle * progress), "linear": progress}.get(self.schedule, 1.0)


@register("caft", CAFTConfig, version=3)
class CAFT(Objective):
    kinds = ("text",)
    causal = True
    needs_head = True

    ignores = property(lambda self: ("block",) if self.config.layer == "linear" else ())

    def __init__(self, config: CAFTConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.is_first_block and config.layer == "transformer":
            copies = {name: p.expand(config.depth, config.heads, *p.shape).clone() for name, p in dims.copy_block().items()}
            self.blocks = nn.ParameterDict({name.replace(".", "-"): nn.Parameter(p) for name, p in copies.items()})
        elif dims.is_first_block:
            self.weight = nn.Parameter(torch.zeros(config.depth, config.heads, dims.width, dims.width))
            if config.bias:
                self.bias = nn.Parameter((2 * torch.rand(config.depth, config.heads, dims.width) - 1) * dims.width**-0.5)

    def ahead(self, states: Tensor, block: Callable | None) -> Tensor:
        """What each head makes of the states (k b n d)."""
        c = self.config
        for i in range(c.depth):
            if c.layer == "transformer":
                states = block(states, {name.replace("-", "."): weight[i] for name, weight in self.blocks.items()})
                continue
            inner = einsum(states, self.weight[i].to(states.dtype), "k b n d, k e d -> k b n e")
            states = states + F.silu(inner + self.bias[i, :, None, None].to(inner.dtype) if c.bias else inner)
        return states

    def loss(
        self, hidden: Tensor, head: Callable, block: Callable | None, labels: Tensor, positions: Tensor, progress: float
    ) -> Tensor | None:
        c = self.config
        if c.alpha == 0:
            return None
        states = self.ahead(hidden.expand(c.heads, *hidden.shape), block)  # k b n d
        behind = lambda x, fill: rearrange(F.pad(x, (0, c.heads), value=fill).unfold(1, c.heads + 1, 1)[..., 1:], "b n k -> k b n")
        steps = torch.arange(1, c.heads + 1, device=labels.device)
        here = behind(positions, -1) == positions + steps[:, None, None]  # not in another sample
        wanted = behind(labels, -100).masked_fill(~here, -100)
        logits = head(states).flatten(0, 2)
        losses = F.cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted.to(logits.device).flatten(), reduction="none"
        ).view(c.heads, -1)
        means = losses.sum(dim=1) / (wanted != -100).flatten(1).sum(dim=1).clamp(min=1)
        return (c.alpha * c.gamma(progress) * c.beta ** steps.to(means) * means).sum()
