"""Expected attention: what later queries would read, if they are as those of the prompt, stays; no attention is looked at.

Paper:   Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution (Devoto et al., 2025),
         arXiv:2510.00636
Needs:   nothing
Maths:   mu, S = mean and covariance of the prompt's queries before they are turned by their places, without its first s;  R = mean of the
         rotations of the next f places;  m = R mu, C = R S R^T;  z_j = k_j m / sqrt(e) + k_j^T C k_j / (2 e);  p = softmax_j(z), without
         the first s, mean of the query heads on a key head;  score_j = (p_j + eps) |v_j|;  the first s and the highest stay
Differs: queries are turned back to one place by the block's own rotation, and not projected anew. `epsilon` is 0 as in the release's
         class; its benchmark has 0.01 and lets AdaKV share the budget out: put `AdaKVConfig(scorer="stack")` beside it. On SmolLM2, at a
         quarter of 12 documents, 0.01 finds 10 % of the lines again for 7 %, at a loss of 2.64 for 2.34. A budget is a share of the tokens
         seen, whatever stands for `compression_ratio` there. A generated token evicts nothing.
Checked: NVIDIA/kvpress@8bb29b9c, scores of ExpectedAttentionPress in two blocks of a Llama in float64, prompts of 23 to 200 tokens, each
         knob off and on: largest difference 2.2e-7 of the largest score; the same entries stay.

>>> from hf_tokens import ExpectedAttentionConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, ExpectedAttentionConfig(budget=0.5))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 8 * 16 * 4
True
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, option, protect, register


@dataclass(frozen=True)
class ExpectedAttentionConfig(MethodConfig):
    budget: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of the tokens seen that a head keeps (release: 1 - compression_ratio).")
    n_future_positions: int = option(512, ge=1, help="Places of later queries that are thought of.")
    n_sink: int = option(4, ge=0, help="First tokens, which stay, and whose queries are not counted.")
    use_covariance: bool = option(True, help="Count how queries differ, and not their mean alone.")
    use_vnorm: bool = option(True, help="Weigh by the norm of the values.")
    epsilon: float = option(0.0, ge=0, was={1: 0.01}, help="Added to what is expected, before it is weighed by that norm.")


@register("expected-attention", ExpectedAttentionConfig, version=2)
class ExpectedAttention(CacheCompressor):
    chunks = False

    def score(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        rotation: Any,
        real: Tensor,
        mask: Tensor,
        positions: Tensor,
        newer: Tensor,
        budget: Tensor,
    ) -> Tensor:
        c, single = self.config, lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
        end = positions.masked_fill(~mask, -1).flatten(1).amax(dim=1, keepdim=True)  # b 1
        counted = real & (end + real - real.flip(1).cumsum(dim=1).flip(1) >= c.n_sink)
        mean, spread = self.expect(single(queries), counted, real, rotation)  # b h e, b h e e
        k, g = single(keys), queries.shape[1] // keys.shape[1]
        z = torch.einsum("bkne,bkge->bkgn", k, mean.unflatten(1, (-1, g))) / k.shape[-1] ** 0.5
        if spread is not None:
            z = z + torch.einsum("bkgne,bkne->bkgn", k[:, :, None] @ spread.unflatten(1, (-1, g)), k) / (2 * k.shape[-1])
        there = mask & (positions >= c.n_sink)
        there = there[:, None, None] if there.dim() == 2 else there[:, :, None]
        score = z.masked_fill(~there, -torch.inf).softmax(dim=-1).nan_to_num(0.0).mean(dim=2)  # b k n
        score = (score + c.epsilon) * single(values).norm(dim=-1) if c.use_vnorm else score
        return protect(score, positions, newer, budget, first=c.n_sink)

    def expect(self, q: Tensor, counted: Tensor, real: Tensor, rotation: Any) -> tuple[Tensor, Tensor | None]:
        """Mean and covariance of the queries that are counted (b m), as if they stood at the next places behind the last real token."""
        places, count = rotation.places, counted.sum(dim=1).clamp(min=1)[:, None, None]
        last = places.masked_fill(~real, 0).amax(dim=1, keepdim=True)
        q, weight = rotation.turn(q, (last - places)[:, None]), counted[:, None, :, None]
        ahead = lambda x: rotation.ahead(x, self.config.n_future_positions)
        mean = (q * weight).sum(dim=2, keepdim=True) / count[..., None]
        if not self.config.use_covariance:
            return ahead(mean[:, :, 0]), None
        off = (q - mean) * weight
        return ahead(mean[:, :, 0]), ahead(ahead(off.mT @ off / count[..., None]).mT)

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, length, self.config.budget)
