"""What one forward costs: tokens that blocks computed, FLOPs, bytes of the KV cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import CacheLayerMixin

from ..engine.block import BlockSurgery
from ..engine.hooks import hooked
from ..engine.surgery import Listener, StreamSurgery
from ..kv.adopt import find_cache, self_attention_cache
from ..kv.layer import TokenCacheLayer, count_bytes
from ..model.anatomy import anatomy
from ..model.parts import OWN
from ..peft.publishing import note_cost


@dataclass(frozen=True)
class Cost:
    """The cost of one forward.

    Attributes:
        tokens: Tokens computed, summed over all blocks and the batch.
        flops: Floating point operations of matrix products and attention.
        kv_bytes: Bytes of keys and values in the cache that the model returned; 0 without one.
    """

    tokens: int
    flops: int
    kv_bytes: int


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call of torch's attention: (b h m e), (b k n e), (b k n v)."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def kv_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache."""
    own = self_attention_cache(cache)
    layers = [] if own is None else [layer for layer in own.layers if isinstance(layer, CacheLayerMixin)]
    states = [layer.tensors() if isinstance(layer, TokenCacheLayer) else (layer.keys, layer.values) for layer in layers]
    return count_bytes(t for of_layer in states for t in of_layer if t is not None)


def grouped_flops(a: torch.Size, b: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """FLOPs of a product of each row with its own expert's matrix, (t k) and (e k n), which torch does not count."""
    return 2 * math.prod(a) * b[-1]


# what torch does not count: the attention on a CPU, and products of each row with a matrix of its own
UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops, torch.ops.aten._grouped_mm: grouped_flops}


class TokenCounts(Listener):
    """The tokens that blocks computed: index of a block, or that and a part of it -> tokens, of one stream or of all."""

    def __init__(self, surgery: StreamSurgery | None = None):
        self.surgery, self.counts = surgery, {}

    def add(self, key: int | tuple[int, str], tokens: int) -> None:
        """So many more."""
        self.counts[key] = self.counts.get(key, 0) + tokens

    def computed(self, block: BlockSurgery, part: str | None, tokens: int) -> None:
        if self.surgery in (None, block.surgery):
            self.add(block.index if part is None else (block.index, part), tokens)

    @property
    def tokens(self) -> int:
        """Of all blocks; their parts are counted with them."""
        return sum(count for key, count in self.counts.items() if isinstance(key, int))


@contextlib.contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """No gradient is wanted, also not by a parameter that a module is given as an argument: the counter hangs a hook on each of these."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in wanting:
            parameter.requires_grad_(False)
        with torch.no_grad():
            yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def measure(model: nn.Module, **inputs: Any) -> Cost:
    """Run one forward and count what it cost. An adapter's card tells it, beside the base's where that is measured with the adapter off.

    Args:
        model: A model with or without a surgery.
        inputs: Keyword arguments of its forward.
    """
    counts, handles = TokenCounts(), []
    for stream in anatomy(model).streams:
        if isinstance(stream.blocks[0]._modules.get(OWN), BlockSurgery):
            continue
        for index, block in enumerate(stream.blocks):

            def count(module: nn.Module, args: tuple, kwargs: dict, index: int = index, stream: Any = stream) -> None:
                hidden = stream.bind(index, args, kwargs)
                counts.add(index, hidden.numel() // hidden.shape[-1])

            handles.append(block.register_forward_pre_hook(count, with_kwargs=True))
    surgeries = {id(block.surgery.model): block.surgery.model for block in model.modules() if isinstance(block, BlockSurgery)}
    with without_gradients(model), hooked(handles), contextlib.ExitStack() as stack:
        for surgery in surgeries.values():
            stack.enter_context(surgery.listening(counts))
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
            output = model(**inputs)
    cache = find_cache(output.values()) if isinstance(output, dict) else None
    cost = Cost(tokens=counts.tokens, flops=counter.get_total_flops(), kv_bytes=kv_bytes(cache))
    for surgery in surgeries.values():
        note_cost(surgery, inputs, asdict(cost))
    return cost
