"""Who is calling: the code further up the stack, where another library tells in no other way what it is about."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType


def callers(most: int) -> Iterator[FrameType]:
    """The frames above the one that asks, the nearest first, at most so many."""
    frame = sys._getframe(1).f_back  # the one that asks is what runs this generator
    while frame is not None and most > 0:
        yield frame
        frame, most = frame.f_back, most - 1
