"""The generated files: cards, their indexes, the table in the README, the stub. `python -m hf_tokens.commands.cards [--check]`."""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import PUBLIC
from ..errors import ConfigError, explain
from ..roles.config import interval
from ..roles.registry import NEEDS, MethodInfo, list_methods
from .recipes import catalogue

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
BOUNDS = ("ge", "gt", "le", "lt", "choices")
BENCH = ROOT / "benchmarks" / "results" / "bench.json"
DOOR = "door"  # the part of it that times commands, and no surgery
STUB = '''"""Written by `make cards`: the public names, the configs and classes of the methods among them, for type checkers and editors."""

{imports}

__version__: str
__all__ = [
{names}
]
'''
COMPARED = r"[\w.-]+/[\w.-]+@[0-9a-f]{8}, .+: largest difference .+"  # owner/name@commit, what was compared: largest difference, of what
NO_CODE = r"no public code found \(\d{4}-\d{2}-\d{2}\)[.;,].+"
NOT_MEASURED = "Not measured on a real model yet."


def knob_rows(info: MethodInfo) -> list[list[str]]:
    """Name, default, allowed values and meaning of every knob."""
    allowed = lambda meta: interval(meta) if any(key in meta for key in BOUNDS) else ""
    return [[field.name, repr(field.default), allowed(field.metadata), field.metadata["help"]] for field, _ in info.config.knobs()]


def table_row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def streams(info: MethodInfo) -> str:
    """The streams that a method supports, in words."""
    causal = {True: "causal ", False: "bidirectional ", None: ""}[info.cls.causal]
    return causal + (", ".join(info.cls.kinds) if info.cls.kinds else "any kind")


def example(info: MethodInfo) -> str:
    """The doctest of a method's card as a plain script."""
    return "\n".join(re.findall(r"^(?:>>>|\.\.\.) ?(.*)$", info.doc, flags=re.MULTILINE))


def measured(info: MethodInfo) -> str:
    """What the benchmarks found, with the command that did it."""
    path = ROOT / "benchmarks" / "results" / "methods.json"
    result = json.loads(path.read_text()).get(info.name) if path.is_file() else None
    if result is None:
        return NOT_MEASURED
    head = [table_row(result["columns"]), table_row(["---"] * len(result["columns"]))]
    return "\n".join([f"`{result['command']}`, {result['setting']}:", "", *head, *map(table_row, result["rows"])])


def is_checked(info: MethodInfo) -> bool:
    """Whether a card says beside which code the method was run and how far apart the two were, or that there is none."""
    return re.fullmatch(f"{COMPARED}|{NO_CODE}", " ".join(info.checked.split())) is not None


def method_card(info: MethodInfo, template: str) -> str:
    """The card of one method.

    Raises:
        ConfigError: It does not say beside which code the method was run, or what the method needs.
    """
    if info.need is None:
        rule = f"A card says what its method needs: `Needs: ` and {', '.join(map(repr, NEEDS))}"
        raise ConfigError(explain(rule, f"{info.needs!r} on that of {info.name}", "Begin the line with one of these."))
    if not is_checked(info):
        rule = "A card says `Checked: owner/name@0123abcd, what was compared: largest difference 0`, or `no public code found (date); ...`"
        remedy = "Run the authors' code beside the method, and write down how far apart the two are."
        raise ConfigError(explain(rule, f"{info.checked!r} on that of {info.name}", remedy))
    entry = index_entry(info)
    made = {"streams": streams(info), "modalities": ", ".join(info.modality), "example": example(info), "measured": measured(info)}
    return template.format(**{**entry, **made, "knobs": "\n".join(map(table_row, entry["knobs"]))})


# column of a table of methods -> what stands in it
METHOD_COLUMNS: dict[str, Callable[[MethodInfo], str]] = {
    "role": lambda info: info.role,
    "for": lambda info: ", ".join(info.modality),
    "needs": lambda info: str(info.need),
    "saves": lambda info: info.cls.saves,
    "what it does": lambda info: info.claim.split(":", 1)[-1].strip().rstrip("."),
    "paper": lambda info: info.paper,
}


def overview(methods: list[MethodInfo], folder: str, columns: Sequence[str] = (*METHOD_COLUMNS,)) -> str:
    """The table of all methods: their names, with their cards behind them, and these columns."""
    rows = [[f"[{info.name}]({folder}{info.name}.md)", *(METHOD_COLUMNS[column](info) for column in columns)] for info in methods]
    head = ["method", *columns]
    return "\n".join([table_row(head), table_row(["---"] * len(head)), *map(table_row, rows)])


