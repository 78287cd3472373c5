"""The cards of the methods as `make cards` wrote them, and those of other packages' methods from the registry; and completions of names."""

from __future__ import annotations

import json
import pkgutil
from typing import Any

BUILT_IN, ENTRY_POINTS = "hf_tokens_adapters", "hf_tokens.methods"
ANY = "any"  # what a method is for that goes into every model


def jobs() -> list[str]:
    """The jobs that a recipe is for, as `make cards` wrote them."""
    return [*json.loads(pkgutil.get_data(BUILT_IN, "recipes.json"))]


def built_in_cards() -> list[dict[str, Any]]:
    """The cards of the built-in methods, as `make cards` wrote them."""
    return json.loads(pkgutil.get_data(BUILT_IN, "index.json"))


def third_parties() -> bool:
    """Whether a package with more methods is installed."""
    from importlib.metadata import entry_points

    return any(entry.value != BUILT_IN for entry in entry_points(group=ENTRY_POINTS))


def every_card(role: str | None = None) -> list[dict[str, Any]]:
    """The cards of all registered methods, or of those of one role."""
    from hf_tokens import list_methods
    from hf_tokens.commands.cards import index_entry

    return [index_entry(info) for info in list_methods(role)]


def one_card(method: str) -> dict[str, Any]:
    """The card of a method; of one that is not built in, from the registry."""
    if (card := next((card for card in built_in_cards() if card["name"] == method), None)) is not None:
        return card
    from hf_tokens import method_info
    from hf_tokens.commands.cards import index_entry

    return index_entry(method_info(method))


def all_cards() -> list[dict[str, Any]]:
    return every_card() if third_parties() else built_in_cards()


def check_known(what: str, asked: str, known: list[str]) -> None:
    """Refuse a word that no card has."""
    if asked not in known:
        from hf_tokens.errors import ConfigError, did_you_mean, explain

        remedy = f"{did_you_mean([asked], known)}Leave it out to list all."
        raise ConfigError(explain(f"A {what} with methods is one of {', '.join(known)}", repr(asked), remedy))


def chosen(role: str | None, modality: str | None, needs_training: bool | None) -> list[dict[str, Any]]:
    """The cards of the methods of a role, for a modality, and that need training or do not; None takes all.

    Raises:
        ConfigError: There is no such role or modality.
    """
    cards = all_cards()
    if role is not None:
        cards = [card for card in cards if card["role"] == role] or every_card(role)
    if modality is not None:
        check_known("modality", modality, sorted({word for card in all_cards() for word in card["modality"]}))
        cards = [card for card in cards if {modality, ANY} & {*card["modality"]}]
    return [card for card in cards if needs_training in (None, card["need"] == "training")]


def method_names(incomplete: str) -> list[str]:
    """Names of methods that begin so, for a shell."""
    return [card["name"] for card in built_in_cards() if card["name"].startswith(incomplete)]


def role_names(incomplete: str) -> list[str]:
    return sorted({card["role"] for card in built_in_cards() if card["role"].startswith(incomplete)})


def modality_names(incomplete: str) -> list[str]:
    return sorted({word for card in built_in_cards() for word in card["modality"] if word.startswith(incomplete)})


def job_names(incomplete: str) -> list[str]:
    return [job for job in jobs() if job.startswith(incomplete)]
