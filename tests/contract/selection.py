"""Which architectures a method meets in a check: some of a kind, others from check to check.

A kind is a kind of stream that the method acts on: it meets two of each. For an adapter's life, which hardly depends on it, a kind is the
library that the model is from: it meets one of each.

The probes meet all of them. An architecture that a check would meet no method on meets one more.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from contract.pairs import Pair, planned

from hf_tokens.testing import probe

ALL = os.environ.get("HF_TOKENS_CONTRACT") == "all"  # the whole grid
POOL = 3  # architectures of a kind of stream, in all checks of a method
Kinds = Callable[[Pair], frozenset]


@dataclass(frozen=True)
class Spread:
    """How many architectures of a kind a method meets in a check."""

    kinds: Kinds
    number: int


@cache
def streams(pair: Pair) -> frozenset[tuple[str, bool, bool]]:
    """The kinds of stream that the method acts on; all that the model has where the engine refuses it at once."""
    taken = planned(pair) is None
    acted_on = pair.streams() if taken else pair.all_streams()
    return frozenset((stream.kind, stream.causal, taken) for stream in acted_on)


def library(pair: Pair) -> frozenset[str]:
    """The library that the model is from."""
    return frozenset({pair.row.library})


BY_STREAM, BY_LIBRARY = Spread(streams, 2), Spread(library, 1)


def lot(*words: str) -> int:
    """A number that is the same in every process, and looks drawn by lot."""
    return zlib.crc32(" ".join(words).encode())


def enough(pairs: Iterable[Pair], number: int, kinds: Kinds) -> list[Pair]:
    """The first pairs among which each kind is there so many times, as far as it is."""
    met: Counter[tuple] = Counter()
    chosen = []
    for pair in pairs:
        if any(met[kind] < number for kind in kinds(pair)):
            met.update(kinds(pair))
            chosen.append(pair)
    return chosen


def own(check: str, pairs: Iterable[Pair], spread: Spread) -> list[Pair]:
    """The pairs of one method that a check takes: out of a few for all checks, since a pair's first check makes what the others reuse."""
    few = enough(sorted(pairs, key=lambda pair: lot(pair.method, pair.architecture)), POOL, streams)
    return enough(sorted(few, key=lambda pair: lot(check, pair.method, pair.architecture)), spread.number, spread.kinds)


def is_probe(pair: Pair) -> bool:
    return pair.info.cls.__module__ == probe.__name__


def thin(check: str, pairs: list[Pair], spread: Spread) -> list[Pair]:
    """The pairs of all methods that a check takes, in their order."""
    methods: dict[str, list[Pair]] = {}
    for pair in pairs:
        methods.setdefault(pair.method, []).append(pair)
    chosen = {pair for of_method in methods.values() for pair in (of_method if is_probe(of_method[0]) else own(check, of_method, spread))}
    for pair in sorted(pairs, key=lambda pair: lot(check, pair.architecture, pair.method)):
        if all(pair.architecture != other.architecture for other in chosen):
            chosen.add(pair)
    return [pair for pair in pairs if pair in chosen]
