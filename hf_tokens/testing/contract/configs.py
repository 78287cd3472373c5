"""Configs to try a method with: small ones, and strong ones, which should do something."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from ...roles.config import MethodConfig


def half_way(field: dataclasses.Field) -> Any:
    """A value between a knob's zero and its other bound; a whole number without one is a step away from zero."""
    meta, zero = field.metadata, field.metadata["zero"]
    others = [meta[key] for key in ("ge", "gt", "le", "lt") if key in meta and meta[key] != zero]
    if not isinstance(zero, (int, float)) or isinstance(zero, bool):
        return field.default
    if not others:
        return zero + 1 if type(zero) is int else field.default
    return type(zero)((zero + others[-1]) / 2)


TINY = 16  # as much of a size as a tiny model needs


def tiny_config(config: type[MethodConfig], **knobs: Any) -> MethodConfig:
    """A config to try a method with whose sizes suit a tiny model."""
    small = {field.name: min(field.default, TINY) for field, _ in config.knobs() if "size" in field.metadata}
    return dataclasses.replace(config.example(), **{**small, **knobs})


def strong(config: type[MethodConfig]) -> Iterator[MethodConfig]:
    """Configs that should do something, mildest first: the defaults; all blocks; and the knobs with a zero half way from it."""
    yield tiny_config(config)
    yield tiny_config(config, layers=(0, 1, 2, 3))
    half = {field.name: half_way(field) for field, _ in config.knobs() if {"zero", "example"} & field.metadata.keys() == {"zero"}}
    yield tiny_config(config, **half)
    yield tiny_config(config, **half, layers=(0, 1, 2, 3))
    for field, _ in config.knobs():
        yield from (tiny_config(config, **{field.name: choice}) for choice in field.metadata.get("choices", ()) if choice != field.default)


def two_blocks(config: type[MethodConfig]) -> Iterator[MethodConfig]:
    """The same where a block may be left out altogether: most of them should run, or nothing shows."""
    yield from (config(layers=pair) for pair in itertools.combinations(range(4), 2))
