"""A version of a method keeps its defaults, its starts and its numbers; what changes them is a new version, and old ones still load."""

import pytest
from contract import pins
from contract.pairs import METHODS

NUMBERS = {"rel": 1e-5, "abs": 1e-5}  # tiny models are drawn in single precision, whose last digits are not the same on all processors


def pinned_starts(pin, role):
    """The numbers of where parameters start. Of what an edit has made only the shapes: that may hang on gradients which are nothing but
    rounding, as those of a key's bias are, and the outputs tell what counts."""
    kept = slice(0 if role == "WeightEdit" else None)
    rows = {key: (count, *shape, *moments[kept]) for key, (count, shape, *moments) in pin.get("starts", {}).items()}
    return {f"{key} {i}": value for key, row in rows.items() for i, value in enumerate(row)}


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
        starts, want = (pinned_starts(pin, METHODS[name].role) for pin in (made, each))
        assert starts == pytest.approx(want, **NUMBERS), "parameters start elsewhere: make it a new version"
        assert made.get("outputs", []) == pytest.approx(each.get("outputs", []), **NUMBERS), "numbers changed: make it a new version"
