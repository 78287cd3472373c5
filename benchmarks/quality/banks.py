"""What token banks learn from few steps: a language model told what library a docstring is from, and a ViT that meets new digits.

python benchmarks/quality/banks.py             # results/quality/banks.json and .png, some minutes on one core
"""

from __future__ import annotations

import ast
import importlib.util
import math
import random
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import Point, digits, draw, write
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit, get_peft_model
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, ViTConfig, ViTForImageClassification

from hf_tokens import APTConfig, ATPrompt, ATPromptConfig, CPTConfig, CSPConfig, DeepPromptConfig, PREConfig, VQTConfig, get_token_model
from hf_tokens.commands.material import load_base, packaged_smollm2

LIBRARIES = ("numpy", "torch", "sklearn", "matplotlib")
NAMES = re.compile(r"numpy|ndarray|\bnp\b|torch|sklearn|scikit|matplotlib|pyplot|\bplt\b", re.IGNORECASE)
LENGTH, QUESTION = 12, "\nLibrary:"  # tokens of a text, and what is asked behind it
WORDS = " This text is from the documentation of a"  # what a context of learnable tokens starts from
STEPS, BATCH, HELD_OUT = 40, 4, 128
LORA = "LoRA (PEFT)"
SEEDS, BASE_STEPS, NEW_STEPS, NEW = 3, 600, 200, 5  # digits from 5 on are new to the ViT
Report = Callable[[str], None]


# -- a language model --------------------------------------------------------------------------------------------------


