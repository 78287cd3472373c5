"""`make torture` runs these tests at length and prints what they counted; among the others each takes a second or two."""

import os
from collections import Counter, defaultdict

import pytest

AT_LENGTH = "HF_TOKENS_TORTURE" in os.environ


@pytest.fixture(scope="session")
def amount():
    """How often something is done: at length, or in short."""
    return lambda at_length, in_short: at_length if AT_LENGTH else in_short


class Counts:
    """Numbers by what they count, in a plain dict, which reports can carry from one process to another."""

    def __init__(self, held):
        self.held = held

    def __getitem__(self, what):
        return self.held.get(what, 0)

    def __setitem__(self, what, number):
        self.held[what] = number


@pytest.fixture
def count(request):
    """What a test counts, printed behind all of them."""
    held = {}
    request.node.user_properties.append(("counted", held))
    return Counts(held)


def pytest_terminal_summary(terminalreporter):
    counted = defaultdict(Counter)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            test = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
            counted[test].update(dict(report.user_properties).get("counted", {}))
    if AT_LENGTH and counted:
        terminalreporter.write_sep("=", "counted")
        for test, numbers in sorted(counted.items()):
            terminalreporter.write_line(f"{test}: " + ", ".join(f"{n:g} {what}" for what, n in sorted(numbers.items())))
