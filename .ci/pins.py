"""Constraints for pip: `python .ci/pins.py newest`, `oldest` or `locked`."""

import platform
import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

PYPROJECT = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(\[[\w,-]+\])?(?P<kind>[=>]=)(?P<version>[\w.]+)[^;]*(?P<marker>;.*)?")


def newest() -> list[str]:
    """What pyproject.toml pins itself; the rest may be as new as its bounds allow."""
    return [line for kind, line in bounds() if kind == "=="]


def oldest() -> list[str]:
    """The lower bound of everything."""
    return [line for _, line in bounds()]


def locked() -> list[str]:
    """What is installed beside this interpreter."""
    head = "# Written by `make lock`, on " + " ".join((f"Python {platform.python_version()},", platform.system(), platform.machine()))
    found = {each.name: each.version.partition("+")[0] for each in distributions() if each.name != PROJECT["name"]}
    return [head, *(f"{name}=={found[name]}" for name in sorted(found, key=str.lower))]


def bounds() -> list[tuple[str, str]]:
    """Each requirement of the project, its extras and its build: `==` or `>=`, and a line that holds it to the version behind that."""
    extras = [each for extra in PROJECT["optional-dependencies"].values() for each in extra]
    listed = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"], *extras]
    lines = []
    for each in listed:
        if each.startswith(f"{PROJECT['name']}["):
            continue
        found = REQUIREMENT.fullmatch(each)
        if found is None:
            raise SystemExit(f"A requirement begins with a pin or a lower bound, got {each!r}. Write it as name==version or name>=version.")
        lines.append((found["kind"], f"{found['name']}=={found['version']}{found['marker'] or ''}"))
    return lines


if __name__ == "__main__":
    print(*{"newest": newest, "oldest": oldest, "locked": locked}[sys.argv[1]](), sep="\n")
