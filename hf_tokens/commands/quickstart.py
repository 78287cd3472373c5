"""The main job, start to end on two CPU cores: compress a document, ask, train, measure, save, load elsewhere, take out again."""

from __future__ import annotations

import copy
import os
import shutil
import statistics
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

import hf_tokens
from hf_tokens_cli.options import Options

from ..errors import HFTokensError, explain
from .material import QUESTIONS, Asked, ask_about, documentation, load_base, packaged_smollm2
from .report import ROUNDS, Measured, show_answers, show_table, size_of, write_card, write_results

NEW_TOKENS = 24  # of an answer
LEARNING_RATE = 1e-3
COMPRESSOR = hf_tokens.SnapKVConfig(budget=0.25, window=64, kernel=5, pooling="average")  # a quarter of a prompt's cache stays
SPARSITY = 0.25  # share of tokens that skip a routed block
BEHIND, CONTINUATION = 768, 128  # tokens that a loss is measured behind, and on
KEEP = "trained"  # the row that one would keep

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


def operate(model: PreTrainedModel, *configs: Any) -> Any:
    """Learnable tokens in front and a LoRA, and what else there is to be."""
    prompt = hf_tokens.DeepPromptConfig(tokens=8, init_std=0.0, layers=(0,))
    return hf_tokens.get_token_model(model, [prompt, LoraConfig(r=8), *configs])


def route(model: PreTrainedModel, *configs: Any) -> Any:
    """A router that lets a part of the tokens skip a third of the blocks, and what else there is to be."""
    blocks = range(1, len(hf_tokens.anatomy(model).streams[0]) - 1, 3)
    return hf_tokens.get_token_model(
        model, [hf_tokens.FTPConfig(sparsity=SPARSITY, router="static", strict=True, layers=tuple(blocks)), *configs]
    )


def twin(base: PreTrainedModel) -> PreTrainedModel:
    """A model of its own over the same weights."""
    return copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})


