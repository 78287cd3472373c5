"""All that a model is made of, to compare it before and behind a surgery."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that a surgery could leave behind: modules, attributes, hooks, configs, and the bits of every tensor."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            seen[f"{path}:{name}"] = trace(value)
        seen[f"{path}:type"] = type(module)
    for path, tensor in model.state_dict().items():
        seen[f"{path}:bits"] = tensor.clone()
    return seen


def trace(value: Any) -> Any:
    """A value that can be compared later."""
    if isinstance(value, dict):
        return {key: trace(item) for key, item in value.items()}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if type(value).__name__.endswith("Config"):
        return {key: trace(item) for key, item in vars(value).items()}
    return type(value)


def difference(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is there now and was not, or is gone, or changed."""
    same = lambda a, b: torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
    keys = sorted(before.keys() | after.keys())
    return [key for key in keys if key not in before or key not in after or not same(before[key], after[key])]


def unwrapped(model: Any) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model
