"""Parameters of which each process holds a part: libraries gather those of a block while it runs, and a method reads them elsewhere too."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """The whole of each parameter of a module of which this process holds a part, by name.

    A gradient goes back to the parts as that of a block's parameter does: the mean over the processes.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return {}
    from torch.distributed.tensor import DTensor

    return {name: in_one_piece(p) for name, p in module.named_parameters() if isinstance(p, DTensor)}


def in_one_piece(part: Tensor) -> Tensor:
    """A parameter in one piece."""
    from torch.distributed.tensor import Partial

    processes = part.device_mesh.size()
    out = part.full_tensor(grad_placements=[Partial()] * part.device_mesh.ndim)
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient / processes)
    return out
