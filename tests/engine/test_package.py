"""`hf-tokens new-method`: of each role a package whose tests pass as it is written, and whose contract sees what is broken in it."""

import contextlib
import importlib
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest

import hf_tokens_cli
from hf_tokens.commands.package import starts, write_package
from hf_tokens.commands.scaffold import known_roles
from hf_tokens.errors import ConfigError
from hf_tokens.roles.registry import ENTRY_POINTS, METHODS, method_info
from hf_tokens.testing import contract

ROLES = sorted(known_roles())


class Outcomes:
    """What became of each test of a run, by its name."""

    def __init__(self):
        self.of = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid.rpartition("::")[2]] = report.outcome


@contextlib.contextmanager
def installed(folder, package):
    """A package that can be imported for a while, as it can be where pip has installed it, and whose method is known."""
    before = dict(METHODS)
    sys.path.insert(0, str(folder / "src"))
    try:
        yield importlib.import_module(package)
    finally:
        sys.path.remove(str(folder / "src"))
        of_it = [name for name, module in sys.modules.items() if str(vars(module).get("__file__")).startswith(str(folder))]
        for name in of_it:
            del sys.modules[name]
        METHODS.clear()
        METHODS.update(before)


def run(folder, *arguments):
    """A run of the package's own tests, as its author starts it."""
    outcomes = Outcomes()
    own = ["-q", "-p", "no:cacheprovider", "-c", str(folder / "pyproject.toml"), "--rootdir", str(folder), str(folder / "tests")]
    code = pytest.main([*own, *arguments], plugins=[outcomes])
    return code, outcomes.of


def test_each_role_has_a_start():
    assert sorted(starts()) == ROLES


@pytest.mark.parametrize("role", ROLES)
def test_what_is_written_is_a_package_whose_verb_is_its_loop(role, tmp_path):
    method = f"my-{role.replace('_', '-')}"
    write_package(method, role, tmp_path)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"][ENTRY_POINTS].items()
    with installed(tmp_path, value):
        assert EntryPoint(name, value, ENTRY_POINTS).load() is sys.modules[value]
        info = method_info(method)
        assert info.role == known_roles()[role].role and info.cls.__module__ == f"{value}.my_{role}"
        code, of = run(tmp_path, "-k", "the_verb_is_the_loop or test_card or example or knob or json or final or some_architecture")
        assert code == 0 and set(of.values()) == {"passed"} and len(of) > 10


BROKEN = {
    "padding counts": ("rate = 1", "positions = torch.arange(positions.shape[1]).expand_as(positions)\n        rate = 1", "padded"),
    "zero strength is not zero": ("if rate == 1", "rate = rate * 0.75\n        if rate == 1", "zero_strength"),
}
CHECKED = "(gpt2 or vit) and (padded_batch or zero_strength_is_the_base or sample_alone or unloaded or promises) and not encoder"


def test_the_contract_of_what_is_written_holds_and_sees_what_is_broken(tmp_path):
    write_package("my-start", "TokenReducer", tmp_path)
    file = tmp_path / "src" / "hf_tokens_my_start" / "my_start.py"
    right = file.read_text().replace("from torch import", "import torch\nfrom torch import")
    with installed(tmp_path, "hf_tokens_my_start"):
        code, of = run(tmp_path, "-k", CHECKED)
        assert code == 0 and set(of.values()) == {"passed"}
        assert any("padded" in name for name in of) and any("unloaded" in name for name in of)
    for old, new, seen in BROKEN.values():
        assert old in right
        file.write_text(right.replace(old, new))
        importlib.invalidate_caches()
        forget_runs()
        with installed(tmp_path, "hf_tokens_my_start"):
            code, of = run(tmp_path, "-k", CHECKED)
        assert code == 1 and any(seen in name for name, outcome in of.items() if outcome == "failed"), of


def forget_runs():
    """What the contract remembers of a method by its name."""
    pairs = importlib.import_module("hf_tokens.testing.contract.pairs")
    for function in (pairs.planned, pairs.outputs_with, pairs.start_run, pairs.refused, pairs.mildest, pairs.base_cost):
        function.cache_clear()


def test_a_method_that_nobody_has_has_no_contract():
    with pytest.raises(ConfigError, match=r"got 'prefixvk'\. Did you mean 'prefixkv'\?"):
        contract.of("prefixvk")


def test_all_checks_are_owed_where_there_is_something_to_check():
    names = set(contract.every_check())
    owed = {name for name in names if name in vars(contract.of("probe-drop"))}
    assert {"test_a_padded_batch_is_each_sample_alone", "test_compiled_is_eager_or_refused", "test_save_and_load"} <= owed
    assert "test_padding_counts_for_nothing" in names - owed  # of objectives alone


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-tokens", "new-method", *arguments])
        with pytest.raises(SystemExit) as end:
            hf_tokens_cli.main()
        return end.value.code or 0, *capsys.readouterr()

    return call


def test_the_command_says_what_it_wrote(cli, tmp_path):
    code, out, err = cli("some-name", "--role", "TokenBank", "--package", str(tmp_path / "new"))
    assert code == 0 and err == ""
    assert sorted(out.split()) == sorted(str(path) for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert any(line.endswith("tests/test_contract.py") for line in out.split())


@pytest.mark.parametrize(
    ("name", "role", "words"),
    [
        ("Some Name", "TokenBank", "small letters, digits and hyphens, got 'Some Name'."),
        ("x", "TokenBnk", "got 'TokenBnk'. Did you mean 'TokenBank'?"),
        ("ftp", "TokenBank", "A new method has a new name, got 'ftp', which is registered."),
        ("x", "TokenBank", "written into an empty folder, got "),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(cli, tmp_path, name, role, words):
    (tmp_path / "notes.txt").write_text("mine")
    folder = tmp_path if "empty" in words else tmp_path / "new"
    code, out, err = cli(name, "--role", role, "--package", str(folder))
    assert code == 2 and out == "" and words in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
