"""Patterns in the config of a PEFT method: PEFT matches them with the names of a model's modules, however long that takes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from re import _constants as ops
from re import _parser as parser
from typing import Any

from peft import PeftConfig

from ..errors import ConfigError, explain

MOST_STEPS, MOST_IN_ALL = 100_000, 5_000_000  # that a pattern may take with one name, and all of them with all names: seconds
MOST_KEYS = 1000  # of a dict: PEFT compiles each for each module
LITERAL = re.compile(r"[\w./ -]*")  # of this only `.` means something, and it takes one step
REPEATS = (ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT)
ONE_CHARACTER = (ops.ANY, ops.IN, ops.NOT_LITERAL, ops.RANGE, ops.CATEGORY)


class TooManyError(Exception):
    """A pattern takes too many steps with a name."""


class Search:
    """The ways in which a backtracking search goes through a name, counted at each place instead of walked."""

    def __init__(self, name: str, left: int):
        self.name, self.steps, self.most = name, 0, min(left, MOST_STEPS)

    def through(self, parts: Iterable[tuple[Any, Any]], at: Counter[int]) -> Counter[int]:
        """How many ways lead to each place behind these parts of a pattern, given how many lead to each in front of them."""
        for op, argument in parts:
            at = self.behind(op, argument, at)
            self.steps += at.total() + 1
            if self.steps > self.most:
                raise TooManyError
        return at

    def behind(self, op: Any, argument: Any, at: Counter[int]) -> Counter[int]:
        """The same for one part; what is not known to fail counts as a match."""
        if op is ops.LITERAL:
            same = lambda i: self.name[i].casefold() == chr(argument).casefold()
            return Counter({i + 1: n for i, n in at.items() if i < len(self.name) and same(i)})
        if op in ONE_CHARACTER:
            return Counter({i + 1: n for i, n in at.items() if i < len(self.name)})
        if op is ops.BRANCH:
            return sum((self.through(each, at) for each in argument[1]), Counter())
        if op is ops.SUBPATTERN:
            return self.through(argument[-1], at)
        if op is ops.ATOMIC_GROUP:
            return self.through(argument, at)
        if op in REPEATS:
            return self.repeated(*argument, at)
        if op in (ops.ASSERT, ops.ASSERT_NOT):
            self.through(argument[1], at)
            return at
        if op is ops.AT:
            return at
        raise TooManyError  # it looks back at what was found before

    def repeated(self, least: int, most: int, parts: Iterable[tuple[Any, Any]], at: Counter[int]) -> Counter[int]:
        """The same for what may come several times; a time that takes nothing is the last."""
        found = Counter(at) if least == 0 else Counter()
        for time in range(1, min(most, least + len(self.name)) + 1):
            at = self.through(parts, at)
            if not at:
                break
            if time >= least:
                found += at
        return found


def strings(value: Any) -> Iterator[str]:
    """Every string in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from (*strings(key), *strings(item))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from strings(item)


def check_patterns(config: PeftConfig, names: Iterable[str]) -> None:
    """Refuse a config whose patterns would not come to an end with the names of a model's modules."""
    patterns, steps = [text for text in strings(vars(config)) if not LITERAL.fullmatch(text)], 0
    most = max((len(value) for value in vars(config).values() if isinstance(value, dict)), default=0)
    if most > MOST_KEYS:
        raise ConfigError(explain(f"A dict of a PEFT method in a stack has at most {MOST_KEYS} keys", most, "Name fewer modules."))
    names = {re.sub(r"\d+", "10", name) for name in names} if patterns else ()
    for pattern in patterns:
        try:
            parts = parser.parse(pattern)
        except re.error:  # it is no pattern
            continue
        for name in names:
            search = Search(name, MOST_IN_ALL - steps)
            try:
                search.through(parts, Counter(range(len(name) + 1)))
                steps += search.steps
            except TooManyError:
                rule = f"A pattern of a PEFT method in a stack takes at most {MOST_STEPS} steps with the name of a module"
                remedy = "Name the modules, in a list; or leave out repeats in repeats and `.*` behind `.*`."
                raise ConfigError(explain(rule, f"{pattern[:80]!r} with {name!r}", remedy)) from None
