"""How the time and the memory of every operation grow with n, on one CPU thread: results/growth.json and results/growth.png.

python benchmarks/growth.py                      # n = 512 ... 32768, about 10 minutes
python benchmarks/growth.py --most 4096 --only attention_scores
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its own start and stop

import torch
from operations.case import every
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

RESULTS = Path(__file__).parent / "results"
LEAST = 512
PATIENCE = 2.0  # seconds of a call from which on it is timed once


def seconds(call: Callable[[], object], most: int = 5) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(most + 1):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
        if taken[-1] > PATIENCE:
            return taken[-1]
    return statistics.median(taken[1:])


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at a time, at most, its result included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def slope(sizes: list[int], values: list[float]) -> float:
    """The exponent of n in the upper half of the sizes."""
    half = max(2, (len(sizes) + 1) // 2)
    x, y = ([math.log(v) for v in found[-half:]] for found in (sizes, values))
    return statistics.linear_regression(x, y).slope if len(set(x)) > 1 else math.nan


def measure(most: int, only: str) -> dict[str, dict[str, dict[int, float]]]:
    """Seconds and bytes of ours and of the peer's, by the operation's name, then by n."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    sizes = [LEAST << i for i in range(most.bit_length()) if LEAST << i <= most]
    for n in track(sizes, "n = 512 ..."):
        for case in every(n, torch.device("cpu"), torch.float32, only):
            rows = found.setdefault(case.name, {"seconds": {}, "bytes": {}, "peer seconds": {}, "peer bytes": {}})
            for call, prefix in ((case.call, ""), (case.peer, "peer ")):
                if call is not None:
                    run = lambda call=call, inputs=case.inputs: call(**inputs)
                    rows[f"{prefix}seconds"][n], rows[f"{prefix}bytes"][n] = seconds(run), peak(run)
    return found


def draw(found: dict, slopes: dict, path: Path) -> None:
    """One picture: time and memory over n, ours and the peer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(16, 7), layout="constrained")
    for axis, what, unit in zip(axes, ("seconds", "bytes"), ("seconds, one CPU thread", "bytes allocated at most"), strict=True):
        for i, (name, rows) in enumerate(found.items()):
            style = dict(color=f"C{i % 10}", marker="os"[i // 10 % 2], markersize=4)
            told = f"{name}: time n^{slopes[name]['seconds']:.1f}, memory n^{slopes[name]['bytes']:.1f}"
            axis.plot(*zip(*rows[what].items(), strict=True), label=told, **style)
            if rows[f"peer {what}"]:
                axis.plot(*zip(*rows[f"peer {what}"].items(), strict=True), linestyle=":", alpha=0.5, **style)
        axis.set(yscale="log", xlabel="n", ylabel=unit)
        axis.set_xscale("log", base=2)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9)
    figure.suptitle("Growth of the operations; dotted: what a user would call instead, as long as it fits", x=0.34)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Measure, print, write the result file and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=32768)
    parser.add_argument("--only", default="", help="files of benchmarks/operations with this in their name")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        found = measure(args.most, args.only)
    slopes = {name: {what: slope(list(v), list(v.values())) for what, v in rows.items() if v} for name, rows in found.items()}
    table = Table(title="Exponents of n, and the peer's cost over ours at the last n that it fits")
    for heading in ("operation", "time", "memory", "peer's time", "peer's memory", "peer / ours", "at n"):
        table.add_column(heading, justify="left" if heading == "operation" else "right")
    for name, rows in found.items():
        last = max(rows["peer seconds"], default=None)
        own = [f"{slopes[name][what]:.2f}" if what in slopes[name] else "" for what in ("seconds", "bytes", "peer seconds", "peer bytes")]
        ratio = "" if last is None else f"{rows['peer seconds'][last] / rows['seconds'][last]:.1f}"
        table.add_row(name, *own, ratio, str(last or ""))
    Console(width=140).print(table)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, 1 thread",
        "torch": torch.__version__,
        "slopes": slopes,
        "rows": found,
    }
    (RESULTS / "growth.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(found, slopes, RESULTS / "growth.png")


if __name__ == "__main__":
    main()
