"""One context, read and compressed once, and many questions asked of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedError, explain
from ..model.anatomy import anatomy, unwrap
from ..model.classes import resumes_not
from ..model.signatures import cache_argument
from .measure import kv_bytes
from .surgeries import evaluated

SPOKEN = ("text", "audio")  # kinds of stream that a model which generates puts out
ONE_PASS = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "use_cache": True, "return_dict_in_generate": True}


@dataclass(frozen=True)
class CompressedContext:
    """What a model holds of a text that it has read.

    Attributes:
        input_ids, attention_mask: The text, (b n).
        cache: What is held of it; `ask` gives copies away, so that no question changes it.
        argument: What the model calls its cache.
    """

    input_ids: Tensor
    attention_mask: Tensor
    cache: Any
    argument: str

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return kv_bytes(self.cache)

    def ask(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        """What `model.generate` takes to answer questions in one batch: all of them of one text, or one of each.

        Args:
            input_ids: Questions, (q m), padded in front where they differ in length.
            attention_mask: Their real tokens, (q m).

        Raises:
            UnsupportedError: There is neither one text nor one for each question, a question ends with padding, or there is padding between
                a text and its question where a block counts places by itself.
        """
        texts, questions = len(self.input_ids), len(input_ids)
        if texts not in (1, questions):
            rule, got = "Questions are of one text, or there is a text for each", f"{texts} texts and {questions} questions"
            raise UnsupportedError(explain(rule, got, "Compress one text, or give as many questions."))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        if not bool(mask[:, -1].all()):
            rule = "A question ends with a token that is real, for the answer to stand behind it"
            raise UnsupportedError(explain(rule, "padding behind it", 'Pad in front: `tokenizer.padding_side = "left"`.'))
        if not bool(mask.all()) and not all(isinstance(layer, CacheLayerMixin) and not layer.is_sliding for layer in self.cache.layers):
            rule = "Behind a text no padding may come where a block has a window or a state, which would take it for tokens"
            raise UnsupportedError(explain(rule, "questions of several lengths", "Ask those of one length together."))
        cache = copy.deepcopy(self.cache)
        if texts != questions:
            cache.batch_repeat_interleave(questions)
        text = (part.expand(questions, -1) for part in (self.input_ids, self.attention_mask))
        ids, real = (torch.cat(pair, dim=1) for pair in zip(text, (input_ids, mask), strict=True))
        return {"input_ids": ids, "attention_mask": real, self.argument: cache}


def check_reader(model: Any) -> None:
    """Whether a model reads a question behind a text as it would read both at once."""
    if model.config.is_encoder_decoder:
        why = "has an encoder"
    elif (unable := resumes_not(unwrap(model))) is not None:
        why = unable
    elif type(model.generation_config) is not GenerationConfig:
        why = "generates in a way of its own"
    elif not any(stream.causal for stream in anatomy(model).streams if stream.kind in SPOKEN):
        why = "lets tokens see those behind them"
    else:
        return
    rule, remedy = "`compress_context` needs a decoder-only language model", "Call its `generate` with text and question at once."
    raise UnsupportedError(explain(rule, f"{type(unwrap(model)).__name__}, which {why}", remedy))


@torch.no_grad()
def compress_context(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> CompressedContext:
    """Read a text once, compressed as the cache compressors of a model say, for many questions.

    ```python
    context = hf_tokens.compress_context(model, **tokenizer(document, return_tensors="pt"))
    answers = model.generate(**context.ask(**tokenizer(questions, return_tensors="pt", padding=True)), max_new_tokens=32)
    ```

    Args:
        model: A decoder-only language model, with a surgery or without one.
        input_ids: Texts, (b n).
        attention_mask: Real tokens, (b n).

    Raises:
        UnsupportedError: The model would read text and question otherwise than both at once, or a text has no token.
    """
    check_reader(model)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.dim() != 2 or not input_ids.numel() or not bool(mask.any(dim=1).all()):
        raise UnsupportedError(explain("A context has one real token at least, (b n)", tuple(input_ids.shape), "Leave empty texts out."))
    with evaluated(model):
        output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=GenerationConfig(**ONE_PASS))
    return CompressedContext(input_ids, mask, output.past_key_values, cache_argument(type(unwrap(model)).forward))
