"""Trials of a bench: which of them none beats in quality and a cost at once, and their picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedError, explain

AXES = {"speed": "speed, times the base's", "kv": "bytes of the cache, share of the base's", "flops": "FLOPs, share of the base's"}
BEST, BEATEN, OF_THE_BASE = "#2f7ed8", "#f2b134", "#9aa5b1"  # colours of the trials, and of the base


@dataclass(frozen=True)
class Trial:
    """How good and how fast one model is, the base being 1 where it is said in shares.

    Attributes:
        setting: The knob and its value.
        quality: What `Bench.quality` names.
        tokens, flops: Shares of what one forward computes.
        kv: Share of the bytes of the cache behind a context; None where there is none.
        prompt_speed: How much faster a context is read; None where there is none.
        speed: How much faster a token is written, or pictures are read.
        best_in: What none of the others beats it in without being worse: "speed", "kv" or "flops", each beside the quality.
    """

    setting: str
    quality: float
    tokens: float
    flops: float
    kv: float | None
    prompt_speed: float | None
    speed: float
    best_in: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """What a bench found.

    Attributes:
        model, quality: The model, and what the quality is.
        more_is_better: Whether more of it is better.
        costs: Names of the numbers of a trial that the quality is drawn over.
        trials: The base, and each value of the knob.
    """

    model: str
    quality: str
    more_is_better: bool
    costs: tuple[str, ...]
    trials: list[Trial]


def better(bench: Bench, cost: str) -> Callable[[Trial], tuple[float, float]]:
    """A trial as a point of which more is better in both: its quality and a cost."""
    sign = 1 if bench.more_is_better else -1
    return lambda trial: (sign * trial.quality, vars(trial)[cost] if cost == "speed" else -vars(trial)[cost])


def pareto_front(bench: Bench, cost: str) -> list[Trial]:
    """The trials that none is as good as in both and better than in one."""
    point = better(bench, cost)
    beats = lambda one, other: point(one) != point(other) and all(a >= b for a, b in zip(point(one), point(other), strict=True))
    return [trial for trial in bench.trials if not any(beats(other, trial) for other in bench.trials)]


def marked(bench: Bench) -> Bench:
    """The same with what each trial is best in."""
    fronts = {cost: pareto_front(bench, cost) for cost in bench.costs}
    best = lambda trial: tuple(cost for cost, trials in fronts.items() if trial in trials)
    trials = [Trial(**{**vars(trial), "best_in": best(trial)}) for trial in bench.trials]
    return Bench(**{**vars(bench), "trials": trials})


def check_drawing() -> None:
    """Refuse where no picture can be drawn, before anything is measured."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        remedy = 'Run `pip install "hf-tokens[plot]"`, or pass `--no-picture`.'
        raise UnsupportedError(explain("The picture is drawn by matplotlib", "an environment without it", remedy)) from None


def draw_fronts(bench: Bench, path: Path) -> None:
    """The quality over each cost, with the trials that none beats joined by a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(bench.costs), 3.8), layout="constrained")
    for axis, cost in zip(figure.subplots(1, len(bench.costs), squeeze=False)[0], bench.costs, strict=True):
        line = sorted(pareto_front(bench, cost), key=lambda trial: vars(trial)[cost])
        axis.plot([vars(t)[cost] for t in line], [t.quality for t in line], color=BEST, zorder=1)
        for trial in bench.trials:
            x = vars(trial)[cost]
            colour = OF_THE_BASE if trial.setting == "base" else BEST if trial in line else BEATEN
            axis.scatter(x, trial.quality, color=colour, zorder=2)
            axis.annotate(trial.setting, (x, trial.quality), xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set_xlabel(AXES[cost])
        axis.set_ylabel(f"{bench.quality} ({'higher' if bench.more_is_better else 'lower'} is better)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
