"""Pictures of what methods do, each one call and one matplotlib figure: `pip install "hf-tokens[plot]"`.

>>> import hf_tokens
>>> from hf_tokens import plot
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("vit")
>>> model = hf_tokens.get_token_model(base.model, hf_tokens.ToMeConfig(r=2))
>>> with hf_tokens.record(model) as run:
...     output = model(**base.inputs)
>>> figure = plot.tokens(run)
>>> figure = plot.costs(hf_tokens.summary(model, **base.inputs))
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from .errors import UnsupportedError, explain
from .model.pictures import grid
from .tools.summary import BlockFate, Passage, RunRecord, Summary

# what became of a token, and its color, from the first to the last in the order of their numbers
FATES = {"kept": "#2f7ed8", "joined": "#8bbc21", "skipped": "#f2b134", "gone": "#e6e9ed", "padding": "#ffffff"}
COLORS = ListedColormap([*FATES.values()])
ACCENT, MUTED = "#2f7ed8", "#9aa5b1"
FEW_WORDS = 60  # as many tokens are written out below a picture


def tokens(run: RunRecord, *, words: Sequence[str] | None = None, row: int = 0, passage: int = 0) -> Figure:
    """What became of each token behind each block: kept, joined with others, skipped by the block, or gone.

    Args:
        run: What was recorded.
        words: The tokens in words, such as `tokenizer.convert_ids_to_tokens(ids)`, written below if they are not too many.
        row: Which sample of the batch.
        passage: Which pass of the run, the first is 0.

    Raises:
        UnsupportedError: The run had no such pass or sample, or no method that acts on tokens.
    """
    seen = nth_passage(run, passage, row)
    table = np.stack([fates_of(seen, seen.behind(index), row) for index in range(seen.blocks)])
    figure = new_figure(min(14, 3 + table.shape[1] * 0.12), min(9, 1.6 + 0.22 * seen.blocks))
    axis = figure.subplots()
    axis.imshow(table, cmap=COLORS, vmin=-0.5, vmax=len(FATES) - 0.5, aspect="auto", interpolation="nearest")
    axis.set(xlabel="token", ylabel="block", title=f"what became of the tokens ({seen.stream})")
    if words is not None and len(words) <= FEW_WORDS:
        axis.set_xticks(range(len(words)), [printable(word) for word in words], rotation=90, fontsize=7)
    legend(figure, table)
    return figure


def picture(run: RunRecord, image: Any, *, row: int = 0, passage: int = 0, blocks: Sequence[int] | None = None) -> Figure:
    """The same over the picture: behind each block that changed something, its patches as they are, those that are gone faded out.

    Args:
        run: What was recorded.
        image: The picture: a PIL image, or an array (h w c) or (h w).
        row: Which sample of the batch.
        passage: Which pass of the run.
        blocks: The blocks behind which it is drawn; at most six that changed something, if left out.

    Raises:
        UnsupportedError: The pass has no picture, or its tokens form no grid.
    """
    seen = nth_passage(run, passage, row)
    rows, height, width = patches(seen, row)
    chosen = [*(blocks if blocks is not None else changed(seen, row))]
    pixels = np.asarray(image)
    figure = new_figure(2.4 * len(chosen), 3.5)
    for axis, index in zip(np.atleast_1d(figure.subplots(1, len(chosen))), chosen, strict=True):
        fates = fates_of(seen, seen.behind(index), row)[rows].reshape(height, width)
        axis.imshow(pixels, cmap="gray" if pixels.ndim == 2 else None, extent=(0, width, height, 0))
        axis.imshow(shades(fates), extent=(0, width, height, 0), interpolation="nearest")
        left = len({*seen.behind(index).slot[row][rows].tolist()} - {-1})
        axis.set(title=f"behind block {index}\n{left} tokens of {fates.size} patches", xticks=[], yticks=[])
    legend(figure, np.concatenate([fates_of(seen, seen.behind(index), row)[rows] for index in chosen]))
    return figure


def cache(run: RunRecord, *, row: int = 0) -> Figure:
    """How much of the KV cache each block and key head holds, as a share of the tokens that it has seen, and the bytes of each block.

    Args:
        run: What was recorded, of a model with a cache compressor.
        row: Which sample of the batch.

    Raises:
        UnsupportedError: No cache was kept.
    """
    if not run.entries:
        raise UnsupportedError(explain("A picture of the cache needs a run that kept one", "none", "Pass `use_cache=True`, or generate."))
    keys = sorted(run.entries, key=lambda key: key[1])
    heads = max(len(run.entries[key][row]) for key in keys)
    table = np.full((len(keys), heads), np.nan)
    for line, key in zip(table, keys, strict=True):
        held = run.entries[key][row]
        line[: len(held)] = held.numpy() / run.seen[key]
    figure = new_figure(7, min(9, 1.6 + 0.22 * len(keys)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    drawn = left.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    left.set(xlabel="key head", ylabel="block", title="share of the entries kept", xticks=range(heads))
    left.set_yticks(range(len(keys)), [str(index) for _, index in keys], fontsize=7)
    figure.colorbar(drawn, ax=left)
    right.barh(range(len(keys)), [run.bytes[key] for key in keys], color=ACCENT)
    right.xaxis.set_major_formatter(EngFormatter("B"))
    right.set(xlabel="bytes", title=f"{EngFormatter('B')(run.kv_bytes)} in all")
    return figure


def costs(summary: Summary) -> Figure:
    """What a forward costs with the methods and without: tokens, FLOPs and bytes of the cache.

    Raises:
        UnsupportedError: The summary has nothing to stand beside.
    """
    if summary.base is None:
        rule, remedy = "A picture of costs needs those without the adapter", "Call `hf_tokens.summary(model, **inputs)`."
        raise UnsupportedError(explain(rule, "a summary of a recorded run", remedy))
    names = [name for name in ("tokens", "flops", "kv_bytes") if getattr(summary.base, name)]
    figure = new_figure(3 * len(names), 2.4)
    for axis, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        values = [getattr(summary.base, name), getattr(summary.cost, name)]
        bars = axis.barh(["without", "with"], values, color=[MUTED, ACCENT])
        axis.bar_label(bars, [EngFormatter()(value) for value in values], padding=3, fontsize=8)
        axis.set(title=f"{name.replace('_', ' ')}: {values[1] / values[0]:.0%}", xlim=(0, 1.35 * max(values)), xticks=[])
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    return figure


def pareto(series: Mapping[str, Sequence[tuple[float, float]]], *, cost: str, quality: str, higher: bool = True) -> Figure:
    """Quality over cost of several methods at several strengths, and the line of those that none beats at both.

    Args:
        series: By the name of a method its points, (cost, quality) each.
        cost, quality: What stands at the axes.
        higher: Whether a higher quality is the better one.

    Raises:
        UnsupportedError: There is no point.
    """
    points = sorted(point for of_one in series.values() for point in of_one)
    if not points:
        raise UnsupportedError(explain("A Pareto picture needs points", "none", "Pass (cost, quality) of at least one method."))
    figure = new_figure(6.5, 4.2)
    axis = figure.subplots()
    for name, of_one in series.items():
        axis.plot(*zip(*sorted(of_one), strict=True), "o-", label=name, alpha=0.85, markersize=5)
    best, line = None, []
    for x, y in points:
        if best is None or (y > best if higher else y < best):
            best = y
            line.append((x, y))
    axis.plot(*zip(*line, strict=True), color="black", linestyle="--", linewidth=1, label="none beats these", zorder=0)
    axis.set(xlabel=cost, ylabel=quality)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


# -- what the pictures are made of -------------------------------------------------------------------------------------
def new_figure(width: float, height: float) -> Figure:
    """A figure that no state of pyplot knows of, and that a notebook shows where a cell returns it; its size is in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_repr_png_, figure)  # a class of our own would be no matplotlib figure to Gradio
    return figure


