"""A run of a denoiser: which of its steps a call is, and what each call of the step before put out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from .clock import Tick, same_table

CALLS = 8  # calls of one name at one timestep; more of them are runs of a single step
Context = tuple[str, int]


@dataclass(frozen=True)
class StepOutput:
    """What a call of a step put out.

    Attributes:
        output: The prediction, cut to the channels of the sample: what stands behind them is a variance.
        shape: That of the sample.
        halves: Whether the two halves of the batch had the same sample, so that they differ by their condition only.
        like: The first call of the step that had this sample.
    """

    output: Tensor
    shape: torch.Size
    halves: bool
    like: Context


class DenoisingRun:
    """Counts the steps of a run; a step back begins another one.

    Attributes:
        place: What counts the steps, and what falls from one to the next; None where the next call begins a run.
        begins: Whether this call is the first of a run.
        index: Of the step.
        first: Place in the scheduler's table at which the run began.
        origin: The timestep at which it began.
        single: Runs of a single step behind each other, none of which was told of.
        context: Name of this call, and how many of that name the step had.
        last, now: What the calls of the step before put out, and those of this one with their samples.
    """

    def __init__(self):
        self.place: tuple[int, float] | None = None
        self.begins = False
        self.index, self.first, self.origin, self.single = 0, 0, 0.0, 0
        self.context: Context = ("default", 1)
        self.last: dict[Context, StepOutput] = {}
        self.now: dict[Context, tuple[Tensor, StepOutput]] = {}
        self._calls: Counter[str] = Counter()
        self._clock: int | None = None  # which scheduler counts the steps
        self._table: Tensor | None = None  # its timesteps

    def end(self) -> None:
        """Let the next call begin a run."""
        self.place, self.last, self.now = None, {}, {}

    def keep(self, sample: Tensor, output: StepOutput) -> None:
        """Keep what this call put out."""
        self.now[self.context] = sample, output

    def step(self, name: str, told: int | None, now: Tick | None, value: float, another: bool = False) -> None:
        """Go on to a call of this name: at a step that its context tells, that a scheduler counts, or that has this much noise.

        Raises:
            UnsupportedError: Another run was inside of this one since the last call, and the scheduler has its timesteps.
        """
        place = (0, -value) if told is None else (1, float(told))
        if told is None and now is not None:
            if not same_table(now, self._clock, self._table):
                self._clock, self._table = now.clock, now.table
            place = (id(self._table), float(now.index))
        before = self.place
        if another and before is not None and place[0] != before[0]:
            rule = "A run within a step of another one's must leave the other's scheduler its timesteps"
            remedy = "Give the pipeline that runs within a copy of the scheduler, or as many steps."
            raise UnsupportedError(explain(rule, "one that set them anew", remedy))
        back = before is not None and place[0] == before[0] and place[1] < before[1]
        self.begins = before is None or back or place[0] != before[0] or self._calls[name] >= CALLS and place == before
        if self.begins or place != before:
            self.single = self.single + 1 if back and self.index == 0 and told is None else 0
            self.index = told if told is not None else 0 if self.begins else self.index + 1
            self._calls.clear()
            self.last = {} if self.begins else {key: output for key, (_, output) in self.now.items()}
            self.now = {}
        if self.begins:
            self.origin, self.first = value, 0 if now is None else now.index
            if now is not None and now.begin is not None and now.index > now.begin:  # another denoiser made the steps before
                self.origin, self.first = value * now.span / now.level if now.level else value, now.begin
        self.place = place
        self._calls[name] += 1
        self.context = (name, self._calls[name])


class NestedRuns:
    """The run of a denoiser, and those that pipelines began within its steps: a callback's, a scheduler's.

    Attributes:
        depth: In how many runs of pipelines the last call was.
    """

    def __init__(self):
        self.depth = 0
        self._runs: dict[int, DenoisingRun] = {0: DenoisingRun()}

    @property
    def run(self) -> DenoisingRun:
        """The one that the last call was of."""
        return self._runs[self.depth]

    def enter(self, depth: int) -> bool:
        """Go on to a call, or an end, of the run at this depth; returns whether one within it was there since its last call."""
        inner = [key for key in self._runs if key > depth]
        self._runs = {key: run for key, run in self._runs.items() if key <= depth}
        self._runs.setdefault(depth, DenoisingRun())
        self.depth = depth
        return bool(inner)
