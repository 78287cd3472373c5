"""Progress of long work: shown on a terminal once it takes a second, wiped off at the end, and in a pipe not at all."""

import os
import threading
import time

import pytest

from hf_tokens.tools import progress
from hf_tokens.tools.progress import track

STEPS, PAUSE = 8, 0.2


class Reader(threading.Thread):
    """Reads the other end of what stands in for stderr, so that nobody waits for it."""

    def __init__(self, end):
        super().__init__(daemon=True)
        self.end, self.seen = end, b""
        self.start()

    def run(self):
        try:
            while more := os.read(self.end, 4096):
                self.seen += more
        except OSError:
            pass  # the terminal was closed


@pytest.fixture
def written(monkeypatch):
    """What a piece of work writes to stderr where that is a `terminal` or a `pipe`."""
    monkeypatch.setenv("TERM", "xterm")

    def of(kind, work):
        there, ours = os.openpty() if kind == "terminal" else os.pipe()
        reader = Reader(there)
        with open(ours, "w") as stderr, monkeypatch.context() as patch:
            patch.setattr("sys.stderr", stderr)
            work()
            stderr.flush()
        reader.join(timeout=2)
        return reader.seen.decode()

    return of


def slow(items=range(STEPS)):
    for _ in track(items, "long work"):
        time.sleep(PAUSE)


def test_a_second_of_work_is_shown_on_a_terminal_and_wiped_off(written):
    seen = written("terminal", slow)
    assert "long work" in seen and f"/{STEPS}" in seen and seen.rstrip().endswith("\x1b[2K")


@pytest.mark.parametrize(("kind", "work"), [("pipe", slow), ("terminal", lambda: slow(range(2)))], ids=["pipe", "short"])
def test_nobody_is_told_in_a_pipe_nor_of_what_is_short(written, kind, work, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # Rich takes that for a terminal
    assert written(kind, work) == ""


def test_what_is_broken_off_leaves_no_bar_and_the_interrupt_passes(written, monkeypatch):
    monkeypatch.setattr(progress, "AFTER", -1.0)
    before = threading.active_count()

    def work():
        with pytest.raises(KeyboardInterrupt):
            for _ in track(iter(range(3)), "endless"):
                raise KeyboardInterrupt
        until = time.monotonic() + 2
        while threading.active_count() > before + 1 and time.monotonic() < until:
            time.sleep(0.05)
        assert threading.active_count() == before + 1  # the reader; no thread draws any more

    assert "endless" in written("terminal", work)


def test_the_items_are_those_that_were_given():
    assert [*track((i for i in "abc"), "letters")] == [*"abc"] and [*track([], "none")] == []
