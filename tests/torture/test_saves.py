"""Saves that are killed at any moment leave the old adapter or the new one; the next one leaves no litter."""

import os
import random
import signal
import time

import gates
import pytest
from damage import MAKERS, WHOLE, filled, held

PARTS = 4
MAKES = [
    pytest.param(maker, marks=gates.add_adapter if maker == "transformers" else ())
    for maker in ("PEFT", "Trainer", "save_adapter of a model by itself", "transformers")
]


def killed_behind(seconds, save, model, folder):
    """Save in another process, which is killed behind so many seconds."""
    child = os.fork()
    if child == 0:
        try:
            save(model, folder)
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("maker", MAKES)
@pytest.mark.parametrize("part", range(PARTS))
def test_a_save_that_is_killed_leaves_the_old_or_the_new(tmp_path, amount, count, part, maker):
    make, save = MAKERS[maker]
    chance = random.Random(part)
    old, new = (filled(lambda value=value: make(value), value) for value in (1, 2))
    save(old, tmp_path)
    files, start = {path.name for path in tmp_path.iterdir()}, time.perf_counter()
    save(old, tmp_path)
    length = time.perf_counter() - start
    for _ in range(amount(45, 1)):
        killed_behind(4 * length * chance.random(), save, new, tmp_path)
        found = held(tmp_path)
        assert found in ((1, 1), (2, 2)) or maker not in WHOLE, f"{found} behind {count['old'] + count['new']} kills"
        count["refused" if found == "refused" else {(1, 1): "old", (2, 2): "new"}[found]] += 1
        save(old, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == files and held(tmp_path) == (1, 1)
