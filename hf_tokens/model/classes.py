"""The class that a model, a module, a scheduler or a pipeline is known as: what a row of data says of one of Transformers or Diffusers
holds for what somebody makes of it."""

from __future__ import annotations

import functools

from torch import nn

from . import families

LIBRARIES = ("transformers", "diffusers")


@functools.cache
def known_class(cls: type) -> type:
    """The nearest class of these libraries that says what it computes; a class that is made of none is its own."""
    acts = ("forward",) if issubclass(cls, nn.Module) else ("step", "__call__")  # a scheduler's, a pipeline's
    known = (c for c in cls.__mro__ if c.__module__.partition(".")[0] in LIBRARIES and any(act in vars(c) for act in acts))
    return next(known, cls)


def resumes_not(model: object) -> str | None:
    """Why a model does not read several tokens behind a cache as behind the text that it holds; None where it does."""
    return next((why for models, why in families.RESUMES_NOT.items() if models.search(class_name(model))), None)


def class_name(thing: object) -> str:
    """Its name, of what is of it."""
    return known_class(type(thing)).__name__
