"""What the quickstart shows and leaves behind: answers, a table, a picture, a file of numbers and a model card."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_tokens_cli.options import Options

ROUNDS = 12  # of the timing

CARD = """---
library_name: peft
base_model: {base}
tags: [hf-tokens]
---
# hf-tokens quickstart

An adapter of hf-tokens on `{base}`: learnable tokens in front, a compressed KV cache, and a LoRA.
Size: {size:.0f} kB. Trained for {steps} steps on {seq_len}-token pieces of the Python documentation (`pydoc_data.topics`).

| | held-out loss | KV MB of the document | tokens/s | speed |
|---|---|---|---|---|
{rows}

The loss is that of held-out text behind a context that is read from the cache. The document has {document:,} tokens; tokens a second are
those of {questions} answers in one batch behind it, on {device} with {threads} threads: medians of {rounds} rounds, in turns.

```python
import hf_tokens

model = hf_tokens.load("<this folder or repository>")
```
"""


@dataclass(frozen=True)
class Measured:
    """What one state of the model costs, how well it predicts held-out text, and what it answers."""

    loss: float
    kv_bytes: int
    tokens_per_second: float
    speed: float
    answers: list[str]


def row_of(name: str, row: Measured) -> list[str]:
    """A row of the table."""
    return [name, f"{row.loss:.3f}", f"{row.kv_bytes / 1e6:.1f}", f"{row.tokens_per_second:.1f}", f"{row.speed:.2f} x"]


def show_table(console: Console, rows: dict[str, Measured]) -> None:
    table = Table(title="Loss of held-out text, cache of the document, and five answers in one batch")
    for heading in ("", "held-out loss", "KV cache, MB", "tokens/s", "speed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        table.add_row(*row_of(name, row))
    console.print(table)


def show_answers(console: Console, questions: Sequence[str], answers: dict[str, list[str]]) -> None:
    """The answers of some models, side by side."""
    table = Table("question", *answers, show_lines=True)
    for question, *told in zip(questions, *answers.values(), strict=True):
        table.add_row(*map(Text, (question, *told)))
    console.print(table)


def draw(rows: dict[str, Measured], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Measured], float]]] = [
        ("KV cache of the document, MB\n(lower is better)", lambda r: r.kv_bytes / 1e6),
        ("tokens a second, five answers in a batch\n(higher is better)", lambda r: r.tokens_per_second),
        ("held-out loss behind a context\n(lower is better)", lambda r: r.loss),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.4), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=True):
        values = [value(row) for row in rows.values()]
        bars = axis.barh(list(rows), values, color=["#9aa5b1", *["#f2b134"] * (len(rows) - 2), "#2f7ed8"])
        axis.bar_label(bars, fmt=lambda v: f"{v:,.2f}" if v < 10 else f"{v:,.0f}", padding=3, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, 1.18 * max(values))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_card(folder: Path, rows: dict[str, Measured], base: str, options: Options, device: str) -> None:
    lines = [f"| {' | '.join(row_of(name, row))} |" for name, row in rows.items()]
    setting = {"steps": options.steps, "seq_len": options.seq_len, "document": options.document, "device": device, "rounds": ROUNDS}
    setting |= {"threads": torch.get_num_threads(), "questions": len(next(iter(rows.values())).answers)}
    name = Path(base).name if Path(base).is_dir() else base
    ModelCard(CARD.format(base=name, size=size_of(folder) / 1e3, rows="\n".join(lines), **setting)).save(folder / "README.md")


def write_results(folder: Path, rows: dict[str, Measured], keep: str, questions: Sequence[str], losses: list[float]) -> None:
    table = {name: asdict(row) for name, row in rows.items()}
    results = {"command": sys.argv, "rows": table, "keep": keep, "questions": list(questions), "training_losses": losses}
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(rows, folder / "results.png")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
