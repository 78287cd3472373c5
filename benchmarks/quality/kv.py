"""What KV compression costs on SmolLM2-135M-Instruct: loss of a continuation and lines looked up in real documents, at equal bytes.

python benchmarks/quality/kv.py [--peers PYTHON]

PYTHON is the interpreter of an environment with kvpress. Each finished cell is a line of kv.jsonl, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from contests import TASKS, Document, Question, documents, is_right
from kv_report import report
from kv_settings import calibrate, settings
from kv_shared import ANSWER_TOKENS, Memory, batch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

import hf_tokens
from hf_tokens.commands.material import documentation, load_base, packaged_smollm2
from hf_tokens.commands.quickstart import Answers, twin
from hf_tokens.kv.layer import TokenCacheLayer

CELLS = RESULTS / "kv.jsonl"
FULL = "full cache"
BEFORE, WITH = "before the question", "with the question"
PEERS = (
    "snapkv",
    "ada-kv over snapkv",
    "expected-attention",
    "kvzip",
    "tova",
    "streaming-llm",
    "random",
    "ada-kv over expected-attention",
    "observed-attention",
    "knorm",
)
# tokens, budget, contest, first and last document: what says most comes first
PLAN = (
    (1024, 0.25, BEFORE, 0, 4),
    (1024, 0.50, BEFORE, 0, 4),
    (1024, 0.10, BEFORE, 0, 4),
    (1024, 0.25, BEFORE, 4, 6),
    (1024, 0.25, WITH, 0, 2),
    (2048, 0.25, BEFORE, 0, 2),
    (1024, 0.10, BEFORE, 4, 12),
    (1024, 0.25, BEFORE, 6, 12),
    (1024, 0.50, BEFORE, 4, 12),
    (1024, 0.25, WITH, 2, 12),
    (2048, 0.25, BEFORE, 2, 6),
    (2048, 0.10, BEFORE, 0, 6),
    (2048, 0.50, BEFORE, 0, 6),
    (4096, 0.25, BEFORE, 0, 3),
    (4096, 0.10, BEFORE, 0, 3),
    (1024, 0.10, WITH, 0, 12),
    (1024, 0.50, WITH, 0, 12),
    (2048, 0.25, WITH, 0, 6),
    (4096, 0.50, BEFORE, 0, 3),
    (2048, 0.10, WITH, 0, 6),
    (2048, 0.50, WITH, 0, 6),
    (4096, 0.25, WITH, 0, 3),
    (4096, 0.10, WITH, 0, 3),
    (4096, 0.50, WITH, 0, 3),
)
ALONE = 2  # questions of a document that are read with it, each in a prompt of its own


def held(cache: Any) -> tuple[int, int]:
    """Bytes of a cache, and what they would be if numbers were of 16 bits."""
    layers = [layer.tensors() if isinstance(layer, TokenCacheLayer) else [layer.keys, layer.values] for layer in cache.layers]
    parts = {id(t): t for of_layer in layers for t in of_layer if t is not None}.values()
    return sum(t.nbytes for t in parts), sum(t.numel() * min(2, t.element_size()) if t.is_floating_point() else t.nbytes for t in parts)


def prompts(document: Document, number: int, contest: str) -> list[tuple[list[int], list[list[int]], list[Question]]]:
    """What is read and compressed, and the rows that are asked of it."""
    if contest == BEFORE:
        return [(document.context, [one.question + one.cue for one in document.questions], document.questions)]
    some = [document.questions[(4 * number + 7 * i) % len(document.questions)] for i in range(ALONE)]
    return [(document.context + one.question, [one.cue], [one]) for one in some]


def ours(model: Any, document: Document, number: int, contest: str) -> dict[str, Any]:
    """One cell of a model of this library, or of the plain one."""
    found: dict[str, Any] = {"answers": [], "bytes": 0, "bytes in 16 bits": 0}
    steps = []
    for text, rows, _ in prompts(document, number, contest):
        start = time.perf_counter()
        context = hf_tokens.compress_context(model, torch.tensor([text]))
        found["seconds"] = time.perf_counter() - start
        for name, count in zip(("bytes", "bytes in 16 bits"), held(context.cache), strict=True):
            found[name] += count
        if contest == BEFORE:
            ids = torch.tensor([document.continuation])
            logits = Answers(model, context, ids).logits
            found["loss"] = cross_entropy(logits[0, :-1], ids[0, 1:]).item()
        answers, told = Answers(model, context, *batch(rows)), []
        for _ in range(ANSWER_TOKENS):
            told.append(answers.logits[:, -1].argmax(dim=-1))
            start = time.perf_counter()
            if len(told) < ANSWER_TOKENS:
                answers.write()
                steps.append(time.perf_counter() - start)
        found["answers"] += torch.stack(told, dim=1).tolist()
    return found | {"seconds a token": statistics.median(steps)}


class Peers:
    """kvpress in a process of its own."""

    def __init__(self, python: str, source: str, threads: int):
        command = [python, str(Path(__file__).parent / "kv_peers.py"), source, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def cell(self, name: str, budget: float, document: Document, number: int, contest: str, text: str) -> dict[str, Any]:
        """One cell of a press."""
        found: dict[str, Any] = {"answers": []}
        for context, rows, _ in prompts(document, number, contest):
            continuation = document.continuation if contest == BEFORE else []
            asked = {"press": name, "budget": budget, "context": context, "rows": rows, "continuation": continuation, "text": text}
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line:
                raise RuntimeError(f"The process with kvpress ended at {name}: run kv_peers.py by hand to see why")
            told = json.loads(line)
            found["answers"] += told.pop("answers")
            found |= told
        return found


def marks(tokenizer: Any, answers: list[list[int]], questions: list[Question]) -> dict[str, float]:
    """Share of right answers in each task."""
    right: dict[str, list[bool]] = {}
    for row, one in zip(answers, questions, strict=True):
        right.setdefault(one.task, []).append(is_right(tokenizer.decode(row, skip_special_tokens=True), one.accepted))
    return {task: statistics.fmean(right[task]) for task in TASKS if task in right}


class Bench:
    """The models, the texts, and the cells that are done."""

    def __init__(self, peers: str | None, threads: int, only: list[str] | None):
        self.only = only
        torch.set_num_threads(threads)
        source = str(packaged_smollm2())
        self.tokenizer, self.base = AutoTokenizer.from_pretrained(source), load_base(source, "cpu")
        self.memory, self.gates = Memory(self.base), []
        self.train = documentation(self.tokenizer, 768)[0][:2]
        self.draws = torch.randint(100, len(self.tokenizer) - 100, (2, 48), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
        self.peers = Peers(peers, source, threads) if peers else None
        lines = CELLS.read_text().splitlines() if CELLS.exists() else []
        self.cells = [json.loads(line) for line in lines if line.endswith("}")]
        self.done = {(c["n"], c["document"], c["contest"], c["method"], c["budget"]) for c in self.cells}

    def models(self, budget: float, n: int) -> Iterator[tuple[str, Any]]:
        """The methods at a budget, calibrated."""
        for name, configs in settings(self.tokenizer, budget, n).items():
            if self.only and name not in self.only:
                continue
            model = hf_tokens.get_token_model(twin(self.base), list(configs)).eval()
            calibrate(model, name, configs[0], self.train, self.draws, self.gates)
            yield name, model

    def write(self, found: dict[str, Any], key: tuple, document: Document, started: float) -> None:
        """A finished cell."""
        n, number, contest, name, budget = key
        questions = [one for part in prompts(document, number, contest) for one in part[2]]
        right = marks(self.tokenizer, found.pop("answers"), questions)
        names = {"n": n, "document": number, "contest": contest, "method": name, "budget": budget}
        cell = names | {k: v if isinstance(v, int) else round(v, 5) for k, v in {**found, **right}.items()}
        CELLS.parent.mkdir(parents=True, exist_ok=True)
        with CELLS.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        self.cells.append(cell)
        self.done.add(key)
        print(f"{time.perf_counter() - started:5.1f}s", json.dumps(cell), flush=True)

    def phase(self, n: int, budget: float, contest: str, first: int, last: int) -> None:
        """Documents by turns, all methods on each."""
        texts = documents(self.tokenizer, n)[first:last]
        wanted = lambda name, share, number: (n, number, contest, name, share) not in self.done
        names = [FULL, *settings(self.tokenizer, budget, n)]
        if (
            not any(wanted(name, 1.0 if name == FULL else budget, first + i) for i in range(len(texts)) for name in names)
            and not self.peers
        ):
            return
        models = [(FULL, self.base), *self.models(budget, n)]
        for number, document in enumerate(texts, first):
            self.memory.forget()
            for name, model in sorted(models, key=lambda pair: "kvzip" in pair[0]):  # five passes for one
                key = (n, number, contest, name, 1.0 if name == FULL else budget)
                if key not in self.done:
                    started = time.perf_counter()
                    self.write(ours(model, document, number, contest), key, document, started)
            for name in [name for name in PEERS if not self.only or f"kvpress: {name}" in self.only] if self.peers else ():
                key = (n, number, contest, f"kvpress: {name}", budget)
                if key not in self.done:
                    started = time.perf_counter()
                    self.write(self.peers.cell(name, budget, document, number, contest, f"{n} {number} {contest}"), key, document, started)

    def speed(self, n: int, budget: float) -> None:
        """Seconds of a prompt and of a token in a batch, each method in turns with the full cache, nothing from memory."""
        document, self.memory.acts = documents(self.tokenizer, n)[0], False
        for name, model in self.models(budget, n):
            key = (n, 0, "seconds", name, budget)
            if key in self.done:
                continue
            started = time.perf_counter()
            cells = [ours(one, document, 0, WITH) for one in (self.base, model)]
            whole, own = ({k: cell[k] for k in ("seconds", "seconds a token")} for cell in cells)
            ratio = {f"{k}, of the full cache's": own[k] / whole[k] for k in own}
            self.write({**own, **ratio, "answers": []}, key, Document([], [], []), started)
        self.memory.acts = True


def main() -> None:
    """Run what is not done, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="interpreter of an environment with kvpress")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="only these of ours and of the peers, besides the full cache")
    parser.add_argument("--report", action="store_true", help="write the table of the cells that are done, and run nothing")
    options = parser.parse_args()
    if not options.report:
        bench = Bench(options.peers, options.threads, options.only)
        with contextlib.ExitStack() as stack:
            if bench.peers:
                stack.callback(bench.peers.process.kill)
            for phase in PLAN:
                bench.phase(*phase)
                if phase == PLAN[5]:
                    bench.speed(1024, 0.25)
    report([json.loads(line) for line in CELLS.read_text().splitlines()])


if __name__ == "__main__":
    main()
