"""Ways to generate that are refused where they begin: what cannot be right should not be found out behind some tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache, GenerationConfig
from transformers.utils import ModelOutput

from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..kv.layer import TokenCacheLayer
from ..model import families
from ..model.classes import class_name
from ..model.pictures import ENCODED, visual_tokens
from ..roles.signals import SPANS
from .handler import handler_of
from .hooks import BoundForward
from .tap import taps

if TYPE_CHECKING:
    from .model import ModelSurgery


class CheckedBeginning(BoundForward):
    """A method of the model with which a way to generate begins, behind a check of the methods that act."""

    def __init__(self, model: ModelSurgery, name: str, check: Callable[..., None]):
        self.model, self.name, self.check = model, name, check
        super().__init__(model.base)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Begin, if nothing is refused."""
        self.check(self.model, *args, **kwargs)
        return self.inner(*args, **kwargs)


class RowsOfCache(BoundForward):
    """A method of a family's that cuts what was generated into plain rows: a cache of which more is known than its keys is left out."""

    def __init__(self, model: ModelSurgery):
        self.name = families.ROWS_OF_CACHE[1]
        super().__init__(model.base)

    def run(self, **outputs: Any) -> Any:
        """Cut all but such a cache; going on without it begins anew."""
        return self.inner(**{name: without_books(value) if isinstance(value, ModelOutput) else value for name, value in outputs.items()})


def without_books(output: ModelOutput) -> ModelOutput:
    """An output without a cache that its keys and values do not tell all of."""
    cache = find_cache(output.values())
    if cache is None or all(layer.plain for layer in cache.layers if isinstance(layer, TokenCacheLayer)):
        return output
    return type(output)(**{name: value for name, value in output.items() if find_cache([value]) is None})


class RowsOfDocuments(BoundForward):
    """Orders the rows of beams where each has one for each of its documents: the family's own makes a plain cache of them."""

    name = "_reorder_cache"

    def __init__(self, model: ModelSurgery):
        super().__init__(model.base)

    def run(self, cache: EncoderDecoderCache, beam_idx: Tensor) -> EncoderDecoderCache:
        """Order them in place."""
        batch = next(len(layer.keys) for layer in cache.cross_attention_cache.layers if layer.is_initialized)
        cache.reorder_cache(torch.arange(batch, device=beam_idx.device).view(len(beam_idx), -1)[beam_idx].flatten())
        return cache


def stand_before(model: ModelSurgery) -> list[BoundForward]:
    """What stands before the methods of a model that generates."""
    bound: list[BoundForward] = [CheckedBeginning(model, name, check) for name, check in BEGINNINGS]
    name = class_name(model.base)
    bound += [RowsOfCache(model)] if families.ROWS_OF_CACHE[0].search(name) else []
    return bound + ([RowsOfDocuments(model)] if families.ROWS_OF_DOCUMENTS.search(name) else [])


def refuse_drafts(model: ModelSurgery, *args: Any, **kwargs: Any) -> None:
    """In assisted decoding a draft is read behind the prompt, and taken back in part.

    Raises:
        UnsupportedError: A method must get its prompt in one pass, or cannot take back what it has read.
    """
    methods = [m for surgery in model.streams if surgery.stream.causal for m in surgery.methods()]
    names = sorted({type(method).__name__ for method in methods if not method.chunks or method.spans})
    if names:
        rule = "Methods that look at a prompt as a whole, or cannot take tokens back, do not go with assisted decoding"
        raise UnsupportedError(explain(rule, ", ".join(names), "Leave out the assistant, or `prompt_lookup_num_tokens`."))


def refuse_pages(model: ModelSurgery, *args: Any, **kwargs: Any) -> None:
    """Continuous batching lays several requests end to end in one row, and keeps their keys in pages of transformers' own.

    Raises:
        UnsupportedError: One moves tokens, thinks of one sample a row, looks for words in it, or sees the attention call.
    """
    moving = [method for surgery in model.streams if surgery.plan.moves for method in surgery.methods()]
    reading = [m for m in model.methods() if not m.packed or taps(m, m.asks) or "arrive" in handler_of(m).phases(m)]
    if moving or reading:
        rule = "Continuous batching lays several samples into one row, and these methods take one sample a row"
        got = ", ".join(sorted({type(method).__name__ for method in (*moving, *reading)}))
        raise UnsupportedError(explain(rule, got, "Use `generate`, or disable the adapter."))


