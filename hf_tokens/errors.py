"""The errors of the engine. Every message says the rule, what came, and the remedy."""


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
