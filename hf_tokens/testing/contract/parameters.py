"""The parameters of an adapter and of its base, how the former are moved from where they start, and a LoRA to put beside them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...model.streams import Stream

STIRS = (0.1, 1.0, -1.0, 2.0, 3.0)  # adapters start from zeros here and there, and routers open or closed; a test of what they do must not


@torch.no_grad()
def stir(model: nn.Module, size: float = STIRS[0]) -> nn.Module:
    """Move every adapter parameter away from where it starts."""
    generator = torch.Generator().manual_seed(max(1, int(abs(size))))
    for parameter in adapter_parameters(model).values():
        parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".hf_tokens." in name or "lora_" in name}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    ours = adapter_parameters(model)
    return {name: p for name, p in model.named_parameters() if name not in ours}


def lora(stream: Stream, **more: Any) -> LoraConfig:
    """A LoRA on every projection of the stream's first and last attention."""
    targets = {
        f"{stream.paths[i]}.{path_in(stream.blocks[i], stream.attention(i))}.{name}": module
        for i in outer(stream)
        for name, module in stream.attention(i).named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }
    transposed = any(isinstance(module, Conv1D) for module in targets.values())
    return LoraConfig(r=2, target_modules=sorted(targets), fan_in_fan_out=transposed, **more)


def outer(stream: Stream) -> set[int]:
    """The first block with an attention, and the last one."""
    attending = [i for i in range(len(stream)) if stream.attention(i) is not None]
    return {attending[0], attending[-1]}


def path_in(block: nn.Module, module: nn.Module) -> str:
    return next(name for name, other in block.named_modules() if other is module)
