"""Check every kernel on the GPU, then time it beside its floor, what a user would call instead, and what it is told in.

python benchmarks/gpu.py                 # under 10 minutes; writes results/gpu.json
python benchmarks/gpu.py --rehearse      # the same script on a CPU with interpreted kernels and tiny sizes; writes nothing

Nothing is timed that was not right first: each case runs in Triton at odd sizes and in three dtypes, forward and backward, beside the
torch reference in float64. Times are medians of device events with a cold cache. The floor is the larger one of the bytes that must move
over the copy bandwidth, and the multiplications and additions over the rate of a matrix product, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = str(int("--rehearse" in sys.argv))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels" / "torch-ext"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torch
from hf_tokens_kernels import backend, picks
from operations.case import Case, every
from tolerances import close
from torch import Tensor

RESULTS = Path(__file__).resolve().parent / "results"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLD = 1 << 28  # bytes written between two calls, which no cache holds
REPEATS = 15
BUDGET = 480  # seconds, after which no case is begun


def tensors(found: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A result as a tuple."""
    return found if isinstance(found, tuple) else (found,)


def run(case: Case, form: str, wide: bool, backward: bool) -> list[Tensor]:
    """The outputs of a case in a form, with the gradients of their weighted sum behind them, in float64 if `wide`."""
    cast = lambda t: t.detach().double() if wide and t.is_floating_point() else t.detach()
    inputs = {name: cast(t) for name, t in case.inputs.items()}
    learnt = [t.requires_grad_() for t in inputs.values() if t.is_floating_point()] if backward else []
    with backend(form):
        out = [t for t in tensors(case.call(**inputs)) if t.is_floating_point()]
        if not backward:
            return out
        total = sum((t.double() * torch.linspace(-1, 1, t.numel(), device=t.device, dtype=torch.float64).view_as(t)).sum() for t in out)
        return [*out, *(g for g in torch.autograd.grad(total, learnt, allow_unused=True) if g is not None)]


def check(n: int, device: torch.device) -> dict[str, str]:
    """What is wrong with each case, by its name; nothing where it is right."""
    wrong: dict[str, str] = {}
    for dtype in DTYPES:
        for case in every(n, device, dtype):
            try:
                ours, theirs = (run(case, form, wide, case.backward) for form, wide in (("triton", False), ("torch", True)))
                for got, want in zip(ours, theirs, strict=True):
                    close(got.to(dtype), want.to(dtype), f"{case.name}, {dtype}, n = {n}")
            except Exception as error:  # a kernel that does not compile must not hide what the others do
                wrong[case.name] = f"{type(error).__name__}: {str(error)[:400]}"
    return wrong


def milliseconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Median time of a call on the device, with a cold cache."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    cold = torch.empty(COLD, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    marks = []
    for _ in range(repeats):
        cold.zero_()
        mark = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        mark[0].record()
        call()
        mark[1].record()
        marks.append(mark)
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and operations a second of a matrix product."""
    size = 1 << (30 if device.type == "cuda" else 22)
    source, into = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    copied = 2 * size / milliseconds(lambda: into.copy_(source)) * 1e3
    side = 8192 if device.type == "cuda" else 128
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return copied, 2 * side**3 / milliseconds(lambda: a @ b) * 1e3


def peak(call: Callable[[], object]) -> int:
    """Bytes that a call allocates at most."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def timed(case: Case, copied: float, multiplied: float) -> dict[str, float | str | None]:
    """A row of the result."""
    ours = lambda: case.call(**case.inputs)
    with picks() as picked:
        ours()
    row = {
        "backend": picked[0].backend if picked else "torch",
        "why": picked[0].why if picked else "",
        "ms": milliseconds(ours),
        "floor ms": 1e3 * max(case.bytes / copied, case.flops / multiplied),
        "bytes at most": peak(ours),
        "peer ms": None if case.peer is None else milliseconds(lambda: case.peer(**case.inputs)),
        "peer bytes at most": None if case.peer is None else peak(lambda: case.peer(**case.inputs)),
        "yardstick ms": None if case.yardstick is None else milliseconds(lambda: case.yardstick(**case.inputs)),
    }
    ratio = lambda name: None if row[name] is None else row["ms"] / row[name]
    return {**row, "of the floor": ratio("floor ms"), "of the peer": ratio("peer ms"), "of the yardstick": ratio("yardstick ms")}


def say(name: str, n: int, dtype: torch.dtype, row: dict) -> None:
    """One line."""
    share = lambda label: "" if row[label] is None else f"{row[label]:8.3f} {label}"
    told = "  ".join(share(label) for label in ("of the floor", "of the peer", "of the yardstick"))
    print(f"{name:48} n {n:6} {str(dtype)[6:]:9} {row['backend']:7} {row['ms']:9.3f} ms  floor {row['floor ms']:8.4f}  {told}", flush=True)


def main() -> int:
    """Check, then time; the exit status says whether all was right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="*", default=[8192, 32768])
    args = parser.parse_args()
    if not torch.cuda.is_available() and not args.rehearse:
        parser.error("a GPU is needed, got none. Run it where torch.cuda.is_available(), or with --rehearse.")
    begun, device = time.perf_counter(), torch.device("cpu" if args.rehearse else "cuda")
    wrong: dict[str, str] = {}
    for n in (129,) if args.rehearse else (129, 1000):
        wrong |= check(n, device)
    for name, error in wrong.items():
        print(f"WRONG  {name}: {error}")
    print(f"checked in {time.perf_counter() - begun:.0f} s, {len(wrong)} wrong", flush=True)
    rows, left = [], []
    for dtype in (torch.bfloat16,) if args.rehearse else (torch.bfloat16, torch.float32):
        copied, multiplied = rates(device, dtype)
        print(f"{dtype}: copies {copied / 1e12:.3f} TB/s, multiplies {multiplied / 1e12:.1f} TFLOP/s", flush=True)
        for n in (129,) if args.rehearse else args.sizes:
            for case in every(n, device, dtype):
                if case.name in wrong or time.perf_counter() - begun > BUDGET:
                    left.append(f"{case.name}, n = {n}, {dtype}")
                    continue
                with torch.no_grad():
                    row = timed(case, copied, multiplied)
                say(case.name, n, dtype, row)
                rows.append({"name": case.name, "n": n, "dtype": str(dtype)[6:], **row})
    if not args.rehearse:
        facts = {"command": " ".join(["python", *sys.argv]), "machine": torch.cuda.get_device_name(), "torch": torch.__version__}
        facts |= {"wrong": wrong, "not timed": left, "seconds": time.perf_counter() - begun, "rows": rows}
        (RESULTS / "gpu.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
