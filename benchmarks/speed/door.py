"""What the door costs in a process of its own: the light commands beside Typer and Rich alone, `import hf_tokens` beside `import peft`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .paired import Row, ratios

ROOT, ROUNDS = Path(__file__).resolve().parents[2], 11
PATHS = [str(ROOT), str(ROOT / "adapters"), str(ROOT / "kernels" / "torch-ext")]
COMMANDS = (["--version"], ["--help"], ["list"], ["show", "ftp"])


def process(*arguments: str) -> Callable[[], object]:
    """A call that runs Python with arguments and throws away what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(PATHS)}
    return lambda: subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)


def rows() -> Iterator[Row]:
    """Each command, then the import."""
    found = ratios([process("-c", "import typer, rich"), *(process("-m", "hf_tokens_cli", *command) for command in COMMANDS)], ROUNDS)
    for command, one in zip(COMMANDS, found, strict=True):
        yield Row(f"hf-tokens {' '.join(command)}", "import typer, rich", *one, 4.0)
    (found,) = ratios([process("-c", "import peft"), process("-c", "import hf_tokens")], ROUNDS)
    yield Row("import hf_tokens", "import peft", *found, 1.1)
