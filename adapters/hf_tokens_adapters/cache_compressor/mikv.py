"""MiKV: no key is evicted; the unimportant ones are held in a few bits, with outlier channels balanced between keys and queries.

Paper:   No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision Quantization (Yang et al., 2024),
         arXiv:2402.18096
Needs:   nothing
Maths:   what a heavy-hitter policy would evict is rounded, token by token in groups of channels:
         x ~ s round((x - z) / s) + z, z = min x, s = (max x - min x) / (2^B - 1);  keys are multiplied by b before that and queries
         divided by it, b_c = sqrt(max_t |q_t,c| / max_t |k_t,c|) over the prompt, so that q k stays what it is
Differs: the balancer divides the keys when they are read, instead of the queries; under grouped attention it takes the largest query of
         the group. What went to few bits stays there. Groups are half a head, the policy is H2O, importance 20 % where the paper varies it.
Checked: no public code found (2026-11-29); the paper leaves open the share of the newest tokens in its policy, the importance ratio of a
         model and the width of a group.

>>> from hf_tokens import MiKVConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, MiKVConfig(importance=0.25, bits=2))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes <= 4 * 2 * 2 * 16 * 32 * 4 * 0.8
True
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from hf_tokens import CacheCompressor, ConfigError, Holding, MethodConfig, Quantized, heavy_hitters, option, register


@dataclass(frozen=True)
class MiKVConfig(MethodConfig):
    importance: float = option(0.2, gt=0, le=1, zero=1.0, help="Share of the tokens that are important (paper: importance ratio).")
    bits: int = option(2, ge=1, le=8, help="Bits of an entry that is not important.")
    high_bits: int = option(16, ge=2, le=16, zero=16, help="Bits of an important entry; above 8 it stays as it is.")
    groups: int = option(2, ge=1, help="Groups of channels of a head with a scale of their own.")
    recent: float = option(0.5, ge=0, le=1, help="Part of the important entries that are the newest ones.")
    balance: bool = option(True, help="Balance the channels between keys and queries.")


@register("mikv", MiKVConfig)
class MiKV(CacheCompressor):
    chunks = False
    decodes = True
    ignores = property(lambda self: () if self.config.balance else ("queries",))

    @classmethod
    def check(cls, config: MiKVConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.high_bits <= config.bits:
            rule = f"MiKVConfig.high_bits must be above bits, which is {config.bits}"
            raise ConfigError(f"{rule}, got {config.high_bits}. Raise it, or lower bits.")

    def score(self, received: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        return heavy_hitters(received, newer, budget, self.config.recent)

    def budget(self, length: int, seen: int) -> int:
        return min(length, max(1, int(self.config.importance * seen + 1e-9)))

    def hold(self, queries: Tensor | None, states: Callable, real: Tensor, mask: Tensor, record: dict) -> Holding:
        c = self.config
        if c.balance and "balance" not in record:
            keys = states()[0]
            mask = mask if mask.dim() == 3 else mask[:, None]
            queries = rearrange(queries, "b (k g) m e -> b k (g m) e", k=keys.shape[1])
            real = real[:, None].repeat(1, 1, queries.shape[2] // real.shape[1])
            most = [(x.abs() * there[..., None]).amax(dim=2) for x, there in ((queries, real), (keys, mask))]  # b k e
            whole = (most[0] > 0) & (most[1] > 0)
            record["balance"] = torch.where(whole, (most[0] / torch.where(whole, most[1], 1)).sqrt(), 1)
        form = lambda bits, width: Quantized(bits, width, -(-width // c.groups))
        both = lambda bits: tuple(form(bits, width) for width in states.widths)
        return Holding(*both(c.bits), record.get("balance"), None if c.high_bits > 8 else both(c.high_bits))
