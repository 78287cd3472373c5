"""The rows of `bench.py` in two checkouts, call by call in turns: what a change of the code costs. One process for each tree,
on one core.

python benchmarks/against.py TREE [PART ...]     # a row's ratio in this tree, to what it stands against, over the one in TREE
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
FOLDERS = ("", "adapters", "kernels/torch-ext", "benchmarks")
PARTS = ("engine", "vlm", "vit", "dit", "kv")
ROUNDS = 15


def serve(tree: Path, part: str, line: Connection) -> None:
    """Run a part of the bench in a tree, with each of its calls made when the other end asks for it, in CPU-seconds."""
    sys.path[:0] = folders = [str(tree / folder) for folder in FOLDERS]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # a part may start processes
    import torch

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    paired = importlib.import_module("speed.paired")

    def ratios(calls: Sequence[Callable[[], object]], rounds: int) -> list[tuple[float, float]]:
        line.send(len(calls))
        while (index := line.recv()) is not None:
            start = time.process_time()
            told = calls[index]()
            line.send(told if isinstance(told, float) else time.process_time() - start)
        return [(1.0, 0.0)] * (len(calls) - 1)

    paired.ratios = ratios
    import hf_tokens

    assert Path(hf_tokens.__file__).is_relative_to(tree), hf_tokens.__file__
    for row in importlib.import_module(f"speed.{part}").rows():
        line.send(f"{row.what} | {row.against}")
    line.send(None)


def compare(trees: tuple[Path, Path], part: str, rounds: int) -> None:
    """Print, for each call of a part, the median of the paired ratios and half the distance between the quartiles."""
    spawn, lines = multiprocessing.get_context("spawn"), []
    for tree in trees:
        line, other = multiprocessing.Pipe()
        spawn.Process(target=serve, args=(tree, part, other), daemon=True).start()
        lines.append(line)
    while (told := [line.recv() for line in lines]) != [None, None]:
        if isinstance(told[0], str):
            print(f"    {told[0]}", flush=True)
            continue
        assert told[0] == told[1], told
        measured = [in_turns(lines, told[0], turn) for turn in range(rounds + 1)][1:]
        for index in range(1, told[0]):
            quotients = [(new[index] / new[0]) / (old[index] / old[0]) for old, new in measured]
            low, middle, high = statistics.quantiles(quotients, n=4)
            took = statistics.median(old[index] for old, _ in measured)
            print(f"{part}, call {index}: {middle:.3f} +- {(high - low) / 2:.3f}, {took:.3f} s", flush=True)
        for line in lines:
            line.send(None)


def in_turns(lines: Sequence[Connection], calls: int, turn: int) -> list[list[float]]:
    """Seconds of each call in each tree."""
    seconds: list[list[float]] = [[0.0] * calls for _ in lines]
    for index in range(calls):
        for i in (0, 1) if turn % 2 else (1, 0):
            lines[i].send(index)
            seconds[i][index] = lines[i].recv()
    return seconds


def main() -> None:
    """Compare part by part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("parts", nargs="*", default=[], metavar="part", help=f"of {PARTS}")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    for part in args.parts or PARTS:
        compare((args.tree.resolve(), HERE), part, args.rounds)


if __name__ == "__main__":
    main()