def _repr_png_(figure: Figure) -> bytes:
    """What IPython shows of a figure."""
    figure.savefig(written := io.BytesIO(), format="png", dpi=100)
    return written.getvalue()


def nth_passage(run: RunRecord, number: int, row: int) -> Passage:
    """A pass of a run, refused where there is none."""
    if not run.passages:
        rule, got = "A picture of tokens needs a method that acts on them", "a run in which none did"
        raise UnsupportedError(explain(rule, got, "Record a prompt or a picture, with a reducer, router or bank."))
    if not 0 <= number < len(run.passages) or not 0 <= row < len(run.passages[number].real):
        rows = [len(passage.real) for passage in run.passages]
        rule = f"The run has {len(rows)} passes, with {rows} samples"
        raise UnsupportedError(explain(rule, f"passage={number}, row={row}", "Count both from 0."))
    return run.passages[number]


def fates_of(seen: Passage, fate: BlockFate, row: int) -> np.ndarray:
    """The number of what became of each token, (n)."""
    out = torch.zeros(seen.real.shape[1], dtype=torch.long)
    for number, flags in ((1, fate.joined), (2, fate.skipped), (3, fate.gone), (4, ~seen.real)):
        out[flags[row]] = number
    return out.numpy()


def patches(seen: Passage, row: int) -> tuple[np.ndarray, int, int]:
    """Which tokens are those of the picture, and the height and width of their grid."""
    n = seen.real.shape[1]
    flags = torch.arange(n) if seen.visual is None else seen.visual[row].nonzero()[:, 0]
    flags = flags[seen.prefix : n - seen.suffix] if seen.visual is None else flags
    if seen.picture is None or not len(flags):
        rule = "A picture is drawn over the tokens of one, whose height and width the model was told in its call"
        raise UnsupportedError(explain(rule, f"a pass of the stream {seen.stream!r} without", "Draw `plot.tokens` instead."))
    height, width = grid(len(flags), seen.picture)
    return flags.numpy(), height, width


def changed(seen: Passage, row: int) -> list[int]:
    """The blocks that changed what became of a sample's tokens, six at most."""
    tables = [fates_of(seen, seen.behind(index), row) for index in range(seen.blocks)]
    before = [np.zeros_like(tables[0]), *tables]
    differs = [index for index, table in enumerate(tables) if (table != before[index]).any()] or [seen.blocks - 1]
    step = -(-len(differs) // 6)
    return differs[::-1][::step][::-1]


def shades(fates: np.ndarray) -> np.ndarray:
    """What is laid over the patches (h w), (h w 4): what is gone is white, what is joined or skipped has a tint."""
    colors = np.zeros((*fates.shape, 4))
    for number, (alpha, color) in enumerate(((0.0, "kept"), (0.35, "joined"), (0.35, "skipped"), (0.85, "gone"), (1.0, "padding"))):
        red, green, blue = (int(FATES[color][i : i + 2], 16) / 255 for i in (1, 3, 5))
        colors[fates == number] = red, green, blue, alpha
    return colors


def legend(figure: Figure, table: np.ndarray) -> None:
    """The colors of what is there."""
    there = {*np.unique(table).tolist()}
    handles = [Patch(facecolor=color, edgecolor="#888888", label=name) for i, (name, color) in enumerate(FATES.items()) if i in there]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def printable(word: str) -> str:
    """A token as it can be read: some vocabularies write a space as a letter, and matplotlib reads dollars as formulas."""
    return word.replace("\u0120", " ").replace("\u2581", " ").replace("\u010a", "\\n").replace("$", r"\$")