def by_role(methods: list[MethodInfo], folder: str) -> str:
    """The table of all roles: what each decides, and its methods."""
    rows = []
    for role in sorted({info.role for info in methods}):
        own = [info for info in methods if info.role == role]
        decides = inspect.getdoc(next(cls for cls in own[0].cls.__mro__ if cls.__name__ == role)).split("\n\n")[0].replace("\n", " ")
        modalities = ", ".join(dict.fromkeys(modality for info in own for modality in info.modality))
        rows.append([role, decides, modalities, ", ".join(f"[{info.name}]({folder}{info.name}.md)" for info in own)])
    head = ["role", "what it decides", "for", "methods"]
    return "\n".join([table_row(head), table_row(["---"] * len(head)), *map(table_row, rows)])


def speeds(bench: dict[str, Any]) -> str:
    """The table of what surgeries cost and save, of the paired runs of the bench."""
    rows = [row for part, result in bench["parts"].items() if part != DOOR for row in result["rows"]]
    beside = lambda row: ", ".join(f"{name} {value:.2f}" for name, value in row["values"].items())
    cells = [[row["what"], row["against"], f"{1 / row['ratio']:.2f}x", beside(row)] for row in rows]
    head = ["surgery", "against", "speed-up", "the rest, as shares of what it runs against"]
    return "\n".join([table_row(head), table_row(["---"] * len(head)), *map(table_row, cells)])


def filled(page: str, tables: dict[str, str]) -> str:
    """A page with its generated tables, each between `<!-- name -->` and `<!-- /name -->`."""
    for name, table in tables.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, _, rest = page.partition(start)
        page = f"{head}{start}\n{table}\n{end}{rest.partition(end)[2]}"
    return page


def index_entry(info: MethodInfo) -> dict[str, Any]:
    """What `hf-tokens list` and `hf-tokens show` print of a method."""
    texts = {key: getattr(info, key) for key in ("name", "version", "role", "claim", "paper", "needs", "maths", "differs", "checked")}
    return {**texts, "need": info.need, "modality": [*info.modality], "config": info.config.__name__, "knobs": knob_rows(info)}


def stub(methods: list[MethodInfo]) -> str:
    """`hf_tokens/__init__.pyi`: every public name, imported from where it lives."""
    ours = {f".{module}": names for module, names in PUBLIC.items()}
    theirs = {info.cls.__module__: (info.config.__name__, info.cls.__name__) for info in methods}
    statement = lambda module, names: f"from {module} import (\n" + "".join(f"    {name},\n" for name in sorted(names)) + ")"
    imports = ["\n".join(statement(*each) for each in sorted(homes.items())) for homes in (theirs, ours)]
    public = sorted(name for homes in (theirs, ours) for names in homes.values() for name in names)
    return STUB.format(imports="\n\n".join(imports), names="\n".join(f'    "{name}",' for name in public))


def pages() -> dict[Path, str]:
    """Every generated file with its text."""
    methods = [info for info in list_methods() if info.cls.__module__.startswith("hf_tokens_adapters.")]
    cards = ROOT / "model_cards"
    template = (cards / "template.md").read_text()
    out = {cards / f"{info.name}.md": method_card(info, template) for info in methods}
    out[cards / "INDEX.md"] = f"# Methods\n\n{overview(methods, '')}\n"
    out[ROOT / "adapters" / "hf_tokens_adapters" / "index.json"] = json.dumps([index_entry(info) for info in methods], indent=1) + "\n"
    out[ROOT / "adapters" / "hf_tokens_adapters" / "recipes.json"] = catalogue(
        lambda name: json.loads((RESULTS / f"{name}.json").read_text())
    )
    out[ROOT / "hf_tokens" / "__init__.pyi"] = stub(methods)
    readme = ROOT / "README.md"
    tables = {"methods": by_role(methods, "model_cards/"), "bench": speeds(json.loads(BENCH.read_text()))}
    out[readme] = filled(readme.read_text(), tables)
    return out


def main() -> None:
    """Write the files, or with --check list those that are not up to date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a file is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text() != text}
    for path, text in stale.items():
        print(path.relative_to(ROOT))
        if not check:
            path.write_text(text)
    sys.exit(bool(check and stale))


if __name__ == "__main__":
    main()
