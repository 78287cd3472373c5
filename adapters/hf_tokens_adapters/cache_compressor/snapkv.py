"""SnapKV: the end of a prompt says what of it will be read; each head keeps that, with its neighbours, and the end itself.

Paper:   SnapKV: LLM Knows What You are Looking for Before Generation (Li et al., NeurIPS 2024), arXiv:2404.14469
Needs:   nothing
Maths:   A = softmax(q_i k_j / sqrt(e)) of the last w queries over all n keys;  s_j = pool_j sum_i A_ij over the j in front of the window,
         max or average of `kernel` neighbours;  in each head the C - w highest stay, and the w newest
Differs: entries are stored once for each key head: A is the mean of its query heads, before the pooling, where the release repeats the
         keys and stores them for each query head. Of equal scores the earlier stays. A later prompt is compressed again. The defaults are
         those of the paper's benchmarks; the class's own are 64, 320, 5 and average. Queries are the prompt's last ones: a question
         that comes later was not among them.
Checked: FasterDecoding/SnapKV@e216ddc8, the scores of what SnapKVCluster keeps of prompts of 77 to 501 tokens, both poolings: largest
         difference 0; which of a plateau of equal maxima stay differs. NVIDIA/kvpress@8bb29b9c, scores under shared keys, average: 4e-18.

>>> from hf_tokens import SnapKVConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, SnapKVConfig(capacity=8, window=4))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 8 * 32 * 4
True
"""

from dataclasses import dataclass

from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, check_capacity, observed, option, protect, register


@dataclass(frozen=True)
class SnapKVConfig(MethodConfig):
    capacity: int = option(2048, ge=1, size=True, help="Entries that a head keeps of a prompt, the window among them (paper: C).")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    window: int = option(32, ge=1, size=True, help="Newest tokens, whose queries look and which stay (paper: w).")
    kernel: int = option(7, ge=1, help="Neighbours over which scores are pooled.")
    pooling: str = option("max", choices=("max", "average"), help="How they are pooled.")


@register("snapkv", SnapKVConfig)
class SnapKV(CacheCompressor):
    chunks = False

    @classmethod
    def check(cls, config: SnapKVConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        check_capacity(config, config.capacity, config.budget, config.window)

    def score(self, scores: object, mask: Tensor, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        c = self.config
        return protect(observed(scores, mask, newer, c.window, c.kernel, c.pooling), positions, newer, budget, newest=c.window)

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, self.config.capacity, self.config.budget)
