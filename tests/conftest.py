"""One thread, no network and interpreted kernels, set before torch, huggingface_hub and triton read the environment."""

import functools
import gc
import itertools
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from costs import Costs
from lots import ALL, MARK, left_out

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

TESTS = Path(__file__).parent


def pytest_addoption(parser):
    parser.addoption("--short", action="store_true", help="the short form: engine, integration, and the first method of each role by name")


@functools.cache
def first_of_each_role():
    import hf_tokens

    roles = {info.role: info.name for info in reversed(hf_tokens.list_methods())}
    return {f"test_{name.replace('-', '_')}.py" for name in roles.values()}


def pytest_ignore_collect(collection_path, config):
    if not config.getoption("short") or collection_path == TESTS or TESTS not in collection_path.parents:
        return None
    room, *rest = collection_path.relative_to(TESTS).parts
    kept = room in ("engine", "integration") or room == "methods" and (not rest or rest[-1] in first_of_each_role())
    return None if kept else True


def pytest_configure(config):
    config.pluginmanager.register(Costs())
    config.addinivalue_line("markers", MARK)


def pytest_collection_modifyitems(config, items):
    out = set() if ALL else left_out(items)
    config.hook.pytest_deselected(items=[item for item in items if item in out])
    items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def cli(monkeypatch, capsys):
    """Run the command line in this process: its exit code, and what it said on stdout and stderr."""
    import hf_tokens_cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-tokens", *arguments])
        with pytest.raises(SystemExit) as end:
            hf_tokens_cli.main()
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    return call


def settle():
    """What is there by now stays: else every full collection walks through all of torch, and what the tests have cached, again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    settle()


OFTEN, ENDED = 20, itertools.count(1)  # tests


@pytest.fixture(autouse=True)
def settled():
    yield
    if next(ENDED) % OFTEN == 0:
        settle()
