"""What `make cards` writes: it is up to date, and it names every method where it is."""

import ast
import dataclasses
import importlib
import tomllib

import pytest

import hf_tokens
from hf_tokens import ConfigError
from hf_tokens.commands.cards import ROOT, index_entry, method_card, pages
from hf_tokens.roles.registry import ENTRY_POINTS
from hf_tokens_cli import catalogue

BUILT_IN = [info for info in hf_tokens.list_methods() if info.cls.__module__.startswith("hf_tokens_adapters.")]


@pytest.mark.parametrize(("path", "text"), [pytest.param(path, text, id=path.name) for path, text in pages().items()])
def test_what_is_generated_is_up_to_date(path, text):
    assert path.read_text() == text, "run `make cards`"


def test_the_stub_names_every_public_name_and_every_method_where_it_is():
    tree = ast.parse((ROOT / "hf_tokens" / "__init__.pyi").read_text())
    imported = {
        alias.name: importlib.import_module("." * node.level + node.module, "hf_tokens")
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (listed,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    methods = {cls.__name__ for info in BUILT_IN for cls in (info.config, info.cls)}
    assert set(listed) == imported.keys() == hf_tokens.MODULES.keys() | methods
    for name, module in imported.items():
        assert getattr(module, name) is getattr(hf_tokens, name)


CHECKED = [
    ("a/b@0123abcd, all of it on random inputs: largest difference 3e-16", True),
    ("a-b/c.d@0123abcd, its head:\n  largest difference 0; the rest by reading.", True),
    ("no public code found (2026-01-31); the width is left open.", True),
    ("", False),
    ("a/b@0123, all of it: largest difference 0", False),
    ("a/b@0123abcd, all of it, by reading", False),
    ("no public code found", False),
]


@pytest.mark.parametrize(("text", "holds"), CHECKED)
def test_a_card_says_beside_what_it_was_checked_or_is_not_written(text, holds):
    info = dataclasses.replace(BUILT_IN[0], checked=text)
    if holds:
        assert text.split(":")[0] in method_card(info, "{checked}")
        return
    with pytest.raises(ConfigError, match=f"on that of {info.name}. Run the authors' code beside the method"):
        method_card(info, "{checked}")


@pytest.mark.parametrize("text", ["", "train", "nothingness", "a lot of training"])
def test_a_card_says_what_its_method_needs_or_is_not_written(text):
    info = dataclasses.replace(BUILT_IN[0], needs=text)
    with pytest.raises(ConfigError, match=f"says what its method needs: .* on that of {info.name}. Begin the line with one of these"):
        method_card(info, "{needs}")
    assert method_card(dataclasses.replace(info, needs="training; a router"), "{needs}") == "training; a router"


def test_what_a_method_is_for_is_read_off_its_class():
    modality = lambda name: hf_tokens.method_info(name).modality
    assert modality("snapkv") == modality("omp-transplant") == ("text",) and modality("apt") == ("any",)
    assert modality("divprune") == ("image-text",) and modality("toca") == ("diffusion",) and modality("tome") == ("image", "audio")


def test_the_index_holds_every_method():
    assert catalogue.built_in_cards() == [index_entry(info) for info in BUILT_IN]
    assert catalogue.ENTRY_POINTS == ENTRY_POINTS


def test_every_package_is_typed_and_what_is_generated_is_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for source in settings["tool"]["setuptools"]["packages"]["find"]["where"]:
        for package in (ROOT / source).glob("hf_tokens*/__init__.py"):
            assert (package.parent / "py.typed").is_file(), package.parent
    assert {"py.typed", "*.pyi", "**/*.json"} <= set(settings["tool"]["setuptools"]["package-data"]["*"])
