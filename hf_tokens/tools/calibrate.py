"""Knobs measured on data, and methods that get another config."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..engine.block import BlockSurgery
from ..engine.surgery import Listener
from ..errors import UnsupportedError, explain
from ..roles.base import Method
from ..roles.config import MethodConfig
from ..roles.registry import method_config
from .progress import track
from .surgeries import blocks_in, evaluated, instances, models_in, surgeries_of
from .undo import AllOrNothing


class Findings(Listener):
    """What the methods of an adapter return when they are examined: key -> place of the block -> values."""

    examines = True

    def __init__(self, adapter_name: str):
        self.adapter_name = adapter_name
        self.records: dict[str, dict[int, list]] = {}

    def examined(self, block: BlockSurgery, method: Method, finding: Any) -> None:
        if method.key.rpartition(".")[0] == self.adapter_name:
            self.records.setdefault(method.key, {}).setdefault(method.dims.place, []).append(finding)


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[dict[str, Any]], adapter_name: str = "default") -> dict[str, Any]:
    """Measure on data the knobs that a method has for that, and write them into its config.

    Args:
        model: A model or pipeline with a surgery.
        batches: Keyword arguments of its call, one dict a batch; of a denoiser alone, one dict a step.
        adapter_name: The adapter to calibrate.

    Returns:
        The JSON form of every method that changed, by its key; of two denoisers, behind the denoiser's name.

    Raises:
        UnsupportedError: There is no batch, or the adapter is not active. After this or an interrupt the model is as it was.
    """
    surgeries, models, changed = surgeries_of(model), models_in(model), {}
    batches = list(batches)
    if not batches:
        raise UnsupportedError(explain("`calibrate` needs at least one batch", "none", "Pass the inputs of the model."))
    active = sorted({name for block in blocks_in(model) for name in block.active_adapters})
    if adapter_name not in active:
        rule = f"`calibrate` measures an adapter that acts, one of {active}"
        raise UnsupportedError(explain(rule, repr(adapter_name), "Switch to it with `set_adapter`."))
    more = {} if all(surgery.is_denoiser for surgery in surgeries.values()) else {"use_cache": True}
    findings = {name: Findings(adapter_name) for name in surgeries}
    with AllOrNothing(models.values()):
        with contextlib.ExitStack() as around:
            for name, surgery in surgeries.items():
                around.enter_context(evaluated(models[name]))
                around.enter_context(surgery.listening(findings[name]))
            for batch in track(batches, "calibrate"):
                model(**{**batch, **more})
        for name, found in findings.items():
            for key, records in found.records.items():
                method = next(m for m in surgeries[name].methods() if m.key == key)
                changed[name, key] = type(method).calibrate(method.config, records)
        for (name, key), config in changed.items():
            rewrite(models[name], key, config)
    return {f"{name}.{key}" if len(models) > 1 else key: config.to_dict() for (name, key), config in changed.items()}


def set_method(model: Any, config: MethodConfig, adapter_name: str = "default") -> None:
    """Give a method that is in a model another config; its parameters stay.

    Args:
        model: A PeftModel with a surgery.
        config: The new config; the first method of this kind in the adapter takes it.
        adapter_name: The adapter.

    Raises:
        UnsupportedError: The adapter has no such method, or the config acts on other blocks or needs other parameters.
    """
    surgeries, models, config = surgeries_of(model), models_in(model), method_config(config)
    keys = {name: check_config(models[name], config, adapter_name) for name in surgeries}
    with AllOrNothing(models.values()):
        for name, key in keys.items():
            rewrite(models[name], key, config)


def check_config(model: nn.Module, config: MethodConfig, adapter_name: str) -> str:
    """The key of the method in a model that can take a config; refused where there is none."""
    alike = [method for method in instances(model, adapter_name) if type(method.config) is type(config)]
    if not alike:
        rule = f"Adapter {adapter_name!r} must have the method {config.method!r}"
        raise UnsupportedError(explain(rule, "one without it", "Add it with get_token_model."))
    old, key = alike[0].config, alike[0].key
    if (config.layers, config.stream) != (old.layers, old.stream):
        raise UnsupportedError(explain("A method stays in its blocks", f"layers={config.layers}", "Take the surgery out and start again."))
    methods = [method for method in alike if method.key == key]
    for method in methods:
        method.check(config, method.dims.kind, method.dims.layers, tuple(m.dims.layer for m in methods))
        with torch.random.fork_rng(devices=[]):
            needed = shapes(type(method)(config, method.dims))
        if missing := dict(sorted(needed.items() - shapes(method).items())):
            got = f"a config that needs {missing} in block {method.dims.layer}"
            raise UnsupportedError(explain("A method keeps its parameters", got, "Take the surgery out and start again."))
    return key


def shapes(method: Method) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a method saves."""
    return {name: tuple(value.shape) for name, value in method.state_dict().items()}


def rewrite(model: nn.Module, key: str, config: MethodConfig) -> None:
    """Write a method's config into all its instances and into the adapter's config."""
    adapter_name, slot = key.rsplit(".", 1)
    methods = [method for method in instances(model, adapter_name) if method.key == key]
    for method in methods:
        method.reconfigure(config)
    for block in blocks_in(model):
        block.renew()
    stack = model.peft_config[adapter_name].methods
    stack[[i for i, m in enumerate(stack) if m["method"] != "peft"][int(slot)]] = config.to_dict()
