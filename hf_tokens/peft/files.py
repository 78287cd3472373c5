"""The files of an adapter: read within bounds, and compared with what its methods need before anything of a model is changed."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import AdapterError, explain
from .config import PEFT_METHOD, HFTokensConfig
from .doors import CONFIG, PICKLE, calling_loader, given_to, without
from .reading import opened, read_pickle, whole
from .saving import PEFT_PREFIX, digest_of

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
BY_VALUE = ("ADAMSS", "BOFT", "FROD", "SHIRA", "UNILORA")  # PEFT methods whose beginning reads the numbers of tensors: no trial without any

FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "eye", "linspace", "normal")
SECONDS, STEPS, STEPS_A_TENSOR, MOST_NUMBERS = 20, 5000, 100, 1 << 24  # of a trial, and what it allocates where it needs numbers

Saved = tuple[list[int], torch.dtype | None]  # shape and kind of a saved tensor; None for a kind that no adapter has


# -- reading ---------------------------------------------------------------------------------------------------------
def header(weights: Path) -> dict[str, Saved]:
    """Shape and kind of each tensor of a file, of which no more is read."""
    kinds = FLOATS | INTEGERS
    with whole(f"{weights.name} must be a whole safetensors file", "Download or save it again."), opened(weights) as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
        return {key: (part.get_shape(), kinds.get(part.get_dtype())) for key, part in slices.items()}


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


def kinds_of(state: Mapping[str, Tensor]) -> dict[str, Saved]:
    """Shape and kind of each tensor of a state dict."""
    return {key: (list(tensor.shape), tensor.dtype) for key, tensor in state.items()}


def check_state(needed: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that is not exactly that of an adapter."""
    check_same(needed, kinds_of(state))
    check_values(state.items())


class Hollow(TorchFunctionMode):
    """Tensors are copied without their numbers."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in (Tensor.__deepcopy__, Tensor.clone):
            return torch.empty_like(args[0], device="meta")
        return func(*args, **(kwargs or {}))


class Bounds(TorchFunctionMode):
    """Refuses to go on with a trial that takes too long, makes too many tensors, or too large ones."""

    def __init__(self, model: nn.Module, held: Mapping[str, Saved]):
        super().__init__()
        sizes = [*(tensor.numel() for tensor in model.parameters()), *(math.prod(shape) for shape, _ in held.values())]
        self.end, self.left = time.perf_counter() + SECONDS, STEPS + STEPS_A_TENSOR * len(sizes)
        self.most = 4 * max(MOST_NUMBERS, *sizes)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.left -= 1
        if self.left < 0 or time.perf_counter() > self.end:
            self.refuse("more than that")
        if func.__name__ in FACTORIES and torch.get_default_device().type != "meta":
            numbers = (n for given in (*args, *(kwargs or {}).values()) for n in (given if isinstance(given, (tuple, list)) else (given,)))
            size = math.prod(n for n in numbers if isinstance(n, int) and n > 0)
            if size > self.most:
                self.refuse(f"one of {size} numbers")
        return func(*args, **(kwargs or {}))

    def refuse(self, got: str) -> None:
        """Say that it is too much."""
        rule = f"The methods in {CONFIG} make no more tensors, and no larger ones, than its file holds"
        raise AdapterError(explain(rule, got, "Save or download the adapter again."))


def tried(model: nn.Module, config: HFTokensConfig, adapter_name: str, held: Mapping[str, Saved]) -> dict[str, Tensor]:
    """The tensors that an adapter has in a model, by the names of its file, found in a copy of the model without any numbers."""
    config = config.for_trial()
    meta = not any(method["config"]["peft_type"] in BY_VALUE for method in config.methods if method["method"] == PEFT_METHOD)
    with Hollow() if meta else contextlib.nullcontext():
        trial = copy.deepcopy(model)
    configs = trial.peft_config if isinstance(trial, PeftModel) else vars(trial).get("peft_config", {})
    configs.pop(adapter_name, None)  # it is there already, and waits for its layers
    with in_silence(), torch.device("meta") if meta else contextlib.nullcontext(), Bounds(model, held):
        inject_adapter_in_model(config, trial, adapter_name)
    state = get_peft_model_state_dict(trial, adapter_name=adapter_name, save_embedding_layers=False)
    return {PEFT_PREFIX + key: tensor for key, tensor in state.items()}


@contextlib.contextmanager
def in_silence() -> Iterator[None]:
    """Without the warnings that what is tried here gives again when it is done."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


MISREAD = (ValueError, TypeError, KeyError, AttributeError)  # what a library says of a value in a config that it cannot read


def misread(config: HFTokensConfig, model: nn.Module, kinds: Any = Exception) -> contextlib.AbstractContextManager:
    """Errors about a config that is being loaded are the file's: they are said in our words."""
    rule, remedy = f"The methods in {CONFIG} must go into {type(model).__name__}", "Save or download the adapter again."
    loading = config.is_loaded or not config.in_trial and calling_loader() is not None
    return whole(rule, remedy, kinds) if loading else contextlib.nullcontext()


def check_file(config: HFTokensConfig, needed: Callable[[Mapping[str, Saved]], Mapping[str, Tensor]]) -> None:
    """Refuse a config that is being loaded with other tensors than its methods need in a model, which are found given those that came."""
    weights, digest = config.take_source()
    loader = None if config.in_trial else calling_loader()
    given = weights if loader is None else given_to(loader)
    if given is None:
        if loader is not None:
            raise without(loader.f_locals["peft_model_id"])
        return
    if isinstance(given, Path) and given.name == PICKLE:
        given = read_pickle(given)
    if isinstance(given, Mapping):
        given = {PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): tensor for key, tensor in given.items()}
        check_same(needed(held := kinds_of(given)), held)
        check_values(given.items(), digest)
        return
    held = header(given)
    check_same(needed(held), held)
    with opened(given) as file:
        check_values(((key, file.get_tensor(key)) for key in held), digest)
