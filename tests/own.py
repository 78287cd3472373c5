"""A method made for a test."""

from contextlib import contextmanager
from dataclasses import dataclass

from hf_tokens import MethodConfig, register
from hf_tokens.roles.registry import METHODS


@contextmanager
def method(role, **words):
    """A config of a method with these words, known for a while."""

    @dataclass(frozen=True)
    class OwnConfig(MethodConfig):
        pass

    try:
        register("own", OwnConfig)(type("Own", (role,), {**words, "__module__": __name__}))
        yield OwnConfig
    finally:
        METHODS.pop("own", None)
