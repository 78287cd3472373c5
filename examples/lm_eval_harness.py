"""Evaluate a model with a surgery in EleutherAI's harness: `HFLM` takes it as it is, beside its base.

pip install lm-eval                                                  # 0.4.13 is the version that this ran with
python examples/lm_eval_harness.py                                   # a tiny random model and a task of its own, seconds
python examples/lm_eval_harness.py --model HuggingFaceTB/SmolLM2-135M-Instruct --tasks lambada_openai gsm8k --limit 100

What is true of it:
- `generate_until` reads a prompt, left-padded with its mask, and decodes from a cache: every method acts there as in `generate`.
- `loglikelihood` and multiple choice read prompt and answer in one pass without a cache: a cache compressor has nothing to drop, and its
  numbers are the base's to the bit. Judge one by tasks that generate.
- They pad on the right and pass no mask: a router or reducer would count the padding as tokens. Hence `batch_size=1`.
- The command `lm_eval --model_args pretrained=...,peft=...` does not import hf-tokens; write three lines as below. A folder that
  `hf_tokens.export` wrote (`checkpoint`) is read by it as any other.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import hf_tokens
from hf_tokens.testing import zoo

NAMES, COLOURS = ("Ann", "Bob", "Eve", "Joe", "Kim", "Lou"), ("red", "blue", "green", "black", "white", "brown")


def base_of(name: str | None) -> tuple[Any, Any]:
    """The named model and its tokenizer, or a tiny random one that reads letters."""
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    letters = ["<pad>", "<eos>", "<unk>", *(chr(i) for i in range(32, 127)), "\n"]
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return zoo.build("llama").model, PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tasks_in(folder: Path) -> list[dict[str, Any]]:
    """Two tasks on one small file: what colour somebody's hat has, to be generated, and to be chosen."""
    draw = random.Random(0)
    rows = []
    for _ in range(8):
        said = {name: draw.choice(COLOURS) for name in draw.sample(NAMES, 4)}
        asked = draw.choice([*said])
        text = " ".join(f"{name} has a {colour} hat." for name, colour in said.items())
        rows.append({"text": f"{text}\n{asked} has a", "answer": f" {said[asked]}", "choices": list(COLOURS)})
    (folder / "hats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "hats.jsonl")}}, "test_split": "test"}
    match = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True, "ignore_punctuation": True}
    generated = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "metric_list": [match]}
    generated |= {"generation_kwargs": {"until": ["\n", ".", " hat"], "max_gen_toks": 7, "do_sample": False}}
    chosen = {"output_type": "multiple_choice", "doc_to_target": "{{choices.index(answer.strip())}}", "doc_to_choice": "{{choices}}"}
    chosen |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    return [{"task": name, "doc_to_text": "{{text}}", **data, **how} for name, how in (("generated", generated), ("chosen", chosen))]


def evaluate(model: Any, tokenizer: Any, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    """What the harness says of a model: its numbers by task, and what it heard of each document."""
    lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=1)
    told = simple_evaluate(model=lm, tasks=tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    return {task: (numbers, [sample["resps"] for sample in told["samples"][task]]) for task, numbers in told["results"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="causal language model, a Hub id or a folder")
    parser.add_argument("--tasks", nargs="+", help="names of the harness's tasks; two of this file by default")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--budget", type=float, default=0.3, help="share of a prompt's entries that SnapKV keeps")
    given = parser.parse_args()
    torch.manual_seed(0)

    with tempfile.TemporaryDirectory() as folder:
        tasks = given.tasks or tasks_in(Path(folder))
        model, tokenizer = base_of(given.model)
        before = evaluate(model, tokenizer, tasks, given.limit)
        model = hf_tokens.get_token_model(model, hf_tokens.SnapKVConfig(budget=given.budget, window=8))
        after = evaluate(model, tokenizer, tasks, given.limit)
    for task, (numbers, heard) in after.items():
        shown = {
            name: (before[task][0][name], value) for name, value in numbers.items() if isinstance(value, float) and "stderr" not in name
        }
        print(f"{task}: " + ", ".join(f"{name} {old:.3f} -> {new:.3f}" for name, (old, new) in shown.items()), end="; ")
        print(f"the same answers as the base: {heard == before[task][1]}")


if __name__ == "__main__":
    main()
