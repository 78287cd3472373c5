"""KIVI: nothing is evicted; keys are rounded to two bits by channel, over groups of tokens, and values by token, over groups of channels.

Paper:   KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (Liu et al., ICML 2024), arXiv:2402.02750
Needs:   nothing
Maths:   x ~ s round((x - z) / s) + z, z = min x, s = (max x - min x) / (2^B - 1), over G tokens of one channel of the rotated keys, and
         over G channels of one value;  of n keys the last n mod R stay as they are, and R at once are rounded when so many wait;  the
         last R values stay, and the oldest is rounded as one more comes
Differs: each entry of a key head also holds the number of its group, 32 bits: at G = 32 and 128 channels a number of a key has 3.25 bits
         in float16 (2, 1 for scale and least value, 0.25) and 4.25 in float32, one of a value 3 and 4; at G = 128, 2.5 and 2.25 in
         float16. A constant group is exact, where the release divides by 0. Groups count from a row's first real token, or from the
         first entry that a compressor in front left; the scales of a group stay until its last entry goes. Another turn of several
         tokens rounds as many times R as wait. 1 to 8 bits.
Checked: jy-yuan/KIVI@876b4d2d, quant_and_pack_kcache and _vcache with their unpacking, 2 and 4 bits, three shapes: largest difference
         0 in codes, scales and least values, in what is read 9e-16 in float64 and 4e-3 in float16 (one rounding fewer). The
         residual's rule by reading.

>>> from hf_tokens import KIVIConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, KIVIConfig(group=4, residual=4))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes <= 4 * 2 * 2 * 16 * 32 * 4 * 0.8
True
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, ConfigError, Holding, MethodConfig, Plain, Quantized, QuantizedTokens, option, register


@dataclass(frozen=True)
class KIVIConfig(MethodConfig):
    key_bits: int = option(2, ge=1, le=16, zero=16, help="Bits of a number of a key; above 8 keys stay as they are (release: k_bits).")
    value_bits: int = option(2, ge=1, le=16, zero=16, help="Bits of a number of a value, likewise (release: v_bits).")
    group: int = option(32, ge=1, example=4, help="Tokens of a group of keys, and channels of a group of a value (paper: G).")
    residual: int = option(32, ge=1, example=4, help="Newest values that stay as they are, and keys that are rounded at once (paper: R).")


@register("kivi", KIVIConfig)
class KIVI(CacheCompressor):
    chunks = False
    decodes = by_head = True

    @classmethod
    def check(cls, config: KIVIConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.residual % config.group:
            rule = f"KIVIConfig.residual must be a multiple of group, which is {config.group}"
            raise ConfigError(f"{rule}, got {config.residual}. Choose another, such as {config.group}.")

    def score(self, newer: Tensor) -> Tensor:
        return -newer.float()

    def budget(self, length: int, seen: int) -> int:
        return min(length, self.config.residual)

    def hold(self, states: Callable, goes: Tensor, mask: Tensor, record: dict) -> Holding | None:
        c, (key_width, value_width) = self.config, states.widths
        values = Quantized(c.value_bits, value_width, c.group) if c.value_bits <= 8 else Plain()
        if c.key_bits > 8:
            return Holding(Plain(), values) if c.value_bits <= 8 else None
        there = (mask if mask.dim() == 3 else mask[:, None]).expand_as(goes)
        done = record.entries.get("rounded", torch.zeros_like(there)).bool()
        waits, keys = there & ~done, QuantizedTokens(c.key_bits, key_width, c.group)
        many = waits.sum(dim=-1, keepdim=True)
        if int(many.max()) < c.residual:
            record.entries["rounded"] = done
            return Holding(keys, values)
        early = waits & (waits.cumsum(dim=-1) <= many - many % c.residual)
        record.entries["rounded"] = done | early
        return Holding(keys, values, kept=(keys, Plain()), early=early)
