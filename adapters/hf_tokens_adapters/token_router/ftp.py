"""FTP: each block runs the tokens that a tiny router, shared by all blocks, calls important; the others skip it.

Paper:   FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing (Li et al., 2024), arXiv:2412.11494
Needs:   training; `router="static"` needs none
Maths:   p = sigmoid(W2 relu(W1 [i/n, a, rank(a)/n, s_l] + b1) + b2); a token runs if p >= 1/2 (strict: the n - floor(s_l n) highest);
         L = w_g BCE(p, static) + w_s sum_l max(s_l - skipped_l, 0) + w_d |H - H_base|^2 / |H_base|^2;
         a decoded token runs block l iff s_l <= threshold
Differs: the paper leaves the scale of the factors, the weights and the decay of L_g open: a is the mean over heads and running queries, L_g
         falls with the progress of the training, L_d is relative, so that one weight suits every model. The losses join the model's own.
         b2 starts at 1, so that every token runs at first. A later turn of a chat is routed as a prompt of its own; decoding without a
         cache routes the whole sequence anew at each token. `search_shares` finds `sparsities`: examples/ftp_search.py.
Checked: no public code found (2026-11-29); the paper leaves open the scale of the router's four factors, the weights of the losses and the
         decay of the guide.

>>> from hf_tokens import FTPConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, FTPConfig(sparsity=0.25, strict=True)).eval()
>>> measure(model, **base.inputs).tokens / (4 * 2 * 16)
0.75
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear

from hf_tokens import ConfigError, Dims, MethodConfig, TokenRouter, option, rank, register, straight_through


@dataclass(frozen=True)
class FTPConfig(MethodConfig):
    sparsity: float = option(0.22, ge=0, lt=1, zero=0.0, help="Share of tokens that skip a block (paper: S); `sparsities` go first.")
    sparsities: tuple[float, ...] = option((), ge=0, le=1, zero=(), help="That share for each block (paper: s_i), as the search found it.")
    router: str = option("dynamic", choices=("dynamic", "static"), help="The trained router, or the first and the newest tokens run.")
    hidden: int = option(64, ge=1, help="Width of the router's hidden layer.")
    strict: bool = option(False, help="Skip exactly floor(s_i n) tokens (paper: strict constraint), not those that the router refuses.")
    threshold: float = option(0.5, ge=0, le=1, help="A decoded token runs the blocks of at most this sparsity.")
    guide_weight: float = option(1.0, ge=0, help="Weight of the guide loss L_g, which imitates the static router.")
    guide_decay: float = option(1.0, ge=0, help="L_g counts by (1 - progress of the training) to this power.")
    sparsity_weight: float = option(1.0, ge=0, help="Weight of the one-sided sparsity loss L_s.")
    distillation_weight: float = option(1.0, ge=0, help="Weight of the distillation loss L_d on the last hidden states.")

    def asked(self, layer: int) -> float:
        """The sparsity asked of a block."""
        return self.sparsities[layer] if self.sparsities else self.sparsity


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the real tokens of each row, then over the rows."""
    return (values.masked_fill(~mask, 0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)).mean()


@register("ftp", FTPConfig)
class FTP(TokenRouter):
    kinds = ("text",)
    side_by_side = True
    causal = True
    chunks = False
    trains_dense = sums_scores = observes_prompts = True
    decodes = property(lambda self: self.config.asked(self.dims.layer) > self.config.threshold)
    teaches = property(lambda self: self.config.router == "dynamic" and self.config.distillation_weight > 0)

    def __init__(self, config: FTPConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.is_first_block and config.router == "dynamic":
            inner, outer = nn.Linear(4, config.hidden), nn.Linear(config.hidden, 1)
            self.w1, self.b1, self.w2, self.b2 = inner.weight, inner.bias, outer.weight, outer.bias
            nn.init.constant_(self.b2, 1.0)  # an untrained router lets every token run

    @classmethod
    def check(cls, config: FTPConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if len(config.sparsities) not in (0, layers):
            rule = f"FTPConfig.sparsities must have one value for each of {layers} blocks of the stream"
            raise ConfigError(f"{rule}, got {len(config.sparsities)}. Give one a block, or leave them out.")

    def route(self, hidden: Tensor, mask: Tensor, prefill: bool, progress: float, memory: dict) -> Tensor | None:
        asked = self.config.asked(self.dims.layer)
        if not prefill:
            return torch.zeros_like(mask, dtype=hidden.dtype)
        count = mask.sum(dim=1, keepdim=True).clamp(min=1)  # b 1
        table = memory.tokens.get(self.key)
        if table is None:  # the scores of each token when it last ran, b m
            wide = torch.promote_types(hidden.dtype, torch.float32)
            table = memory.tokens[self.key] = (1 / count.to(wide)).expand(mask.shape)
        runs, gate = mask, None
        if asked > 0:
            stays = count - torch.floor(asked * count + 1e-9)
            place = mask.cumsum(dim=1) - 1
            static = mask & (torch.where(place == 0, 0, count - place) < stays)  # the first token, then the newest
            runs, gate = static, static.to(hidden.dtype)
        if asked > 0 and self.config.router == "dynamic":
            logit = self.logit(place, table, rank(table.masked_fill(~mask, -1)), count, asked)
            chance = logit.sigmoid()
            runs = mask & (rank(chance.masked_fill(~mask, -1)) < stays if self.config.strict else logit >= 0)
            gate = straight_through(runs.to(chance.dtype), chance)
            if self.training and torch.is_grad_enabled():
                self.blame(logit, gate, static, mask, progress, asked)
        memory.tokens[f"{self.key}.runs"] = runs
        return gate

    def logit(self, place: Tensor, score: Tensor, ahead: Tensor, count: Tensor, asked: float) -> Tensor:
        """The router's say on each token, (b m)."""
        factors = torch.stack([place.to(score) / count, score, ahead.to(score) / count, torch.full_like(score, asked)], dim=-1)  # b m 4
        first = self.stream_first
        w1, b1, w2, b2 = (p.to(score.dtype) for p in (first.w1, first.b1, first.w2, first.b2))
        return linear(linear(factors, w1, b1).relu(), w2, b2)[..., 0]

    def blame(self, logit: Tensor, gate: Tensor, static: Tensor, mask: Tensor, progress: float, asked: float) -> None:
        """Guide and sparsity loss of this block."""
        c = self.config
        named = range(self.dims.layers) if c.layers is None else c.layers
        routed = sum(c.asked(layer) > 0 for layer in named)
        guide = binary_cross_entropy_with_logits(logit, static.to(logit.dtype), reduction="none")
        self.add_loss(c.guide_weight * (1 - progress) ** c.guide_decay / routed * row_mean(guide, mask))
        skipped = ((1 - gate) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        self.add_loss(c.sparsity_weight * (asked - skipped).relu().mean())

    def observe(self, scores: object, memory: dict) -> None:
        runs = memory.tokens[f"{self.key}.runs"]
        with torch.no_grad():
            received = scores.columns().mean(dim=1) / runs.sum(dim=1, keepdim=True).clamp(min=1)
        memory.tokens[self.key] = torch.where(runs, received, memory.tokens[self.key])

    def teach(self, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
        off, size = (x.square().sum(dim=-1).masked_fill(~mask, 0).sum(dim=1) for x in (student - teacher, teacher))  # b
        self.add_loss(self.config.distillation_weight * (off / size.where(size > 0, 1)).mean())
