"""Start a package of one method, `hf-tokens new-method`: what pip installs, and the tests that hold it to the contract.

It begins with a small method of its role that the contract accepts; the author puts his own in its place, and the tests stay.
"""

from __future__ import annotations

import pkgutil
import re
import tomllib
from pathlib import Path
from string import Template
from typing import Any

from ..errors import ConfigError, did_you_mean, explain
from ..roles.registry import ENTRY_POINTS, METHODS, discover
from .scaffold import known_roles, snake

HINTS = {"nn": r"\bnn\.", "torch": r"\btorch\.", "Tensor": r"\bTensor\b"}

PROJECT_FILE = Template("""[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "hf-tokens-$name"
version = "0.1.0"
description = "$title for hf-tokens: $claim."
requires-python = ">=3.11"
dependencies = ["hf-tokens>=0.1,<1"]

[project.optional-dependencies]
test = ["hf-tokens[testing]"]

[project.entry-points."$group"]
$name = "$package"

[tool.setuptools.packages.find]
where = ["src"]

[tool.pytest.ini_options]
testpaths = ["tests"]
addopts = "--import-mode=importlib"
""")

PACKAGE_FILE = Template('''"""$title for hf-tokens: named by the entry point in pyproject.toml, by which it is found."""

from .$module import $title, ${title}Config

__all__ = ["$title", "${title}Config"]
''')

METHOD_FILE = Template('''"""$title: $claim.

Paper:   None: this is what `hf-tokens new-method` begins with. Say whose method yours is, arXiv:0000.00000
Needs:   $need
Maths:   $maths
Differs: Nothing. Say what is not as in the paper.
Checked: <owner/name@0123abcd, what was compared: largest difference 0; or: no public code found (date); what the paper leaves open>

$example
"""

from __future__ import annotations

from dataclasses import dataclass

$torch
from hf_tokens import $imports


@dataclass(frozen=True, kw_only=True)
class ${title}Config(MethodConfig):
    """The knobs, with the paper's names and defaults."""

$body''')

EXAMPLE = Template(""">>> from hf_tokens import get_token_model
>>> from hf_tokens.testing import zoo
>>> model = get_token_model(zoo.build("$family").model, ${title}Config())
>>> model.peft_config["default"].methods[0]["method"]
'$name\'""")
EXAMPLE_ALONE = Template(""">>> ${title}Config().to_dict()["method"]
'$name'""")

TEST_FILE = Template('''"""$title against a slow loop, written from its equations and never from its code."""

${standard}import pytest
import torch
$ours
$constants
$naive

@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_the_verb_is_the_loop(n):
    torch.manual_seed(0)
$checks''')
DIMS = 'DIMS = Dims(width=8, heads=2, kv_heads=2, head_dim=4, layer=0, layers=4, kind="text", causal=True)\n\n'

CONTRACT_FILE = Template('''"""The contract of hf-tokens: what every method is held to, on each architecture that it takes."""

from hf_tokens.testing import contract

TestContract = contract.of("$name")
''')

README_FILE = Template("""# hf-tokens-$name

$title: $claim. A method for [hf-tokens](https://pypi.org/project/hf-tokens/).

```
pip install -e ".[test]"
pytest                      # the loop in tests/test_$module.py, and the whole contract; `-k llama` is one architecture of it
hf-tokens show $name
```

```python
from hf_tokens import get_token_model
from $package import ${title}Config

model = get_token_model(model, ${title}Config())
```

Whoever loads an adapter that it is in needs this package: `pip install hf-tokens-$name`. It is found by itself.
""")


def starts() -> dict[str, dict[str, Any]]:
    """What each role begins with, by its folder."""
    return tomllib.loads(pkgutil.get_data(__package__, "starts.toml").decode())