def refuse_prefill(
    model: ModelSurgery, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
) -> None:
    """In chunked prefill the passes behind the first one bring no prompt of their own; without its use, a given cache grows by all of it.

    Raises:
        UnsupportedError: A cache is given and not used, or a method must get its prompt, or the pictures in it, in one pass, and it is
            longer than a chunk.
    """
    size, cache, mask = generation_config.prefill_chunk_size, find_cache(model_kwargs.values()), model_kwargs.get("attention_mask")
    if cache is not None and cache.get_seq_length() and not generation_config.use_cache:  # each token would be read with all before it
        rule, got = "A cache that `generate` is given is used for what it writes", "`use_cache=False`, of the call or of the model's config"
        raise UnsupportedError(explain(rule, got, "Pass `use_cache=True`."))
    seen = cache is not None and mask is not None and mask.shape[1] == input_ids.shape[1]  # the ids are those of the whole sequence
    new = input_ids.shape[1] - (cache.get_seq_length() if seen else 0)
    if size is None or new <= size:
        return
    visual = visual_tokens(model.base, {**model_kwargs, "input_ids": input_ids})
    pictured = visual is None or bool(visual[:, -new:].any())  # a chunk may end within a picture, or between two
    names = sorted({type(m).__name__ for m in model.methods() if not m.chunks or pictured and SPANS & m.asks})
    if names:
        rule = "Methods that look at a prompt as a whole, or at the pictures in it, must get it in one pass"
        raise UnsupportedError(explain(rule, f"{', '.join(names)} and a prompt in chunks of {size}", "Leave out `prefill_chunk_size`."))


def refuse_own_caches(model: ModelSurgery, generation_config: GenerationConfig) -> None:
    """A cache that does not hold a key for each token of a block, or that masks do not lie over, tells nothing of tokens that have moved.

    Raises:
        UnsupportedError: A method moves tokens in a stream with such a cache.
    """
    cached = [surgery for surgery in model.streams if any(block.layer_idx is not None for block in surgery.blocks.values())]
    methods = [m for surgery in cached for m in surgery.methods() if m.moves_tokens and m.config != m.config.at_zero()]
    moving = sorted({type(method).__name__ for method in methods})
    if moving and generation_config.use_cache and families.OWN_CACHES.search(class_name(model.base)):
        rule = f"{', '.join(moving)} must act where a cache holds a key of each token of a block, and the masks lie over them"
        raise UnsupportedError(explain(rule, type(model.base).__name__, "Pass `use_cache=False` to `generate`, or choose another model."))


MOVING = {"before", "gate", "insert", "last", "between", "sublayer"}  # phases in which a block gets other tokens, or runs not once


def refuse_timestamps(model: ModelSurgery, generation_config: GenerationConfig) -> None:
    """When a token was said is read off what it attends to in each block, counted by blocks and by tokens.

    Raises:
        UnsupportedError: A method lets blocks of the decoder out, or other tokens in.
    """
    if vars(generation_config).get("return_token_timestamps"):
        methods = [m for surgery in model.streams if surgery.stream.causal for m in surgery.methods() if m.config != m.config.at_zero()]
        moving = sorted({type(m).__name__ for m in methods if m.moves_tokens and MOVING & {*handler_of(m).phases(m)}})
        if moving:
            rule = "When a token was said is told by blocks that all run once, for the tokens of the prompt and no others"
            raise UnsupportedError(explain(rule, ", ".join(moving), "Leave out `return_token_timestamps`, or disable the adapter."))


def refuse_cached(model: ModelSurgery, generation_config: GenerationConfig) -> None:
    """A generation with a cache gives a model its sequence in parts.

    Raises:
        UnsupportedError: A method reads the whole sequence.
    """
    causal = [surgery for surgery in model.streams if surgery.stream.causal]
    cached = [surgery for surgery in causal if any(block.layer_idx is not None for block in surgery.blocks.values())]
    whole = sorted({type(method).__name__ for surgery in cached for method in surgery.methods() if not method.caches})
    new = generation_config.max_new_tokens or 1
    if whole and generation_config.use_cache and new > 1:
        rule, got = f"{', '.join(whole)} must see the whole sequence in one pass", f"{new} new tokens with a cache"
        raise UnsupportedError(explain(rule, got, "Pass no cache, and `use_cache=False` to `generate`."))


def refuse_at_once(model: ModelSurgery, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
    """What the settings of a generation show before anything is computed."""
    refuse_own_caches(model, generation_config)
    refuse_cached(model, generation_config)
    refuse_timestamps(model, generation_config)


def forget_towers(model: ModelSurgery, model_kwargs: dict) -> None:
    """What a tower was called for before a generation is not of it, where that encodes its pictures itself."""
    if not any(value is not None for value in (model_kwargs.get(ENCODED) or {}).values()):
        model.seen.clear()


def refuse_export(model: ModelSurgery) -> None:
    """A graph is recorded once, and cannot do other things for other numbers.

    Raises:
        UnsupportedError: A method looks at them.
    """
    looking = sorted({type(method).__name__ for method in model.methods() if not method.exports})
    if looking:
        rule = "A model is exported with methods that decide nothing by the values of tensors"
        raise UnsupportedError(explain(rule, ", ".join(looking), "Call `torch.compile`, or disable the adapter."))


# methods of transformers' `GenerationMixin`, and what is checked before they run
BEGINNINGS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("init_continuous_batching", refuse_pages),
    ("_prepare_special_tokens", refuse_at_once),
    ("_prepare_multimodal_encoder_kwargs_for_generation", forget_towers),
    ("_get_candidate_generator", refuse_drafts),
    ("_prefill", refuse_prefill),
)
