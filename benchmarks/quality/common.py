"""What the experiments of this folder share: real data, paired seconds, the result file and its Pareto picture."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent.parent / "results" / "quality"
MARKS = "osD^vP*X<>hp"


@dataclass(frozen=True)
class Point:
    """One measured setting: a row of the table, and a point of the picture.

    Attributes:
        series: The method; points of one series are joined by a line. The uncompressed model and the naive baselines are series too.
        setting: The knob's value, in words.
        values: Measured numbers by column name.
    """

    series: str
    setting: str
    values: dict[str, float]


def seconds_in_turns(calls: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    """Median seconds of each call, all taken in turns, so that a busy machine slows all of them alike."""
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for seconds, call in zip(taken, calls, strict=True):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in taken]


def write(name: str, points: Iterable[Point], *, command: str, setting: str, notes: str) -> Path:
    """Write results/quality/<name>.json.

    Args:
        name: Name of the experiment.
        points: Its rows.
        command: The command that makes the file.
        setting: Model, data and machine, in a sentence.
        notes: What the numbers say, in plain words; a claim that does not show is said here.
    """
    rows = [{"series": p.series, "setting": p.setting, **{k: round(v, 5) for k, v in p.values.items()}} for p in points]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, "setting": setting, "notes": notes, "rows": rows}, indent=1) + "\n")
    index()
    return path


def rows_of(name: str, part: str) -> list[Point]:
    """The rows of a result file whose setting begins so."""
    rows = json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    rest = lambda row: {column: value for column, value in row.items() if column not in ("series", "setting")}
    return [Point(row["series"], row["setting"], rest(row)) for row in rows if row["setting"].startswith(part)]


def index() -> None:
    """Write results/quality/README.md: picture, setting, notes and table of every experiment, from their result files."""
    pages = ["# What the methods are worth", "Made from the result files beside it; each was made by the command that stands there."]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        pages += [f"## {path.stem}", f"`{found['command']}`", found["setting"], f"![{path.stem}]({path.stem}.png)", found["notes"]]
        pages += ["<details><summary>All rows</summary>", table(found["rows"]), "</details>"]
    (RESULTS / "README.md").write_text("\n\n".join(page for page in pages if page) + "\n")


def table(rows: list[dict[str, float | str]]) -> str:
    """Rows of a result file in Markdown."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = lambda value: (
        value if isinstance(value, str) else "" if value is None else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    )
    lines = [names, ["---"] * len(names), *([text(row.get(name)) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(name: str, points: Sequence[Point], panels: Sequence[tuple[str, str]], *, better: tuple[str, str] = ("low", "low")) -> Path:
    """Draw results/quality/<name>.png: one panel for each pair of columns (cost, quality), with the front of what nothing beats.

    Args:
        name: Name of the experiment.
        points: What was measured.
        panels: The columns on the x and y axis of each panel.
        better: Which end of the cost and of the quality is better, "low" or "high".
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = list(dict.fromkeys(p.series for p in points))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6.2 * len(panels), 4.6), layout="constrained", squeeze=False)
    for axis, (x, y) in zip(axes[0], panels, strict=True):
        for i, one in enumerate(series):
            mine = sorted((p.values[x], p.values[y]) for p in points if p.series == one and x in p.values and y in p.values)
            axis.plot(*zip(*mine, strict=True), marker=MARKS[i % len(MARKS)], color=f"C{i % 10}", label=one, linewidth=1) if mine else None
        best = front([(p.values[x], p.values[y]) for p in points if x in p.values and y in p.values], better)
        axis.plot(*zip(*best, strict=True), color="0.4", linestyle=":", linewidth=3, alpha=0.5, zorder=0, label="Pareto front")
        axis.set(xlabel=f"{x} ({better[0]} is better)", ylabel=f"{y} ({better[1]} is better)")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def front(pairs: Sequence[tuple[float, float]], better: tuple[str, str]) -> list[tuple[float, float]]:
    """The pairs that no other one beats in both numbers, along the first."""
    signs = [1 if end == "low" else -1 for end in better]
    found, best = [], float("inf")
    for x, y in sorted(pairs, key=lambda pair: (signs[0] * pair[0], signs[1] * pair[1])):
        if signs[1] * y < best:
            best = signs[1] * y
            found.append((x, y))
    return found


def fit(model: nn.Module, loss: Callable[[], Tensor], updates: int) -> float:
    """Train a denoiser from nothing and leave the running mean of its weights in it, frozen; the seconds of the processor that it took.

    Args:
        model: The denoiser.
        loss: Draws a batch and says what the model's loss on it is.
        updates: Steps of AdamW.
    """
    begun, optimizer = time.process_time(), torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    for _ in range(updates):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    model.eval().requires_grad_(False)
    return time.process_time() - begun


def digits(size: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits of scikit-learn: pictures (n 1 size size) in [-1, 1] and labels (n), 1,437 to train and 360 held out."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    if size != pictures.shape[-1]:
        pictures = torch.nn.functional.interpolate(pictures, size=(size, size), mode="bilinear")
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    return pictures[train], labels[train], pictures[held_out], labels[held_out]
