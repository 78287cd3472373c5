"""Which architectures a method meets in a check: one that takes it and one that refuses it, drawn by lot, others from check to check.

Of the architectures that take a role, a check meets each kind: where the lots of the role's methods leave one out, one more is drawn. A
kind is a kind of stream that the method acts on; for an adapter's life, which hardly depends on it, the library that the model is from.

The probes meet all of them. An architecture that a check would meet no method on meets one more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

from lots import covering, lot

from hf_tokens.testing import probe
from hf_tokens.testing.contract.pairs import ContractPair, planned

POOL = 2  # architectures of a kind of stream, in all checks of a method
Kinds = Callable[[ContractPair], frozenset]


@cache
def streams(pair: ContractPair) -> frozenset[tuple[str, bool, bool]]:
    """The kinds of stream that the method acts on; all that the model has where the engine refuses it at once."""
    taken = planned(pair) is None
    acted_on = pair.streams() if taken else pair.all_streams()
    return frozenset((stream.kind, stream.causal, taken) for stream in acted_on)


def library(pair: ContractPair) -> frozenset[str]:
    """The library that the model is from."""
    return frozenset({pair.row.library})


def by_lot(pairs: Iterable[ContractPair], *words: str) -> list[ContractPair]:
    return sorted(pairs, key=lambda pair: lot(*words, pair.method, pair.architecture))


def pool(pairs: Iterable[ContractPair]) -> list[ContractPair]:
    """The pairs of one method that its checks draw from: a few of each kind, since a pair's first check makes what the others reuse."""
    few, left = [], by_lot(pairs)
    for _ in range(POOL):
        more = covering((pair for pair in left if pair not in few), streams)
        few += more
    return few


def own(check: str, pairs: Iterable[ContractPair]) -> list[ContractPair]:
    """The pairs of one method that a check takes: one that is taken, and one that is refused."""
    return covering(by_lot(pool(pairs), check), lambda pair: [planned(pair) is None])


def is_probe(pair: ContractPair) -> bool:
    return pair.info.cls.__module__ == probe.__name__


def thin(check: str, pairs: list[ContractPair], kinds: Kinds) -> list[ContractPair]:
    """The pairs of all methods that a check takes, in their order."""
    methods: dict[str, list[ContractPair]] = {}
    for pair in pairs:
        methods.setdefault(pair.method, []).append(pair)
    chosen = [pair for of_method in methods.values() for pair in (of_method if is_probe(of_method[0]) else own(check, of_method))]
    pools = [pair for of_method in methods.values() if not is_probe(of_method[0]) for pair in by_lot(pool(of_method), check)]
    of_a_role = lambda pair: [(pair.info.role, kind) for kind in kinds(pair)]
    for values, among in ((of_a_role, pools), (lambda pair: [pair.architecture], pairs)):
        met = [value for pair in chosen for value in values(pair)]
        chosen += covering(by_lot(among, check), values, met)
    return [pair for pair in pairs if pair in chosen]