@contextmanager
def step(console: Console, title: str):
    console.print(f"[bold cyan]{title}[/]")
    start = time.perf_counter()
    yield
    console.print(f"  [dim]{time.perf_counter() - start:.1f} s[/]")


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Answers:
    """Answers that a model writes to all questions in one batch, token by token, behind one document that it has read."""

    def __init__(self, model: Any, context: hf_tokens.CompressedContext, ids: torch.Tensor, mask: torch.Tensor | None = None):
        self.model, self.given = model, context.ask(ids, mask)
        self.logits = self.read(ids)

    @torch.no_grad()
    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits of tokens (b m), the last ones that the mask counts."""
        places = (self.given["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(**{**self.given, "input_ids": ids}, position_ids=places, use_cache=True).logits

    def write(self) -> None:
        """One token more of each answer."""
        self.given["attention_mask"] = torch.nn.functional.pad(self.given["attention_mask"], (0, 1), value=1)
        self.logits = self.read(self.logits[:, -1:].argmax(dim=-1))


def held_out_loss(model: Any, chunks: list[torch.Tensor]) -> float:
    """Loss of what follows a held-out context, which is read from the cache that the model makes of it."""
    losses = []
    for chunk in chunks:
        ids = chunk[None].to(model.device)
        n = ids.shape[1] - CONTINUATION * ids.shape[1] // (BEHIND + CONTINUATION)
        told = Answers(model, hf_tokens.compress_context(model, ids[:, :n]), ids[:, n:]).logits
        losses.append(torch.nn.functional.cross_entropy(told[0, :-1], ids[0, n + 1 :]).item())
    return statistics.fmean(losses)


def answer_all(model: Any, tokenizer: Any, context: hf_tokens.CompressedContext, asked: Asked) -> list[str]:
    """The answers to all questions, from what is held of their document."""
    given = context.ask(asked.questions, asked.mask)
    told = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)[:, given["input_ids"].shape[1] :]
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in told]


def seconds_in_turns(answers: list[Answers]) -> list[list[float]]:
    """Seconds of each model for a token of all answers. They take turns, so that whatever else the machine does hits all alike."""
    times: list[list[float]] = [[] for _ in answers]
    for round in range(ROUNDS + 1):
        for one, taken in zip(answers, times, strict=True):
            wait()
            start = time.perf_counter()
            one.write()
            wait()
            if round > 0:
                taken.append(time.perf_counter() - start)
    return times


@dataclass(frozen=True)
class Tried:
    """A model and what it makes of the document and of the held-out text."""

    model: Any
    context: hf_tokens.CompressedContext
    answers: list[str]
    loss: float


def try_out(model: Any, tokenizer: Any, asked: Asked, chunks: list[torch.Tensor]) -> Tried:
    """Let a model read the document, answer the questions, and go on with held-out text."""
    context = hf_tokens.compress_context(model.eval(), asked.document)
    return Tried(model, context, answer_all(model, tokenizer, context, asked), held_out_loss(model, chunks))


def compare(tried: dict[str, Tried], asked: Asked) -> dict[str, Measured]:
    """One row for each model, the first one being what the others are timed against, turn by turn."""
    times = seconds_in_turns([Answers(one.model, one.context, asked.questions, asked.mask) for one in tried.values()])
    rows = {}
    for (name, one), taken in zip(tried.items(), times, strict=True):
        speed = statistics.median(first / own for first, own in zip(times[0], taken, strict=True))
        rate = len(asked.questions) / statistics.median(taken)
        rows[name] = Measured(one.loss, one.context.kv_bytes, rate, speed, one.answers)
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


def run(options: Options) -> dict[str, Measured]:
    """Do the whole job and leave its results in `options.output`."""
    console, start = Console(), time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prepare(options)

    with step(console, "1. A real model, a document and five questions about it"):
        name = options.model or str(packaged_smollm2())
        tokenizer, base = AutoTokenizer.from_pretrained(name), load_base(name, device)
        training, held_out = documentation(tokenizer, options.seq_len)[0], documentation(tokenizer, BEHIND + CONTINUATION)[1][::2]
        asked = ask_about(tokenizer, options.document, device)
        probe = held_out[0][None].to(device)
        before = logits(base, probe)
        console.print(f"  {name}: a document of {asked.document.shape[1]:,} tokens, and {len(training)} pieces of others to train on")

    with step(
        console, "2. At once, without training: the document is read and compressed, and five questions are asked of it in one batch"
    ):
        tried = {"base": try_out(base, tokenizer, asked, held_out)}
        tried["compressed"] = try_out(hf_tokens.get_token_model(twin(base), COMPRESSOR), tokenizer, asked, held_out)
        show_answers(console, QUESTIONS, {name: one.answers for name, one in tried.items()})
        show_table(console, compare(tried, asked))

    with step(console, f"3. Learnable tokens and a LoRA beside it, {options.steps} steps with transformers.Trainer"):
        transformers.set_seed(options.seed)
        model = operate(twin(base), COMPRESSOR)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        console.print(f"  {trainable:,} numbers to train; the base model is frozen")
        losses = train(model, training, options)

    with step(
        console, "4. The trained model, and a router that lets a quarter of the tokens skip a third of the blocks, beside the others"
    ):
        tried["router"] = try_out(route(twin(base), COMPRESSOR), tokenizer, asked, held_out)
        tried[KEEP] = try_out(model, tokenizer, asked, held_out)
        rows = compare(tried, asked)
        show_answers(console, QUESTIONS, {KEEP: rows[KEEP].answers})

    with step(console, "5. Save, and use it in a fresh process"):
        prompt = tokenizer.decode(held_out[0][: min(64, options.seq_len)])
        save_and_use(console, model, tokenizer, name, prompt, options.output, device)

    with step(console, "6. Take it out again"):
        model = model.unload().eval()
        check(console, "After unload the logits are the base model's, to the bit", torch.equal(logits(model, probe), before))

    write_card(options.output / "adapter", rows, name, options, device)
    write_results(options.output, rows, KEEP, QUESTIONS, losses)
    show_table(console, rows)
    console.print(f"In {options.output}: results.png, results.json, use_it.py and adapter/ with its model card.")
    console.print(f"{time.perf_counter() - start:.0f} s in all")
    return rows
