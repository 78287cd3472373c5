"""StreamingLLM: the first tokens, on which attention rests, and the newest ones stay in the cache; what lies between goes.

Paper:   Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024), arXiv:2309.17453
Needs:   nothing
Maths:   of n entries the first s and the last C - s stay, in every block and head, behind the prompt and behind each token;  keys are
         turned by their place in the cache:  only differences of places count, so each of the first s is turned on by R(g), where g of
         those behind it have gone, from the key as it came
Differs: `shift=False` leaves keys where they stood, as in kvpress, for models that tell places otherwise; beyond the length that a model
         was trained for it fails. The release rotates all keys anew for each token, and its chat also makes room in front of a
         new turn. A long prompt is read whole before it is cut, as in its programs.
Checked: mit-han-lab/streaming-llm@2e504260, entries of StartRecentKVCache and logits of a Llama with its shifted attention behind prompts
         of 9 to 37 and 40 tokens: largest difference 0 entries and 2.2e-7 of 1.3, the single precision of the model's tables.

>>> from hf_tokens import StreamingLLMConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, StreamingLLMConfig(capacity=6, sinks=2))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 6 * 16 * 4
True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tokens import CacheCompressor, Folded, SlackConfig, allowance, check_capacity, option, protect, register


@dataclass(frozen=True)
class StreamingLLMConfig(SlackConfig):
    capacity: int = option(2004, ge=1, size=True, help="Entries that a head keeps, the sinks among them (paper: cache size).")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    sinks: int = option(4, ge=0, help="First tokens that stay (paper: attention sinks).")
    shift: bool = option(True, was={1: False}, help="Turn keys to their places among those that are left.")


@register("streaming-llm", StreamingLLMConfig, version=2)
class StreamingLLM(CacheCompressor):
    chunks = False
    decodes = True
    ignores = property(lambda self: () if self.folds(self.config) else ("rotation",))

    @classmethod
    def folds(cls, config: StreamingLLMConfig) -> bool:
        return config.shift and config.sinks > 0

    @classmethod
    def check(cls, config: StreamingLLMConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        check_capacity(config, config.capacity, config.budget, config.sinks)

    def score(self, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        return protect(-newer.double(), positions, newer, budget, first=self.config.sinks)

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, self.config.capacity, self.config.budget)

    def fold(self, states: Callable, rotation: Any, positions: Tensor, stays: Tensor, goes: Tensor, record: dict) -> Folded:
        place = positions if positions.dim() == 3 else positions[:, None]
        sink = torch.arange(self.config.sinks, device=place.device)[:, None]
        found = (place[:, :, None] == sink) & stays[:, :, None]  # b k s n
        there, index = found.max(dim=-1)
        keys, _ = states(index)
        turned, gone = record.entries.get("turned", torch.zeros_like(goes, dtype=torch.long)), goes.sum(dim=-1, keepdim=True)
        before = turned.gather(-1, index)
        came = torch.where(before[..., None] > 0, record.get("keys", keys), keys)  # turned once, or roundings would add up
        record["keys"], record.entries["turned"] = came, turned + gone * found.any(dim=2)
        return Folded(index.masked_fill(~there, -1), rotation.turn(came, before + gone))
