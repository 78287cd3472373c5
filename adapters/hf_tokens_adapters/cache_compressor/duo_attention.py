"""DuoAttention: heads that look far back keep every entry; the others stream, and keep the first ones and the newest.

Paper:   DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads (Xiao et al., ICLR 2025), arXiv:2410.10819
Needs:   calibration, or the gates of the release
Maths:   a gate a in [0, 1] for each key head of all blocks: those at or above the quantile `sparsity` of all gates keep the whole cache,
         the others s sinks and the r newest entries;  nothing is dropped in the prompt's own pass
Differs: the gates are given, such as those that the release ships, or measured: `hf_tokens.calibrate(model, batches)` takes for a the
         attention of a head to what it would lose as a streaming one, mean over the queries, highest of its group. The release learns
         them, by a blend a full + (1 - a) streaming of both outputs on passkeys hidden in text, which is left out. Without gates all
         heads stream. Of equal gates the earlier head keeps all, where the release adds noise. A prompt in one pass only.
Checked: mit-han-lab/duo-attention@fe93c314, sparsify_attention_heads on the six tables of gates that it ships, seven shares each: largest
         difference 0 heads in how many keep all, and none in which but among gates 1e-12 apart, where its noise draws. What a
         streaming head keeps, by reading.

>>> from hf_tokens import DuoAttentionConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, DuoAttentionConfig(sinks=1, recent=3))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 4 * 32 * 4
True
"""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, SlackConfig, UnsupportedError, option, register

AT_A_TIME = 256  # queries of a calibration that are looked at together


@dataclass(frozen=True)
class DuoAttentionConfig(SlackConfig):
    gates: tuple[float, ...] = option(
        (), ge=-1, le=2, help="The gate of each key head, block by block; below 0 and above 1 they count as these. Calibration finds them."
    )
    sparsity: float = option(0.5, ge=0, le=1, zero=0.0, help="Quantile of the gates below which a head streams: the share of such heads.")
    sinks: int = option(128, ge=0, example=2, help="First tokens that a streaming head keeps (release: sink_size).")
    recent: int = option(256, ge=1, example=4, help="Newest tokens that it keeps (release: recent_size).")


@register("duo-attention", DuoAttentionConfig)
class DuoAttention(CacheCompressor):
    chunks = False
    decodes = by_head = True

    @classmethod
    def calibrate(cls, config: DuoAttentionConfig, records: dict[int, list[Tensor]]) -> DuoAttentionConfig:
        gates = torch.cat([torch.cat(batches).mean(dim=0) for _, batches in sorted(records.items())])
        return dataclasses.replace(config, gates=tuple(gates.tolist()))

    def examine(self, scores: object, mask: Tensor, positions: Tensor) -> Tensor:
        c, (batch, n), far = self.config, mask.shape, 0
        if n <= c.sinks + c.recent:
            rule = f"DuoAttention is calibrated on texts longer than its sinks and newest tokens, {c.sinks + c.recent}"
            raise UnsupportedError(f"{rule}, got {n} tokens. Take longer ones, or keep fewer.")
        for some in torch.arange(n, device=mask.device).split(AT_A_TIME):
            rows = scores.rows(some.expand(batch, -1))  # b h r n
            ago = positions[:, some, None] - positions[:, None]
            lost = (positions[:, None] >= c.sinks) & (ago >= c.recent) & mask[:, some, None]  # b r n
            far = far + (rows * lost[:, None]).sum(dim=(2, 3))
        far = far / mask.sum(dim=1, keepdim=True)  # b h
        return far.unflatten(1, (self.dims.kv_heads, -1)).amax(dim=2)

    def score(self, positions: Tensor, newer: Tensor) -> Tensor:
        return torch.where(positions < self.config.sinks, torch.inf, -newer.double())

    def budget(self, length: int, seen: int) -> list[int]:
        few = min(length, self.config.sinks + self.config.recent)
        return [length if whole else few for whole in self.keeps_all()]

    def keeps_all(self) -> list[bool]:
        """Whether each key head of this block keeps every entry."""
        c, heads, gates = self.config, self.dims.kv_heads, self.config.gates
        if c.sparsity in (0, 1) or not gates:
            return [c.sparsity == 0] * heads
        if len(gates) != heads * self.dims.places:
            rule = "DuoAttention.gates has one for each key head of each of its blocks"
            got = f"{len(gates)} for {self.dims.places} blocks of {heads}"
            raise UnsupportedError(f"{rule}, got {got}. Take those of this model, or calibrate the method on it.")
        many = len(gates) - math.ceil(c.sparsity * (len(gates) - 1) - 1e-9)
        order = torch.tensor(gates).clamp(0, 1).argsort(descending=True, stable=True)
        whole = set(order[:many].tolist())
        first = self.dims.place * heads
        return [first + head in whole for head in range(heads)]
