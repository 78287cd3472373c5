"""The thin contract leaves nothing out: each check meets every role and every architecture that it meets in the whole one."""

import importlib
import inspect
from collections import Counter
from pathlib import Path

import pytest
from contract.conftest import FIXTURES, spread_of
from contract.pairs import PAIRS
from contract.selection import BY_STREAM, is_probe, own, streams
from contract.selection import thin as thinned

FILES = sorted(Path(__file__).parent.glob("test_*.py"))
MODULES = [importlib.import_module(f"contract.{path.stem}") for path in FILES if path.stem != "test_selection"]
CHECKS = {
    name: fixture
    for module in MODULES
    for name, check in inspect.getmembers(module, inspect.isfunction)
    for fixture in FIXTURES.keys() & inspect.signature(check).parameters.keys()
    if name.startswith("test_")
}


def whole(check):
    return [pair for pair in PAIRS if FIXTURES[CHECKS[check]](pair)]


def thin(check):
    return thinned(check, whole(check), spread_of(CHECKS[check]))


def test_the_checks_are_found():
    assert set(CHECKS.values()) == FIXTURES.keys() and len(CHECKS) > 20


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_meets_every_role_method_and_architecture(check):
    every, some = whole(check), thin(check)
    for of in (lambda pair: pair.info.role, lambda pair: pair.method, lambda pair: pair.architecture):
        assert {of(pair) for pair in some} == {of(pair) for pair in every}
    assert set(some) <= set(every)


@pytest.mark.parametrize("check", CHECKS)
def test_a_method_meets_enough_architectures_of_a_kind_and_what_no_other_meets(check):
    chosen, some, spread = [], thin(check), spread_of(CHECKS[check])
    for method in {pair.method for pair in some if not is_probe(pair)}:
        every = [pair for pair in whole(check) if pair.method == method]
        mine = own(check, every, spread)
        there, met = (Counter(kind for pair in pairs for kind in spread.kinds(pair)) for pairs in (every, mine))
        assert all(met[kind] >= min(spread.number, number) for kind, number in there.items())
        assert max(Counter(spread.kinds(pair) for pair in mine).values()) <= spread.number
        chosen += mine
    more = [pair for pair in some if pair not in chosen and not is_probe(pair)]
    met = Counter(pair.architecture for pair in some)
    assert all(met[pair.architecture] == 1 for pair in more)


def test_the_probes_meet_everything():
    for check in CHECKS:
        assert [pair for pair in thin(check) if is_probe(pair)] == [pair for pair in whole(check) if is_probe(pair)]


def test_architectures_change_from_check_to_check():
    checks = [check for check, fixture in CHECKS.items() if fixture == "pair"]
    for method in {pair.method for pair in whole(checks[0]) if not is_probe(pair)}:
        mine = [pair for pair in whole(checks[0]) if pair.method == method]
        if len({streams(pair) for pair in mine}) == 1 and len(mine) > BY_STREAM.number:
            assert len({frozenset(own(check, mine, BY_STREAM)) for check in checks}) > 1, method
