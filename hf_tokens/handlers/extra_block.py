"""One more block of a stream, for an objective: like the last but one, called as that was called, with weights of the objective's own."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from ..engine.block import BlockSurgery
from ..engine.call import BlockCall
from ..engine.hooks import SharedHook, lacks
from ..engine.trial import stripped
from ..errors import UnsupportedError, explain
from ..model.blocks import BlockFacts, borrows_keys
from ..model.streams import SIDE_BY_SIDE

LAST_BUT_ONE = "how the last block but one was called"


class ExtraBlock:
    """A copy of the last block but one of a stream, without weights of its own, kept by the block that an objective sits in."""

    def __init__(self, block: BlockSurgery):
        self.surgery = block.surgery
        stream = self.surgery.stream
        self.index = max(len(stream) - 2, 0)
        module, attention = stream.blocks[self.index], stream.attention(self.index)
        if stream.layout in SIDE_BY_SIDE or borrows_keys(attention):
            raise lacks(block, "states and keys that another block like it can make,", ", or a setting that needs no block")
        self.twin = stripped(module)
        check_copied(self.twin, stream.paths[self.index])
        for part in self.twin.modules():
            if "gradient_checkpointing" in vars(part):
                part.gradient_checkpointing = False  # its weights are gone by the backward pass

    def attach(self, block: BlockSurgery) -> list[Any]:
        """Note the calls of the block that it is like."""
        module = self.surgery.stream.blocks[self.index]
        return [module.register_forward_pre_hook(SharedHook(block, note_call), with_kwargs=True)]

    def run(self, states: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """The `block` signal: states (k b n d) behind such a block with each of k times its weights."""
        args, kwargs = self.surgery.call.held[LAST_BUT_ONE]
        stream = self.surgery.stream
        if self.twin.training != stream.blocks[self.index].training:
            self.twin.train(stream.blocks[self.index].training)
        call = BlockCall(stream, self.index, BlockFacts.of(stream.blocks[self.index]), args, kwargs)
        buffers = {name: buffer.to(states.device) for name, buffer in self.twin.named_buffers()}

        def one(hidden: Tensor, number: int) -> Tensor:
            own = {name: weight[number].to(hidden.dtype) for name, weight in weights.items()}
            return call.again(lambda *args, **kwargs: functional_call(self.twin, buffers | own, args, kwargs), hidden)

        return torch.stack([one(hidden, number) for number, hidden in enumerate(states)])


def check_copied(module: nn.Module, path: str) -> None:
    """Refuse a block with an adapter in it."""
    adapted = sorted({type(part).__name__ for part in module.modules() if isinstance(part, BaseTunerLayer)})
    if adapted:
        rule = "An objective's own blocks begin as copies of one that has no adapter"
        remedy = "Stack both in one adapter, the objective first; or choose a setting that needs no block."
        raise UnsupportedError(explain(rule, f"{', '.join(adapted)} at {path}", remedy))


def note_call(block: BlockSurgery, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """Hold how a block is called, as long as the call of the model lasts."""
    block.surgery.call.held[LAST_BUT_ONE] = args, kwargs
