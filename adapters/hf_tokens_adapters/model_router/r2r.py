"""R2R: while a small model writes, a router on its last state hands those tokens to a large model that would turn the text another way.

Paper:   R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing (Fu et al., 2025), arXiv:2505.21600
Needs:   training
Maths:   u = Wh h + Wz z + We e + b of the last hidden state h, the highest logits z and the embedding e of the small model's token;
         u <- u + W2 gelu(W1 norm(u)), L times;  p = sigmoid(w norm(u) + c); the large model emits the token if p >= threshold;
         BCE against labels: 1 where the two models part and a verifier finds that it matters
Differs: the router has two layers of the small model's width, not six of 1024, and no dropout; its output starts at 0. e is that of the
         small model's likeliest token, also in sampling. Labels come as a column `hf_tokens_targets` of the batch (1, 0, or -100 for
         unknown), which `label_routes` makes. In a batch the large model reads for all rows as soon as one row asks. At a threshold
         of 1 it never speaks, at 0 always. `generate` gets the large model as `custom_generate=route_to(large)`.
Checked: thu-nics/R2R@560f5ecd, `ClassifierBackbone` at the biases and norms of its start, in float64: largest difference 0 of the logit;
         it learns these biases and norms too, and has dropout 0.3.

>>> import torch
>>> from hf_tokens import R2RConfig, get_token_model, route_to
>>> from hf_tokens.testing import zoo
>>> base, large = zoo.build("llama"), zoo.build("llama", seed=1).model
>>> prompt = {**base.inputs, "max_new_tokens": 4, "do_sample": False}
>>> model = get_token_model(base.model, R2RConfig(threshold=0.0)).eval()
>>> bool((model.generate(**prompt, custom_generate=route_to(large)) == large.generate(**prompt)).all())
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, layer_norm, linear

from hf_tokens import ConfigError, Dims, MethodConfig, ModelRouter, option, register


@dataclass(frozen=True)
class R2RConfig(MethodConfig):
    threshold: float = option(0.5, ge=0, le=1, zero=1.0, help="Probability from which the large model emits a token; 1 never lets it.")
    logits: int = option(100, ge=1, help="Highest logits that the router sees.")
    depth: int = option(2, ge=1, help="Residual layers of the router.")
    expansion: int = option(4, ge=1, was={1: 1}, help="Width of a residual layer inside, as a multiple of the small model's.")
    positive_weight: float = option(1.0, gt=0, help="Weight of labels 1 in the loss, such as the number of labels 0 for each.")


@register("r2r", R2RConfig, version=2)
class R2R(ModelRouter):
    def __init__(self, config: R2RConfig, dims: Dims):
        super().__init__(config, dims)
        d, seen = dims.width, min(config.logits, dims.outputs)
        drawn = lambda *shape: nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)
        self.enter = drawn(d, 2 * d + seen)
        self.bias = nn.Parameter(torch.zeros(d))
        self.w1, self.w2 = drawn(config.depth, config.expansion * d, d), drawn(config.depth, d, config.expansion * d)
        self.w, self.c = nn.Parameter(torch.zeros(1, d)), nn.Parameter(torch.zeros(1))

    def route(self, hidden: Tensor, logits: Tensor, predicted: Tensor, targets: Tensor | None) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        highest = logits.topk(self.enter.shape[1] - 2 * self.dims.width, dim=-1).values
        u = linear(torch.cat([hidden, highest, predicted], dim=-1).to(wide), self.enter.to(wide), self.bias.to(wide))
        for w1, w2 in zip(self.w1.to(wide), self.w2.to(wide), strict=True):
            u = u + linear(gelu(linear(layer_norm(u, u.shape[-1:]), w1)), w2)
        logit = linear(layer_norm(u, u.shape[-1:]), self.w.to(wide), self.c.to(wide))[..., 0]  # b m
        if self.training and torch.is_grad_enabled() and logit.requires_grad:
            self.learn(logit, targets)
        return (logit.sigmoid() >= self.config.threshold) & (self.config.threshold < 1)

    def learn(self, logit: Tensor, targets: Tensor | None) -> None:
        """The loss on the labels."""
        if targets is None:
            rule = "R2R learns from the column hf_tokens_targets alone"
            raise ConfigError(f"{rule}, got a batch without it. Make it with `label_routes`, or call `eval()`.")
        targets = targets.to(logit.device)
        if targets.shape != logit.shape or bool((targets > 1).any()):
            rule = "The column hf_tokens_targets must hold 1, 0 or -100 for each token"
            raise ConfigError(f"{rule}, got {tuple(targets.shape)} for {tuple(logit.shape)} tokens. Make it with `label_routes`.")
        known = targets >= 0
        weight = logit.new_tensor(self.config.positive_weight)
        loss = binary_cross_entropy_with_logits(logit, targets.clamp(min=0).to(logit), reduction="none", pos_weight=weight)
        self.add_loss(loss.masked_fill(~known, 0).sum() / known.sum().clamp(min=1))
