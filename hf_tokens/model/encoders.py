"""Which text encoders of a pipeline make the prompt that its denoiser is given, and out of which of their states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import UnsupportedError, explain
from .classes import class_name

FINAL_NORM = "final_layer_norm"  # behind the last block of a text tower of CLIP
POOLED = ("added_cond_kwargs", "text_embeds")  # the argument of a denoiser, and the name in it, of what an encoder pooled
READ_BESIDE = ("mid_block_additional_residual",)  # arguments of a denoiser with what another network (a ControlNet) made of the prompt


@dataclass(frozen=True)
class EncoderRow:
    """A text encoder of a pipeline.

    Attributes:
        encoder, tokenizer: The names of the components.
        layer: Which of its hidden states are the prompt, side by side with those of the other encoders; None is the last through its norm.
        pooled: Whether what it pools is given to the denoiser too.
    """

    encoder: str
    tokenizer: str
    layer: int | None = None
    pooled: bool = False


Rows = tuple[EncoderRow, ...]
ONE: Rows = (EncoderRow("text_encoder", "tokenizer"),)
TWO: Rows = (EncoderRow("text_encoder", "tokenizer", -2), EncoderRow("text_encoder_2", "tokenizer_2", -2, True))
ENCODERS: dict[str, Rows] = {
    **dict.fromkeys(("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"), ONE),
    **dict.fromkeys(("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"), TWO),
}


def encoders_of(pipeline: Any) -> list[tuple[EncoderRow, nn.Module, Any]]:
    """The text encoders of a pipeline with their tokenizers; refused where no row tells them, or one of them is not there."""
    name, rule = class_name(pipeline), "Which text encoders make a pipeline's prompt is told by a row of data"
    if name not in ENCODERS:
        remedy = f"There is one for {', '.join(ENCODERS)}. Leave out `word`: the tokens then stand behind the encoded prompt."
        raise UnsupportedError(explain(rule, name, remedy))
    found = [(row, pipeline.components.get(row.encoder), pipeline.components.get(row.tokenizer)) for row in ENCODERS[name]]
    missing = [row.encoder for row, *parts in found if None in parts]
    if missing:
        remedy = "Load the pipeline with them, or leave out `word`."
        raise UnsupportedError(explain("A word of the prompt is read by the pipeline's text encoders", f"none as {missing}", remedy))
    return found
