"""The contract that every method is held to, built-in or not: as a class of tests, which pytest runs.

In a test file of the package that has the method:

    from hf_tokens.testing import contract

    TestContract = contract.of("my-method")

Each check is run with each of the tiny architectures that the method takes: about a minute a method.
`-k llama` runs it on one of them. This needs pytest and Diffusers: `pip install "hf-tokens[testing]"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import ClassVar

import pytest

CHECKS = ("methods", "outputs", "adapters", "generation", "training", "objectives", "failures")
pytest.register_assert_rewrite(f"{__name__}.checks")  # in front of their import

import torch  # noqa: E402

from ...roles.registry import method_info  # noqa: E402
from .cases import has_cases, parametrize, prepare_check  # noqa: E402

__all__ = ["Contract", "every_check", "of"]


def every_check() -> dict[str, Callable]:
    """Every check of the contract, by its name."""
    modules = [importlib.import_module(f"{__name__}.checks.{name}") for name in CHECKS]
    return {name: check for module in modules for name, check in vars(module).items() if name.startswith("test_")}


class Contract:
    """What pytest needs beside the checks: their cases, and what goes before each. `of` makes it a class of tests."""

    methods: ClassVar[tuple[str, ...]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        parametrize(metafunc, self.methods)

    @pytest.fixture(autouse=True)
    def prepared(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        prepare_check(request, monkeypatch)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiny models: several threads wait for each other, and add in another order
        yield
        torch.set_num_threads(threads)


def of(*methods: str) -> type:
    """The contract of some methods, as a class of tests. pytest collects it under a name that begins with `Test`.

    Args:
        methods: The names that they are registered under; the package that has them is installed, or imported before.

    Raises:
        ConfigError: No method is registered under one of the names.
    """
    names = tuple(method_info(name).name for name in methods)
    owed = {name: staticmethod(check) for name, check in every_check().items() if has_cases(check, names)}
    return type("Contract", (Contract,), {"methods": names, **owed})
