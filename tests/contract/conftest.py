"""The contract over all methods: `hf_tokens/testing/contract/cases.py` says what a check is given, `selection.py` which architectures a
method meets in it; `make contract` takes all of them.
"""

import pytest
import torch
from contract.pairs import METHODS, PAIRS, one_of_each_role, with_pictures
from contract.selection import library, streams, thin
from lots import ALL

from hf_tokens.testing.contract.cases import SINGLE, parametrize, prepare_check
from hf_tokens.testing.contract.pairs import ContractPair

PLACES = {pair: i for i, pair in enumerate(PAIRS)}
COMPILED = 2  # blocks for which a piece of code is compiled anew; the others run as they are


def pytest_generate_tests(metafunc):
    parametrize(metafunc, METHODS, chosen)


def chosen(check, argument, pairs):
    if argument == SINGLE:
        return with_pictures() if "raises" in check else one_of_each_role()
    return pairs if ALL else thin(check, pairs, kinds_of(argument))


def kinds_of(argument):
    return library if argument == "host" else streams


def pytest_itemcollected(item):
    if vars(item.function).get("drawn"):
        item.add_marker("drawn")


def pytest_collection_modifyitems(items):
    """Put the checks of a pair side by side: the first one makes what the others find made."""
    checks = [item for item in items if pair_of(item)]
    ordered = iter(sorted(checks, key=lambda item: PLACES.get(pair_of(item), len(PLACES))))
    items[:] = [next(ordered) if pair_of(item) else item for item in items]


def pair_of(item):
    """The pair that a check runs with; None for another test."""
    cases = vars(item).get("callspec")
    return None if cases is None else next((value for value in cases.params.values() if isinstance(value, ContractPair)), None)


@pytest.fixture(autouse=True)
def prepared(request, monkeypatch):
    prepare_check(request, monkeypatch)


@pytest.fixture(autouse=True)
def compiles_little(request):
    if ALL or "compiled" not in request.node.name:
        yield
        return
    with torch._dynamo.config.patch(recompile_limit=COMPILED):
        yield
