"""What the lot leaves of a test: each row of each of its tables, or what its mark names; and all of it in `make contract`."""

from itertools import product
from types import SimpleNamespace

import pytest
from lots import covering, left_out

LETTERS, NUMBERS = [(letter, 2 * letter) for letter in "abcde"], [[1], [2], [3]]


class Case:
    """A case of a test, as pytest collects it; its first table is of two names, its second comes from a hook."""

    def __init__(self, test, letters, number, **knobs):
        self.name = f"{test}[{letters}-{number}]"
        self.nodeid, self.mark = f"tests/test_it.py::{self.name}", pytest.mark.drawn(**knobs).mark
        self.callspec = SimpleNamespace(params={**dict(zip(("letter", "twice"), letters, strict=True)), "number": number})

    def get_closest_marker(self, name):
        return self.mark

    def iter_markers(self, name):
        return [pytest.mark.parametrize("letter, twice", LETTERS).mark]


def drawn(test="test_one", **knobs):
    """The cases that stay of a letter with each number."""
    cases = [Case(test, letters, number, **knobs) for letters, number in product(LETTERS, NUMBERS)]
    out = left_out(cases)
    return [(case.callspec.params["letter"], *case.callspec.params["number"]) for case in cases if case not in out]


def test_each_row_of_each_table_is_met_by_about_as_few_as_can():
    met = drawn()
    assert {letter for letter, _ in met} == {letter for letter, _ in LETTERS} and {number for _, number in met} == {1, 2, 3}
    assert len(LETTERS) <= len(met) <= len(LETTERS) + len(NUMBERS) - 1


def test_the_draw_is_the_same_in_every_run_and_another_in_another_test():
    assert drawn() == drawn()
    assert len({tuple(drawn(f"test_{i}")) for i in range(9)}) > 5


def test_a_mark_says_what_has_to_be_met_and_how_many_are_too_many():
    assert len(drawn(of=lambda letter, **_: letter < "c")) == 2
    assert len(drawn(most=2)) == 2 and drawn(most=0) == []


def test_what_is_met_already_is_met():
    assert covering("abca", str) == ["a", "b", "c"] and covering("abca", str, met="b") == ["a", "c"]


def test_a_test_without_the_mark_keeps_its_cases():
    case = Case("test_one", LETTERS[0], [1])
    case.get_closest_marker = lambda name: None
    assert left_out([case, case]) == set()
