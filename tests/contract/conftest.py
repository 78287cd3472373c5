"""`pair` runs a test with every method on every architecture that takes it, `talker` with those of them that generate text, and so on;
`host` is `pair` for what hardly depends on where in a model the method acts.

`selection.py` says on which architectures; `make contract` takes all of them.
"""

import pytest
from contract.pairs import PAIRS, Pair, planned, refused
from contract.selection import library, streams, thin
from lots import ALL

from hf_tokens.peft.publishing import CardDoor

FIXTURES = {
    "any_pair": lambda pair: True,
    "pair": lambda pair: planned(pair) is None,
    "host": lambda pair: planned(pair) is None,
    "talker": lambda pair: planned(pair) is None and pair.row.generates,
    "objective": lambda pair: planned(pair) is None and pair.info.role == "Objective",
    "padded_objective": lambda pair: planned(pair) is None and pair.info.role == "Objective" and not pair.row.timesteps,
    "padded_talker": lambda pair: planned(pair) is None and pair.row.generates and "left" in pair.row.pads,
}
PLACES = {pair: i for i, pair in enumerate(PAIRS)}


def pytest_generate_tests(metafunc):
    for name, takes in FIXTURES.items():
        if name in metafunc.fixturenames:
            sides = "side" in metafunc.fixturenames
            pairs = [pair for pair in PAIRS if takes(pair)]
            pairs = pairs if ALL else thin(metafunc.function.__name__, pairs, kinds_of(name))
            cases = [(pair, side) for pair in pairs for side in (pair.row.pads if sides else ("",))]
            ids = [f"{pair.method}-{pair.architecture}{side and '-' + side}" for pair, side in cases]
            names = [name, "side"] if sides else [name]
            metafunc.parametrize(names, [case if sides else case[:1] for case in cases], ids=ids, indirect=[name])


def kinds_of(fixture):
    return library if fixture == "host" else streams


def pytest_collection_modifyitems(items):
    """Put the checks of a pair side by side: the first one makes what the others find made."""
    checks = [item for item in items if pair_of(item)]
    ordered = iter(sorted(checks, key=lambda item: PLACES.get(pair_of(item), len(PLACES))))
    items[:] = [next(ordered) if pair_of(item) else item for item in items]


def pair_of(item):
    """The pair that a check runs with; None for another test."""
    cases = vars(item).get("callspec")
    return None if cases is None else next((value for value in cases.params.values() if isinstance(value, Pair)), None)


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    """Nothing here reads the card that is written at each save; `tests/hub` does."""
    monkeypatch.setattr(CardDoor, "__call__", lambda *_: None)


def accepted(pair):
    if reason := refused(pair):
        pytest.skip(f"un-skip when the engine takes this pair: {reason}")
    return pair


@pytest.fixture
def any_pair(request):
    return request.param


@pytest.fixture
def pair(request):
    return accepted(request.param)


@pytest.fixture
def host(request):
    return accepted(request.param)


@pytest.fixture
def talker(request):
    return accepted(request.param)


@pytest.fixture
def objective(request):
    return accepted(request.param)


@pytest.fixture
def padded_objective(request):
    return accepted(request.param)


@pytest.fixture
def padded_talker(request):
    return accepted(request.param)
