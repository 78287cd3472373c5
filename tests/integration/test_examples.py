"""Every example runs on its tiny model, as its first line says."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "train_text.py": "same text from the saved adapter: True",
    "merge_vit.py": "back to the bit: True",
    "prune_vlm.py": "tokens computed",
    "cache_dit.py": "back to the bit: True",
}


@pytest.mark.parametrize("name", sorted(SAYS))
def test_the_example_runs_and_says_what_it_promises(name, tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout


def test_no_example_is_left_out():
    tried_elsewhere = {"ftp_search.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys() | tried_elsewhere
