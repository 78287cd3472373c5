"""constraints.txt, which `make lock` writes, holds what the project, its extras and its tests ask for, inside the project's bounds."""

import ast
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LINES = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
LOCKED = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in LINES)}
EXTRAS = PYPROJECT["project"]["optional-dependencies"].values()
ASKED = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"], *(each for extra in EXTRAS for each in extra)]
REQUIREMENTS = sorted({each for each in ASKED if not each.startswith(PYPROJECT["project"]["name"])})


@pytest.mark.parametrize("asked", REQUIREMENTS)
def test_a_requirement_is_locked_inside_its_bounds(asked):
    requirement = Requirement(asked)
    if requirement.marker is not None and not requirement.marker.evaluate({"platform_system": "Linux", "platform_machine": "x86_64"}):
        return  # it is for another system than the lock is made on
    assert LOCKED[canonicalize_name(requirement.name)] in requirement.specifier


def test_what_the_tests_and_examples_import_is_locked():
    paths = [path for room in ("tests", "examples") for path in (ROOT / room).rglob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    sources = packages_distributions()
    needed = {canonicalize_name(source) for module in modules for source in sources.get(module.partition(".")[0], ())}
    assert {"torch", "hypothesis"} <= needed
    assert needed - LOCKED.keys() <= {"hf-tokens", "kernels"}  # the second is tested where it is installed
