"""The surgery in a model or a pipeline."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..engine.block import BlockSurgery
from ..engine.model import ModelSurgery
from ..errors import UnsupportedError, explain
from ..model.pipelines import denoising
from ..roles.base import Method


def denoiser(pipeline: Any) -> nn.Module | None:
    """The denoiser of a diffusers pipeline; None for a plain model."""
    if isinstance(pipeline, nn.Module):
        return None
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        rule = "A surgery needs a torch module or a diffusers pipeline"
        raise UnsupportedError(explain(rule, type(pipeline).__name__, "Pass the model that holds the blocks."))
    inner = denoising(type(pipeline).__name__, components)
    if inner is None:
        raise UnsupportedError(explain("A pipeline needs a `transformer` or a `unet`", sorted(components), "Pass the denoiser itself."))
    return inner


def blocks_in(model: Any) -> list[BlockSurgery]:
    """The surgery of every block in a model or pipeline."""
    module = denoiser(model) or model
    return [m for m in module.modules() if isinstance(m, BlockSurgery)]


def surgery_of(model: Any) -> ModelSurgery:
    """The surgery of a model; refused where there is none."""
    blocks = blocks_in(model)
    if not blocks:
        raise UnsupportedError(explain("This needs a model with a surgery", type(model).__name__, "Call get_token_model first."))
    return blocks[0].surgery.model


def instances(model: Any, adapter_name: str) -> list[Method]:
    """Every method of an adapter, in every block."""
    stacks = [block.hf_tokens_methods for block in blocks_in(model)]
    return [method for stack in stacks if adapter_name in stack for method in stack[adapter_name].values()]


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """A model in eval mode for a moment."""
    training = [module for module in model.modules() if module.training]  # a PeftModel and its base need not agree
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
