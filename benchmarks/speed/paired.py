"""Paired times: all calls in turns, so that a busy machine slows all of them alike, and ratios to the first one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One paired measurement.

    Attributes:
        what: What was done to the model.
        against: What it is compared with.
        ratio: Median of the paired ratios of seconds, what / against.
        spread: Half the distance between their quartiles.
        goal: The largest ratio that the project wants; None where nothing is asked.
        values: Other numbers, as ratios where they are costs: FLOPs, tokens, bytes.
    """

    what: str
    against: str
    ratio: float
    spread: float
    goal: float | None = None
    values: dict[str, float] = field(default_factory=dict)


def seconds(call: Callable[[], object]) -> float:
    """Seconds of a call; one that returns a float measured itself."""
    start = time.perf_counter()
    told = call()
    return told if isinstance(told, float) else time.perf_counter() - start


def ratios(calls: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
    """Median ratio to the first call, and half the distance between the quartiles, of each of the others; the order turns."""
    taken: list[list[float]] = [[] for _ in calls]
    order = list(range(len(calls)))
    for turn in range(rounds + 1):
        for i in order if turn % 2 else order[::-1]:
            taken[i].append(seconds(calls[i]))
    found = []
    for mine in taken[1:]:
        low, middle, high = statistics.quantiles([a / b for a, b in zip(mine[1:], taken[0][1:], strict=True)], n=4)
        found.append((middle, (high - low) / 2))
    return found
