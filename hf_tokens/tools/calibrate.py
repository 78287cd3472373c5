"""Knobs measured on data, and methods that get another config."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ..engine.block import BlockSurgery
from ..engine.surgery import Listener
from ..errors import UnsupportedError, explain
from ..roles.base import Method
from ..roles.config import MethodConfig
from ..roles.registry import method_config
from .surgeries import blocks_in, denoiser, evaluated, instances, surgery_of


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
        The JSON form of every method that changed.

    Raises:
        UnsupportedError: There is no batch, or the adapter is not active.
    """
    surgery, changed = surgery_of(model), {}
    batches = list(batches)
    if not batches:
        raise UnsupportedError(explain("`calibrate` needs at least one batch", "none", "Pass the inputs of the model."))
    active = sorted({name for block in blocks_in(model) for name in block.active_adapters})
    if adapter_name not in active:
        rule = f"`calibrate` measures an adapter that acts, one of {active}"
        raise UnsupportedError(explain(rule, repr(adapter_name), "Switch to it with `set_adapter`."))
    more = {} if surgery.is_denoiser else {"use_cache": True}
    findings = Findings(adapter_name)
    with evaluated(denoiser(model) or model), surgery.listening(findings):
        for batch in batches:
            model(**{**batch, **more})
    for key, records in findings.records.items():
        method = next(m for m in surgery.methods() if m.key == key)
        changed[key] = type(method).calibrate(method.config, records)
    for key, config in changed.items():
        rewrite(model, key, config)
    return {key: config.to_dict() for key, config in changed.items()}


def set_method(model: Any, config: MethodConfig, adapter_name: str = "default") -> None:
    """Give a method that is in a model another config; its parameters stay.

    Args:
        model: A PeftModel with a surgery.
        config: The new config; the first method of this kind in the adapter takes it.
        adapter_name: The adapter.

    Raises:
        UnsupportedError: The adapter has no such method, or the config acts on other blocks or needs other parameters.
    """
    surgery_of(model)
    config = method_config(config)
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
    rewrite(model, key, config)


def shapes(method: Method) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a method saves."""
    return {name: tuple(value.shape) for name, value in method.state_dict().items()}


def rewrite(model: Any, key: str, config: MethodConfig) -> None:
    """Write a method's config into all its instances and into the adapter's config."""
    adapter_name, slot = key.rsplit(".", 1)
    methods = [method for method in instances(model, adapter_name) if method.key == key]
    before = methods[0].config
    try:
        give(model, methods, config)
    except UnsupportedError:
        give(model, methods, before)
        raise
    stack = (denoiser(model) or model).peft_config[adapter_name].methods
    stack[[i for i, m in enumerate(stack) if m["method"] != "peft"][int(slot)]] = config.to_dict()


def give(model: Any, methods: list[Method], config: MethodConfig) -> None:
    """Give methods another config, and the blocks the hooks that it needs."""
    for method in methods:
        method.reconfigure(config)
    for block in blocks_in(model):
        block.renew()
