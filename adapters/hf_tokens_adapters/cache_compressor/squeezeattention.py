"""SqueezeAttention: layers whose attention hardly turns the tokens give most of their KV budget to the others.

Paper:   SqueezeAttention: 2D Management of KV-Cache in LLM Inference via Layer-wise Optimal Budget (Wang, Cui & Gan, ICLR 2025),
         arXiv:2404.04793
Needs:   nothing
Maths:   c_l = mean_t cos(A_l,t, A_l,t + SelfAttention(A_l)_t) over the prompt;  k-means of the L numbers c_l into 3 groups, G3 the one
         of the largest;  b_l = p b in G3, (L b - |G3| p b) / (L - |G3|) elsewhere;  in its b_l each layer runs any eviction policy
Differs: k-means is solved exactly (it is one-dimensional), for each row of the batch. b is a share of the tokens seen, where the release
         counts those of the prompt, so a layer grows while it decodes. What a layer has above all its tokens goes to the others, so
         that the bytes are those of b (0.25 held 0.18); `surplus="lost"` keeps none of it, the release fills it later. The paper
         takes the best of three policies for each model, and p from 0.3 to 0.4; the release has a window and sinks.
Checked: hetailang/SqueezeAttention@a1933d18, scikit-learn's k-means and the release's budgets, 60 draws of 32
         numbers: largest difference 5.6e-17 where k-means finds the best clustering, as it did 30 times with the release's one start;
         sinks and window by reading.

>>> from hf_tokens import SqueezeAttentionConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, SqueezeAttentionConfig(budget=0.5, sinks=1))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes <= 4 * 2 * 2 * 16 * 32 * 4 // 2
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hf_tokens import CacheCompressor, SlackConfig, heavy_hitters, option, register, share_out

AT_A_TIME = 128  # tokens whose states stand in float64 together
DECIMALS = 6  # of the numbers that are told apart: what lies behind them is rounding, and makes no group


@dataclass(frozen=True)
class SqueezeAttentionConfig(SlackConfig):
    budget: float = option(0.4, gt=0, le=1, zero=1.0, help="Mean share of the tokens that a layer keeps (paper: b_init).")
    p: float = option(0.35, gt=0, le=1, zero=1.0, help="Part of its budget that a layer of the least important group keeps (paper: p).")
    groups: int = option(3, ge=2, help="Groups of layers (paper: 3).")
    policy: str = option(
        "sinks", choices=("window", "sinks", "heavy_hitters"), was={1: "heavy_hitters"}, help="What is kept within a layer."
    )
    surplus: str = option("shared", choices=("shared", "lost"), was={1: "lost"}, help="What becomes of a share above 1.")
    sinks: int = option(4, ge=0, help="First tokens that the policy `sinks` keeps beside the recent ones.")
    recent: float = option(0.5, ge=0, le=1, help="Part of its budget that the policy `heavy_hitters` gives to the most recent tokens.")


def top_group(values: Tensor, groups: int) -> Tensor:
    """Of numbers (b n), those in the highest group of the best k-means clustering, (b n) bool."""
    n = values.shape[1]
    values = values.double().round(decimals=DECIMALS)
    order = values.sort(dim=1).values
    sums, squares = (torch.nn.functional.pad(x.cumsum(dim=1), (1, 0)) for x in (order, order.square()))  # b n+1
    place = torch.arange(n + 1, device=values.device)
    size = (place[None, :] - place[:, None]).clamp(min=1)
    between = lambda total: total[:, None, :] - total[:, :, None]  # b i j: of the numbers i .. j-1
    cost = between(squares) - between(sums).square() / size
    cost = cost.masked_fill(place[:, None] >= place[None, :], torch.inf)
    best = cost[:, 0]  # b j: one group of the first j
    start = torch.zeros_like(values[:, 0], dtype=torch.long)
    for _ in range(min(groups, n) - 1):
        best, split = (best[:, :, None] + cost).min(dim=1)
        start = split[:, n]
    return values >= order.gather(1, start[:, None])


@register("squeezeattention", SqueezeAttentionConfig, version=2)
class SqueezeAttention(CacheCompressor):
    chunks = False
    decodes = observes_prompts = True
    of_prompts = ("entered", "attended")
    allots = True
    ignores = property(lambda self: () if self.config.policy == "heavy_hitters" else ("received",))

    def observe(self, entered: Tensor, attended: Tensor, real: Tensor) -> Tensor:
        pairs = zip(entered.split(AT_A_TIME, dim=1), attended.split(AT_A_TIME, dim=1), strict=True)
        alike = torch.cat([cosine_similarity(old.double(), new.double(), dim=-1) for old, new in pairs], dim=1)  # b m
        return (alike * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)

    def score(self, positions: Tensor, newer: Tensor, received: Tensor | None, budget: Tensor) -> Tensor:
        c = self.config
        if c.policy != "heavy_hitters":
            first = positions < (c.sinks if c.policy == "sinks" else 0)
            return torch.where(first, torch.inf, positions.double())
        return heavy_hitters(received, newer, budget, c.recent)

    def budget(self, length: int, seen: int) -> int:
        return length

    def allot(self, scores: dict[int, Tensor], notes: dict[int, Tensor]) -> dict[int, Tensor]:
        c, alike = self.config, torch.stack(list(notes.values()), dim=1)  # b l
        least = top_group(alike, c.groups)
        count, layers = least.sum(dim=1, keepdim=True).double(), alike.shape[1]
        others = c.budget * (layers - count * c.p) / (layers - count).clamp(min=1)
        given = torch.where(least, c.budget * torch.where(count < layers, count.new_tensor(c.p), 1), others)
        given = share_out(given, c.budget) if c.surplus == "shared" else given.clamp(max=1)
        return dict(zip(notes, given.unbind(dim=1), strict=True))
