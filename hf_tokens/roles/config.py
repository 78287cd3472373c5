"""Configs of methods. A knob is declared once: default, bound, help, error text and card row come from `option`."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import ConfigError, did_you_mean, explain
from .in_peft import for_peft


def option(
    default: Any,
    *,
    help: str,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: tuple | None = None,
    free: bool = False,
    zero: Any = None,
    size: bool = False,
    example: Any = None,
    was: dict[int, Any] | None = None,
) -> Any:
    """Declare one knob of a method.

    Args:
        default: The paper's default. `None` makes the knob optional; a tuple makes it a list of values.
        help: One sentence, with the paper's symbol.
        ge, gt, le, lt: Bounds of a number, or of each number in a list. A number needs at least one.
        choices: The allowed values of a string.
        free: Whether a string is any that the user has a use for, but an empty one.
        zero: The value at which the method changes nothing.
        size: Whether it only sets how large the adapter is, so that a tiny model may do with less.
        example: A value to try the method with, where the default is for the user to fill in.
        was: Defaults of earlier versions of the method, each by the last version that had it: what their files leave unsaid.

    >>> field = option(0.5, ge=0, lt=1, zero=0.0, help="Share of the tokens that vanish (s).")
    >>> interval(field.metadata)
    '[0, 1)'
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "free": free or None, "zero": zero, "size": size or None}
    bounds |= {"example": example, "was": was}
    return dataclasses.field(default=default, metadata={"help": help, **{k: v for k, v in bounds.items() if v is not None}})


def interval(metadata: typing.Mapping) -> str:
    """The bound of a knob in mathematical notation, e.g. `[0, 1)`."""
    if "choices" in metadata:
        return "{" + ", ".join(map(str, metadata["choices"])) + "}"
    low = f"[{metadata['ge']:g}" if "ge" in metadata else f"({metadata['gt']:g}" if "gt" in metadata else "(-inf"
    high = f"{metadata['le']:g}]" if "le" in metadata else f"{metadata['lt']:g})" if "lt" in metadata else "inf)"
    return f"{low}, {high}"


def inside(value: float, metadata: typing.Mapping) -> bool:
    """Whether a number keeps the bounds of its knob."""
    strictly = metadata.get("gt", -math.inf) < value < metadata.get("lt", math.inf)
    return strictly and metadata.get("ge", -math.inf) <= value <= metadata.get("le", math.inf)


