"""The thin contract leaves nothing out: each check meets every role and every architecture that it meets in the whole one."""

import importlib
import inspect
from collections import Counter
from pathlib import Path

import pytest
from contract.conftest import kinds_of
from contract.pairs import PAIRS
from contract.selection import is_probe, own, pool
from contract.selection import thin as thinned

from hf_tokens.testing.contract.cases import PAIR_ARGUMENTS
from hf_tokens.testing.contract.pairs import planned

FILES = sorted(Path(__file__).parent.glob("test_*.py"))
MODULES = [importlib.import_module(f"contract.{path.stem}") for path in FILES if path.stem != "test_selection"]
CHECKS = {
    name: fixture
    for module in MODULES
    for name, check in inspect.getmembers(module, inspect.isfunction)
    for fixture in PAIR_ARGUMENTS.keys() & inspect.signature(check).parameters.keys()
    if name.startswith("test_")
}


def whole(check):
    return [pair for pair in PAIRS if PAIR_ARGUMENTS[CHECKS[check]](pair)]


def thin(check):
    return thinned(check, whole(check), kinds_of(CHECKS[check]))


def test_the_checks_are_found():
    assert set(CHECKS.values()) == PAIR_ARGUMENTS.keys() and len(CHECKS) > 20


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_meets_every_role_method_and_architecture(check):
    every, some = whole(check), thin(check)
    for of in (lambda pair: pair.info.role, lambda pair: pair.method, lambda pair: pair.architecture):
        assert {of(pair) for pair in some} == {of(pair) for pair in every}
    assert set(some) <= set(every)


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_meets_every_kind_of_stream_or_library_with_each_role(check):
    kinds = kinds_of(CHECKS[check])
    met, there = ({(pair.info.role, kind) for pair in pairs for kind in kinds(pair)} for pairs in (thin(check), whole(check)))
    assert met == there


@pytest.mark.parametrize("check", CHECKS)
def test_a_method_is_taken_once_and_refused_once_and_more_where_its_role_or_an_architecture_would_be_left_out(check):
    kinds, some = kinds_of(CHECKS[check]), [pair for pair in thin(check) if not is_probe(pair)]
    values = lambda pair: {("architecture", pair.architecture), *((pair.info.role, kind) for kind in kinds(pair))}
    drawn = []
    for method in {pair.method for pair in some}:
        every = [pair for pair in whole(check) if pair.method == method]
        mine = own(check, every)
        assert Counter(planned(pair) is None for pair in mine) == dict.fromkeys({planned(pair) is None for pair in every}, 1)
        drawn += mine
    assert set(drawn) <= set(some)
    for pair in set(some) - set(drawn):
        others = {value for other in drawn for value in values(other)}
        assert values(pair) - others, f"{pair} meets nothing that the others do not"


def test_the_probes_meet_everything():
    for check in CHECKS:
        assert [pair for pair in thin(check) if is_probe(pair)] == [pair for pair in whole(check) if is_probe(pair)]


def test_architectures_change_from_check_to_check():
    checks = [check for check, fixture in CHECKS.items() if fixture == "pair"]
    for method in {pair.method for pair in whole(checks[0]) if not is_probe(pair)}:
        mine = [pair for pair in whole(checks[0]) if pair.method == method]
        met = {pair for check in checks for pair in own(check, mine)}
        assert len(met) > 1 or len(mine) == 1, method
        assert met <= {*pool(mine)}
