"""Progress of long work, on stderr: shown where somebody sees it and it takes long, and nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

Item = TypeVar("Item")
AFTER = 1.0  # seconds before anything is shown


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar once they have taken a second, on a terminal or in a notebook; in a pipe nothing is written.

    Args:
        items: What the work is done for, one by one.
        what: What the work is, in a few words.
        total: How many there are; None takes the length of `items`, and shows no end where that has none.
    """
    total = len(items) if total is None and isinstance(items, Sized) else total
    begun, bar, shown = time.monotonic(), None, None
    try:
        for done, item in enumerate(items):
            if shown is None and time.monotonic() - begun > AFTER:
                bar = bar_on_stderr()
                shown = bar is not None
                if shown:
                    bar.start()
                    task = bar.add_task(what, total=total)
            if shown:
                bar.update(task, completed=done)
            yield item
    finally:
        if bar is not None:
            bar.stop()  # the line is wiped off, whether the work was done or broken off


def bar_on_stderr():
    """A bar of Rich's; None where stderr is neither a terminal nor a notebook."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not (sys.stderr.isatty() or console.is_jupyter):
        return None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True)
