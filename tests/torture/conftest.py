"""`make torture` runs these tests at length and prints what they counted; among the others each takes a second or two."""

import os
from collections import Counter, defaultdict

import pytest

AT_LENGTH = "HF_TOKENS_TORTURE" in os.environ


@pytest.fixture(scope="session")
def amount():
    """How often something is done: at length, or in short."""
    return lambda at_length, in_short: at_length if AT_LENGTH else in_short


@pytest.fixture
def count(request):
    """What a test counts, printed behind all of them."""
    counted = Counter()
    yield counted
    request.node.user_properties.append(("counted", dict(counted)))


def pytest_terminal_summary(terminalreporter):
    counted = defaultdict(Counter)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "teardown":
                test = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
                counted[test].update(dict(report.user_properties).get("counted", {}))
    if AT_LENGTH and counted:
        terminalreporter.write_sep("=", "counted")
        for test, numbers in sorted(counted.items()):
            terminalreporter.write_line(f"{test}: " + ", ".join(f"{n:g} {what}" for what, n in sorted(numbers.items())))
