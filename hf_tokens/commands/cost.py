"""What `hf-tokens measure` does: one forward of a text or a picture of the user's, without the methods and with them, counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_tokens

from ..errors import ConfigError, UnsupportedError, explain, first_line
from ..model.signatures import parameters
from .sources import Source, need_methods, picture_of_file, reader_of, text_of_file, tokenizer_of, with_methods

TAKES_PICTURES = "pixel_values"


def processor_of(source: Source, cls: type) -> Any:
    """What makes pictures into the model's inputs.

    Raises:
        UnsupportedError: The model has none.
    """
    try:
        return cls.from_pretrained(source.model)
    except (OSError, ValueError) as error:
        got = f"{source.model}: {first_line(error)}"
        raise UnsupportedError(explain("A picture is read by the model's processor", got, "Save one beside it.")) from error


def inputs_of(source: Source, base: Any, text: str | None, picture: Path | None, tokens: int | None) -> dict[str, Any]:
    """What a model is given of a text, a picture, or both.

    Raises:
        ConfigError: There is neither, a file is not there, or the model does not read such.
    """
    if text is None and picture is None:
        remedy = "Pass `--text FILE`, `--prompt TEXT` or `--image FILE`."
        raise ConfigError(explain("A forward is counted of a text or a picture", "neither", remedy))
    takes = parameters(type(base))
    if picture is not None and TAKES_PICTURES not in takes:
        rule = f"A picture goes to a model that takes `{TAKES_PICTURES}`"
        raise UnsupportedError(explain(rule, type(base).__name__, "Pass a text, or choose another model."))
    if text is not None and "input_ids" not in takes:
        raise UnsupportedError(explain("A text goes to a model that takes `input_ids`", type(base).__name__, "Pass `--image FILE`."))
    if picture is None:
        cut = {} if tokens is None else {"truncation": True, "max_length": tokens}
        found = tokenizer_of(source)(text, return_tensors="pt", **cut)
        if not found["input_ids"].numel():
            raise ConfigError(explain("A text has one token at least", repr(text[:40]), "Pass another one."))
    elif text is None:
        found = processor_of(source, transformers.AutoImageProcessor)(images=[picture_of_file(picture)], return_tensors="pt")
    else:
        found = processor_of(source, transformers.AutoProcessor)(images=[picture_of_file(picture)], text=[text], return_tensors="pt")
    cached = {"use_cache": True} if "use_cache" in takes else {}
    return {**{name: value for name, value in found.items() if name in takes}, **cached}


def cost_of(source: Source, text: str | None, picture: Path | None, tokens: int | None, device: str) -> dict[str, dict[str, int]]:
    """Tokens, FLOPs and bytes of the cache of one forward, for the base and with the methods.

    Raises:
        ConfigError: There is nothing to read, or nothing in the model to compare.
        UnsupportedError: The methods do not fit the model, or it does not read such.
    """
    need_methods(source)
    base = reader_of(source.model, device, "hf-tokens measure")
    given = inputs_of(source, base, text, picture, tokens)
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    before = hf_tokens.measure(base, **given)
    after = hf_tokens.measure(with_methods(source, base), **given)
    return {"base": dataclasses.asdict(before), "with": dataclasses.asdict(after)}


def text_or_prompt(file: Path | None, prompt: str | None) -> str | None:
    """The text that was given, in a file or as it is.

    Raises:
        ConfigError: Both were.
    """
    if file is not None and prompt is not None:
        raise ConfigError(explain("A text is in a file or given as it is", "`--text` and `--prompt`", "Leave one of them out."))
    return prompt if file is None else text_of_file(file)
