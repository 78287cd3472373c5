"""How a method is called: its verb, or another of its words, with the signals that it names."""

from __future__ import annotations

from typing import Any

from ..roles.base import Method
from ..roles.signals import OF_A_QUERY
from ..tokens.altered import altered
from .handler import handler_of
from .run import Site
from .supply import SUPPLY


def ask(method: Method, site: Site, word: str | None = None) -> Any:
    """Call a method's verb, or another of its words, with the signals that it names."""
    word = method.verb if word is None else word
    site = altered(site, whole_cache=handler_of(method).reads_cache, key=method.key)
    unused = method.ignores if not method.of_prompts or site.run.prefill else (*method.ignores, *method.of_prompts)
    supply = {name: SUPPLY[name] for name in method.words[word] if name not in unused}
    signals = {name: source(site) for name, source in supply.items()}
    if site.part is not None:
        signals = {name: value[:, site.part] if name in OF_A_QUERY else value for name, value in signals.items()}
    return getattr(method, word)(**{**dict.fromkeys(method.words[word]), **signals})
