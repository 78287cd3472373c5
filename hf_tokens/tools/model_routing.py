"""Two models that write one text: a router in the small one decides, behind each token, which of them emits the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMode

from ..engine.model import ModelSurgery
from ..errors import UnsupportedError, explain
from ..model.anatomy import unwrap
from ..model.classes import resumes_not
from ..model.signatures import CACHES, cache_argument, parameters
from .surgeries import surgery_of

Verify = Callable[[Tensor, Tensor, Tensor], bool]
PLAIN = {"attention_mask", "position_ids", *CACHES, "use_cache", "cache_position", "logits_to_keep", "token_type_ids"}


class LargeTakesOver(LogitsProcessor):
    """Puts the large model's logits in the place of the small one's, in the rows that the router sends to it.

    The large model keeps a cache of its own and reads, when it is called, the tokens that it has not seen.
    """

    def __init__(self, surgery: ModelSurgery, large: nn.Module, mask: Tensor, eos: Tensor | None, log: list[Tensor]):
        self.surgery, self.large, self.mask, self.eos, self.log = surgery, large, mask, eos, log
        self.cache, self.read = None, mask.new_zeros(len(mask), 0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores of the next token, (b v)."""
        rows = torch.zeros_like(input_ids[:, 0], dtype=torch.bool)
        if self.surgery.verdict is not None:
            rows = self.surgery.verdict[:, -1].to(rows.device)
        if self.eos is not None:
            new = input_ids[:, self.mask.shape[1] :]
            rows = rows & ~torch.isin(new, self.eos.to(new.device)).any(dim=1)  # a text that has ended needs no model
        self.log.append(rows)
        if not bool(rows.any()):
            return scores
        return torch.where(rows[:, None], fit(self.catch_up(input_ids), scores), scores)

    def catch_up(self, input_ids: Tensor) -> Tensor:
        """The large model's logits of the next token."""
        ids = input_ids.to(self.large.device)
        seen = self.read.shape[1]
        if self.cache is None or not torch.equal(ids[:, :seen], self.read):
            self.cache, seen = DynamicCache(config=self.large.config), 0
        mask = self.mask.to(ids.device)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
        prepare = self.large.prepare_inputs_for_generation
        more = {cache_argument(prepare): self.cache, "attention_mask": mask, "use_cache": True, "is_first_iteration": seen == 0}
        if "position_ids" in parameters(type(self.large)):
            more["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        self.read = ids
        return self.large(**prepare(ids, next_sequence_length=ids.shape[1] - seen, **more)).logits[:, -1]


def fit(logits: Tensor, like: Tensor) -> Tensor:
    """Logits in the width of another model's head: the ends of both are no tokens."""
    logits = logits.to(like)[:, : like.shape[1]]
    return torch.nn.functional.pad(logits, (0, like.shape[1] - logits.shape[1]), value=-torch.inf)


def check_vocabulary(small: Any, large: Any, tokenizers: tuple[Any, Any] | None) -> None:
    """Refuse two models that do not write the same tokens."""
    rule = "Two models that write one text must share the tokenizer"
    if tokenizers is not None:
        small_ids, large_ids = ({*tokenizer.get_vocab().items()} for tokenizer in tokenizers)
        if differing := len(small_ids ^ large_ids):
            raise UnsupportedError(explain(rule, f"two that differ in {differing} tokens", "Choose models of one family."))
        return
    configs = (model.config.get_text_config() for model in (small, large))
    small_ids, large_ids = ((config.vocab_size, config.bos_token_id, config.eos_token_id) for config in configs)
    if small_ids != large_ids:
        remedy = "Choose models of one family, or pass `tokenizers=(small's, large's)` to compare these."
        raise UnsupportedError(explain(rule, f"vocabulary, first and last token {small_ids} and {large_ids}", remedy))


def check_look_ups(small: Any, large: Any, tokenizers: tuple[Any, Any] | None, input_ids: Tensor) -> None:
    """Refuse a model that cannot look up each token that the text may have."""
    vocabulary = small.config.get_text_config().vocab_size if tokenizers is None else max(tokenizers[0].get_vocab().values()) + 1
    used = max(vocabulary, int(input_ids.max()) + 1)
    rows = [model.get_input_embeddings().num_embeddings for model in (small, large)]
    if min(rows) < used:
        got = f"tables of {rows[0]} and {rows[1]} embeddings for ids up to {used - 1}"
        remedy = "Choose models of one family, or make the smaller table larger by `resize_token_embeddings`."
        raise UnsupportedError(explain("Two models that write one text must look up each of its tokens", got, remedy))


class RouteTo:
    """A `custom_generate` for `generate`: the small model decodes, and leaves single tokens to a large one.

    `small.generate(**inputs, custom_generate=route_to(large))`. Afterwards `routed` marks the tokens that the large model emitted, (b new).
    """

    def __init__(self, large: Any, tokenizers: tuple[Any, Any] | None = None):
        self.large, self.tokenizers = large, tokenizers
        self.log: list[Tensor] = []

    @property
    def routed(self) -> Tensor:
        """Tokens of the last text that the large model emitted, (b new) bool."""
        return torch.stack(self.log, dim=1)

    def __call__(
        self, model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        """Decode as `generate` does."""
        surgery = surgery_of(model)
        mode = generation_config.get_generation_mode()
        more = sorted(name for name, value in kwargs.items() if name not in PLAIN and not isinstance(value, (bool, int, str, type(None))))
        unable = resumes_not(unwrap(self.large))
        reasons = {
            f"{mode.value}": mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
            f"{type(model).__name__}, which has an encoder": model.config.is_encoder_decoder or self.large.config.is_encoder_decoder,
            f"a prompt with {more}": bool(more),
            f"{type(unwrap(self.large)).__name__}, which {unable}": unable is not None,
        }
        for reason, holds in reasons.items():
            if holds:
                rule = "Two models write one text in greedy decoding or sampling, behind a prompt of tokens alone"
                raise UnsupportedError(explain(rule, reason, "Let one of the models generate by itself."))
        check_vocabulary(model, self.large, self.tokenizers)
        check_look_ups(model, self.large, self.tokenizers, input_ids)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        self.log = []
        router = LargeTakesOver(surgery, self.large, mask, generation_config._eos_token_tensor, self.log)
        processors = LogitsProcessorList([router, *logits_processor])
        return type(model)._sample(model, input_ids, processors, stopping_criteria, generation_config, **kwargs)


def route_to(large: Any, *, tokenizers: tuple[Any, Any] | None = None) -> RouteTo:
    """A `custom_generate` with which a model that has a model router leaves tokens to a large model.

    Transformers passes no `streamer` on to a `custom_generate`: none gets the new tokens.

    Args:
        large: A decoder-only language model with the same tokenizer.
        tokenizers: The small model's and the large one's tokenizer, to compare them where the configs differ.
    """
    return RouteTo(large, tokenizers)


@torch.no_grad()
def label_routes(
    small: Any,
    large: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    prompt: int = 1,
    verify: Verify | None = None,
    horizon: int = 32,
) -> Tensor:
    """Where the large model should take over in a text of its own, as the column `hf_tokens_targets`: (b n), 1 there, 0 not, -100 unknown.

    At a token behind which the two models would go on differently, the large one writes on from both ways, and `verify` returns whether
    the ways part. Without it each difference counts.

    Args:
        small: The model with the router.
        large: The model whose text it is.
        input_ids: Prompts and the large model's texts behind them, (b n).
        attention_mask: Real tokens, (b n).
        prompt: How many tokens of each row are the prompt, which is not labelled, padding included.
        verify: Called with the tokens so far (n), the text behind the small model's token and the one behind the large model's own (h).
        horizon: Tokens that the large model writes on for `verify`, the first one included.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    predicted = small(input_ids=input_ids, attention_mask=mask).logits[:, :-1].argmax(dim=-1)  # b n-1
    differ = predicted != input_ids[:, 1:]
    known = (mask[:, 1:] * mask[:, :-1]).bool()
    known[:, : prompt - 1] = False
    labels = torch.nn.functional.pad(torch.where(known, differ.long(), -100), (0, 1), value=-100)
    for row, place in (differ & known).nonzero().tolist() if verify is not None else ():
        so_far = input_ids[row, : place + 1][mask[row, : place + 1].bool()]
        ways = []
        for token in (predicted[row, place], input_ids[row, place + 1]):
            start = torch.cat([so_far, token[None]])[None]
            text = large.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=horizon - 1, do_sample=False)
            ways.append(text[0, len(so_far) :])
        labels[row, place] = int(verify(so_far, *ways))
    return labels
