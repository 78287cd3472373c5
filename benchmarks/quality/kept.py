"""Rows that are kept as they are measured, so that an experiment that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from common import Point


class Kept:
    """The rows of a file, one a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.points = {(p.series, p.setting): p for p in (Point(**json.loads(line)) for line in lines)}

    def row(self, series: str, setting: str, measure: Callable[[], dict[str, float]]) -> Point:
        """A row that is there, or that is measured now and written down."""
        if (series, setting) not in self.points:
            self.points[series, setting] = point = Point(series, setting, measure())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(point)) + "\n")
            print(series, "|", setting, {k: round(v, 4) for k, v in point.values.items()}, flush=True)
        return self.points[series, setting]
