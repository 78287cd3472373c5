"""Ways to generate that are refused where they begin: what cannot be right should not be found out behind some tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError, explain
from .handler import handler_of
from .hooks import BoundForward
from .tap import taps

if TYPE_CHECKING:
    from .model import ModelSurgery


class BatchedGeneration(BoundForward):
    """Refuses, where it begins, a generation with several requests end to end in one row, and their keys in pages of transformers' own."""

    name = "init_continuous_batching"

    def __init__(self, model: ModelSurgery):
        self.model = model
        super().__init__(model.base)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Begin it, if every method that acts reads each token by itself."""
        refuse_pages(self.model)
        return self.inner(*args, **kwargs)


class GuessedGeneration(BoundForward):
    """Refuses, where it begins, a generation in which a draft is read behind the prompt and taken back in part."""

    name = "_get_candidate_generator"

    def __init__(self, model: ModelSurgery):
        self.model = model
        super().__init__(model.base)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Begin it, if no method that acts must get its prompt in one pass, or cannot take back what it has read."""
        methods = [m for surgery in self.model.streams if surgery.stream.causal for m in surgery.methods()]
        names = sorted({type(method).__name__ for method in methods if not method.chunks or method.spans})
        if names:
            rule = "Methods that look at a prompt as a whole, or cannot take tokens back, do not go with assisted decoding"
            raise UnsupportedError(explain(rule, ", ".join(names), "Leave out the assistant, or `prompt_lookup_num_tokens`."))
        return self.inner(*args, **kwargs)


def refuse_pages(model: ModelSurgery) -> None:
    """Only a method that reads each token by itself is right there.

    Raises:
        UnsupportedError: One moves tokens, thinks of one sample a row, looks for words in it, or sees the attention call.
    """
    moving = [method for surgery in model.streams if surgery.plan.moves for method in surgery.methods()]
    reading = [m for m in model.methods() if not m.packed or taps(m, m.asks) or "arrive" in handler_of(m).phases(m)]
    if moving or reading:
        rule = "Continuous batching lays several samples into one row, and these methods take one sample a row"
        got = ", ".join(sorted({type(method).__name__ for method in (*moving, *reading)}))
        raise UnsupportedError(explain(rule, got, "Use `generate`, or disable the adapter."))
