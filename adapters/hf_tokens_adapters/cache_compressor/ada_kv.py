"""Ada-KV: the heads of a block share its cache by their scores: one that spreads its attention keeps more entries than one that does not.

Paper:   Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference (Feng et al., NeurIPS 2025),
         arXiv:2407.11550
Needs:   nothing
Maths:   scores s_ij of head i as in SnapKV;  m_i = how many of the k B highest of all k heads are those of head i, B = C - w;
         b_i = alpha B + (1 - alpha) m_i;  in each head the b_i highest stay, and the w newest
Differs: the heads of a block hold k C entries exactly: what rounding down leaves goes to the largest fractions, where the release cuts
         alpha B and rounds each b_i (762 entries for 768, measured on 8 heads). Entries are stored once for each key head, by
         the mean of its query heads, before the pooling: the release with its `gqa_support`. A later prompt is compressed again.
         With `scorer="stack"` it divides what the compressors beside it keep, by their scores, while they decode too.
Checked: FFY0/AdaKV@efe4e2ee, head sizes of AdaptiveSnapKVCluster, with and without `gqa_support`, and scores of what it keeps: largest
         difference 0 in scores, 1 entry in a head's size (rounding).

>>> from hf_tokens import AdaKVConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, AdaKVConfig(capacity=6, window=2))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 6 * 32 * 4
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, check_capacity, observed, option, protect, register


@dataclass(frozen=True)
class AdaKVConfig(MethodConfig):
    capacity: int = option(1024, ge=1, size=True, help="Entries that a head keeps, on average over its block, the window among them.")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    alpha: float = option(0.2, ge=0, le=1, zero=1.0, help="Part of its budget that each head has whatever its scores (paper: alpha).")
    window: int = option(32, ge=1, size=True, help="Newest tokens, whose queries look and which stay.")
    kernel: int = option(7, ge=1, help="Neighbours over which scores are pooled.")
    pooling: str = option("max", choices=("max", "average"), help="How they are pooled.")
    scorer: str = option("window", choices=("window", "stack"), help="Whose scores: its own, or those of the compressors beside it.")


@register("ada-kv", AdaKVConfig)
class AdaKV(CacheCompressor):
    chunks = False
    by_head = True
    divides_others = property(lambda self: self.config.scorer == "stack")
    ignores = property(lambda self: ("scores",) if self.divides_others else ())

    @classmethod
    def check(cls, config: AdaKVConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.scorer == "window":
            check_capacity(config, config.capacity, config.budget, config.window)

    def score(self, scores: object | None, mask: Tensor, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        c = self.config
        if scores is None:  # what others keep is divided, and nothing goes by its own
            return -newer.double()
        return protect(observed(scores, mask, newer, c.window, c.kernel, c.pooling), positions, newer, budget, newest=c.window)

    def budget(self, length: int, seen: int) -> int:
        return length if self.divides_others else allowance(length, seen, self.config.capacity, self.config.budget)

    def divide(self, scores: Tensor, budgets: Tensor) -> Tensor:
        always, there = scores.isposinf().sum(dim=-1), scores.isfinite()
        even = (budgets - always).clamp(min=0)  # b k: of the others
        order = scores.masked_fill(~there, -torch.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
        total = even.sum(dim=1, keepdim=True)
        best = torch.arange(order.shape[1], device=order.device) < total  # b k*n
        most = torch.zeros_like(even).scatter_add_(1, order // scores.shape[-1], best.to(even.dtype))
        share = self.config.alpha * even.double() + (1 - self.config.alpha) * most
        whole = (share + 1e-9).floor().long()
        left = total - whole.sum(dim=1, keepdim=True)
        turn = (whole - share).argsort(dim=1, stable=True).argsort(dim=1)  # b k: 0 for the largest fraction
        return always + whole + (turn < left)
