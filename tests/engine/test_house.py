"""The house: who may import whom, how long a file is, and who owns what. Each test says the line that breaks it."""

import ast
import types
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import hf_tokens
from hf_tokens import roles
from hf_tokens.engine.handler import HANDLERS, PHASES, Handler

HOUSE = Path(hf_tokens.__file__).parent
# A package may import those in front of it; imports for type checkers count like all others.
ORDER = (
    *("errors", "tokens", "model", "kv", "attention", "roles", "engine", "handlers", "diffusion", "training", "peft", "tools", "api"),
    *("testing", "commands", "sentence_transformers", "plot", "__main__"),
)
LINES = 400
ROLES = {name for name in roles.__all__ if isinstance(vars(roles)[name], type) and issubclass(vars(roles)[name], roles.Method)}
KNOW_ROLES = ("handlers", "peft/placement.py")  # where a method's role may be asked


@cache
def tree(path):
    return ast.parse(path.read_text())


FILES = sorted(path for path in HOUSE.rglob("*.py") if path.name != "__init__.py" or path.parent != HOUSE)


def at(path, node):
    return f"{path.relative_to(HOUSE)}:{node.lineno}"


def imported(path, node):
    """The package of ours that an import names; None for another library's."""
    if isinstance(node, ast.Import):
        return next((name.name.split(".")[1] for name in node.names if name.name.startswith("hf_tokens.")), None)
    if node.level == 0:
        parts = (node.module or "").split(".")
        return None if parts[0] != "hf_tokens" else parts[1] if len(parts) > 1 else node.names[0].name
    base = path.relative_to(HOUSE).parts[:-1]
    parts = [*base[: len(base) - (node.level - 1)], *(node.module or "").split(".")]
    return next(part for part in (*parts, node.names[0].name) if part)


def wrong_imports(order=ORDER):
    rank = {name: i for i, name in enumerate(order)}
    for path in FILES:
        own = path.relative_to(HOUSE).parts[0].removesuffix(".py")
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                other = imported(path, node)
                if other in rank and other != own and rank[other] > rank[own]:
                    yield f"{at(path, node)}: {own} imports {other}"


def test_a_package_imports_those_in_front_of_it_only():
    assert {path.relative_to(HOUSE).parts[0].removesuffix(".py") for path in FILES} == set(ORDER)
    assert not list(wrong_imports())
    assert list(wrong_imports(ORDER[::-1])), "the test sees imports"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_a_file_is_a_room_that_one_can_look_over(path):
    assert len(path.read_text().splitlines()) <= LINES


def test_a_name_stands_at_the_top_of_one_file():
    places = defaultdict(set)
    for path in FILES:
        for node in tree(path).body:
            names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            names += [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            for name in names:
                places[name].add(str(path.relative_to(HOUSE)))
    assert not {name: sorted(where) for name, where in places.items() if len(where) > 1 and name != "__all__"}


def test_what_role_a_method_has_is_asked_by_handlers_and_placement_only():
    calls = [
        at(path, node)
        for path in FILES
        if not str(path.relative_to(HOUSE)).startswith(KNOW_ROLES)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass")
        if {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)} & (ROLES - {"Method"})
    ]
    assert not calls


def own_attributes():
    """Attribute -> the files whose classes set it on themselves."""
    owners = defaultdict(set)
    for path in FILES:
        for cls in (node for node in ast.walk(tree(path)) if isinstance(node, ast.ClassDef)):
            for field in cls.body:
                if isinstance(field, ast.AnnAssign):
                    owners[field.target.id].add(path)
            for _, target in written(cls):
                if target.value.id == "self":
                    owners[target.attr].add(path)
    return owners


def written(node):
    """Assignments to attributes of a name."""
    for one in ast.walk(node):
        several = one.targets if isinstance(one, (ast.Assign, ast.Delete)) else []
        targets = [one.target] if isinstance(one, (ast.AugAssign, ast.AnnAssign)) else several
        for part in (part for target in targets for part in ast.walk(target)):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, (ast.Store, ast.Del)) and isinstance(part.value, ast.Name):
                yield one, part


FOREIGN = {"_disable_adapters"}  # PEFT's layers have it, and so has ours


def test_an_object_s_attributes_are_written_where_its_class_is():
    owners = own_attributes()
    strangers = [
        f"{at(path, node)}: {target.value.id}.{target.attr}"
        for path in FILES
        for node, target in written(tree(path))
        if target.value.id not in ("self", "cls") and target.attr in owners.keys() - FOREIGN and path not in owners[target.attr]
    ]
    assert not strangers


def test_the_page_of_the_architecture_has_the_table_of_phases():
    page = (HOUSE.parent / "docs" / "architecture.md").read_text()
    rows = [tuple(cell.strip() for cell in line.split("|")[1:3]) for line in page.splitlines() if line.startswith("| `")]
    assert [(name.strip("`"), meaning) for name, meaning in rows if name.strip("`") in PHASES] == [*PHASES.items()]


@pytest.mark.parametrize("role", sorted(HANDLERS))
def test_a_handler_takes_part_in_phases_that_there_are(role):
    asked = {phase for info in hf_tokens.list_methods(role) for phase in HANDLERS[role].phases(example_of(info))}
    assert asked <= PHASES.keys()
    own = {name for name in vars(type(HANDLERS[role])) if name in vars(Handler)}
    assert asked or own & PHASES.keys(), "a handler that is never asked"


def example_of(info):
    """What a handler may read of a method before it stands in a block."""
    cls, last = info.cls, types.SimpleNamespace(is_last_block=True, weights={"/head.weight": ()} if info.cls.site == "model" else {})
    asks = {name for names in cls.words.values() for name in names}
    more = {"allots": cls.allots, "recites": cls.recites}
    return types.SimpleNamespace(site=cls.site, words=cls.words, spans=cls.spans, asks=asks, is_first_block=True, dims=last, **more)
