"""What surgeries cost and save on a CPU: paired runs in turns on one thread, ratios only.

python benchmarks/bench.py                       # under 15 minutes: the table, and results/bench.json
python benchmarks/bench.py --only vit --tome ../ToMe   # one part, beside the public ToMe (needs timm)
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table
from speed.paired import Row

RESULTS = Path(__file__).parent / "results"
PARTS = ("door", "engine", "vlm", "vit", "dit", "kv")


def show(rows: list[Row]) -> None:
    """Print a table."""
    table = Table(title="Seconds, and other costs, over those of what stands under `against`; one thread")
    for heading in ("surgery", "against", "time", "+-", "goal", "speed-up", "others"):
        table.add_column(heading, justify="left" if heading in ("surgery", "against", "others") else "right")
    for row in rows:
        goal = "" if row.goal is None else f"{'' if row.ratio <= row.goal else 'missed: '}<= {row.goal:.2f}"
        others = ", ".join(f"{name} {value:.3f}" for name, value in row.values.items())
        table.add_row(row.what, row.against, f"{row.ratio:.3f}", f"{row.spread:.3f}", goal, f"{1 / row.ratio:.2f}x", others)
    Console(width=180).print(table)


def main() -> None:
    """Measure, print, write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    parser.add_argument("--tome", type=Path, help="a clone of facebookresearch/ToMe")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "bench.json"
    known = json.loads(path.read_text())["parts"] if path.exists() else {}
    begun, parts = time.perf_counter(), {}
    for part in args.only:
        print(f"{time.perf_counter() - begun:5.0f} s  {part}", file=sys.stderr, flush=True)
        given = {"path": args.tome} if part == "vit" else {}
        parts[part] = list(importlib.import_module(f"speed.{part}").rows(**given))
    show([row for rows in parts.values() for row in rows])
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    known |= {part: {**facts, "rows": [asdict(row) for row in rows]} for part, rows in parts.items()}
    path.write_text(json.dumps({"parts": {part: known[part] for part in PARTS if part in known}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
