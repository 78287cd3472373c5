"""Prompts made short by one model for another: the tokens that are left, as ids, and vectors in the place of embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.run import StreamRun
from ..engine.surgery import Listener, StreamSurgery
from ..errors import UnsupportedError, explain
from ..handlers.token_reducer import reducing_blocks
from ..model.signatures import parameters
from ..tokens.token_map import take
from .surgeries import evaluated, surgery_of


class Passes(Listener):
    """The passes through a stream that have ended."""

    def __init__(self, surgery: StreamSurgery):
        self.surgery, self.runs = surgery, []

    def closed(self, surgery: StreamSurgery, run: StreamRun) -> None:
        if surgery is self.surgery:
            self.runs.append(run)


@torch.no_grad()
def compress_prompt(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """The tokens of each prompt that the reducers of a model leave: a short prompt for any model with this tokenizer, or as text for all.

    Args:
        model: A decoder-only language model with a method that drops tokens of the text.
        input_ids: Prompts, (b n).
        attention_mask: Real tokens, (b n).

    Returns:
        The ids that are left of each row, (k), in their order and without padding.

    Raises:
        UnsupportedError: No reducer acts on the text, or tokens joined, so that no id stands for them.
    """
    surgery, rule = surgery_of(model), "`compress_prompt` needs a decoder-only language model in which a TokenReducer acts on the text"
    streams = [stream for stream in surgery.streams if stream.stream.kind == "text" and reducing_blocks(stream)]
    if len(streams) != 1 or surgery.base.config.is_encoder_decoder:
        got = f"{type(surgery.base).__name__} with {len(streams)} of such streams"
        raise UnsupportedError(explain(rule, got, "Add a method such as one that prunes tokens, or switch its adapter on."))
    if input_ids.dim() != 2 or not input_ids.numel():
        raise UnsupportedError(
            explain("`compress_prompt` needs prompts of one token at least, (b n)", tuple(input_ids.shape), "Leave them out.")
        )
    (stream,) = streams
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    more = {"logits_to_keep": 1} if "logits_to_keep" in parameters(type(surgery.base)) else {}
    passes = Passes(stream)
    with evaluated(surgery.base), surgery.listening(passes), stream.stopping_after(max(reducing_blocks(stream))):
        surgery.base(input_ids=input_ids, attention_mask=mask, use_cache=False, **more)
    if not passes.runs:  # no method was called
        return [row[real] for row, real in zip(input_ids, mask.bool(), strict=True)]
    ledger = passes.runs[-1].ledger
    left = ledger.flags(ledger.filled, True) & ~ledger.flags(ledger.fresh, False) & mask.bool().gather(1, ledger.rows)
    if bool((ledger.all_sizes() > 1)[left].any()):
        raise UnsupportedError(explain(rule, "tokens that joined, for which no id stands", "Choose a method that drops tokens."))
    return [row[place[kept]] for row, place, kept in zip(input_ids, ledger.rows, left, strict=True)]


def embed_prompt(model: Any, *parts: Tensor) -> dict[str, Tensor]:
    """A prompt of tokens and vectors for a decoder, which stays as it is: `inputs_embeds` and its mask, with padding in front.

    Args:
        model: The decoder.
        parts: One behind the other: ids (b n), which the model looks up, and vectors (b p d) in the place of embeddings, such as an encoder
            puts out; an id of -1 and a vector of zeros are padding.
    """
    table = model.get_input_embeddings()
    real = torch.cat([part != -1 if part.dim() == 2 else part.any(dim=-1) for part in parts], dim=1)
    hidden = torch.cat([table(part.clamp(min=0)) if part.dim() == 2 else part.to(table.weight) for part in parts], dim=1)
    order = real.long().argsort(dim=1, stable=True)
    return {"inputs_embeds": take(hidden, order), "attention_mask": real.long().gather(1, order)}
