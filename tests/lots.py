"""Which cases of a test are drawn by lot: the same ones in every run, others from test to test. `make contract` takes all of them.

The mark `drawn` is for a test that takes each case of one table with each of another: of these it leaves as few as meet each value of each
table, so no row is left out. `drawn(of=...)` names the values otherwise: what of a case, given its parameters, has to be met.
`drawn(most=...)` is for what is dear: no more cases than that, and with none only `make contract` runs the test.
"""

import os
import zlib
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import TypeVar

Case = TypeVar("Case")
ALL = os.environ.get("HF_TOKENS_CONTRACT") == "all"  # the whole grid
MARK = "drawn(most, of): of each case of one table with each of another, as few as meet each value of each; tests/lots.py"


def lot(*words: str) -> int:
    """A number that is the same in every process, and looks drawn by lot."""
    return zlib.crc32(" ".join(words).encode())


def covering(cases: Iterable[Case], values: Callable[[Case], Iterable[Hashable]], met: Iterable[Hashable] = ()) -> list[Case]:
    """The first cases that meet a value which none before them met, and which is not met already."""
    seen, chosen = set(met), []
    for case in cases:
        if not seen.issuperset(new := set(values(case))):
            seen |= new
            chosen.append(case)
    return chosen


def tables(item):
    """The names that each table of the case gives values for."""
    told = [mark.args[0] for mark in item.iter_markers("parametrize")]
    known = [tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names) for names in told]
    return known + [(name,) for name in item.callspec.params if not any(name in names for names in known)]


def values_of(item, of):
    """What has to be met: each row of each table that the case is made of, or what the mark names."""
    if "callspec" not in vars(item):
        return [item.name]
    params = item.callspec.params
    return [of(**params)] if of else [(names, *(id(params[name]) for name in names)) for names in tables(item)]


def left_out(items):
    """The items that the lot leaves out."""
    tests = {}
    for item in items:
        if item.get_closest_marker("drawn"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    out = set()
    for cases in tests.values():
        knobs = cases[0].get_closest_marker("drawn").kwargs
        cases = sorted(cases, key=lambda item: lot(item.name))
        out |= {*cases} - {*covering(cases, partial(values_of, of=knobs.get("of")))[: knobs.get("most")]}
    return out
