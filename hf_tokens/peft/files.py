"""The files of an adapter: read within bounds, and compared with what its methods need before anything of a model is changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AdapterError, HFTokensError, explain
from ..roles.config import matches
from .config import NAME, PEFT_METHOD, HFTokensConfig
from .doors import CONFIG, PICKLE, calling_loader, given_to, without_weights
from .saving import PEFT_PREFIX, digest_of

MOST_BYTES, MOST_METHODS = 1 << 20, 100  # of an adapter_config.json
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


def finite_ones(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, one by one; numbers that are none are refused."""
    for key, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AdapterError(explain("The tensors of an adapter are finite", f"{key} with NaN or infinity", "Train the adapter again."))
        yield key, tensor


def check_values(tensors: Iterable[tuple[str, Tensor]], digest: str | None = None) -> None:
    """Refuse numbers that are none, and tensors of another digest than the config has: one file is of another save, or was changed."""
    if digest is None:
        for _ in finite_ones(tensors):
            pass
    elif (found := digest_of(finite_ones(tensors))) != digest:
        rule = f"The tensors beside {CONFIG} have the digest that it names, {digest[:80]}"
        remedy = "A save was broken off, or a file changed: save or download it again, or delete `digest` there if you changed it yourself."
        raise AdapterError(explain(rule, found, remedy))


def check_state(needed: Mapping[str, Tensor], state: Mapping[str, Tensor], digest: str | None = None) -> None:
    """Refuse a state dict that is not exactly that of an adapter."""
    check_same(needed, {key: (list(tensor.shape), tensor.dtype) for key, tensor in state.items()})
    check_values(state.items(), digest)


class Hollow(TorchFunctionMode):
    """Tensors are copied without their numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone):
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))


def tried(model: nn.Module, config: HFTokensConfig, adapter_name: str) -> dict[str, Tensor]:
    """The tensors that an adapter has in a model, by the names of its file, found in a copy of the model without any numbers."""
    config = config.for_trial()
    meta = not any(method["config"]["peft_type"] in BY_VALUE for method in config.methods if method["method"] == PEFT_METHOD)
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
    """Refuse a config that is being loaded with other tensors than its methods have in a model, which is not touched."""
    weights, digest = config.take_source()
    loader = None if config.in_trial else calling_loader()
    given = weights if loader is None else given_to(loader)
    if given is None:
        if loader is not None:
            raise without_weights(loader.f_locals["peft_model_id"])
        return
    if isinstance(given, Path) and given.name == PICKLE:
        given = read_pickle(given)
    needed = tried(model, config, adapter_name)
    if isinstance(given, Mapping):
        check_state(needed, {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): tensor for key, tensor in given.items()}, digest)
        return
    held = header(given)
    check_same(needed, held)
    with opened(given) as file:
        check_values(((key, file.get_tensor(key)) for key in held), digest)
