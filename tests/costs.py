"""What the tests cost, in CPU-seconds: the slowest files, and each method's own share.

Wall time says little on a shared machine and nothing under xdist; CPU time of the process and of the ones it started does. Imports and the
collection are not in it. `HF_TOKENS_COSTS=FILE` writes what each test cost.
"""

import os
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[1]
METHODS = {path.stem.replace("_", "-") for path in ROOT.glob("adapters/hf_tokens_adapters/*/*.py") if path.stem != "__init__"}
BUDGET = 5.0  # CPU-seconds that one more method may add
FILES, MOST = 10, 5  # as many files, and methods, are named


def method_of(nodeid: str) -> str | None:
    """The method that a test is there for: its own file, or a case of a test over all methods, whose id begins with its name."""
    file, _, case = nodeid.partition("[")
    stem = Path(file.partition("::")[0]).stem.removeprefix("test_").replace("_", "-")
    if "/methods/" in file:
        return stem
    words = case.rstrip("]").split("-")
    return next((name for end in range(len(words), 0, -1) if (name := "-".join(words[:end])) in METHODS), None)


def spent() -> float:
    """CPU-seconds of this process and of the processes it has waited for."""
    times = os.times()
    return sum(times[:4])


class Costs:
    """Notes the CPU time of every test where it runs, and adds it up where all reports come together."""

    def __init__(self) -> None:
        self.mark = 0.0
        self.seconds: Counter[str] = Counter()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        self.mark = spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = spent()
        report.cpu, self.mark = now - self.mark, now
        return report

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += vars(report).get("cpu", 0.0)  # xdist reports a test that killed its process, and knows no more

    def pytest_terminal_summary(self, terminalreporter):
        if self.seconds:
            terminalreporter.write_sep("=", "CPU-seconds")
            for line in self.lines():
                terminalreporter.write_line(line)
        if path := os.environ.get("HF_TOKENS_COSTS"):
            Path(path).write_text("".join(f"{seconds:.3f}\t{nodeid}\n" for nodeid, seconds in self.seconds.most_common()))

    def lines(self) -> list[str]:
        files, methods = Counter(), Counter()
        for nodeid, seconds in self.seconds.items():
            files[nodeid.partition("::")[0]] += seconds
            if method := method_of(nodeid):
                methods[method] += seconds
        lines = [f"{seconds:8.1f}  {file}" for file, seconds in files.most_common(FILES)]
        lines.append(f"{sum(files.values()):8.1f}  all {len(files)} files, {len(self.seconds)} tests")
        if methods:
            over = sum(seconds > BUDGET for seconds in methods.values())
            most = ", ".join(f"{name} {seconds:.1f}" for name, seconds in methods.most_common(MOST))
            lines.append(f"{median(methods.values()):8.1f}  a method: in the middle of {len(methods)}; {over} over {BUDGET:g}: {most}")
        return lines
