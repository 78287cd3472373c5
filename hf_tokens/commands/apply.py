"""What `hf-tokens apply` does: where methods would go, by the config alone, or the adapter that they make, saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

import hf_tokens

from ..errors import ConfigError, explain
from ..roles.registry import MethodInfo
from ..tools.surgeries import models_in
from .report import size_of
from .sources import Planned, Source, base_of, need_methods, plans, with_methods


def ranges(layers: tuple[int, ...]) -> str:
    """Numbers of blocks in few words, such as `0-3, 7`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def describe(info: MethodInfo) -> dict[str, Any]:
    """What a method does and needs, of its card."""
    return {"method": info.name, "role": info.role, "does": info.claim, "needs": info.needs}


def rows_of(planned: list[Planned]) -> list[dict[str, Any]]:
    """Where each method goes, a row for each stream."""
    rows = []
    for part, placement in [(one.part, placement) for one in planned for placement in one.placements]:
        stream = placement.stream
        where = {"part": part, "stream": stream.name, "kind": stream.kind, "layers": [*placement.layers], "blocks": len(stream)}
        rows.append({**describe(placement.info), **where, "config": placement.config.to_dict()})
    return rows


def check_applied(source: Source) -> None:
    """Refuse what has methods in it already, and what has none to put in."""
    need_methods(source)
    if source.adapter is not None:
        remedy = "`hf-tokens pull` shows what an adapter holds."
        raise ConfigError(explain("`apply` puts methods into a base model", f"{source.adapter}, an adapter", remedy))


def where_they_go(source: Source) -> list[dict[str, Any]]:
    """Where each method of a source goes; no weight is read.

    Raises:
        UnsupportedError: They do not fit the model, or not together.
    """
    check_applied(source)
    return rows_of(plans(source))


def save_methods(source: Source, output: Path) -> dict[str, Any]:
    """Put the methods into the model, and save their adapter.

    Returns:
        What is to train of it, the folder, and its size in bytes.
    """
    model = with_methods(source, base_of(source.model))
    hf_tokens.save_adapter(model, output)
    inner = [model] if isinstance(model, nn.Module) else models_in(model).values()
    trained = sum(p.numel() for one in inner for p in one.parameters() if p.requires_grad)
    return {"folder": str(output), "trainable": trained, "bytes": size_of(output)}
