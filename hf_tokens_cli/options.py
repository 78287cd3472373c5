"""What the quickstart can be told; light, so that the command line reads its defaults without loading torch."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    model: str | None = None
    steps: int = 100
    seq_len: int = 192
    document: int = 4096
    output: Path = Path("quickstart-output")
    seed: int = 0
    threads: int | None = None
