"""D2O: layers of even attention keep more of their KV cache, and what is evicted joins the key that it is most like, if it is like it.

Paper:   D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language Models (Wan et al., ICLR 2025),
         arXiv:2406.13035
Needs:   nothing
Maths:   F_l = mean_h scaled Var_j sum_i A_l[h, i, j] of the prompt, scaled by its least and most over the heads;  layer shares by
         softmax(-F_l);  the first 4, the M newest and the N of most summed attention stay, N : M = 1 : 1;  u_i = max_j cos(k_i, k_j) of
         an evicted i and a kept j;  tau_0 = mean_i u_i, then tau_t = beta u_t + (1 - beta) tau_t-1;  where u_i >= tau, i joins its j:
         k_j <- (k_j + sum_i u_i k_i) / (1 + |i|), and v_j with the same weights;  the blocks 0, 1 and the last keep all
Differs: `rule="paper"` is the paper's text: Var over all heads, by its mean over the layers, and weights exp(u_i) beside e. What a layer
         has above all its tokens goes to the others. Each key head has a threshold of its own and scores, keeps and merges for itself;
         the release compares the mean over heads of what they drop in the same order. It compresses behind the first token, ours
         behind the prompt. In models of fewer than four blocks all are compressed.
Checked: AIoT-MLSys-Lab/D2O@12c99d8a, `D2O_LayerKVCache` behind a prompt of 36 tokens and twelve more, two equal
         heads: largest difference 2.2e-16; the layer shares by reading.

>>> from hf_tokens import D2OConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, D2OConfig(budget=0.25))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes <= (3 + 0.25) * 2 * 2 * 16 * 32 * 4
True
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hf_tokens_kernels import Slots, match
from torch import Tensor

from hf_tokens import CacheCompressor, Folded, MethodConfig, heavy_hitters, indices, option, register, share_out


@dataclass(frozen=True)
class D2OConfig(MethodConfig):
    budget: float = option(0.4, gt=0, le=1, zero=1.0, help="Mean share of the tokens that a layer keeps, of those it acts on.")
    recent: float = option(0.5, ge=0, le=1, was={1: 0.25}, help="Part of a layer's budget that the newest tokens get (paper: M / (N + M)).")
    beta: float = option(0.5, ge=0, le=1, was={1: 0.7}, help="Weight of the newest similarity in the threshold (paper: beta).")
    sinks: int = option(4, ge=0, was={1: 0}, help="First tokens that are heavy hitters whatever attention they got.")
    spare: bool = option(True, was={1: False}, help="Leave the blocks 0, 1 and the last as they are, if there are four.")
    rule: str = option("release", choices=("release", "paper"), was={1: "paper"}, help="Whose layer shares and weights of a merge.")


@register("d2o", D2OConfig, version=2)
class D2O(CacheCompressor):
    chunks = False
    decodes = observes_prompts = True
    allots = True

    @classmethod
    def default_layers(cls, config: D2OConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(2, layers - 1)) if config.spare and layers > 3 else super().default_layers(config, layers)

    def observe(self, received: Tensor, mask: Tensor) -> Tensor | None:
        mask = mask if mask.dim() == 3 else mask[:, None].expand_as(received)
        if self.config.rule == "paper":
            return self.variance(received.flatten(1), mask.flatten(1), 0)
        uneven = self.variance(received, mask, 1)  # b k
        least, most = uneven.amin(dim=1, keepdim=True), uneven.amax(dim=1, keepdim=True)
        return ((uneven - least) / (most - least + 1e-6)).mean(dim=1)

    @staticmethod
    def variance(received: Tensor, there: Tensor, less: int) -> Tensor:
        """Of what is there, over the last axis; the divisor is the count less a number."""
        sums, count = received.double() * there, there.sum(dim=-1)
        off = torch.where(there, sums - sums.sum(dim=-1, keepdim=True) / count.clamp(min=1)[..., None], 0)
        return off.square().sum(dim=-1) / (count - less).clamp(min=1)

    def score(self, received: Tensor, newer: Tensor, budget: Tensor, positions: Tensor) -> Tensor:
        score = heavy_hitters(received, newer, budget, self.config.recent)
        first = (positions if positions.dim() == 3 else positions[:, None]) < self.config.sinks
        return torch.where(first & score.isfinite(), torch.finfo(score.dtype).max, score)

    def budget(self, length: int, seen: int) -> int:
        return length

    def allot(self, scores: dict[int, Tensor], notes: dict[int, Tensor]) -> dict[int, Tensor]:
        uneven = torch.stack(list(notes.values()), dim=1)  # b l
        scale = uneven.mean(dim=1, keepdim=True).clamp(min=1e-30) if self.config.rule == "paper" else 1
        return dict(zip(notes, share_out((-uneven / scale).softmax(dim=1), self.config.budget).unbind(dim=1), strict=True))

    def fold(self, keys: Tensor, states: Callable, stays: Tensor, goes: Tensor, record: dict, prefill: bool) -> Folded:
        index = indices(goes)  # b k g
        there = goes.gather(-1, index)
        gone = states(index)
        heads = [x.flatten(0, 1) for x in (gone[0], keys, there, stays)]
        alike, nearest = (x.view_as(there) for x in match(*heads[:2], src_mask=heads[2], dst_mask=heads[3]))  # b k g
        alike = alike.to(keys.dtype)
        tau = self.threshold(torch.where(there, alike, 0).sum(dim=-1) / there.sum(dim=-1), record, prefill)
        joins, plain = there & (alike >= tau[..., None]), self.config.rule == "release"
        own, weight = (1.0, torch.where(joins, alike, 0)) if plain else (math.e, torch.where(joins, alike.exp(), 0))
        target, slots = self.targets(torch.where(joins, nearest, -1).flatten(0, 1))
        taken = target.view_as(nearest)  # b k g: each target once, then -1
        added = (joins.to(weight) if plain else weight).flatten(0, 1)[..., None]
        total = own + slots.merge(added, reduce="sum").view_as(weight)[..., None]
        joined = [
            (own * old + slots.merge(new.flatten(0, 1), weight.flatten(0, 1), reduce="sum").view_as(old)) / total
            for old, new in zip(states(taken.clamp(min=0)), gone, strict=True)
        ]
        return Folded(taken, *joined)

    @staticmethod
    def targets(into: Tensor) -> tuple[Tensor, Slots]:
        """Each entry that others join, once, and -1 behind those; and the place there of each that joins: into (r g), -1 for none."""
        (entry, order), many = into.sort(dim=-1, descending=True, stable=True), into.shape[-1]
        again = torch.zeros_like(entry, dtype=torch.bool)
        again[:, 1:] = entry[:, 1:] == entry[:, :-1]
        place = ((~again).cumsum(dim=-1) - 1).masked_fill(entry < 0, many)  # the last one collects those that join none
        target = into.new_full((len(into), many + 1), -1).scatter(-1, place, entry)[:, :many]
        slot = torch.empty_like(into).scatter_(-1, order, place.masked_fill(place == many, -1))
        return target, Slots(slot, many)

    def threshold(self, alike: Tensor, record: dict, prefill: bool) -> Tensor:
        """The moving mean of how alike evicted keys are to kept ones, (b k); NaN where none has gone yet."""
        old = record.get("threshold")
        if old is not None:
            moved = torch.where(old.isnan() | prefill, alike, self.config.beta * alike + (1 - self.config.beta) * old)
            alike = torch.where(alike.isnan(), old, moved)
        record["threshold"] = alike
        return alike
