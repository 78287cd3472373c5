"""Ways to generate that are refused where they begin: what cannot be right should not be found out behind some tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig

from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..model import families
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


def refuse_chunks(
    model: ModelSurgery, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict, *args: Any, **kwargs: Any
) -> None:
    """In chunked prefill the passes behind the first one bring no prompt of their own.

    Raises:
        UnsupportedError: A method must get its prompt in one pass, and it is longer than a chunk.
    """
    size, cache, mask = generation_config.prefill_chunk_size, find_cache(model_kwargs.values()), model_kwargs.get("attention_mask")
    seen = cache is not None and mask is not None and mask.shape[1] == input_ids.shape[1]  # the ids are those of the whole sequence
    new = input_ids.shape[1] - (cache.get_seq_length() if seen else 0)
    names = sorted({type(method).__name__ for method in model.methods() if not method.chunks})
    if names and size is not None and new > size:
        rule = "Methods that look at a prompt as a whole must get it in one pass"
        raise UnsupportedError(explain(rule, f"{', '.join(names)} and a prompt in chunks of {size}", "Leave out `prefill_chunk_size`."))


def refuse_own_caches(model: ModelSurgery, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> None:
    """A cache that does not hold a key for each token of a block, or that masks do not lie over, tells nothing of tokens that have moved.

    Raises:
        UnsupportedError: A method moves tokens in a stream with such a cache.
    """
    cached = [surgery for surgery in model.streams if any(block.layer_idx is not None for block in surgery.blocks.values())]
    methods = [m for surgery in cached for m in surgery.methods() if m.moves_tokens and m.config != m.config.at_zero()]
    moving = sorted({type(method).__name__ for method in methods})
    if moving and generation_config.use_cache and families.OWN_CACHES.search(type(model.base).__name__):
        rule = f"{', '.join(moving)} must act where a cache holds a key of each token of a block, and the masks lie over them"
        raise UnsupportedError(explain(rule, type(model.base).__name__, "Pass `use_cache=False` to `generate`, or choose another model."))


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
    ("_prepare_special_tokens", refuse_own_caches),
    ("_get_candidate_generator", refuse_drafts),
    ("_prefill", refuse_chunks),
)