def texts(name: str, role: str) -> dict[str, str]:
    """The files of the package of a method, by their paths in it."""
    cls, start = known_roles()[role], starts()[role]
    module, title = name.replace("-", "_"), "".join(part.capitalize() for part in name.split("-"))
    package = f"hf_tokens_{module}"
    words = {"name": name, "module": module, "title": title, "package": package, "role": cls.role, "group": ENTRY_POINTS}
    words |= {key: start[key] for key in ("claim", "maths", "family") if key in start}
    fill = lambda text: Template(text).substitute(words)
    knobs, cls_text = start["body"].lstrip("\n").split("\n\n\n", 1)
    body = fill(f'{knobs}\n\n\n@register("$name", ${{title}}Config)\n{cls_text}')
    asked = [word for word in ("TokenMap", "TextWords", "allowance", "rank", "Dims") if re.search(rf"\b{word}\b", body)]
    imports = ", ".join(sorted(["MethodConfig", cls.role, "option", "register", *asked], key=order))
    example = (EXAMPLE if "family" in start else EXAMPLE_ALONE).substitute(words)
    parts = [part for part in ("Tensor", "nn") if re.search(HINTS[part], body)]
    words["need"] = "training" if "nn" in parts or cls.role == "Objective" else "an edit" if cls.role == "WeightEdit" else "nothing"
    torch_lines = "import torch\n" if re.search(HINTS["torch"], body) else ""
    torch_lines += f"from torch import {', '.join(parts)}\n"
    checks, naive = fill(start["checks"]), fill(start["naive"]).lstrip("\n")
    needs = [word for word in ("DIMS", "TokenMap", "TextWords") if re.search(rf"\b{word}\b", checks)]
    public = ", ".join(sorted(("Dims" if word == "DIMS" else word for word in needs), key=order))
    ours = (f"\nfrom hf_tokens import {public}" if public else "") + f"\nfrom {package} import {title}, {title}Config\n"
    standard = "import math\n\n" if "math." in naive + checks else ""
    test = {"standard": standard, "ours": ours, "constants": DIMS if "DIMS" in needs else "", "naive": naive, "checks": checks.lstrip("\n")}
    return {
        "pyproject.toml": PROJECT_FILE.substitute(words),
        "README.md": README_FILE.substitute(words),
        f"src/{package}/__init__.py": PACKAGE_FILE.substitute(words),
        f"src/{package}/py.typed": "",
        f"src/{package}/{module}.py": METHOD_FILE.substitute(words, body=body, imports=imports, example=example, torch=torch_lines),
        f"tests/test_{module}.py": TEST_FILE.substitute(words, **test),
        "tests/test_contract.py": CONTRACT_FILE.substitute(words),
    }


def order(word: str) -> tuple[bool, str]:
    """Classes first, then functions, as a sorter of imports has them."""
    return word[0].islower(), word


def write_package(name: str, role: str, folder: Path) -> list[Path]:
    """Write the package of a method and return its files; what exists is never written over.

    Args:
        name: The name that the method is registered under, `some-name`.
        role: Its role, `TokenReducer` or `token_reducer`.
        folder: A folder that is empty or not there.

    Raises:
        ConfigError: The name is none or is taken, the role is unknown, or the folder holds something.
    """
    known, name = known_roles(), name.replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        remedy = "Use `hf-tokens new-method some-name --role ROLE --package FOLDER`."
        raise ConfigError(explain("A method's name is of small letters, digits and hyphens", repr(name), remedy))
    if snake(role) not in known:
        roles = sorted(cls.role for cls in known.values())
        raise ConfigError(
            explain(f"A role must be one of {roles}", repr(role), f"{did_you_mean([role], roles)}Choose the role by its verb.")
        )
    discover()
    if name in METHODS:
        raise ConfigError(explain("A new method has a new name", f"{name!r}, which is registered", "Choose another name."))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(explain("A package is written into an empty folder", f"{folder}, which is not", "Name another one."))
    written = {folder / path: text for path, text in texts(name, snake(role)).items()}
    for path, text in written.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(written)
