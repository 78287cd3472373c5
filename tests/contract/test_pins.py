"""A version of a method keeps its defaults, its starts and its numbers; what changes them is a new version, and old ones still load."""

import pytest
from contract import pins
from contract.pairs import METHODS

NUMBERS = {"rel": 1e-5, "abs": 1e-6}


@pytest.mark.parametrize("name", pins.PUBLISHED)
def test_a_version_keeps_its_numbers(name):
    pinned = pins.read(name)
    assert pinned and pinned[-1]["version"] == METHODS[name].version, f"python tests/contract/pins.py {name} writes what is pinned"
    assert [each["version"] for each in pinned] == [*range(pinned[0]["version"], METHODS[name].version + 1)]
    for each in pinned:
        made = pins.again(name, each)
        known = {name: made["defaults"][name] for name in each["defaults"]}  # a later version may have more knobs
        assert known == each["defaults"], "a default changed: make it a new version, and say what it `was`"
        assert made.get("base", []) == pytest.approx(each.get("base", []), **NUMBERS), "the tiny model changed: write the pins again"
        flat = lambda starts: {f"{key} {i}": v for key, value in starts.items() for i, v in enumerate((value[0], *value[1], *value[2:]))}
        starts, want = flat(made.get("starts", {})), flat(each.get("starts", {}))
        assert starts == pytest.approx(want, **NUMBERS), "parameters start elsewhere: make it a new version"
        assert made.get("outputs", []) == pytest.approx(each.get("outputs", []), **NUMBERS), "numbers changed: make it a new version"