def first_sentences(library: str) -> Iterator[tuple[str, str]]:
    """File and first sentence of the docstrings of a library, without those that say its name."""
    root = Path(importlib.util.find_spec(library).submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        if "test" in path.as_posix() or path.stat().st_size > 400_000:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if text and not NAMES.search(text):
                    yield f"{library}/{path.relative_to(root)}", text


def examples(tokenizer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Texts with question and answer (n), to train on and held out; no file gives to both."""
    draws, train, held_out = random.Random(0), [], []
    question = tokenizer(QUESTION)["input_ids"]
    for library in LIBRARIES:
        (answer,) = tokenizer(f" {library}")["input_ids"]
        texts = {tuple(tokenizer(text)["input_ids"][:LENGTH]): file for file, text in first_sentences(library)}
        files = sorted({file for text, file in texts.items() if len(text) == LENGTH})
        draws.shuffle(files)
        aside = set(files[: len(files) // 4])
        for side, wanted, many in ((held_out, True, HELD_OUT), (train, False, STEPS * BATCH)):
            rows = sorted(text for text, file in texts.items() if len(text) == LENGTH and (file in aside) == wanted)
            side += [torch.tensor([*row, *question, answer]) for row in draws.sample(rows, many // len(LIBRARIES))]
    draws.shuffle(train)
    return train, held_out


def batch(rows: list[Tensor], front: list[int], told: list[bool] | None = None) -> dict[str, Tensor]:
    """Inputs and labels of some rows behind a front; of the front, the tokens `told` count too."""
    ids = torch.stack(rows)
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    before = torch.tensor(front, dtype=torch.long).expand(len(ids), -1)
    counted = torch.tensor(told or [False] * len(front), dtype=torch.bool).expand(len(ids), -1)
    return {"input_ids": torch.cat([before, ids], dim=1), "labels": torch.cat([torch.where(counted, before, -100), labels], dim=1)}


@torch.no_grad()
def ask(model: Any, rows: list[Tensor], front: list[int], answers: list[int]) -> tuple[float, float]:
    """Mean loss of the answers, and the share of those that are right among the libraries."""
    losses, right = [], []
    for i in range(0, len(rows), 16):
        given = batch(rows[i : i + 16], front)
        logits, wanted = model(input_ids=given["input_ids"][:, :-1]).logits[:, -1], given["labels"][:, -1]
        losses += F.cross_entropy(logits, wanted, reduction="none").tolist()
        right += (torch.tensor(answers)[logits[:, answers].argmax(dim=1)] == wanted).tolist()
    return statistics.fmean(losses), statistics.fmean(right)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def words_of(rows: list[Tensor]) -> tuple[list[int], list[int]]:
    """A context of one example a library, and the types of its tokens as CPT counts them."""
    chosen = [next(row for row in rows if row[-1] == answer) for answer in dict.fromkeys(int(row[-1]) for row in rows)]
    types = [4 * i + kind for i, row in enumerate(chosen) for kind in (*[2] * LENGTH, *[3] * (len(row) - LENGTH - 1), 4)]
    return torch.cat(chosen).tolist(), types


def text_settings(tokenizer: Any, name: str, rows: list[Tensor]) -> Iterator[tuple[str, str, Callable, float, list[int], list[bool]]]:
    """Series, setting, what makes the model, learning rate, ids in front of each text, and which of those count in the loss."""
    ours = lambda *methods: lambda base: get_token_model(base, list(methods))
    theirs = lambda config: lambda base: get_peft_model(base, config)
    words, asked = tokenizer(WORDS)["input_ids"], tokenizer(QUESTION)["input_ids"]
    examples_ids, types = words_of(rows)
    labels = [kind % 4 == 0 for kind in types]
    (x,), (topic,) = (tokenizer(word)["input_ids"] for word in (" x", " topic"))
    anchored = ATPromptConfig(placeholder=x, attributes=((topic,),), n_att=4, n_ctx=4)
    yield "no training", "the question alone", lambda base: base, 0.0, [], []
    yield "no training", "4 examples in front", lambda base: base, 0.0, examples_ids, labels
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=8, prompt_tuning_init=PromptTuningInit.TEXT, prompt_tuning_init_text=WORDS,
        tokenizer_name_or_path=name,
    )  # fmt: skip
    yield "prompt tuning (PEFT)", "8 tokens", theirs(prompt), 1e-2, [], []
    yield "prefix tuning (PEFT)", "8 tokens", theirs(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)), 1e-2, [], []
    for r in (1, 4):
        yield LORA, f"r={r}", theirs(LoraConfig(task_type="CAUSAL_LM", r=r, target_modules=["q_proj", "v_proj"])), 1e-3, [], []
    yield "deep-prompt", "8 tokens, first block", ours(DeepPromptConfig(tokens=8, layers=(0,))), 1e-2, [], []
    yield "deep-prompt", "8 tokens a block", ours(DeepPromptConfig(tokens=8)), 1e-2, [], []
    yield "csp", f"{len(set(asked))} words of the question", ours(CSPConfig(ids=tuple(dict.fromkeys(asked)))), 1e-2, [], []
    yield "pre", f"{len(words)} words", ours(PREConfig(ids=tuple(words))), 1e-3, words, []
    yield "atprompt", "4 + 4 tokens, 'topic'", ours(anchored), 1e-2, list(ATPrompt.prompt_ids(anchored)), []
    for epsilon in (0.1, 4.0):
        knobs = {"projection_epsilon": epsilon, "projection_format_epsilon": epsilon, "loss_decay_factor": 0.95}
        yield (
            "cpt",
            f"4 examples, epsilon {epsilon}",
            ours(CPTConfig(ids=tuple(examples_ids), types=tuple(types), **knobs)),
            1e-2,
            examples_ids,
            labels,
        )


def text_points(report: Report) -> Iterator[Point]:
    name = str(packaged_smollm2())
    tokenizer = AutoTokenizer.from_pretrained(name)
    train, held_out = examples(tokenizer)
    answers = [tokenizer(f" {library}")["input_ids"][0] for library in LIBRARIES]
    for series, setting, make, rate, front, told in text_settings(tokenizer, name, train):
        start = time.process_time()
        torch.manual_seed(0)
        model = make(load_base(name, "cpu").requires_grad_(False)).train()
        learned = trainable(model)
        steps = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0) if learned else None
        for i in range(STEPS if learned else 0):
            steps.zero_grad()
            model(**batch(train[i * BATCH : (i + 1) * BATCH], front, told)).loss.backward()
            steps.step()
        seconds = time.process_time() - start
        loss, right = ask(model.eval(), held_out, front, answers)
        count = sum(p.numel() for p in learned)
        yield Point(series, setting, {
            "parameters": count, "log10 of parameters, text": math.log10(max(count, 1)), "held-out loss": loss, "accuracy": right,
            "seconds to train": seconds,
        })  # fmt: skip
        report(f"{series:22} {setting:28} {count:>9,} parameters  loss {loss:.3f}  right {right:.3f}  {seconds:.0f} s")


# -- a ViT -------------------------------------------------------------------------------------------------------------


def vit() -> ViTForImageClassification:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=NEW, **sizes))


def teach(model: nn.Module, pictures: Tensor, labels: Tensor, steps: int, rate: float) -> None:
    """Train what is trainable on random batches."""
    learned, model = torch.optim.AdamW(trainable(model), lr=rate, weight_decay=0.01), model.train()
    schedule = torch.optim.lr_scheduler.OneCycleLR(learned, rate, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (32,))
        learned.zero_grad()
        model(pixel_values=pictures[chosen], labels=labels[chosen]).loss.backward()
        learned.step()
        schedule.step()


@torch.no_grad()
def right(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    return float((model.eval()(pixel_values=pictures).logits.argmax(dim=1) == labels).float().mean())


def vit_settings() -> Iterator[tuple[str, str, Callable[[PreTrainedModel], nn.Module], float]]:
    """Series, setting, what makes the model, learning rate; each trains the head of the new classes too."""
    ours = lambda config: lambda base: get_token_model(base, config, modules_to_save=["classifier"])
    lora = lambda r: LoraConfig(r=r, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])

    def probe(base: PreTrainedModel) -> nn.Module:
        base.requires_grad_(False).classifier.requires_grad_(True)
        return base

    yield "linear probe", "head", probe, 1e-2
    yield "whole model", "all", lambda base: base, 2e-3
    for r in (1, 4):
        yield LORA, f"r={r}", lambda base, r=r: get_peft_model(base, lora(r)), 1e-2
    for tokens in (1, 4, 8):
        yield "deep-prompt", f"{tokens} tokens a block", ours(DeepPromptConfig(tokens=tokens)), 1e-2
        yield "vqt", f"{tokens} queries a block", ours(VQTConfig(tokens=tokens)), 1e-2
    for rank in (1, 4):
        yield "apt", f"8 prompts of rank {rank}", ours(APTConfig(tokens=8, rank=rank)), 1e-2


def vit_points(report: Report) -> Iterator[Point]:
    pictures, labels, new_pictures, new_labels = digits()
    old, fresh, test = labels < NEW, labels >= NEW, new_labels >= NEW
    bases = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        base = vit()
        teach(base, pictures[old], labels[old], BASE_STEPS, 2e-3)
        bases.append(base.state_dict())
    for series, setting, make, rate in vit_settings():
        found, count, start = [], 0, time.process_time()
        for seed, state in enumerate(bases):
            torch.manual_seed(100 + seed)
            base = vit()
            base.load_state_dict({name: value for name, value in state.items() if "classifier" not in name}, strict=False)
            model = make(base)
            count = sum(p.numel() for p in trainable(model))
            teach(model, pictures[fresh], labels[fresh] - NEW, NEW_STEPS, rate)
            found.append(right(model, new_pictures[test], new_labels[test] - NEW))
        error, spread = 1 - statistics.fmean(found), statistics.stdev(found)
        yield Point(series, f"ViT: {setting}", {
            "parameters": count, "log10 of parameters, ViT": math.log10(count), "error on new digits": error, "spread of 3 seeds": spread,
            "seconds to train": (time.process_time() - start) / SEEDS,
        })  # fmt: skip
        report(f"{series:22} {setting:28} {count:>9,} parameters  error {error:.4f} +- {spread:.4f}")


NOTES = (
    "ViT, five new classes in 200 steps: query tokens (VQT) fall from an error of 0.25 with one query a block to 0.15 with eight, deep "
    "prompts stay at 0.33 to 0.35, where the linear probe has 0.40. APT, whose prompts never enter the attention, is better than both "
    "for its parameters, 0.19 with 1,909. LoRA is better still: 0.14 with 1,013, 0.07 with 3,317; the whole model 0.04. The paper of "
    "VQT compares on models pretrained on far more than it is tuned on; here the base knows five digits, and what the new ones need is "
    "in the weights, not in its layers' outputs. Text, 40 steps of 4: at the same 4,608 parameters PEFT's prompt tuning (1.48) is far "
    "ahead of prompts in the first block alone (7.98): those act through one attention and are taken out behind it. Prompts in each "
    "block reach LoRA's loss (1.43) with the answer's format alone: which library it is they do not tell (0.27, chance is 0.25), as "
    "PEFT's prefix tuning does not (0.32). The three embeddings of the question itself (CSP, 1,728 parameters) tell 0.49 and PRE's "
    "reparameterised words 0.48, for its 2 million parameters no more than prompt tuning's 0.52. ATPrompt's anchor word helps nothing "
    "here. CPT starts from examples, the best start of all, 3.10, and at the paper's radius of 0.1 hardly moves in 40 steps (2.83); at "
    "4.0 it has the lowest loss but LoRA's, 1.38, and costs three times the seconds: its prompt is the longest. Accuracies of 128 texts"
    " are uncertain by 0.04, so 0.46 to 0.52 are the same."
)


def main() -> None:
    """Measure, and write the result file and its picture."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    report = lambda line: print(line, flush=True)
    points = [*vit_points(report), *text_points(report)]
    setting = (
        f"Text: SmolLM2-135M-Instruct in float32, {LENGTH} tokens of a docstring's first sentence, which of {len(LIBRARIES)} libraries is "
        f"it from (their names left out), {STEPS} steps of {BATCH}, AdamW at 1e-2 (LoRA and PRE 1e-3), {HELD_OUT} held-out texts of other "
        f"files, one seed. ViT: 4 blocks of width 48, trained on digits 0-4 of scikit-learn, then on 5-9 with a new head in {NEW_STEPS} "
        f"steps of 32, mean of {SEEDS} seeds. One core; seconds are of the processor."
    )
    write("banks", points, command="python benchmarks/quality/banks.py", setting=setting, notes=NOTES)
    panels = [("log10 of parameters, text", "held-out loss"), ("log10 of parameters, ViT", "error on new digits")]
    draw("banks", points, panels)


if __name__ == "__main__":
    main()
