"""Every example runs on its tiny model, as its first line says."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "train_text.py": "same text from the saved adapter: True",
    "merge_vit.py": "back to the bit: True",
    "prune_vlm.py": "tokens computed",
    "cache_dit.py": "back to the bit: True",
    "embed_text.py": "same vectors from the saved folders: True",
    "lm_eval_harness.py": "the same answers as the base: True",
}
NEEDS = {"lm_eval_harness.py": "lm_eval"}  # a library that few have


@pytest.mark.parametrize("name", sorted(SAYS))
def test_the_example_runs_and_says_what_it_promises(name, tmp_path):
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip("un-skip when lm-eval is installed: pip install lm-eval")
    done = subprocess.run([sys.executable, str(EXAMPLES / name)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout


def test_no_example_is_left_out():
    tried_elsewhere = {"ftp_search.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} == SAYS.keys() | tried_elsewhere
