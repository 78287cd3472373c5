"""A property that is computed when it is first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Owner, Value = TypeVar("Owner"), TypeVar("Value")


class lazy(Generic[Owner, Value]):
    """`functools.cached_property` without its lock, which a compiler cannot trace."""

    def __init__(self, make: Callable[[Owner], Value]):
        self.make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, owner: None, cls: type) -> lazy[Owner, Value]: ...
    @overload
    def __get__(self, owner: Owner, cls: type) -> Value: ...
    def __get__(self, owner: Any, cls: type) -> Any:
        if owner is None:
            return self
        value = vars(owner)[self.name] = self.make(owner)
        return value
