"""`make new`: what it writes compiles, registers under its name, and is never written over."""

import ast

import pytest

from hf_tokens.commands.scaffold import known_roles, write
from hf_tokens.errors import ConfigError


@pytest.mark.parametrize("role", sorted(known_roles()))
def test_both_files_of_every_role_are_python(role, tmp_path):
    method, test = write("some_method", role, tmp_path)
    (cls,) = [node for node in ast.parse(method.read_text()).body if isinstance(node, ast.ClassDef) and node.bases[0].id != "MethodConfig"]
    assert cls.name == "SomeMethod" and cls.bases[0].id == known_roles()[role].role
    assert {node.name for node in cls.body} == set(known_roles()[role].__abstractmethods__)
    assert '@register("some-method", SomeMethodConfig)' in method.read_text()  # as `deep-prompt` is, not as its file is called
    assert "def naive" in test.read_text() and ast.parse(test.read_text())


def test_nothing_is_written_over(tmp_path):
    write("some_method", "TokenBank", tmp_path)
    with pytest.raises(ConfigError, match="A new method has a new name"):
        write("some_method", "token_bank", tmp_path)


@pytest.mark.parametrize(
    ("name", "role", "words"),
    [
        ("X", "token_bank", "snake_case"),
        ("x", "bank", "role must be one of"),
        ("x", "TokenBnk", r"got 'TokenBnk'\. Did you mean 'token_bank'\? Use `make new"),
        ("", "", "snake_case"),
    ],
)
def test_mistakes_are_named(name, role, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        write(name, role, tmp_path)
    assert not list(tmp_path.iterdir())
