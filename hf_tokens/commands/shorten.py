"""What `hf-tokens compress-prompt` does: a prompt of the user's, made short by a model for any other one."""

from __future__ import annotations

from typing import Any

import hf_tokens

from .sources import Source, need_methods, reader_of, tokenizer_of, with_methods


def shorten(
    source: Source, text: str, instruction: str | None, question: str | None, max_tokens: int | None, keep: list[str], device: str
) -> dict[str, Any]:
    """A prompt, with what may stand in front of it and behind, which stay whole.

    Returns:
        The text, and the tokens before and behind.

    Raises:
        ConfigError: There is no method in the model, or a budget is out of its bounds.
        UnsupportedError: The model has nothing that shortens a prompt.
    """
    need_methods(source)
    tokenizer = tokenizer_of(source)
    model = with_methods(source, reader_of(source.model, device, "hf-tokens compress-prompt"))
    around = [(part, 1.0) if part else None for part in (instruction, question)]
    parts = [part for part in (around[0], text, around[1]) if part is not None]
    prompt = parts if len(parts) > 1 else text
    short = hf_tokens.compress_prompt(model, prompt, tokenizer=tokenizer, force_tokens=keep, max_tokens=max_tokens)
    count = lambda words: len(tokenizer(words, add_special_tokens=False)["input_ids"])
    long = "".join(part for part in (instruction, text, question) if part)
    return {"text": short, "tokens_before": count(long), "tokens": count(short)}
