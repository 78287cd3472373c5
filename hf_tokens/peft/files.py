"""The files of an adapter: read within bounds, and compared with what its methods need before anything of a model is changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AdapterError, HFTokensError, explain
from ..roles.config import matches
from .config import CONFIG, NAME, PEFT_METHOD, HFTokensConfig

MOST_BYTES, MOST_METHODS = 1 << 20, 100  # of an adapter_config.json
PEFT_PREFIX = "base_model.model."  # how a file calls what is in the base
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
BY_VALUE = ("BOFT", "FROD", "SHIRA", "UNILORA")  # PEFT methods whose beginning reads the numbers of tensors: no trial without any

Saved = tuple[list[int], torch.dtype | None]  # shape and kind of a saved tensor; None for a kind that no adapter has


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


# -- reading ---------------------------------------------------------------------------------------------------------
def finite(text: str) -> float:
    """A number of a JSON file, which can be written without a bound."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def read_config(folder: Path) -> dict[str, Any]:
    """What the config in a folder says: refused if it is no config of ours."""
    path = folder / CONFIG
    with whole(f"{CONFIG} must be a whole JSON file", "Download or save it again."):
        if path.stat().st_size > MOST_BYTES:
            raise AdapterError(explain(f"{CONFIG} has at most {MOST_BYTES} bytes", path.stat().st_size, "Save the adapter again."))
        data = json.loads(path.read_text(encoding="utf-8"), parse_float=finite, parse_constant=finite)
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind != NAME:
        raise AdapterError(explain(f"hf_tokens.load needs an adapter of type {NAME}", repr(kind)[:80], "Use peft for other adapters."))
    hints = typing.get_type_hints(HFTokensConfig)
    for field in dataclasses.fields(HFTokensConfig):
        if field.name in data.keys() - {"methods"} and not matches(data[field.name], hints[field.name]):
            rule = f"{field.name!r} in {CONFIG} must be of type {hints[field.name]}"
            raise AdapterError(explain(rule, repr(data[field.name])[:80], "Save the adapter again."))
    methods = data.get("methods")
    if isinstance(methods, list) and len(methods) > MOST_METHODS:
        raise AdapterError(explain(f"An adapter has at most {MOST_METHODS} methods", len(methods), "Make several adapters."))
    return data


def header(weights: Path) -> dict[str, Saved]:
    """Shape and kind of each tensor of a file, of which no more is read."""
    kinds = FLOATS | INTEGERS
    with whole(f"{weights.name} must be a whole safetensors file", "Download or save it again."), opened(weights) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        return {key: (part.get_shape(), kinds.get(part.get_dtype())) for key, part in slices.items()}


def opened(weights: Path) -> Any:
    """A safetensors file; a pipe or a device in its place would never end."""
    if not weights.is_file():
        raise AdapterError(explain(f"{weights.name} must be a file", weights, "Download or save it again."))
    return safe_open(str(weights), framework="pt")


# -- comparing -------------------------------------------------------------------------------------------------------
def faults(needed: Mapping[str, Tensor], held: Mapping[str, Saved]) -> Iterator[str]:
    """What is wrong with the tensors that an adapter brings, one by one, given those that its methods have."""
    for key, tensor in needed.items():
        shape, kind = held.get(key, (None, None))
        if shape is None:
            yield f"{key} missing"
        elif shape != list(tensor.shape):
            yield f"{key} of shape {shape}"
        elif kind not in (FLOATS.values() if tensor.is_floating_point() else (tensor.dtype,)):
            yield f"{key} of numbers of another kind"
    yield from (f"{key}, which is none of them" for key in held if key not in needed)


def check_same(needed: Mapping[str, Tensor], held: Mapping[str, Saved]) -> None:
    """Refuse tensors that are not exactly those that the methods of an adapter have."""
    if wrong := list(faults(needed, held)):
        rule = f"An adapter's file holds the {len(needed)} tensors of its methods"
        remedy = "Save the adapter again, without layers of the base (`save_embedding_layers=False`)."
        raise AdapterError(explain(rule, f"{len(wrong)} that are not right, the first {wrong[0]}", remedy))


def check_values(tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Refuse numbers that are none."""
    for key, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterError(explain("The tensors of an adapter are finite", f"{key} with NaN or infinity", "Train the adapter again."))


def check_state(needed: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that is not exactly that of an adapter."""
    check_same(needed, {key: (list(tensor.shape), tensor.dtype) for key, tensor in state.items()})
    check_values(iter(state.items()))


class Hollow(TorchFunctionMode):
    """Tensors are copied without their numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone):
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))


def tried(model: nn.Module, config: HFTokensConfig, adapter_name: str) -> dict[str, Tensor]:
    """The tensors that an adapter has in a model, by the names of its file, found in a copy of the model without any numbers."""
    config, meta = copy.deepcopy(config), True
    for method in config.methods:  # nothing begins here
        if method["method"] == PEFT_METHOD:
            method["config"] = {key: value for key, value in method["config"].items() if not key.startswith("init_")}
            meta = meta and method["config"]["peft_type"] not in BY_VALUE
    with Hollow() if meta else contextlib.nullcontext():
        trial = copy.deepcopy(model)
    configs = trial.peft_config if isinstance(trial, PeftModel) else vars(trial).get("peft_config", {})
    configs.pop(adapter_name, None)  # it is there already, and waits for its layers
    with whole(f"The methods in {CONFIG} must go into {type(model).__name__}", "Save the adapter again."):
        with warnings.catch_warnings(), torch.device("meta") if meta else contextlib.nullcontext():
            warnings.simplefilter("ignore")  # the real one says them
            inject_adapter_in_model(config, trial, adapter_name)
        state = get_peft_model_state_dict(trial, adapter_name=adapter_name, save_embedding_layers=False)
    return {PEFT_PREFIX + key: tensor for key, tensor in state.items()}


def check_file(model: nn.Module, config: HFTokensConfig, adapter_name: str) -> None:
    """Refuse a config that was read with other tensors beside it than its methods have in a model, which is not touched."""
    weights = config.take_weights()
    if weights is None:
        return
    held = header(weights)
    check_same(tried(model, config, adapter_name), held)
    with opened(weights) as file:
        check_values((key, file.get_tensor(key)) for key in held)
