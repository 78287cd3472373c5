"""Decoding SmolLM2-135M behind a long prompt with a quarter of its cache, against the full DynamicCache."""

from __future__ import annotations

import copy
import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import DynamicCache

import hf_tokens
from hf_tokens.commands.quickstart import load_base, packaged_smollm2
from hf_tokens.measure import kv_bytes

from .paired import Row, ratios

CONTEXT, CHUNK, NEW, ROUNDS = 8192, 1024, 8, 5
BUDGET = 0.25
METHODS = {
    "prefixkv": hf_tokens.PrefixKVConfig(budget=BUDGET),
    "squeezeattention, a window": hf_tokens.SqueezeAttentionConfig(budget=BUDGET, policy="window"),
    "d2o": hf_tokens.D2OConfig(budget=BUDGET),
    "razorattention, a fifth of the heads whole": hf_tokens.RazorAttentionConfig(compression=8, heads=tuple(range(0, 90, 5))),
    "mikv, 2 bits": hf_tokens.MiKVConfig(importance=0.15, bits=2),
}


def twin(base: Any) -> Any:
    """A model of its own over the same weights."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def prefilled(model: Any, ids: torch.Tensor) -> tuple[Any, float]:
    """The cache behind the prompt, and the seconds that took."""
    start = time.perf_counter()
    return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values, time.perf_counter() - start


def decode(model: Any, cache: Any) -> None:
    """A few tokens more."""
    for token in range(NEW):
        model(input_ids=torch.full((1, 1), 100 + token), past_key_values=cache, use_cache=True)


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Seconds a token, bytes of the cache, and seconds of the prompt."""
    base = load_base(str(packaged_smollm2()), "cpu")
    ids = torch.randint(100, 40000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    full, took = prefilled(base, ids)
    assert type(full) is DynamicCache
    setting = f"SmolLM2-135M, {CONTEXT} tokens of context"
    for name, config in METHODS.items():
        model = hf_tokens.get_token_model(twin(base), config).eval()
        cache, mine = prefilled(model, ids)
        found = ratios([lambda: decode(base, full), lambda: decode(model, cache)], ROUNDS)  # noqa: B023
        share = {"KV bytes": kv_bytes(cache) / kv_bytes(full), "prompt": mine / took}
        yield Row(f"{name}: decoding", setting, *found[0], 1 / 1.5, share)
        del cache, model


def high_water() -> int:
    """Bytes of memory that the process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
