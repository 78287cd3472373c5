"""RazorAttention: retrieval heads keep every key; the others keep the first and the last ones, and one that stands for all between.

Paper:   RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (Tang et al., ICLR 2025), arXiv:2407.15891
Needs:   calibration; before it no head is one that retrieves
Maths:   on random tokens that are repeated, a head's echo score is its attention to the same token in earlier repetitions, its induction
         score that to the token behind it; the top 1 % by echo and 14 % by induction are retrieval heads. The others keep N_0 sinks and
         L = max(S_0, N / C) newest of N tokens; of the N_d dropped ones k^ = mean k and v^ = mean v stay, and
         o = (N_d exp(q k^) v^ + sum_m exp(q k_m) v_m) / (N_d exp(q k^) + sum_m exp(q k_m))
Differs: `hf_tokens.calibrate(model, batches)` finds the heads; before that none is one. Where query heads share a key head, it has the
         best score of them. Scores are read off the last repetition. S_0 is 0, where the paper takes 4000 for its long contexts. What
         leaves the window while decoding joins k^ and v^. The paper's rule for ALiBi models is left out.
Checked: mindspore-ai/golden-stick@a50ddc93, `_select_top_heads` on 200 draws of scores: largest difference 0 heads; by reading, it sums
         the scores over all repetitions and has 4 times 2500 tokens.

>>> from hf_tokens import RazorAttentionConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, RazorAttentionConfig(sinks=1, compression=8))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes  # 2 newest, a sink and the one that stands for 13
8192
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from hf_tokens import CacheCompressor, Folded, SlackConfig, UnsupportedError, indices, option, register

AT_A_TIME = 256  # queries of a calibration that are looked at together


@dataclass(frozen=True)
class RazorAttentionConfig(SlackConfig):
    heads: tuple[int, ...] = option(
        (), ge=0, help="Retrieval heads, as place of the block among its own * key heads + head; calibration finds them."
    )
    key_heads: tuple[int, ...] = option((), ge=1, help="Key heads of each of its blocks among which calibration found them.")
    compression: float = option(5.0, ge=1, zero=1.0, help="Tokens for each one in the window of another head (paper: C).")
    buffer: int = option(0, ge=0, help="Least number of newest tokens that a head keeps (paper: S_0).")
    sinks: int = option(4, ge=0, help="First tokens that every head keeps (paper: N_0).")
    induction: float = option(0.14, ge=0, le=1, help="Share of the heads that are retrieval heads by their induction score.")
    echo: float = option(0.01, ge=0, le=1, help="Share of the heads that are retrieval heads by their echo score.")
    whole: str = option("nearest", choices=("nearest", "up"), was={1: "up"}, help="How a share of the heads becomes a whole number.")
    repeats: int = option(4, ge=2, help="How often the random tokens of calibration stand in a row.")


@register("razorattention", RazorAttentionConfig, version=2)
class RazorAttention(CacheCompressor):
    chunks = False
    decodes = True

    @classmethod
    def calibrate(cls, config: RazorAttentionConfig, records: dict[int, list[Tensor]]) -> RazorAttentionConfig:
        found = [torch.cat(batches).mean(dim=0) for _, batches in sorted(records.items())]  # for each block (k 2)
        best = torch.cat(found).argsort(dim=0, descending=True, stable=True)  # l*k 2
        count = math.ceil if config.whole == "up" else round
        chosen = [best[: count(share * len(best)), i].cpu() for i, share in enumerate((config.echo, config.induction))]
        heads, among = torch.cat(chosen).unique().tolist(), (len(block) for block in found)
        return dataclasses.replace(config, heads=tuple(heads), key_heads=tuple(among))

    def examine(self, scores: object, mask: Tensor) -> Tensor:
        batch, n = len(mask), mask.shape[-1]
        times = self.config.repeats
        if n % times or not bool(mask.all()):
            came = f"{n} tokens" if n % times else "a batch with padding"
            rule = f"RazorAttention is calibrated on random tokens that stand {times} times in each row"
            raise UnsupportedError(f"{rule}, got {came}. Repeat them so often, or set `repeats`.")
        query, found = torch.arange(n - n // times, n, device=mask.device), 0
        for some in query.split(AT_A_TIME):
            rows = scores.rows(some.expand(batch, -1))  # b h r n
            earlier = some[:, None] - n // times * torch.arange(1, times, device=mask.device)  # r j
            at = lambda keys, rows=rows: rows.gather(3, keys.expand(*rows.shape[:2], -1, -1)).sum(dim=(2, 3)) / len(query)
            found = found + torch.stack([at(earlier), at(earlier + 1)], dim=-1)  # b h 2
        return rearrange(found, "b (k g) s -> b k g s", k=self.dims.kv_heads).amax(dim=2)

    def score(self, positions: Tensor, newer: Tensor) -> Tensor:
        return torch.where(positions < self.config.sinks, torch.inf, -newer.double())

    def budget(self, length: int, seen: int) -> list[int]:
        c, dims = self.config, self.dims
        few = min(length, c.sinks + max(c.buffer, math.floor(seen / c.compression + 1e-9)) + 1)
        first = self.first_head() if c.heads else 0
        return [length if first + head in c.heads else few for head in range(dims.kv_heads)]

    def first_head(self) -> int:
        """The number of this block's first head among those of all blocks."""
        among, here, place = self.config.key_heads, self.dims.kv_heads, self.dims.place
        other = self.model_first.dims.kv_heads if place >= len(among) else among[place]
        if other != here:
            rule = "RazorAttention.heads are numbers among the key heads that the caches of its blocks hold"
            got = f"{other} for a block where block {self.dims.layer} holds {here}"
            raise UnsupportedError(f"{rule}, got {got}. Calibrate the method on this model.")
        return sum(among[:place]) if among else place * here

    def fold(self, states: Callable, sizes: Tensor, stays: Tensor, goes: Tensor, positions: Tensor) -> Folded:
        sizes, positions = (x if x.dim() == 3 else x[:, None].expand_as(goes) for x in (sizes, positions))
        found, oldest = (stays & (positions >= self.config.sinks)).max(dim=-1, keepdim=True)
        there, index = found & goes.any(dim=-1, keepdim=True), indices(goes)
        counts = torch.cat([there, goes.gather(-1, index)], dim=-1)
        index = torch.cat([oldest, index], dim=-1)  # b k r
        weight = sizes.gather(-1, index) * counts
        total = weight.sum(dim=-1, keepdim=True)
        mean = lambda x: ((weight[..., None] * x).sum(dim=2, keepdim=True) / total.clamp(min=1)[..., None]).to(x.dtype)
        sizes = sizes.scatter(-1, oldest, torch.where(there, total.to(sizes.dtype), sizes.gather(-1, oldest)))
        return Folded(torch.where(there, oldest, -1), *map(mean, states(index)), sizes)
