"""FTP in its three steps: search the sparsity of every block with the static router, train the dynamic router, search again with it.

python examples/ftp_search.py --model HuggingFaceTB/SmolLM2-135M --texts my.txt --sparsity 0.25 --out ftp-adapter
"""

import argparse
import dataclasses
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_tokens import FTPConfig, get_token_model, search_shares, set_method, unload


@torch.no_grad()
def search(model: nn.Module, batches: list[dict], config: FTPConfig, start: tuple[float, ...], **knobs) -> FTPConfig:
    """The config with the sparsities of the lowest loss on the batches; the model keeps it."""
    model.eval()

    def loss(shares: tuple[float, ...]) -> float:
        set_method(model, dataclasses.replace(config, sparsities=shares))
        return sum(model(**batch, labels=batch["input_ids"]).loss.item() for batch in batches) / len(batches)

    best = dataclasses.replace(config, sparsities=search_shares(loss, start, **knobs))
    set_method(model, best)
    return best


def fit(base: nn.Module, batches: list[dict], sparsity: float, steps: int, out: Path, **knobs) -> nn.Module:
    """All three steps on a model; returns it with the trained router."""
    depth = base.config.num_hidden_layers
    model = get_token_model(base, FTPConfig(sparsity=sparsity, router="static"))
    found = search(model, batches, FTPConfig(sparsity=sparsity, router="static"), (sparsity,) * depth, **knobs)
    print("static router: ", [round(s, 3) for s in found.sparsities])
    config = FTPConfig(sparsity=sparsity, sparsities=found.sparsities)
    model = get_token_model(unload(model), config)
    rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch["input_ids"]]
    quiet = {"report_to": [], "save_strategy": "no"}
    options = TrainingArguments(str(out), max_steps=steps, per_device_train_batch_size=1, learning_rate=1e-3, **quiet)
    Trainer(model=model, args=options, train_dataset=rows).train()
    found = search(model, batches, config, config.sparsities, **knobs)
    print("dynamic router:", [round(s, 3) for s in found.sparsities])
    model.save_pretrained(out)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="causal language model, a Hub id or a folder")
    parser.add_argument("--texts", required=True, type=Path, help="text file to calibrate and train on")
    parser.add_argument("--sparsity", type=float, default=0.25, help="share of tokens that skip a block, mean over the blocks")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=500, help="training steps of the router")
    parser.add_argument("--population", type=int, default=20)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--mutation", type=float, default=0.2, help="the most sparsity that moves between two blocks at a time")
    parser.add_argument("--out", type=Path, default=Path("ftp-adapter"))
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    ids = tokenizer(given.texts.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    batches = [{"input_ids": chunk[None]} for chunk in ids.split(given.length) if len(chunk) == given.length]
    knobs = {name: getattr(given, name) for name in ("population", "generations", "mutation")}
    fit(AutoModelForCausalLM.from_pretrained(given.model), batches, given.sparsity, given.steps, given.out, **knobs)


if __name__ == "__main__":
    main()
