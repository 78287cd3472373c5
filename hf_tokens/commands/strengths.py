"""The strengths of a method that a bench goes through: values of one of its knobs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError, did_you_mean, explain
from ..roles.config import MethodConfig
from .recipe_file import value_of

ON_THE_WAY = (0.25, 0.5, 0.75, 0.9)  # of the way from where a knob changes nothing to its other bound


def ends(metadata: Any) -> tuple[float, float]:
    """Where a knob changes nothing, and its other bound; infinite where it has none."""
    low = metadata.get("ge", metadata.get("gt", -math.inf))
    high = metadata.get("le", metadata.get("lt", math.inf))
    zero = metadata["zero"]
    return zero, low if zero == high else high


def usual(config: MethodConfig) -> tuple[str, list[Any]] | None:
    """The first knob with a zero and a bound on the other side, and values on the way from one to the other; None where it has none."""
    for field, hint in config.knobs():
        zero = field.metadata.get("zero")
        if isinstance(zero, bool) or not isinstance(zero, (int, float)):
            continue
        zero, other = ends(field.metadata)
        if math.isfinite(other):
            rounded = round if hint is int else lambda value: round(value, 4)
            return field.name, [*dict.fromkeys(rounded(zero + share * (other - zero)) for share in ON_THE_WAY)]
    return None


def values_of(words: str) -> tuple[str, list[Any]]:
    """A knob and its values, as they are written on a command line: `budget=0.1,0.25`."""
    name, equals, values = words.partition("=")
    found = value_of(f"[{values}]") if equals else []
    if not name or not found:
        raise ConfigError(explain("`--vary` is a knob and its values", repr(words), "Write `--vary budget=0.1,0.25,0.5`."))
    return name.strip(), found


def stacks_for(configs: Sequence[Any], words: str | None) -> tuple[str, list[tuple[Any, list[Any]]]]:
    """The knob that is varied, and for each of its values the value and the whole stack.

    Raises:
        ConfigError: No method has the knob or several have it, a value is out of its bounds, or no knob says how strong a method is.
    """
    methods = [config for config in configs if isinstance(config, MethodConfig)]
    has = lambda config, name: any(field.name == name for field, _ in config.knobs())
    if words is None:
        found = [(config, one) for config in methods if (one := usual(config)) is not None]
        if not found:
            names = ", ".join(config.method for config in methods) or "none"
            rule = "A bench varies a knob that has a value which changes nothing and a bound on the other side"
            raise ConfigError(explain(rule, names, "Name one: `--vary tokens=2,4,8`."))
        varied, (name, values) = found[0]
    else:
        name, values = values_of(words)
        having = [config for config in methods if has(config, name)]
        if len(having) != 1:
            known = sorted({field.name for config in methods for field, _ in config.knobs()})
            got = f"{name!r}, which {'none has' if not having else ' and '.join(config.method for config in having) + ' have'}"
            raise ConfigError(explain("`--vary` names a knob of one of the methods", got, f"{did_you_mean([name], known)}Name another."))
        (varied,) = having
    stacks = []
    for value in values:
        changed = dataclasses.replace(varied, **{name: tuple(value) if isinstance(value, list) else value})
        stacks.append((value, [changed if config is varied else config for config in configs]))
    return name, stacks
