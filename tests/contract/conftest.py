"""`pair` runs a test with every method on every architecture that takes it, `talker` with those of them that generate text."""

import pytest
from contract.pairs import PAIRS, Pair, planned, refused

WHICH = {
    "any_pair": lambda pair: True,
    "pair": lambda pair: planned(pair) is None,
    "talker": lambda pair: planned(pair) is None and pair.row.generates,
}


def pytest_generate_tests(metafunc):
    for name, takes in WHICH.items():
        if name in metafunc.fixturenames:
            pairs = [pair for pair in PAIRS if takes(pair)]
            metafunc.parametrize(name, pairs, ids=[f"{pair.method}-{pair.architecture}" for pair in pairs], indirect=True)


@pytest.fixture
def any_pair(request) -> Pair:
    return request.param


@pytest.fixture
def pair(request) -> Pair:
    if reason := refused(request.param):
        pytest.skip(f"un-skip when the engine takes this pair: {reason}")
    return request.param


@pytest.fixture
def talker(request) -> Pair:
    if reason := refused(request.param):
        pytest.skip(f"un-skip when the engine takes this pair: {reason}")
    return request.param
