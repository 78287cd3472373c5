"""The text encoders of a pipeline: what they have read lately, and the same again with other embeddings in the place of words."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.hooks import SignedForward, hooked
from ..engine.model import ModelSurgery
from ..engine.results import World
from ..errors import UnsupportedError, explain
from ..model.encoders import FINAL_NORM, EncoderRow, encoders_of
from ..model.signatures import bound_arguments

KEPT = 8  # calls of an encoder that are remembered
OUTPUTS = ("return_dict", "output_hidden_states", "output_attentions")  # arguments that say what a call returns
AGAIN = "Encode the prompts of a call by the pipeline's own text encoder just before it, without `clip_skip`; pass `prompt`, no embeddings."


@dataclass(frozen=True)
class EncoderCall:
    """A call of an encoder: token ids (b n), its other arguments, and the states that are the prompt (b n d)."""

    ids: Tensor
    more: dict[str, Any]
    states: Tensor

    def rows(self, rows: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Ids and arguments of some samples."""
        own = lambda value: isinstance(value, Tensor) and len(value) == len(self.ids)
        return self.ids[rows], {name: value[rows] if own(value) else value for name, value in self.more.items()}


@dataclass(frozen=True)
class Encoding:
    """What an encoder makes of some prompts: the states that are the prompt (b n d), these for the values alone, and what it pooled."""

    states: Tensor
    values: Tensor
    pooled: Tensor | None


class NotedForward(SignedForward):
    """The forward of a text encoder: PEFT calls it past the encoder's hooks."""

    def __init__(self, encoder: TextEncoder):
        self.encoder = encoder
        super().__init__(encoder.base)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        self.encoder.note(args, kwargs, output)
        return output


class TextEncoder:
    """A text encoder of a pipeline, whose calls are noted."""

    def __init__(self, row: EncoderRow, base: nn.Module, tokenizer: Any):
        self.row, self.base, self.tokenizer = row, base, tokenizer
        self.calls: deque[EncoderCall] = deque(maxlen=KEPT)
        self.again = False  # whether it is called by us
        self.forward = NotedForward(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "calls": deque(maxlen=KEPT), "again": False}

    @property
    def table(self) -> nn.Module:
        """What looks up its embeddings, with whatever an adapter put around it."""
        return self.base.get_input_embeddings()

    def note(self, args: tuple, kwargs: dict, output: Any) -> None:
        """The encoder has been called."""
        if self.again:
            return
        arguments = bound_arguments(self.base, args, kwargs)
        ids, states = arguments.pop("input_ids", None), self.states(output)
        if isinstance(ids, Tensor) and ids.dim() == 2 and states is not None:
            more = {name: value for name, value in arguments.items() if value is not None and name not in OUTPUTS}
            self.calls.append(EncoderCall(ids, more, states.detach()))

    def states(self, output: Any) -> Tensor | None:
        """The states in an output that are the prompt; None where it holds none of that layer."""
        if self.row.layer is None:
            return output[0]
        items = output.get("hidden_states") if isinstance(output, dict) else next((x for x in output if isinstance(x, tuple)), None)
        return None if items is None else items[self.row.layer]

    def ids(self, word: str) -> list[int]:
        """The token ids of a word."""
        return ids_of(self.row, self.base, self.tokenizer, word)

    def match(self, prompt: Tensor) -> Iterator[tuple[EncoderCall, Tensor, Tensor]]:
        """For each call, the newest first, which of its rows each sample of a prompt (b n d) is, (b), -1 for none; which are unclear."""
        for call in reversed(self.calls):
            states, ids = call.states.to(prompt), call.ids.to(prompt.device)
            if states.shape[1:] == prompt.shape[1:]:
                same = (prompt[:, None] == states).flatten(2).all(dim=2)  # b r
                row = same.int().argmax(dim=1)
                unclear = same & (ids[None] != ids[row][:, None]).any(dim=2)
                yield call, torch.where(same.any(dim=1), row, -1), unclear.any(dim=1)

    def read(
        self, ids: Tensor, more: dict[str, Any], put: Callable[[Tensor], Tensor], shift: Callable[[Tensor], Tensor] | None
    ) -> Encoding:
        """Encode ids again, with embeddings as `put` makes them, and values of the last states as `shift` makes them."""
        norm = next((m for name, m in self.base.named_modules() if name.rpartition(".")[2] == FINAL_NORM), None)
        last: list[Tensor] = []
        handles = [self.table.register_forward_hook(lambda module, args, output: put(output))]
        if shift is not None and self.row.layer is None:
            handles.append(norm.register_forward_pre_hook(lambda module, args: last.append(args[0])))
        self.again = True
        try:
            with hooked(handles):
                output = self.base(input_ids=ids, **more, output_hidden_states=True, return_dict=True)
        finally:
            self.again = False
        states = self.states(output)
        values = states
        if shift is not None:
            values = shift(states) if self.row.layer is not None else norm(shift(last[0]))
        return Encoding(states, values, output[0] if self.row.pooled else None)


class TextEncoders(World):
    """The text encoders of the pipeline that a denoiser belongs to."""

    def __init__(self, encoders: list[tuple[EncoderRow, nn.Module, Any]]):
        self.encoders = [TextEncoder(*each) for each in encoders]

    def detach(self) -> None:
        for encoder in self.encoders:
            encoder.forward.remove()


def ids_of(row: EncoderRow, encoder: nn.Module, tokenizer: Any, word: str) -> list[int]:
    """The token ids of a word; refused where the encoder has no embeddings for them."""
    ids, rows = tokenizer(word, add_special_tokens=False).input_ids, encoder.get_input_embeddings().weight.shape[0]
    if not ids or max(ids) >= rows:
        rule = f"A word of the prompt has embeddings in `{row.encoder}`"
        remedy = f"Call `pipe.{row.encoder}.resize_token_embeddings(len(pipe.{row.tokenizer}))`, and give the new rows values."
        raise UnsupportedError(explain(rule, f"{word!r} with the ids {ids} of {rows}", remedy))
    return ids


def check_words(pipeline: Any, words: Iterable[str]) -> list[tuple[EncoderRow, nn.Module, Any]]:
    """The text encoders of a pipeline, which must be able to read these words."""
    found = encoders_of(pipeline)
    for each in found:
        for word in words:
            ids_of(*each, word)
    return found


def note_encoders(surgery: ModelSurgery, encoders: list[tuple[EncoderRow, nn.Module, Any]]) -> None:
    """Let the surgery of a denoiser know the text encoders of its pipeline, once."""
    if not any(isinstance(world, TextEncoders) for world in surgery.worlds):
        surgery.take_in(TextEncoders(encoders))
