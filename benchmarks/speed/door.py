"""What the door costs in a process of its own: the light commands beside Typer and Rich alone, `import hf_tokens` beside `import peft`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .paired import Row, ratios

ROOT, ROUNDS = Path(__file__).resolve().parents[2], 11
PATHS = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "kernels" / "torch-ext")]
COMMANDS = (["--version"], ["--help"], ["list"], ["show", "ftp"])
# `import hf_tokens` begins with `import peft`: both are timed in one process, which whatever else the machine does hits alike.
IMPORTS = """
from time import perf_counter
start = perf_counter()
import peft
half = perf_counter()
import hf_tokens
print((perf_counter() - start) / (half - start))
"""


def python(*arguments: str) -> str:
    """What Python prints in a process of its own. Bytecode is kept, as it is of an installed package."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS), "PYTHONDONTWRITEBYTECODE": ""}
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=environment).stdout


def rows() -> Iterator[Row]:
    """Each command, then the import."""
    call: Callable[..., Callable[[], str]] = lambda *arguments: lambda: python(*arguments)
    found = ratios([call("-c", "import typer, rich"), *(call("-m", "hf_tokens_cli", *command) for command in COMMANDS)], ROUNDS)
    for command, one in zip(COMMANDS, found, strict=True):
        yield Row(f"hf-tokens {' '.join(command)}", "import typer, rich", *one, 4.0)
    low, middle, high = statistics.quantiles([float(python("-c", IMPORTS)) for _ in range(ROUNDS + 1)][1:], n=4)
    yield Row("import hf_tokens", "import peft", middle, (high - low) / 2, 1.1)
