"""The settings of the KV benchmark: every cache compressor of the box, and stacks of them, at a share of the full cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import hf_tokens
from hf_tokens import (
    AdaKVConfig,
    D2OConfig,
    DuoAttentionConfig,
    ExpectedAttentionConfig,
    H2OConfig,
    KIVIConfig,
    KVzipConfig,
    MethodConfig,
    MiKVConfig,
    PrefixKVConfig,
    PyramidKVConfig,
    RandomConfig,
    RazorAttentionConfig,
    SnapKVConfig,
    SqueezeAttentionConfig,
    StreamingLLMConfig,
    TOVAConfig,
)
from hf_tokens.commands.recipes import words

WIDE = {"window": 64, "kernel": 5, "pooling": "average"}
SINKS = 8  # of a streaming head
TWO, FOUR = 0.203, 0.335  # share of a 16-bit cache that KIVI's 2 and 4 bits take, with scales, least values and numbers of groups
MIKV = 0.19  # MiKV's 2 bits, likewise


def kvzip(tokenizer: Any, **knobs: Any) -> KVzipConfig:
    """KVzip with the release's words, in this model's template."""
    return KVzipConfig(**words(tokenizer), **knobs)


def settings(tokenizer: Any, b: float, n: int) -> dict[str, Sequence[MethodConfig]]:
    """Stacks that hold the share b of the cache of n tokens, by name, the ones of most interest first.

    Stored in few bits they are given the share that they would hold of a cache of 16 bits; in float32 it is less.
    """
    window = b / 2  # what the streaming heads of DuoAttention and RazorAttention keep
    whole = (b - window) / (1 - window)
    echo = {"echo": whole / 15, "induction": whole * 14 / 15}
    out: dict[str, Sequence[MethodConfig]] = {
        "snapkv": [SnapKVConfig(budget=b, **WIDE)],
        "kvzip": [kvzip(tokenizer, ratio=b)],
        "ada-kv": [AdaKVConfig(budget=b, **WIDE)],
        "random": [RandomConfig(budget=b)],
        **rounded(tokenizer, b, n),
        "expected-attention": [ExpectedAttentionConfig(budget=b)],
        "expected-attention, epsilon 0.01": [ExpectedAttentionConfig(budget=b, epsilon=0.01)],
        "ada-kv over expected-attention, epsilon 0.01": [
            AdaKVConfig(budget=b, scorer="stack"),
            ExpectedAttentionConfig(budget=b, epsilon=0.01),
        ],
        "tova": [TOVAConfig(budget=b)],
        "streaming-llm": [StreamingLLMConfig(budget=b)],
        "duo-attention": [DuoAttentionConfig(sinks=SINKS, recent=max(1, int(window * n) - SINKS), sparsity=1 - whole)],
        "razorattention": [RazorAttentionConfig(compression=1 / (window - 5 / n), **echo)],
        "h2o": [H2OConfig(budget=b)],
        "snapkv, release": [SnapKVConfig(budget=b)],
        "ada-kv, release": [AdaKVConfig(budget=b)],
        "ada-kv over kvzip": [AdaKVConfig(scorer="stack"), kvzip(tokenizer, ratio=b, level="pair-uniform")],
        "pyramidkv": [PyramidKVConfig(budget=b)],
        "h2o, mean": [H2OConfig(budget=b, normalise=True)],
        "prefixkv": [PrefixKVConfig(budget=b)],
        "squeezeattention": [SqueezeAttentionConfig(budget=b)],
        "d2o": [D2OConfig(budget=(30 * b - 3) / 27) if b > 0.12 else D2OConfig(budget=b, spare=False)],
    }
    return out


def rounded(tokenizer: Any, b: float, n: int) -> dict[str, Sequence[MethodConfig]]:
    """Entries in two or four bits, and stacks that evict first."""
    newest = 32 / n  # KIVI leaves so many as they are
    out: dict[str, Sequence[MethodConfig]] = {}
    for bits, cost in ((4, FOUR), (2, TWO))[: 1 + (b < 0.2)]:
        few, keep = KIVIConfig(key_bits=bits, value_bits=bits), (b - newest / 2) / cost
        if keep < 1:
            out[f"snapkv + kivi {bits} bits"] = [SnapKVConfig(budget=keep, **WIDE), few]
            out[f"ada-kv + kivi {bits} bits"] = [AdaKVConfig(budget=keep, **WIDE), few]
            out[f"kvzip + kivi {bits} bits"] = [kvzip(tokenizer, ratio=keep), few]
    if b > 0.2:
        out["kivi, 2 bits" if b < 0.3 else "kivi, 4 bits"] = [KIVIConfig() if b < 0.3 else KIVIConfig(key_bits=4, value_bits=4)]
        out["mikv"] = [MiKVConfig(importance=(b - MIKV) / (1 - MIKV))]
    if b > 0.48:
        out["kivi, 6 bits"] = [KIVIConfig(key_bits=6, value_bits=6)]
        out["kivi, 8 bits of keys, 4 of values"] = [KIVIConfig(key_bits=8, value_bits=4)]
        out["kivi, 4 bits of keys, 8 of values"] = [KIVIConfig(key_bits=4, value_bits=8)]
    return out


def calibrate(model: Any, name: str, config: MethodConfig, texts: list[torch.Tensor], draws: torch.Tensor, gates: list[float]) -> None:
    """Measure what a method has to know of this model, on training text or on random tokens that are repeated; gates are found once."""
    if name == "duo-attention":
        if not gates:
            hf_tokens.set_method(model, replace(config, recent=128))
            found = hf_tokens.calibrate(model, [{"input_ids": text[None]} for text in texts])
            gates += next(iter(found.values()))["gates"]
        hf_tokens.set_method(model, replace(config, gates=tuple(gates)))
    elif name == "razorattention":
        hf_tokens.calibrate(model, [{"input_ids": row[None]} for row in draws])
    elif name == "prefixkv":
        hf_tokens.calibrate(model, [{"input_ids": text[None]} for text in texts])
