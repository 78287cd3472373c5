"""StreamingLLM: the first tokens, on which attention rests, and the newest ones stay in the cache; what lies between goes.

Paper:   Efficient Streaming Language Models with Attention Sinks (Xiao et al., ICLR 2024), arXiv:2309.17453
Maths:   of n entries the first s and the last C - s stay, in every block and head, behind the prompt and behind each token
Differs: keys keep the rotation of their true places, as in kvpress: the release rotates them by their place in the cache, which is what
         lets it read beyond the length that a model was trained for. Its chat also makes room in front of a new turn.
Checked: mit-han-lab/streaming-llm@2e504260, entries of StartRecentKVCache behind a prompt and 11 tokens: largest difference 0 entries.

>>> from hf_tokens import StreamingLLMConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("gpt2")
>>> model = get_token_model(base.model, StreamingLLMConfig(capacity=6, sinks=2))
>>> measure(model, **base.inputs, use_cache=True).kv_bytes == 4 * 2 * 2 * 6 * 32 * 4
True
"""

from dataclasses import dataclass

from torch import Tensor

from hf_tokens import CacheCompressor, MethodConfig, allowance, check_capacity, option, protect, register


@dataclass(frozen=True)
class StreamingLLMConfig(MethodConfig):
    capacity: int = option(2004, ge=1, size=True, help="Entries that a head keeps, the sinks among them (paper: cache size).")
    budget: float | None = option(None, gt=0, le=1, zero=1.0, help="Share of the tokens seen, in the place of `capacity`.")
    sinks: int = option(4, ge=0, help="First tokens that stay (paper: attention sinks).")


@register("streaming-llm", StreamingLLMConfig)
class StreamingLLM(CacheCompressor):
    chunks = False
    decodes = True

    @classmethod
    def check(cls, config: StreamingLLMConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        check_capacity(config, config.capacity, config.budget, config.sinks)

    def score(self, positions: Tensor, newer: Tensor, budget: Tensor) -> Tensor:
        return protect(-newer.double(), positions, newer, budget, first=self.config.sinks)

    def budget(self, length: int, seen: int) -> int:
        return allowance(length, seen, self.config.capacity, self.config.budget)
