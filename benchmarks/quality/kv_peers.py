"""NVIDIA's kvpress under the protocol of kv.py, which starts this with the interpreter of an environment that has kvpress in it.

Each line of the input asks for one cell, each line of the output answers it, in JSON. What a press evicts from a head alone it hides with
false keys and holds on to, so the bytes of its cells are the share it was told to keep.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from typing import Any

import kvpress
import torch
from kv_shared import ANSWER_TOKENS, Memory, batch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "snapkv": lambda r: kvpress.SnapKVPress(r),
    "ada-kv over snapkv": lambda r: kvpress.AdaKVPress(kvpress.SnapKVPress(r)),
    "expected-attention": lambda r: kvpress.ExpectedAttentionPress(r),
    "ada-kv over expected-attention": lambda r: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(r, epsilon=0.01)),
    "tova": lambda r: kvpress.TOVAPress(r),
    "knorm": lambda r: kvpress.KnormPress(r),
    "streaming-llm": lambda r: kvpress.StreamingLLMPress(r),
    "observed-attention": lambda r: kvpress.ObservedAttentionPress(r),
    "random": lambda r: kvpress.RandomPress(r, seed=0),
    "kvzip": lambda r: kvpress.KVzipPress(r),
}


class Held:
    """What a press leaves of a context."""

    def __init__(self, model: Any, press: Any, ids: list[int]):
        self.model, self.length = model, len(ids)
        self.cache = DynamicCache()
        for layer in model.model.layers:
            layer.self_attn.masked_key_indices = None
        with press(model):
            model.model(input_ids=torch.tensor([ids]), past_key_values=self.cache)
        self.hidden = [layer.self_attn.masked_key_indices for layer in model.model.layers]

    def ask(self, ids: Tensor, mask: Tensor, steps: int) -> tuple[Tensor, Tensor, list[float]]:
        """Logits of the tokens, greedy tokens behind them, and seconds of each."""
        q, cache = len(ids), copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(q)
        for layer, hidden in zip(self.model.model.layers, self.hidden, strict=True):
            if hidden is not None:
                _, heads, places = hidden
                rows = torch.arange(q).repeat_interleave(len(heads))
                layer.self_attn.masked_key_indices = (rows, heads.repeat(q), places.repeat(q))
        places = self.length + (mask.cumsum(dim=1) - 1).clamp(min=0)
        whole = torch.cat([mask.new_ones(q, cache.get_seq_length()), mask], dim=1)
        first = self.model(input_ids=ids, attention_mask=whole, position_ids=places, past_key_values=cache).logits
        told, seconds, logits = [], [], first
        for _ in range(steps):
            start = time.perf_counter()
            told.append(logits[:, -1].argmax(dim=-1))
            if len(told) == steps:
                break
            whole, places = pad(whole, (0, 1), value=1), places[:, -1:] + 1
            logits = self.model(input_ids=told[-1][:, None], attention_mask=whole, position_ids=places, past_key_values=cache).logits
            seconds.append(time.perf_counter() - start)
        return first, torch.stack(told, dim=1) if told else ids[:, :0], seconds


@torch.no_grad()
def answer(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """One cell: the loss of a continuation, if one is given, and the answers to rows of ids."""
    model.set_attn_implementation("eager" if asked["press"] == "observed-attention" else "sdpa")
    held = Held(model, PRESSES[asked["press"]](1 - asked["budget"]), asked["context"])
    found: dict[str, Any] = {}
    if asked["continuation"]:
        ids = torch.tensor([asked["continuation"]])
        logits = held.ask(ids, torch.ones_like(ids), 0)[0]
        found["loss"] = cross_entropy(logits[0, :-1], ids[0, 1:]).item()
    _, told, _ = held.ask(*batch(asked["rows"]), ANSWER_TOKENS)
    return found | {"answers": told.tolist()}


def main() -> None:
    """Answer line by line."""
    torch.set_num_threads(int(sys.argv[2]))
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    memory, text = Memory(model), None
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["text"] != text:
            memory.forget()
            text = asked["text"]
        print(json.dumps(answer(model, asked)), flush=True)


if __name__ == "__main__":
    main()
