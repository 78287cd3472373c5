"""Dynamic token pooling: a small predictor cuts the text into segments, and the middle blocks run once for each segment.

Paper:   Efficient Transformers with Dynamic Token Pooling (Nawrot et al., ACL 2023), arXiv:2211.09761
Needs:   training; behind it `calibrate` finds the threshold that ends as many segments as the prior wants where the predictor is unsure
Maths:   p_t = sigmoid(W2 gelu(W1 norm(h_t) + c1) + c2);  b_t = [sigmoid((logit p_t + g) / tau) > 1/2], g logistic noise, straight through;
         s_0 learnt, s_k = sum_t a_t h_t / sum_t a_t over the t of segment k, sum_{j < t} b_j = k - 1, with a_t = 2 - k + sum_{j < t} b_j;
         the middle blocks run on s_0, s_1, ..;  behind them h_t + s'_{k(t)}, k(t) = sum_{j <= t} b_j: the last finished segment;
         L = -1/n log Binomial(sum_t b_t; n, alpha), or with labels the cross-entropy of p_t
Differs: a segment has the position of its last token, the paper counts segments: a pretrained model's distances stay. Outside of training
         there is no noise. The paper's blocks end in a norm; here the predictor norms h_t, and the pooling leaves it to the blocks.
         Labels (of subwords, of spikes of entropy) come as `hf_tokens_targets`, 1 where a segment ends, -100 where it is left open. What
         a token bank inserted ends its segment. `upsample="update"` is ours, h_t + s'_k - s_k: milder on a model trained without pooling.
Checked: PiotrNawrot/dynamic-pooling@1e6f360d, `downsample` and `upsample` of 13 tokens at the same boundaries: largest difference 4.2e-9.

>>> from hf_tokens import DynamicTokenPoolingConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, DynamicTokenPoolingConfig(boundaries="fixed", prior=0.25, layers=(1, 2)))
>>> cache = model(**base.inputs, use_cache=True).past_key_values
>>> [layer.length for layer in cache.layers]  # 16 tokens are 4 segments, and the learnt one stands in front
[16, 5, 5, 16]
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, gelu, layer_norm, linear

from hf_tokens import ConfigError, Dims, MethodConfig, TokenMap, TokenReducer, option, register, straight_through

DEPTH, FIRST = 12, 2  # the paper's model: 2 blocks, 8 shortened ones, 2 blocks


@dataclass(frozen=True)
class DynamicTokenPoolingConfig(MethodConfig):
    boundaries: str = option("learnt", choices=("learnt", "labels", "fixed"), help="Who says where a segment ends.")
    prior: float = option(0.2, gt=0, le=1, zero=1.0, help="Share of tokens that end a segment, exact if fixed (paper: alpha).")
    weight: float = option(1.0, ge=0, help="Weight of the loss of the boundaries.")
    temperature: float = option(0.5, gt=0, help="Temperature of the noisy boundaries in training (paper: tau).")
    threshold: float = option(0.5, gt=0, lt=1, help="Chance above which a segment ends outside of training; `calibrate` finds it.")
    hidden: int = option(2048, ge=1, size=True, help="Width of the predictor's hidden layer.")
    upsample: str = option("sum", choices=("sum", "update"), help="What a token gets of its segment: all, or what the blocks changed.")


def log_binomial(k: Tensor, n: Tensor, share: float) -> Tensor:
    """Log-probability of k successes among n."""
    ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    return ways + k * torch.log(n.new_tensor(share)) + (n - k) * torch.log1p(-n.new_tensor(share))


@register("dynamic-token-pooling", DynamicTokenPoolingConfig)
class DynamicTokenPooling(TokenReducer):
    site = "before"
    kinds = ("text",)
    causal = True
    spans = True

    def __init__(self, config: DynamicTokenPoolingConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.is_first_block:
            self.null = nn.Parameter(0.02 * torch.randn(dims.width))  # as small as embeddings are
        if dims.is_first_block and config.boundaries != "fixed":
            inner, outer = nn.Linear(dims.width, config.hidden), nn.Linear(config.hidden, 1)
            self.w1, self.b1, self.w2, self.b2 = inner.weight, inner.bias, outer.weight, outer.bias

    @property
    def ignores(self) -> tuple[str, ...]:
        return () if self.config.boundaries == "labels" else ("targets",)

    @classmethod
    def default_layers(cls, config: DynamicTokenPoolingConfig, layers: int) -> tuple[int, ...]:
        aside = max(1, round(layers * FIRST / DEPTH))
        return tuple(range(layers))[aside : layers - aside] or (layers // 2,)

    def assign(
        self, hidden: Tensor, mask: Tensor, fresh: Tensor, positions: Tensor, targets: Tensor | None, memory: dict
    ) -> TokenMap | None:
        if self.config.prior == 1:
            return None
        rows, wide = memory.rows, torch.promote_types(hidden.dtype, torch.float32)
        x = hidden.to(wide)
        ends, soft = self.fixed(positions, mask, x) if self.config.boundaries == "fixed" else self.predict(x, mask & ~fresh, targets)
        ends = ends & mask | fresh
        begun = rows.get(f"{self.key}.begun", torch.zeros_like(mask[:, 0]))
        first = mask.long().argmax(dim=1)  # b
        tokens = TokenMap.segments(ends, mask.any(dim=1) & ~begun, first, mask)
        before = soft.cumsum(dim=1) - soft
        share = mask * (1 + before - before.detach())  # b n, its gradient is that of a_t
        at_first = torch.zeros_like(share).scatter(1, first[:, None], 1)
        running, count = rows.get(f"{self.key}.running", x[:, 0] * 0), rows.get(f"{self.key}.count", share[:, 0] * 0)
        x = (x * share[..., None]).masked_fill(~mask[..., None], 0) + at_first[..., None] * running[:, None]
        share = share + at_first * count[:, None]
        unfinished = tokens.slot < 0
        rows[f"{self.key}.begun"] = begun | mask.any(dim=1)
        rows[f"{self.key}.running"], rows[f"{self.key}.count"] = (x * unfinished[..., None]).sum(dim=1), (share * unfinished).sum(dim=1)
        total = tokens.count(share)[..., None]
        slots = tokens.sum(x) / total.where(total > 0, 1)
        null = torch.zeros_like(total, dtype=torch.bool) if tokens.fresh is None else tokens.fresh[..., None]
        return tokens.holding(torch.where(null, self.null.to(wide), slots))

    def regain(self, before: Tensor, given: Tensor, got: Tensor) -> Tensor:
        return before + got if self.config.upsample == "sum" else before + (got - given)

    def fixed(self, positions: Tensor, mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Boundaries as evenly as the prior allows, (b n), hard and as numbers."""
        before, behind = ((place * self.config.prior + 1e-9).floor() for place in (positions, positions + 1))
        return (ends := mask & (behind > before)), ends.to(like.dtype)

    def predict(self, x: Tensor, mask: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor]:
        """The boundaries behind these tokens (b n d), hard and straight through; in training, their loss is noted."""
        config, logit = self.config, self.logit(x)
        learns, noisy = self.training and torch.is_grad_enabled(), self.training and config.boundaries == "learnt"
        if noisy:
            logit = (logit + torch.rand_like(logit).logit(eps=1e-6)) / config.temperature
        chance = logit.sigmoid()
        ends = mask & (chance > (0.5 if noisy else config.threshold))
        soft = straight_through(ends.to(x.dtype), chance * mask)
        if learns and config.boundaries == "learnt":
            n = mask.sum(dim=1).to(x.dtype)
            said = log_binomial(soft.sum(dim=1), n, config.prior) / n.clamp(min=1)
            self.add_loss(-config.weight * said.sum() / (n > 0).sum().clamp(min=1))
        if learns and config.boundaries == "labels" and targets is not None:
            self.add_loss(config.weight * self.blame(logit, mask, targets.to(x.device)))
        return ends, soft if config.boundaries == "learnt" else soft.detach()

    def logit(self, x: Tensor) -> Tensor:
        """How likely a segment ends behind each token (b n d), (b n)."""
        w1, b1, w2, b2 = (p.to(x.dtype) for p in (self.w1, self.b1, self.w2, self.b2))
        return linear(gelu(linear(layer_norm(x, x.shape[-1:]), w1, b1)), w2, b2)[..., 0]

    def examine(self, hidden: Tensor, mask: Tensor, fresh: Tensor) -> Tensor | None:
        x = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return self.logit(x)[mask & ~fresh].sigmoid() if self.config.boundaries == "learnt" else None

    @classmethod
    def calibrate(cls, config: DynamicTokenPoolingConfig, records: dict[int, list[Tensor]]) -> DynamicTokenPoolingConfig:
        chances = torch.cat([batch for batches in records.values() for batch in batches]).sort(descending=True).values
        ends = max(1, int(config.prior * len(chances) + 1e-9))
        return replace(config, threshold=float(chances[ends - 1 : ends + 1].mean()))

    @staticmethod
    def blame(logit: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the labels of the boundaries, mean over those that there are."""
        if targets.shape != mask.shape or bool((targets > 1).any()):
            rule = f"The column hf_tokens_targets must hold 1, 0 or -100 for each of {tuple(mask.shape)} tokens"
            raise ConfigError(f"{rule}, got {tuple(targets.shape)} up to {int(targets.max())}. Give it so, and insert no tokens in front.")
        known = mask & (targets >= 0)
        each = binary_cross_entropy_with_logits(logit, targets.clamp(min=0).to(logit.dtype), reduction="none")
        return each.masked_fill(~known, 0).sum() / known.sum().clamp(min=1)
