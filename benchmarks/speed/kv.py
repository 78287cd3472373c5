"""Decoding SmolLM2-135M behind a long prompt with a quarter of its cache, against the full DynamicCache.

cd benchmarks && python -m speed.kv prefixkv     # bytes that a process has at most for the prompt and a few tokens, all told
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import hf_tokens
from hf_tokens.commands.material import load_base, packaged_smollm2
from hf_tokens.testing import CACHE
from hf_tokens.tools.measure import kv_bytes

from .paired import Row, ratios

BENCHMARKS = Path(__file__).resolve().parents[1]
CONTEXT, SHORT, NEW, ROUNDS = 8192, 1024, 6, 5
BUDGET = 0.25
METHODS = {
    "prefixkv": hf_tokens.PrefixKVConfig(budget=BUDGET),
    "squeezeattention, a window": hf_tokens.SqueezeAttentionConfig(budget=BUDGET, policy="window"),
    "razorattention, a fifth of the heads whole": hf_tokens.RazorAttentionConfig(compression=16, heads=tuple(range(0, 90, 5))),
    "razorattention, the same with a slack of 16": hf_tokens.RazorAttentionConfig(compression=16, heads=tuple(range(0, 90, 5)), slack=16),
    "mikv, 2 bits but for a tenth": hf_tokens.MiKVConfig(importance=0.1, bits=2),
    "kivi, 2 bits": hf_tokens.KIVIConfig(),
    "kivi, 4 bits": hf_tokens.KIVIConfig(key_bits=4, value_bits=4),
}
IN_FEW_BITS = "mikv, 2 bits but for a tenth", "kivi, 2 bits", "kivi, 4 bits"  # which evict nothing
WEIGHED = "prefixkv"  # whose memory is measured in a process of its own
SHORTLY = {  # behind a short prompt, where attention costs little: what is left is the bookkeeping
    **{name: METHODS[name] for name in ("prefixkv", "squeezeattention, a window")},
    "streaming-llm": hf_tokens.StreamingLLMConfig(budget=BUDGET),
    "streaming-llm, a slack of 16": hf_tokens.StreamingLLMConfig(budget=BUDGET, slack=16),
    "streaming-llm, keys as they stood": hf_tokens.StreamingLLMConfig(budget=BUDGET, shift=False),
    "snapkv": hf_tokens.SnapKVConfig(budget=BUDGET),
}
BATCHED, ROWS = "kivi, 2 bits", 12


def twin(base: Any) -> Any:
    """A model of its own over the same weights."""
    return copy.deepcopy(base, {id(t): t for t in (*base.parameters(), *base.buffers())})


def prompt(context: int, rows: int) -> torch.Tensor:
    return torch.randint(100, 40000, (rows, context), generator=torch.Generator().manual_seed(0))


def prefilled(model: Any, context: int = CONTEXT, rows: int = 1) -> tuple[Any, float]:
    """The cache behind the prompt, and the seconds that took."""
    start = time.perf_counter()
    return model(input_ids=prompt(context, rows), use_cache=True, logits_to_keep=1).past_key_values, time.perf_counter() - start


def decode(model: Any, cache: Any, rows: int = 1) -> None:
    """A few tokens more."""
    for token in range(NEW):
        model(input_ids=torch.full((rows, 1), 100 + token), **{CACHE: cache}, use_cache=True)


def process_bytes(name: str) -> int:
    """What a process has at most that runs a method, or the plain model."""
    done = subprocess.run([sys.executable, "-m", "speed.kv", name], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@torch.no_grad()
def rows() -> Iterator[Row]:
    """Seconds a token, bytes of the cache, and seconds of the prompt."""
    base = load_base(str(packaged_smollm2()), "cpu")
    full, took = prefilled(base)
    assert type(full) is DynamicCache
    for name, config in METHODS.items():
        model = hf_tokens.get_token_model(twin(base), config).eval()
        cache, mine = prefilled(model)
        share = {"KV bytes": kv_bytes(cache) / kv_bytes(full), "seconds of the prompt": mine / took}
        if name == WEIGHED:
            spared = process_bytes("") - process_bytes(name)
            share["memory spared at the peak / bytes evicted"] = spared / (kv_bytes(full) - kv_bytes(cache))
        found = ratios([partial(decode, base, full), partial(decode, model, cache)], ROUNDS)
        yield Row(
            f"{name}: decoding", f"SmolLM2-135M, {CONTEXT} tokens of context", *found[0], 1 / (0.8 if name in IN_FEW_BITS else 1.5), share
        )
    models = [base, *(hf_tokens.get_token_model(twin(base), config).eval() for config in SHORTLY.values())]
    found = ratios([partial(decode, model, prefilled(model, SHORT)[0]) for model in models], 3 * ROUNDS)
    for name, ratio in zip(SHORTLY, found, strict=True):
        yield Row(f"{name}: decoding", f"SmolLM2-135M, {SHORT} tokens of context", *ratio, 1 / 0.98)
    models = [base, hf_tokens.get_token_model(twin(base), METHODS[BATCHED]).eval()]
    found = ratios([partial(decode, model, prefilled(model, SHORT, ROWS)[0], ROWS) for model in models], ROUNDS)
    yield Row(f"{BATCHED}: decoding", f"SmolLM2-135M, {SHORT} tokens of context, {ROWS} rows", *found[0], 1 / 0.8)


@torch.no_grad()
def main() -> None:
    """One method, or none, in this process."""
    torch.set_num_threads(1)
    name, model = sys.argv[1], load_base(str(packaged_smollm2()), "cpu")
    model = hf_tokens.get_token_model(model, METHODS[name]).eval() if name else model
    decode(model, prefilled(model)[0])
    told = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())  # since this program began, unlike what getrusage says
    print(int(told[1]) * 1024)


if __name__ == "__main__":
    main()
