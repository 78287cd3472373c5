"""What PEFT is told of methods: the type of their adapters, and that the config of one is a config of PEFT's, too.

PEFT, TRL and transformers ask whether they were given a `PeftConfig`. Its dataclass can be written to and those of methods are frozen, so
that neither may be declared with the other as a base. What `FTPConfig()` returns is therefore of a class derived from both, made once for
each config: it has the knobs, the equality and the words of the first, and holds beside them what PEFT notes on a config of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any, TypeVar

from peft import PeftConfig, PeftType

from ..errors import ConfigError, explain

NAME = "HF_TOKENS"
NOTED = {field.name for field in fields(PeftConfig)} - {"peft_type"}  # what PEFT may write on a config
A = TypeVar("A")


def extend_peft_type() -> PeftType:
    """Add HF_TOKENS to PEFT's closed enum."""
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_, member.__objclass__ = NAME, NAME, PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


class PlainType(str):
    """Stands for the enum member where PEFT's enum cannot be extended: compares as the string, has what PEFT reads."""

    value = property(str)
    name = property(str)


def peft_type() -> PeftType | PlainType:
    """The PEFT type, as an enum member where that is possible."""
    try:
        return extend_peft_type()
    except (AttributeError, TypeError):
        return PlainType(NAME)


HF_TOKENS = peft_type()


class ForPeft:
    """What a method's config has beside its knobs: PEFT's type and notes."""

    peft_type = HF_TOKENS

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in NOTED:
            raise FrozenInstanceError(f"cannot assign to field {name!r}")
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Callable, tuple]:
        return method_config_from, (declared(type(self)), dict(vars(self)))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """A method is saved in an adapter: always refused."""
        rule, remedy = "A method's config is saved in that of an adapter", "Save the model, or `HFTokensConfig(methods=[...])`."
        raise ConfigError(explain(rule, f"`{type(self).__name__}.save_pretrained`", remedy))


def declared(cls: type) -> type:
    """The class that a method's author wrote, of the one that its configs are of."""
    return next(base for base in cls.__mro__ if not issubclass(base, ForPeft))


@functools.cache
def for_peft(cls: type[A]) -> type[A]:
    """The class of which the configs of a declared one are."""
    if issubclass(cls, ForPeft):
        return cls
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (ForPeft, cls, PeftConfig), names)


def method_config_from(cls: type[A], state: dict[str, Any]) -> A:
    """A config from its declared class and what it held."""
    config = cls.__new__(cls)
    vars(config).update(state)
    return config
