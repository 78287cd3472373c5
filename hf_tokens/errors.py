"""The errors of the engine. Every message says the rule, what came, and the remedy."""

import difflib
from collections.abc import Iterable


class HFTokensError(ValueError):
    """Base class of every error that hf-tokens raises on purpose."""


class ConfigError(HFTokensError):
    """A knob is out of its bounds, of the wrong type, or the method is unknown."""


class UnsupportedError(HFTokensError):
    """This method, model, cache or backend cannot go together; nothing was changed."""


class AdapterError(HFTokensError):
    """An adapter file does not fit the base model or cannot be read."""


def explain(rule: str, got: object, remedy: str) -> str:
    """One wording for every error: rule, value that came, remedy."""
    return f"{rule}, got {got}. {remedy}"


def first_line(error: Exception) -> str:
    """The first line that an error of somebody else's says."""
    return str(error).strip().split("\n")[0]


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name that a misspelt one most likely means; None where none is near."""
    name, known = str(name), list(known)
    near = difflib.get_close_matches(name.casefold(), [each.casefold() for each in known], n=1)
    alike = [each for each in known if each.casefold() in near]  # such as `Anatomy` and `anatomy`
    return max(alike, key=lambda each: difflib.SequenceMatcher(None, name, each).ratio(), default=None)


def did_you_mean(names: Iterable[object], known: Iterable[str]) -> str:
    """The question that stands before a remedy, with the nearest known name of each unknown one; empty where none is near."""
    known = list(known)
    meant = dict.fromkeys(repr(near) for name in names if (near := nearest(name, known)) is not None)
    return f"Did you mean {' and '.join(meant)}? " if meant else ""
