"""A transformers cache in whose layers ours stand."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from transformers import Cache, DynamicCache, EncoderDecoderCache, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..errors import UnsupportedError, explain
from .layer import TokenCacheLayer


@contextlib.contextmanager
def place(cache: Cache | None, slot: int | None, layer: TokenCacheLayer | None) -> Iterator[None]:
    """Put another layer into a cache for a while; nothing is done without one."""
    if layer is None:
        yield
        return
    own = cache.layers[slot]
    cache.layers[slot] = layer
    try:
        yield
    finally:
        cache.layers[slot] = own


def self_attention_cache(cache: object) -> Cache | None:
    """The part of a model's cache that holds its own tokens."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.self_attention_cache
    return cache if isinstance(cache, Cache) else None


def refuse(cls: type) -> UnsupportedError:
    """The error for a class of cache, or of its layers, whose tokens we cannot keep books of."""
    rule = "A surgery that changes the number of tokens needs a dynamic cache"
    remedy = "Leave out `cache_implementation`, or pass a `DynamicCache(config=model.config)`."
    return UnsupportedError(explain(rule, f"a cache of {cls.__name__}", remedy))


PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
STATELESS = (cache_utils.DummyLayer,)


def adopt(cache: Cache, last: int) -> bool:
    """Put our layers into a transformers cache, in place, up to layer `last`; stored states move over.

    Returns:
        Whether the books of the cache can be kept. If not, a sequence may be run once with it, and not be continued.

    Raises:
        UnsupportedError: The cache is static, or it holds states of layers that we cannot take over.
    """
    others = [layer for layer in cache.layers if not isinstance(layer, (TokenCacheLayer, *STATELESS)) and type(layer) not in PLAIN_LAYERS]
    attending = [layer for layer in others if isinstance(layer, CacheLayerMixin)]
    if any(isinstance(layer, StaticLayer) or layer.get_seq_length() for layer in attending):
        raise refuse(type(attending[0]))
    if type(cache) is not DynamicCache and cache.get_seq_length():
        raise refuse(type(cache))
    if attending or type(cache) is not DynamicCache:
        return False
    for index, layer in enumerate(cache.layers):
        if type(layer) not in PLAIN_LAYERS:
            continue
        window = layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None
        if window is not None and layer.get_seq_length() >= window:
            rule, got = "A cache can be taken over before its window is full", f"{layer.get_seq_length()} tokens"
            raise UnsupportedError(explain(rule, got, "Start a new cache."))
        taken_over = TokenCacheLayer(window)
        if window is not None and layer.record_past:
            taken_over.activate_past_recording()
        if layer.get_seq_length():
            taken_over.update(layer.keys, layer.values)
        cache.layers[index] = taken_over
    while len(cache.layers) <= last:
        cache.layers.append(TokenCacheLayer())
    return True


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The cache of a model's own tokens among the arguments of a block."""
    return next((cache for value in values if (cache := self_attention_cache(value)) is not None), None)
