"""H2O: beside the newest entries those stay that attracted the most attention, summed over all queries since they are cached.

Paper:   H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models (Zhang et al., NeurIPS 2023),
         arXiv:2306.14048
Needs:   nothing
Maths:   a_j = sum over all queries so far of softmax(q k_j / sqrt(e));  if a head holds more than C = H + R entries, the R newest stay and,
         of the older ones, the H of the highest a_j; one that goes loses its a_j
Differs: of the release's four programs this is the one that drops entries, behind the prompt and each token; its benchmark program chooses
         by queries that come later, an upper bound. A key head goes by the mean of its query heads, where that program knows no shared
         keys. A share grows with the tokens seen, where the scripts take 0.1 + 0.1 of the prompt; `normalise` is kvpress's mean
         over the queries that could look.
Checked: FMInference/H2O@ac75c2a8, entries and sums of H2OKVCache_LayerWise over a prompt of 64 and 20 tokens, three splits: largest
         difference 0; its sums are in the model's precision, here float64 as ours.

>>> from hf_tokens import H2OConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, H2OConfig(capacity=6))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 6 * 32 * 4
True
"""

from dataclasses import dataclass

from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, option, protect, register


@dataclass(frozen=True)
class H2OConfig(MethodConfig):
    capacity: int = option(2048, ge=1, size=True, help="Entries that a head keeps, heavy hitters and newest ones (paper: K).")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    recent: float = option(0.5, ge=0, le=1, help="Part of them that are the newest ones.")
    normalise: bool = option(False, help="Score by the mean over the queries that could look, and not by the sum.")


@register("h2o", H2OConfig)
class H2O(CacheCompressor):
    chunks = False
    decodes = True

    def score(self, received: Tensor, mask: Tensor, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        got = received
        if self.config.normalise:
            looked = positions.masked_fill(~mask, 0).amax(dim=-1, keepdim=True) + 1 - positions
            got = received / (looked if looked.dim() == 3 else looked[:, None]).clamp(min=1)
        return protect(got, positions, newer, budget, newest=(self.config.recent * budget + 1e-9).floor())

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, self.config.capacity, self.config.budget)
