"""Start a method, `python -m hf_tokens.commands.scaffold <name> <role>`: its file with empty headings, its test with an empty `naive`."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from .. import roles
from ..errors import ConfigError, HFTokensError, did_you_mean, explain

METHOD = '''"""{title}: <the claim in one line>.

Paper:   <title (authors, venue year), arXiv:0000.00000>
Needs:   <nothing, training, calibration, or an edit; and what else is to be said of it>
Maths:   <what is computed, in the paper's symbols>
Differs: <what is not as in the paper>
Checked: <owner/name@0123abcd, what was compared: largest difference 0; what differs and why. Or: no public code found (2026-01-31);
         what the paper leaves open>
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_tokens import {imports}


@dataclass(frozen=True, kw_only=True)
class {title}Config(MethodConfig):
    """The knobs, with the paper's names and defaults: `name: type = option(default, bound, help=...)`."""


@register("{name}", {title}Config)
class {title}({role}):
{verbs}
'''

TEST = '''"""{title} against its paper: <section and equations>."""

import pytest
import torch

from hf_tokens import {title}Config


def naive(x):
    """The paper's equations as a loop over one sample, x (n, d)."""


@pytest.mark.parametrize("n", [1, 2, 7, 16])
def test_matches_the_paper(n):
    x = torch.randn(2, n, 4, dtype=torch.float64)
    expected = torch.stack([naive(sample) for sample in x])
    config = {title}Config()
    pytest.fail(f"compare what the verb does under {{config}} with {{expected}}")
'''


def snake(role: str) -> str:
    """The folder of a role, e.g. `token_reducer`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", role).lower()


def known_roles() -> dict[str, type[roles.Method]]:
    """The class of each role, by its folder."""
    classes = (cls for cls in vars(roles).values() if inspect.isclass(cls) and issubclass(cls, roles.Method))
    return {snake(cls.role): cls for cls in classes if cls is not roles.Method}


def verb_header(cls: type[roles.Method], verb: str) -> str:
    """The header of a verb that the role leaves open."""
    signature = inspect.signature(getattr(cls, verb))
    arguments = "hidden: Tensor" if verb == cls.verb else ", ".join(str(p) for name, p in signature.parameters.items() if name != "self")
    return f"    def {verb}(self, {arguments.replace(chr(39), '')}) -> {signature.return_annotation}: ..."


def write(name: str, role: str, root: Path) -> list[Path]:
    """Write the two files and return their paths; what exists is never written over. The method `some_name` is registered as `some-name`.

    Raises:
        ConfigError: The name is no snake_case word, the role is unknown, or a file is there already.
    """
    known = known_roles()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(explain("A method's name is a snake_case word", repr(name), "Use `make new m=<name> role=<role>`."))
    if snake(role) not in known:
        remedy = f"{did_you_mean([snake(role)], known)}Use `make new m=<name> role=<role>`."
        raise ConfigError(explain(f"A role must be one of {sorted(known)}", repr(role), remedy))
    cls = known[snake(role)]
    title = "".join(part.capitalize() for part in name.split("_"))
    verbs = "\n\n".join(verb_header(cls, verb) for verb in sorted(cls.__abstractmethods__, key=lambda verb: verb != cls.verb))
    words = re.findall(r"\bTokenMap\b", verbs)[:1] + ["MethodConfig", cls.role, "register"]
    fill = {"name": name.replace("_", "-"), "title": title, "role": cls.role, "verbs": verbs, "imports": ", ".join(sorted(words))}
    texts = {
        root / "adapters" / "hf_tokens_adapters" / snake(role) / f"{name}.py": METHOD.format(**fill),
        root / "tests" / "methods" / f"test_{name}.py": TEST.format(**fill),
    }
    for path in texts:
        if path.exists():
            raise ConfigError(explain("A new method has a new name", f"{path}, which exists", "Choose another name."))
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "adapters" / "hf_tokens_adapters" / snake(role) / "__init__.py").touch()
    return list(texts)


def start() -> None:
    name, role = (sys.argv[1:] + ["", ""])[:2]
    try:
        print(*write(name, role, Path.cwd()), sep="\n")
    except HFTokensError as error:
        print(f"hf-tokens: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    start()
