"""What methods cost and save on SmolLM2-135M and real text: the numbers in their cards.

python benchmarks/methods.py
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import hf_tokens
from hf_tokens.commands.material import documentation, load_base, packaged_smollm2
from hf_tokens.testing import CACHE
from hf_tokens.tools.measure import kv_bytes

RESULTS = Path(__file__).parent / "results" / "methods.json"
COMMAND = "python benchmarks/methods.py"
PROMPT, ANSWER, SAMPLES = 192, 48, 4


@torch.no_grad()
def continuation(model: Any, texts: list[torch.Tensor]) -> tuple[float, int, float]:
    """Loss of the tokens behind a prompt, one at a time over its cache; bytes of the cache behind the prompt; seconds a token."""
    losses, held, seconds = [], [], []
    for text in texts:
        out = model(input_ids=text[None, :PROMPT], use_cache=True)
        held.append(kv_bytes(out.past_key_values))
        for place in range(PROMPT, PROMPT + ANSWER):
            losses.append(torch.nn.functional.cross_entropy(out.logits[0, -1:], text[place : place + 1]).item())
            start = time.perf_counter()
            out = model(input_ids=text[None, place : place + 1], **{CACHE: out.past_key_values}, use_cache=True)
            seconds.append(time.perf_counter() - start)
    return statistics.fmean(losses), int(statistics.fmean(held)), statistics.median(seconds)


def prefixkv(name: str, train: list[torch.Tensor], held_out: list[torch.Tensor]) -> dict[str, Any]:
    """PrefixKV at several budgets, with and without calibration."""
    whole = continuation(load_base(name, "cpu"), held_out)
    rows = [["full cache", f"{whole[0]:.3f}", "1.00"]]
    for budget in (0.75, 0.5, 0.25):
        for calibrated in (False, True):
            model = hf_tokens.get_token_model(load_base(name, "cpu"), hf_tokens.PrefixKVConfig(budget=budget)).eval()
            if calibrated:
                hf_tokens.calibrate(model, [{"input_ids": text[None, :PROMPT]} for text in train[:4]])
            loss, held, _ = continuation(model, held_out)
            rows.append([f"budget {budget}{', calibrated' if calibrated else ''}", f"{loss:.3f}", f"{held / whole[1]:.2f}"])
    setting = f"SmolLM2-135M-Instruct, {ANSWER} held-out tokens behind {PROMPT} of a prompt, {SAMPLES} texts"
    columns = ["cache", "loss of the continuation", "KV bytes behind the prompt"]
    return {"command": COMMAND, "setting": setting, "columns": columns, "rows": rows}


def ftp(name: str, held_out: list[torch.Tensor]) -> dict[str, Any]:
    """FTP with the static router in blocks that can spare tokens, untrained."""
    blocks = (3, 4, 12, 14, 17, 18, 19, 20, 25, 26)
    base = load_base(name, "cpu")

    @torch.no_grad()
    def row(label: str, model: Any) -> list[str]:
        loss = statistics.fmean(model(input_ids=text[None], labels=text[None]).loss.item() for text in held_out)
        cost = hf_tokens.measure(model, input_ids=held_out[0][None], use_cache=True)
        return [label, f"{loss:.3f}", f"{cost.tokens / whole.tokens:.2f}", f"{cost.kv_bytes / whole.kv_bytes:.2f}"]

    whole = hf_tokens.measure(base, input_ids=held_out[0][None], use_cache=True)
    rows = [row("base", base)]
    for sparsity in (0.1, 0.25, 0.5):
        config = hf_tokens.FTPConfig(sparsity=sparsity, router="static", strict=True, layers=blocks)
        model = hf_tokens.get_token_model(load_base(name, "cpu"), config).eval()
        rows.append(row(f"sparsity {sparsity}", model))
    setting = f"SmolLM2-135M-Instruct, {PROMPT + ANSWER} held-out tokens, {SAMPLES} texts, static router in blocks {blocks}, untrained"
    return {"command": COMMAND, "setting": setting, "columns": ["router", "loss", "tokens computed", "KV bytes"], "rows": rows}


def main() -> None:
    """Measure and write the result file."""
    torch.set_num_threads(1)
    name = str(packaged_smollm2())
    train, held_out = documentation(AutoTokenizer.from_pretrained(name), PROMPT + ANSWER)
    held_out = held_out[:SAMPLES]
    results = {"ftp": ftp(name, held_out), "prefixkv": prefixkv(name, train, held_out)}
    for key, found in results.items():
        print(key, *found["rows"], sep="\n  ")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
