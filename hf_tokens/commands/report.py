"""What the quickstart leaves behind: a table, a picture, a file of numbers and a model card."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from rich.console import Console
from rich.table import Table

from hf_tokens_cli.options import Options

ROUNDS = 7  # of the timing

CARD = """---
library_name: peft
base_model: {base}
tags: [hf-tokens]
---
# hf-tokens quickstart

An adapter of hf-tokens on `{base}`: learnable tokens in front, a token router in a third of the blocks,
a compressed KV cache, and a LoRA that adapts the model to them.
Size: {size:.0f} kB. Trained for {steps} steps on {seq_len}-token pieces of the Python documentation (`pydoc_data.topics`).

| | held-out loss | tokens computed | KV kB | tokens/s | speed |
|---|---|---|---|---|---|
{rows}

Measured on held-out topics of the same text, {seq_len} tokens a piece, on {device} with {threads} threads; times are medians of
{rounds} rounds in which the three models take turns. "Tokens computed" counts the tokens that went through a block,
summed over the blocks.

```python
import hf_tokens

model = hf_tokens.load("<this folder or repository>")
```
"""


@dataclass(frozen=True)
class Measured:
    """What one state of the model costs and how well it predicts the held-out text."""

    name: str
    loss: float
    tokens: int
    kv_bytes: int
    tokens_per_second: float
    speed: float


def show_table(console: Console, rows: list[Measured]) -> None:
    table = Table(title="Held-out text, before and after")
    for heading in ("", "held-out loss", "tokens computed", "KV cache", "tokens/s", "speed"):
        table.add_column(heading, justify="left" if not heading else "right")
    for r in rows:
        kv, rate = f"{r.kv_bytes / 1024:,.0f} kB", f"{r.tokens_per_second:.0f}"
        table.add_row(r.name, f"{r.loss:.3f}", f"{r.tokens:,}", kv, rate, f"{r.speed:.2f}x")
    console.print(table)


def draw(rows: list[Measured], losses: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: list[tuple[str, Callable[[Measured], float]]] = [
        ("held-out loss", lambda r: r.loss),
        ("tokens computed", lambda r: r.tokens),
        ("KV cache (kB)", lambda r: r.kv_bytes / 1024),
        ("tokens per second", lambda r: r.tokens_per_second),
    ]
    figure, axes = pyplot.subplots(1, len(panels) + 1, figsize=(16, 3.6), layout="constrained")
    for axis, (title, value) in zip(axes, panels, strict=False):
        bars = axis.bar([r.name for r in rows], [value(r) for r in rows], color=["#9aa5b1", "#f2b134", "#2f7ed8"])
        axis.bar_label(bars, fmt=lambda v: f"{v:,.2f}" if v < 100 else f"{v:,.0f}", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.tick_params(axis="x", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].plot(losses, color="#2f7ed8", marker="o", markersize=3)
    axes[-1].set_title("training loss, as logged", fontsize=10)
    axes[-1].spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def write_card(folder: Path, rows: list[Measured], base: str, options: Options, device: str) -> None:
    lines = [
        f"| {r.name} | {r.loss:.3f} | {r.tokens} | {r.kv_bytes / 1024:.0f} | {r.tokens_per_second:.0f} | {r.speed:.2f}x |" for r in rows
    ]
    setting = {"steps": options.steps, "seq_len": options.seq_len, "device": device, "threads": torch.get_num_threads(), "rounds": ROUNDS}
    name = Path(base).name if Path(base).is_dir() else base
    ModelCard(CARD.format(base=name, size=size_of(folder) / 1e3, rows="\n".join(lines), **setting)).save(folder / "README.md")


def write_results(folder: Path, rows: list[Measured], losses: list[float]) -> None:
    results = {"command": sys.argv, "rows": [asdict(r) for r in rows], "training_losses": losses}
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(rows, losses, folder / "results.png")


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
