"""What a stranger's files may be: a small adapter_config.json of plain numbers, of known names with values of their types; tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import AdapterError, HFTokensError, explain
from ..roles.config import matches

MOST_BYTES, MOST_METHODS = 1 << 20, 100  # of an adapter_config.json
MOST = 1 << 24  # the largest whole number that a knob of a method has; a PEFT method's may be seeds, and are bounded by what they make


@contextlib.contextmanager
def whole(rule: str, remedy: str, kinds: type[Exception] | tuple[type[Exception], ...] = Exception) -> Iterator[None]:
    """Read what somebody else wrote: errors of these kinds in it are said in our words, with the cause."""
    try:
        yield
    except HFTokensError:
        raise
    except kinds as error:
        got = f"one that says: {type(error).__name__}: {error}" if str(error) else f"one that says: {type(error).__name__}"
        raise AdapterError(explain(rule, got, remedy)) from error


def finite(text: str) -> float:
    """A number of a JSON file, which can be written without a bound."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def read_config(path: Path, cls: type, kind: str) -> dict[str, Any]:
    """What the file of a config says.

    Args:
        path: The file.
        cls: The dataclass that it is for.
        kind: The PEFT type that it must have.

    Raises:
        AdapterError: It is damaged, too large, or of another kind.
    """
    with whole(f"{path.name} must be a whole JSON file", "Download or save it again."):
        if path.stat().st_size > MOST_BYTES:
            raise AdapterError(explain(f"{path.name} has at most {MOST_BYTES} bytes", path.stat().st_size, "Save the adapter again."))
        data = json.loads(path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
    found = data.get("peft_type") if isinstance(data, dict) else None
    if found != kind:
        raise AdapterError(explain(f"hf_tokens.load needs an adapter of type {kind}", repr(found)[:80], "Use peft for other adapters."))
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.name in data.keys() - {"methods"} and not matches(data[field.name], hints[field.name]):
            rule = f"{field.name!r} in {path.name} must be of type {hints[field.name]}"
            raise AdapterError(explain(rule, repr(data[field.name])[:80], "Save the adapter again."))
    methods = data.get("methods") if isinstance(data.get("methods"), list) else []
    if len(methods) > MOST_METHODS:
        raise AdapterError(explain(f"An adapter has at most {MOST_METHODS} methods", len(methods), "Make several adapters."))
    knobs = [value for method in methods if isinstance(method, dict) for key, value in method.items() if key != "config"]
    large = [n for value in knobs for n in whole_numbers(value) if n > MOST]
    if large:
        raise AdapterError(explain(f"A knob of a method in {path.name} is at most {MOST}", str(large[0])[:80], "Save the adapter again."))
    return data


def whole_numbers(value: Any) -> Iterator[int]:
    """Every whole number in a value of a JSON file."""
    if isinstance(value, int):
        yield abs(value)
    elif isinstance(value, list):
        for item in value:
            yield from whole_numbers(item)


def check_is_file(weights: Path) -> None:
    """Refuse a pipe or a device in the place of a file: it would never end."""
    if not weights.is_file():
        raise AdapterError(explain(f"{weights.name} must be a file", weights, "Download or save it again."))


def opened(weights: Path) -> Any:
    """A safetensors file."""
    check_is_file(weights)
    return safe_open(str(weights), framework="pt")


def read_pickle(weights: Path) -> dict[str, Tensor]:
    """The tensors in torch's own kind of file, which PEFT writes with `safe_serialization=False`; nothing in it is run."""
    check_is_file(weights)
    with whole(f"{weights.name} must be a whole file of tensors", "Download or save it again."):
        state = torch.load(weights, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            raise TypeError("there is more than tensors by their names")
    return state


def tensors_of(weights: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file with their names, one by one."""
    if weights.suffix != ".safetensors":
        yield from read_pickle(weights).items()
        return
    with whole(f"{weights.name} must be a whole safetensors file", "Download or save it again."), opened(weights) as file:
        yield from ((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118 (a safetensors file is no dict)
