"""Progress of what takes longer than one would wait for, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

Item = TypeVar("Item")


def track(iterable: Iterable[Item], what: str) -> Iterable[Item]:
    """The same items, with a bar of how many are done where stderr is a terminal."""
    from rich import progress
    from rich.console import Console

    return progress.track(iterable, what, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
