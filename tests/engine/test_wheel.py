"""What is built: a wheel of a source distribution holds every module, what is written beside them and no test, and works by itself."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

from hf_tokens_cli import catalogue

ROOT = Path(__file__).parents[2]
SOURCES = {
    "hf_tokens": ROOT,
    "hf_tokens_cli": ROOT,
    "hf_tokens_adapters": ROOT / "adapters",
    "hf_tokens_kernels": ROOT / "kernels" / "torch-ext",
}
CARRIED = (".py", ".pyi", ".json", ".toml", ".txt", ".md", ".j2", ".yaml")  # what a package may hold
BUILD = """
import os, sys, tarfile
from setuptools import build_meta
out = sys.argv[1]
name = build_meta.build_sdist(out)
with tarfile.open(os.path.join(out, name)) as archive:
    archive.extractall(out, filter="data")
os.chdir(os.path.join(out, name.removesuffix(".tar.gz")))
print(os.path.join(out, build_meta.build_wheel(out)))
"""
USED = """
import sys
from importlib.metadata import entry_points, version
from pathlib import Path
import hf_tokens, hf_tokens_adapters, hf_tokens_cli, hf_tokens_kernels
from hf_tokens.commands.package import starts
from hf_tokens.commands.scaffold import known_roles
here = Path(sys.argv[1])
for package in (hf_tokens, hf_tokens_adapters, hf_tokens_cli, hf_tokens_kernels):
    assert Path(package.__file__).is_relative_to(here), package.__file__
assert version("hf-tokens") == hf_tokens.__version__
for name in hf_tokens.__all__:
    getattr(hf_tokens, name)
assert starts().keys() == known_roles().keys()
for arguments in (["--version"], ["list"], ["show", "ftp"], ["recipe", "--help"]):
    sys.argv = ["hf-tokens", *arguments]
    try:
        hf_tokens_cli.main()
    except SystemExit as end:
        assert not end.code, arguments
"""


def run(code, *arguments, folder, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy of what is under version control for that."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("out")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package, source in SOURCES.items():
        where = tree / source.relative_to(ROOT) / package
        shutil.copytree(source / package, where, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("tests", "docs"):  # what a search for packages might take along
        (tree / room).mkdir()
        (tree / room / "made.py").write_text("")
    return Path(run(BUILD, out, folder=tree).splitlines()[-1])


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def in_the_tree(package):
    root = SOURCES[package] / package
    paths = (path for path in root.rglob("*") if path.suffix in CARRIED or path.name == "py.typed")
    return {str(path.relative_to(root.parent)) for path in paths}


def test_it_holds_all_of_the_packages_and_nothing_else(unpacked):
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    packed = {path for path in files if ".dist-info" not in path}
    assert packed == {path for package in SOURCES for path in in_the_tree(package)}
    assert {f"{package}/py.typed" for package in SOURCES} | {"hf_tokens/__init__.pyi", "hf_tokens_adapters/index.json"} <= packed


def test_it_says_what_pip_and_other_programs_read(unpacked):
    (folder,) = unpacked.glob("*.dist-info")
    said = HeaderParser().parsestr((folder / "METADATA").read_text())
    pythons = [each.rpartition(":: ")[2] for each in said.get_all("Classifier") if "Python :: 3." in each]
    assert said["Requires-Python"] == f">={pythons[0]}" and f"{sys.version_info.major}.{sys.version_info.minor}" in pythons
    assert {"testing", "diffusers", "triton", "quickstart"} <= set(said.get_all("Provides-Extra"))
    entries = (folder / "entry_points.txt").read_text()
    assert "hf-tokens = hf_tokens_cli:main" in entries and f"[{catalogue.ENTRY_POINTS}]\nbuiltin = {catalogue.BUILT_IN}" in entries
    assert (folder / "licenses" / "LICENSE").is_file()


def test_it_works_where_the_repository_is_not(unpacked, tmp_path):
    shown = run(USED, unpacked, folder=tmp_path, path=[str(unpacked)])
    assert " methods" in shown and "FTPConfig" in shown
