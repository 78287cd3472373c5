"""What both interpreters of the KV benchmark need, with torch alone: passes of one text are computed once, and questions as a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ANSWER_TOKENS = 6
LONG, ROOM = 256, 5 << 30  # tokens of a pass that is remembered, and bytes of all of them


class Memory:
    """Projections and MLPs of a model answer a pass of a prompt from memory if its input is equal to the bit to one that they had.

    A compressor acts behind a prompt's own pass, so that all of them share what is computed before it; what differs is computed.
    """

    def __init__(self, model: Any):
        self.entries: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}
        self.bytes, self.acts = 0, True
        for layer in model.model.layers:
            part = layer.self_attn
            for module in (part.q_proj, part.k_proj, part.v_proj, part.o_proj, layer.mlp):
                module.forward = self.remembered(module, module.forward)

    def remembered(self, module: nn.Module, forward: Any) -> Any:
        """A module's forward that looks first."""

        def call(x: Tensor) -> Tensor:
            if not self.acts or x.shape[1] < LONG or len(x) > 1 or torch.is_grad_enabled():
                return forward(x)
            known = self.entries.setdefault(module, [])
            for given, made in known:
                if given is x or torch.equal(given, x):
                    return made
            made = forward(x)
            if self.bytes < ROOM:
                known.append((x, made))
                self.bytes += made.nbytes + x.nbytes
            return made

        return call

    def forget(self) -> None:
        """Another text comes."""
        self.entries.clear()
        self.bytes = 0


def batch(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids, padded in front, and their mask."""
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)