def flat(value: Any) -> list[Any]:
    """The items of a list of lists; of one value, itself."""
    return [item for part in value for item in flat(part)] if isinstance(value, tuple) else [value]


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has the annotated type; ints pass as floats, lists as tuples, bools never as numbers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Union or type(hint).__name__ == "UnionType":
        return any(matches(value, arg) for arg in args)
    if hint is type(None) or hint is None:
        return value is None
    if origin is tuple or origin is list:
        return isinstance(value, (tuple, list)) and all(matches(v, args[0]) for v in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_value(name: str, metadata: typing.Mapping, hint: Any, value: Any) -> None:
    """Refuse a value that has not the annotated type or is out of the bounds that were declared for this name.

    Raises:
        ConfigError: It is.
    """
    meaning = f"Meaning: {metadata['help']}"
    if not matches(value, hint):
        want = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
        raise ConfigError(explain(f"{name} must be of type {want}", repr(value), meaning))
    for item in flat(value):
        if "choices" in metadata and item is not None and item not in metadata["choices"]:
            remedy = f"{did_you_mean([item], metadata['choices'])}{meaning}"
            raise ConfigError(explain(f"{name} must be one of {interval(metadata)}", repr(value), remedy))
        if "free" in metadata and item == "":
            raise ConfigError(explain(f"{name} must not be empty", repr(value), meaning))
        if isinstance(item, (int, float)) and not isinstance(item, bool) and not inside(item, metadata):
            raise ConfigError(explain(f"{name} must be in {interval(metadata)}", repr(value), meaning))


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config.

    `register` gives each subclass its `method` name and `version`. Two knobs are common to all methods: `layers` and `stream`. A config is
    a `peft.PeftConfig` as well: `peft.get_peft_model(model, FTPConfig())` and TRL's `peft_config=FTPConfig()` take it as an adapter of one.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class ShareConfig(MethodConfig):
    ...     share: float = option(0.5, ge=0, lt=1, zero=0.0, help="Share of the tokens that vanish (s).")
    >>> ShareConfig(share=0.25).at_zero()
    ShareConfig(layers=None, stream=None, share=0.0)
    """

    method: ClassVar[str]
    version: ClassVar[int] = 1

    layers: tuple[int, ...] | None = option(None, ge=-1000, lt=1000, help="Blocks the method acts on; None takes the method's own choice.")
    stream: str | None = option(None, help="Name of the stream to act on; None takes every stream of a kind that the method supports.")

    if not typing.TYPE_CHECKING:  # the constructor's signature is the dataclass's own

        def __new__(cls, *args: Any, **knobs: Any):
            known = [field.name for field in dataclasses.fields(cls)]
            if unknown := [name for name in knobs if name not in known]:
                remedy = f"{did_you_mean(unknown, known)}`help({cls.__name__})` names them."
                raise ConfigError(explain(f"{cls.__name__} takes the knobs that it declares", ", ".join(map(repr, unknown)), remedy))
            return super().__new__(for_peft(cls))

        def __getattr__(self, name: str) -> Any:
            rule = f"{type(self).__name__} has the knobs that it declares, and what every config of PEFT's has"
            remedy = "What belongs to a whole adapter stands in `HFTokensConfig(methods=[...])`."
            raise AttributeError(explain(rule, repr(name), remedy))

    def __post_init__(self):
        for field, hint in self.knobs():
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
                object.__setattr__(self, field.name, value)
            check_value(f"{type(self).__name__}.{field.name}", field.metadata, hint, value)

    @classmethod
    def take_name(cls, method: str, version: int) -> None:
        """Note the name and version of the method; `register` calls it."""
        cls.method, cls.version = method, version

    @classmethod
    @functools.cache
    def knobs(cls) -> tuple[tuple[dataclasses.Field, Any], ...]:
        """Every knob with its resolved type."""
        hints = typing.get_type_hints(cls)
        return tuple((field, hints[field.name]) for field in dataclasses.fields(cls))

    def at_zero(self) -> MethodConfig:
        """This config at zero strength: each knob that declares a `zero` takes it."""
        return dataclasses.replace(self, **{f.name: f.metadata["zero"] for f, _ in self.knobs() if "zero" in f.metadata})

    @classmethod
    def example(cls) -> MethodConfig:
        """A config to try the method with: the defaults, and the examples of what has none of use."""
        return cls(**{f.name: f.metadata["example"] for f, _ in cls.knobs() if "example" in f.metadata})

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: method, version, and the knobs that differ from their default."""
        changed = {f.name: getattr(self, f.name) for f, _ in self.knobs() if getattr(self, f.name) != f.default}
        return {"method": self.method, "version": self.version, **changed}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MethodConfig:
        """The config of a JSON form; keys of a newer release are dropped with a warning, and what an older one left unsaid is as it was."""
        names, version = {f.name for f, _ in cls.knobs()}, data.get("version", cls.version)
        unknown = sorted(set(data) - names - {"method", "version"})
        if unknown:
            words = f"hf-tokens: {cls.__name__} does not know {unknown}; these keys are ignored. {did_you_mean(unknown, names)}"
            warnings.warn(words.rstrip(), stacklevel=2)
        return cls(**{**cls.defaults_of(version), **{k: v for k, v in data.items() if k in names}})

    @classmethod
    def defaults_of(cls, version: int) -> dict[str, Any]:
        """The defaults of a version of the method that are no more."""
        past = {f.name: {last: value for last, value in f.metadata.get("was", {}).items() if version <= last} for f, _ in cls.knobs()}
        return {name: values[min(values)] for name, values in past.items() if values}
