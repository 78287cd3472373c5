"""The cases that a check of the contract is run with: what it is given is said by the name of its argument."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch

from ...peft.publishing import CardDoor
from ...roles.config import MethodConfig
from ...roles.registry import MethodInfo, method_info
from .. import probe
from .pairs import ContractPair, pairs_of, planned, refused, simplest


class Knob(NamedTuple):
    """A knob of a method's config, and the type that it has."""

    config: type[MethodConfig]
    field: dataclasses.Field
    hint: Any


# an argument that is a method on an architecture -> which of them a check is run with
PAIR_ARGUMENTS: dict[str, Callable[[ContractPair], bool]] = {
    "any_pair": lambda pair: True,
    "pair": lambda pair: planned(pair) is None,
    "host": lambda pair: planned(pair) is None,  # for what hardly depends on where in a model the method acts
    "talker": lambda pair: planned(pair) is None and pair.row.generates,
    "objective": lambda pair: planned(pair) is None and pair.info.role == "Objective",
    "padded_objective": lambda pair: planned(pair) is None and pair.info.role == "Objective" and not pair.row.timesteps,
    "padded_talker": lambda pair: planned(pair) is None and pair.row.generates and "left" in pair.row.pads,
}
# an argument that is a method -> which
NAMED: dict[str, Callable[[MethodInfo], bool]] = {
    "method": lambda info: True,
    "published": lambda info: info.cls.__module__ != probe.__name__,  # the probes are no paper's
    "placed": lambda info: info.cls.placed,
}
KNOB, SINGLE = "knob", "one"
Chosen = Callable[[str, str, list[ContractPair]], Iterable[ContractPair]]  # the check, its argument, all pairs -> those that it meets


def drawn(check: Any) -> Any:
    """Mark a check that takes each case of one table with each of another: who has many methods may draw some of them."""
    check.drawn = True
    return check


def everything(check: str, argument: str, pairs: list[ContractPair]) -> list[ContractPair]:
    """All pairs; a single one of each method for what is too slow to do with each."""
    return simplest(pairs, lambda pair: pair.method) if argument == SINGLE else pairs


def of_argument(argument: str, methods: tuple[str, ...]) -> list[ContractPair]:
    """All pairs that a check with this argument may be run with."""
    return [pair for pair in pairs_of(methods) if PAIR_ARGUMENTS.get(argument, PAIR_ARGUMENTS["pair"])(pair)]


@cache
def knobs(methods: tuple[str, ...]) -> dict[str, Knob]:
    """Every knob of these methods, by the method's and its own name."""
    configs = {name: method_info(name).config for name in methods}
    return {f"{name}-{field.name}": Knob(config, field, hint) for name, config in configs.items() for field, hint in config.knobs()}


def parametrize(metafunc: pytest.Metafunc, methods: Iterable[str], chosen: Chosen = everything) -> None:
    """Run a check with these methods: the body of a `pytest_generate_tests`."""
    methods, asked = tuple(methods), metafunc.fixturenames
    for argument, takes in NAMED.items():
        if argument in asked:
            infos = [info for info in map(method_info, methods) if takes(info)]
            metafunc.parametrize(argument, infos, ids=[info.name for info in infos])
    if KNOB in asked:
        metafunc.parametrize(KNOB, [*knobs(methods).values()], ids=[*knobs(methods)])
    if SINGLE in asked:
        pairs = [*chosen(metafunc.function.__name__, SINGLE, of_argument(SINGLE, methods))]
        metafunc.parametrize(SINGLE, pairs, ids=[f"{pair.info.role}-{pair.method}-{pair.architecture}" for pair in pairs])
    for argument in PAIR_ARGUMENTS:
        if argument in asked:
            sides = "side" in asked
            pairs = chosen(metafunc.function.__name__, argument, of_argument(argument, methods))
            cases = [(pair, side) for pair in pairs for side in (pair.row.pads if sides else ("",))]
            ids = [f"{pair.method}-{pair.architecture}{side and '-' + side}" for pair, side in cases]
            names = [argument, "side"] if sides else [argument]
            metafunc.parametrize(names, [case if sides else case[:1] for case in cases], ids=ids)


def has_cases(check: Callable, methods: tuple[str, ...]) -> bool:
    """Whether there is anything to run a check with: an objective's checks have nothing where there is none."""
    arguments = inspect.signature(check).parameters
    named = [NAMED[argument] for argument in arguments if argument in NAMED]
    pairs = [of_argument(argument, methods) for argument in arguments if argument in (*PAIR_ARGUMENTS, SINGLE)]
    return all(pairs) and all(any(takes(method_info(name)) for name in methods) for takes in named)


def prepare_check(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes before each check: a pair that the engine refuses is skipped, but by the check that is there for that.

    No card is written at a save: nothing here reads it, and its template is parsed anew for each.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(CardDoor, "__call__", lambda *_: None)
    params = request.node.callspec.params if "callspec" in vars(request.node) else {}
    for argument, pair in params.items():
        if argument in PAIR_ARGUMENTS.keys() - {"any_pair"} and (reason := refused(pair)):
            pytest.skip(f"un-skip when the engine takes this pair: {reason}")
