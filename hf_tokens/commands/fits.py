"""Which methods fit a model, by its config alone."""

from __future__ import annotations

import warnings

from ..errors import HFTokensError
from ..model.anatomy import anatomy
from ..model.streams import Anatomy
from ..peft.config import HFTokensConfig
from ..peft.placement import plan
from ..roles.registry import MethodInfo, list_methods
from .blueprint import blueprints


def refusal(info: MethodInfo, base: Anatomy) -> str | None:
    """Why a method does not go into a model; None where it does. One that is no adapter goes where there is a vocabulary."""
    if not info.cls.placed:
        return None if any(stream.table for stream in base.streams) else f"Method {info.name!r} needs a table of embeddings."
    try:
        with warnings.catch_warnings(action="ignore"):  # of blocks that a method leaves out
            plan(base, HFTokensConfig(methods=[info.config.example()]))
    except HFTokensError as error:
        return str(error)
    return None


def methods_that_fit(model: str) -> dict[str, str | None]:
    """Each method with what is said where no part of a model takes it; None where one does.

    Raises:
        UnsupportedError: There is no model of this name, or no part of it has a stream of Transformer blocks.
    """
    bases, nothing = [], None
    for _, part in blueprints(model):
        try:
            bases.append(anatomy(part))
        except HFTokensError as error:  # as in the VAE of nearly every pipeline
            nothing = error
    if not bases:
        raise nothing
    found = {}
    for info in list_methods():
        said = [refusal(info, base) for base in bases]
        found[info.name] = None if None in said else said[-1]
    return found
