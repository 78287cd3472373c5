"""How a command says what it found: on stdout its result alone, as columns, a table, or JSON."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable
from typing import Annotated, Any, TypeVar

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]
Found = TypeVar("Found")


def working(work: Callable[[], Found]) -> Found:
    """Do something whose libraries print: what they print goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's own
        return work()


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=1, default=str))


def columns(rows: list[list[str]]) -> str:
    """Rows as plain columns, the last one folded at the edge of a terminal. A rich table takes 2 ms a row."""
    widths = [max(map(len, column)) + 2 for column in list(zip(*rows, strict=True))[:-1]]
    left, edge = sum(widths), shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    lines = []
    for *cells, last in rows:
        first, *more = textwrap.wrap(last, max(edge - left, 20)) or [""]
        lines += ["".join(map(str.ljust, cells, widths)) + first, *(" " * left + part for part in more)]
    return "\n".join(lines)


def console() -> Any:
    from rich.console import Console

    return Console()


def grid(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")  # a name is never cut, however narrow the terminal
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def say(text: str) -> None:
    """A line in which nothing is markup."""
    console().print(text, markup=False, highlight=False, soft_wrap=True)
