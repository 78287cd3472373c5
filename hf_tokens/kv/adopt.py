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
    remedy = "Leave out `cache_implementation`, or pass a `DynamicCache(config=model.config)`, or `use_cache=False`."
    return UnsupportedError(explain(rule, f"a cache of {cls.__name__}", remedy))


PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
STATELESS = (cache_utils.DummyLayer,)


def told(layers: list[Any], last: int, config: Any) -> tuple[list[Any], list[int | None]]:
    """The layers of a cache up to `last`, and their windows, as the model's config has them: what a `DynamicCache` is made without.

    Raises:
        UnsupportedError: A layer holds states, or has a window, that the config does not tell of.
    """
    if len(layers) > last and not any(type(layer) in PLAIN_LAYERS for layer in layers):
        return layers, [None] * len(layers)
    known = [DynamicLayer() for _ in range(max(last + 1, len(layers)))] if config is None else DynamicCache(config=config).layers
    slots = [*layers, *known[len(layers) :]]
    for i, (layer, other) in enumerate(zip(slots, known, strict=False)):
        if type(layer) not in PLAIN_LAYERS or config is None:
            continue
        plain = type(other) in PLAIN_LAYERS
        if not plain and type(layer) is DynamicLayer and not layer.is_initialized:
            slots[i] = other
        elif not plain or window_of(layer) not in (None, window_of(other)):
            raise other_layers(layer, other, i)
    if len(known) < len(slots) or len(slots) <= last:
        raise other_layers(slots[-1] if slots else None, None, last)
    return slots, [window_of(layer if config is None else other) for layer, other in zip(slots, known, strict=True)]


def window_of(layer: Any) -> int | None:
    """Tokens that a layer of transformers' lets a query see; None for all."""
    return layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None


def other_layers(layer: Any, other: Any, place: int) -> UnsupportedError:
    """The error for a layer of a cache that is not as the model's config has it."""
    name = lambda x: "none" if x is None else f"{type(x).__name__}{'' if window_of(x) is None else f' of {window_of(x)} tokens'}"
    rule, got = "The layers of a cache must be those of the model's config", f"{name(layer)} in place of {name(other)} at {place}"
    return UnsupportedError(explain(rule, got, "Pass a `DynamicCache(config=model.config)`."))


def adopt(cache: Cache, last: int, config: Any) -> bool:
    """Put our layers into a transformers cache, in place, up to layer `last`; stored states move over.

    Args:
        cache: The cache.
        last: Slot of the last block.
        config: Of the stream, which tells what kind of layer each slot has, and its window; None where there is none.

    Returns:
        Whether the books of the cache can be kept. If not, a sequence may be run once with it, and not be continued.

    Raises:
        UnsupportedError: The cache is static, or it holds states of layers that we cannot take over.
    """
    layers, windows = told(cache.layers, last, config) if type(cache) is DynamicCache else (cache.layers, [])
    others = [layer for layer in layers if not isinstance(layer, (TokenCacheLayer, *STATELESS)) and type(layer) not in PLAIN_LAYERS]
    attending = [layer for layer in others if isinstance(layer, CacheLayerMixin)]
    if any(isinstance(layer, StaticLayer) or layer.get_seq_length() for layer in attending):
        raise refuse(type(attending[0]))
    if type(cache) is not DynamicCache and cache.get_seq_length():
        raise refuse(type(cache))
    if attending or type(cache) is not DynamicCache:
        return False
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer and layer.get_seq_length() >= layer.sliding_window:
            rule, got = "A cache can be taken over before its window is full", f"{layer.get_seq_length()} tokens"
            raise UnsupportedError(explain(rule, got, "Start a new cache."))
    pairs = zip(layers, windows, strict=True)
    cache.layers[:] = [take_over(layer, window) if type(layer) in PLAIN_LAYERS else layer for layer, window in pairs]
    return True


def take_over(layer: DynamicLayer, window: int | None) -> TokenCacheLayer:
    """Our layer with the states of one of transformers'."""
    ours = TokenCacheLayer(window)
    if type(layer) is DynamicSlidingWindowLayer and layer.record_past:
        ours.activate_past_recording()
    if layer.get_seq_length():
        ours.update(layer.keys, layer.values)
    return ours


def find_cache(values: Iterable[Any]) -> Cache | None:
    """The cache of a model's own tokens among the arguments of a block."""
    return next((cache for value in values if (cache := self_attention_cache(value)) is not None), None)
