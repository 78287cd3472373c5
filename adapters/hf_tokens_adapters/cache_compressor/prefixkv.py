"""PrefixKV: every layer keeps the fewest keys that hold the same share of its attention, so each layer gets a cache of its own size.

Paper:   PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation (Wang et al.,
         NeurIPS 2025), arXiv:2412.03409
Needs:   calibration; without it each layer keeps the same share, or measures its own in each prompt (`online`)
Maths:   I_l = mean_h sum_q A_l[h, q, :] / |.|_1, sorted;  o_l(p) = min {o : the first o of I_l sum to p};  R_l = o_l(p) / n for the
         largest p, by binary search, with sum_l o_l(p) <= r L n;  the first and the newest entries stay beside the prefix;  decoding
         drops the entry at one place of the cache, `distance` in front of the prompt's end, if a layer outgrows R_l
Differs: without calibration (`hf_tokens.calibrate`) and `online` every layer keeps the share r. The search ends at the budget, where the
         release stops within 5 keys of it and scales the rest. A later turn of a chat scores all by its own queries.
Checked: THU-MIG/PrefixKV@39b72656, `PrefixKV` at sizes it chose itself, first 1 and 4, 41 tokens and 22 more: largest difference 0
         entries behind the prompt and 1 while decoding: it rounds the entries that go down, and so holds one more.

>>> from hf_tokens import PrefixKVConfig, calibrate, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, PrefixKVConfig(budget=0.5))
>>> round(sum(calibrate(model, [base.inputs])["default.0"]["ratios"]), 2) <= 4 * 0.5
True
>>> measure(model, **base.inputs, use_cache=True).kv_bytes <= 4 * 2 * 2 * 16 * 32 * 4 // 2
True
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, ConfigError, MethodConfig, option, register

ROUNDS = 60  # of the binary search: p is then exact in float64


@dataclass(frozen=True)
class PrefixKVConfig(MethodConfig):
    budget: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of all keys that stay (paper: compression ratio r).")
    ratios: tuple[float, ...] = option((), gt=0, le=1, zero=(), help="Share in each of its blocks (paper: R_l), as calibration found it.")
    online: bool = option(False, help="Search the shares anew for each sample, at the end of its prompt.")
    start_size: int = option(4, ge=0, was={1: 0}, help="First entries that always stay (release: 4, its scripts 1).")
    protect_size: int = option(1, ge=0, was={1: 0}, help="Newest entries of a prompt that always stay.")
    distance: int = option(25, ge=1, help="Distance from the newest entry to the one that goes while decoding.")
    anchor: str = option(
        "prompt",
        choices=("prompt", "newest"),
        was={1: "newest"},
        help="Whether the distance counts from the end of the prompt, or moves on.",
    )


def sizes(scores: dict[int, Tensor], ratio: float, protected: int = 0) -> dict[int, Tensor]:
    """Keys that each layer keeps, (b), of scores (b n), or (b k n) where heads differ, that are -inf where there is no key: the largest p
    whose prefixes fit the budget, with so many protected ones beside each."""
    held, count = {}, {}
    for layer, score in scores.items():
        there = score.isfinite()
        order = score.double().masked_fill(~there, 0).sort(dim=-1, descending=True).values
        order, count[layer] = (order, there.sum(dim=1)) if order.dim() == 2 else (order.mean(dim=1), there.sum(dim=-1).amax(dim=1))
        held[layer] = order.cumsum(dim=1) / order.sum(dim=1, keepdim=True)
    budget = (ratio * sum(count.values()) + 1e-9).floor()  # b; at p = 0 each layer keeps one key

    def prefixes(p: Tensor) -> dict[int, Tensor]:
        found = {layer: (share < p[:, None] - 1e-12).sum(dim=1) + 1 + protected for layer, share in held.items()}
        return {layer: torch.where(p >= 1, count[layer], size.minimum(count[layer])) for layer, size in found.items()}

    high = torch.ones_like(budget, dtype=torch.float64)
    low = (sum(prefixes(high).values()) <= budget).double()
    for _ in range(ROUNDS):
        p = (low + high) / 2
        fits = sum(prefixes(p).values()) <= budget
        low, high = torch.where(fits, p, low), torch.where(fits, high, p)
    return prefixes(low)


def mean_by_place(received: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """What each token (b k n) received, its mean over the heads that hold it."""
    place = (positions if positions.dim() == 3 else positions[:, None].expand_as(mask)).clamp(min=0)  # b k n
    sums = lambda x: received.new_zeros(len(mask), int(place.max()) + 1).scatter_add(1, place.flatten(1), x.flatten(1))
    total, count = sums(received * mask), sums(mask.to(received.dtype))
    return (total / count.clamp(min=1)).gather(1, place.flatten(1)).view_as(received)


@register("prefixkv", PrefixKVConfig, version=2)
class PrefixKV(CacheCompressor):
    chunks = False
    decodes = sums_scores = observes_prompts = True
    of_prompts = ("scores",)
    allots = property(lambda self: self.config.online)

    @classmethod
    def check(cls, config: PrefixKVConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if len(config.ratios) not in (0, len(chosen)):
            rule = f"PrefixKVConfig.ratios must have one value for each of {len(chosen)} blocks"
            raise ConfigError(f"{rule}, got {len(config.ratios)}. Give one a block, or leave them out.")

    @classmethod
    def calibrate(cls, config: PrefixKVConfig, records: dict[int, list[Tensor]]) -> PrefixKVConfig:
        found = {layer: [] for layer in sorted(records)}
        for batch in zip(*(records[layer] for layer in found), strict=True):
            scores = dict(zip(found, batch, strict=True))
            for layer, size in sizes(scores, config.budget, config.start_size + config.protect_size).items():
                found[layer] += (size / scores[layer].isfinite().sum(dim=1).double()).tolist()
        return dataclasses.replace(config, ratios=tuple(sum(shares) / len(shares) for shares in found.values()))

    def examine(self, scores: object, positions: Tensor, mask: Tensor) -> Tensor:
        if mask.dim() == 2:
            received = scores.columns().mean(dim=1)
        else:  # beside a policy that keeps other tokens in each head
            received = mean_by_place(scores.columns(heads="key"), positions, mask)
        return received.masked_fill(~mask, -torch.inf)

    def observe(self, scores: object, mask: Tensor, positions: Tensor, record: dict) -> Tensor | None:
        record["prompt"] = torch.where(mask, positions, -1).flatten(1).amax(dim=1)  # b
        record.pop("place", None)
        return self.examine(scores, positions, mask) if self.config.online else None

    def score(self, scores: object, mask: Tensor, newer: Tensor, positions: Tensor, record: dict, prefill: bool) -> Tensor:
        c = self.config
        if prefill:
            return self.examine(scores, positions, mask).masked_fill((positions < c.start_size) | (newer < c.protect_size), torch.inf)
        if c.anchor == "newest":
            return torch.where(newer >= c.distance, newer, 2 * mask.shape[-1] - newer).double()
        place = mask.cumsum(dim=-1) - 1
        if "place" not in record:
            size = (mask & (positions <= record["prompt"].view(-1, *[1] * (mask.dim() - 1)))).sum(dim=-1, keepdim=True)
            record["place"] = torch.where(size > c.distance, size - c.distance, size // 2)
        fixed = record["place"] if record["place"].dim() == mask.dim() else record["place"][:, None]  # heads may come to differ
        return torch.where(place >= fixed, place, 3 * mask.shape[-1] - place).double()

    def budget(self, length: int, seen: int) -> int:
        c, dims = self.config, self.dims
        blocks = sorted(range(dims.layers) if c.layers is None else {layer % dims.layers for layer in c.layers})
        share = c.ratios[blocks.index(dims.layer)] if c.ratios else c.budget
        return min(length, max(1, c.start_size + c.protect_size, math.floor(share * seen + 1e-9)))

    def allot(self, scores: dict[int, Tensor], notes: dict[int, Tensor]) -> dict[int, Tensor]:
        return sizes(notes, self.config.budget, self.config.start_size + self.config.protect_size)
