"""A `generate` whose blocks keep the entries of their cache that score highest, in torch and Transformers alone.

`hf_tokens.export(model, folder, form="custom-generate")` writes it, with the code of a method in the place of the one at its end.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

STEP = 128  # queries whose scores are held at a time
RUNNING: ContextVar[CompressedCache] = ContextVar("the cache of the generation that runs")
UNKNOWN = ("position_bias", "s_aux", "softcap")  # of an attention call: what the scores would have to know


class Entries(DynamicLayer):
    """What a block stores: keys and values, and where in the sequence each entry came from.

    Attributes:
        origins: Place of each entry, (b n), or (b k n) once heads keep others.
        there: Entries that count, of the same shape; the others fill rows up.
        received: Attention that each entry got so far, (b k n), where the method asks for it.
        seen: Tokens that came.
        reads: Attention calls that read them.
    """

    is_croppable = False

    def __init__(self, compressor: Any, index: int):
        super().__init__()
        self.compressor, self.index, self.seen, self.reads = compressor, index, 0, 0
        self.origins = self.there = self.received = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        m = key_states.shape[2]
        if self.seen:
            self.check_read()
        if m > 1 and self.seen:
            raise ValueError("A compressed prompt comes in one pass, got more of it. Leave out `prefill_chunk_size` and assistants.")
        lead = key_states.shape[:1] if self.origins is None else self.origins.shape[:-1]
        new = torch.arange(self.seen, self.seen + m, device=key_states.device).expand(*lead, m)
        self.origins = new if self.origins is None else torch.cat([self.origins, new], dim=-1)
        self.there = torch.ones_like(self.origins, dtype=torch.bool) if self.there is None else grown(self.there, m, True)
        self.received = None if self.received is None else grown(self.received, m, 0)
        self.seen += m
        return super().update(key_states, value_states)

    def check_read(self) -> None:
        """Refuse a model whose attention does not ask what is registered."""
        if not self.reads:
            raise ValueError("A compressor needs attention of Transformers' interface, got another one. Choose another model.")

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        for name in ("keys", "values", "origins", "there", "received"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[indices.to(value.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(len(self.keys)).repeat_interleave(repeats))

    def crop(self, *args: Any) -> None:
        raise ValueError(
            "A compressed cache takes no token back, got a call of `crop`. Leave out assistants and `prompt_lookup_num_tokens`."
        )

    def hides(self, mask: Tensor | None) -> Tensor | None:
        """The mask (b 1 m seen) of all that came, as one of the entries, (b 1|k m n); None where none is hidden."""
        there, origins = (x[:, None, None] if x.dim() == 2 else x[:, :, None] for x in (self.there, self.origins))
        if mask is None:
            return None if bool(self.there.all()) else there
        if origins.shape[-1] == self.seen:  # nothing is gone yet
            return mask
        wide = mask.expand(len(origins), origins.shape[1], -1, -1)
        return wide.gather(3, origins.expand(-1, -1, mask.shape[2], -1)) & there

    def keep(self, real: Tensor, scores: Any, prefill: bool) -> None:
        """Score the entries, and keep of each row or head the highest, as many as its budget: of two equal ones the earlier."""
        method = self.compressor
        real = torch.logical_and(*both(self.there, real))
        lengths = real.sum(dim=-1)
        begin = torch.where(scores.real, torch.arange(self.seen, device=real.device), self.seen).amin(dim=1)
        tokens = scores.real.sum(dim=-1).view(-1, *[1] * (lengths.dim() - 1)).expand_as(lengths)
        pairs = zip(lengths.flatten().tolist(), tokens.flatten().tolist(), strict=True)
        budgets = torch.tensor([method.budget(*pair) for pair in pairs], device=real.device).view_as(lengths).minimum(lengths)
        over = int((lengths - budgets).amax()) > (0 if prefill else method.slack)
        if not over and (not prefill or int(lengths.amax()) == self.origins.shape[-1]):
            return
        count = real.cumsum(dim=-1)
        known = {"scores": scores, "keys": self.keys, "values": self.values, "received": self.received, "prefill": prefill, "kind": "text"}
        known |= {"mask": real, "positions": self.origins - begin.view(-1, *[1] * (real.dim() - 1)), "newer": count[..., -1:] - count}
        known |= {"budget": budgets if budgets.dim() == 2 else budgets[:, None], "layer": self.index, "layers": method.dims.layers}
        score = method.score(**{name: known[name] for name in method.signals})
        if score.dim() == 3 or real.dim() == 3:
            score, real = (x if x.dim() == 3 else x[:, None].expand(-1, self.keys.shape[1], -1) for x in (score, real))
            budgets = budgets if budgets.dim() == 2 else budgets[:, None].expand(score.shape[:2])
        order = score.masked_fill(~real, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(order.shape[-1], device=order.device) < budgets[..., None]
        stays = torch.zeros_like(real).scatter(-1, order, first) & real
        self.take(stays.long().argsort(dim=-1, descending=True, stable=True)[..., : max(1, int(budgets.amax()))], stays)

    def take(self, index: Tensor, stays: Tensor) -> None:
        """Leave the entries of an index, (b r) or (b k r), of which those that stay count."""
        wide = index if index.dim() == 3 else index[:, None].expand(-1, self.keys.shape[1], -1)
        self.keys, self.values = (x.gather(2, wide[..., None].expand(-1, -1, -1, x.shape[3])) for x in (self.keys, self.values))
        self.received = None if self.received is None else self.received.gather(2, wide)
        origins, index = both(self.origins, index)
        self.origins, self.there = origins.gather(-1, index), stays.gather(-1, index)


class CompressedCache(DynamicCache):
    """A cache whose blocks keep what a method says."""

    def __init__(self, config: Any, compressor: type, knobs: SimpleNamespace):
        super().__init__(config=config)
        if any(type(layer) is not DynamicLayer for layer in self.layers):
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(f"A compressor needs blocks that attend to all that came, got {kinds}. Choose another model.")
        count = len(self.layers)
        chosen = {i % count for i in range(count) if knobs.layers is None} | {i % count for i in knobs.layers or ()}
        dims = [SimpleNamespace(layer=i, layers=count, kind="text", kv_heads=None) for i in range(count)]
        compressor.check(knobs, "text", count, tuple(sorted(chosen)))
        self.layers = [Entries(compressor(knobs, dims[i]), i) if i in chosen else layer for i, layer in enumerate(self.layers)]
        self.layer_class_to_replicate = self.real = None


class GivenScores:
    """The attention that the queries of a pass give to the entries of a block."""

    def __init__(self, query: Tensor, layer: Entries, mask: Tensor | None, scaling: float, real: Tensor):
        self.query, self.layer, self.mask, self.scaling, self.real = query, layer, mask, scaling, real

    def given(self, query: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        """What queries (b h r e) in these rows of the pass (b r) give to each entry, weighed (b r), mean of each key head's, (b k n)."""
        b, h, r, e = query.shape
        k, n = self.layer.keys.shape[1:3]
        wide = torch.promote_types(query.dtype, torch.float32)
        s = torch.matmul((query.to(wide) * self.scaling).reshape(b, k, h // k * r, e), self.layer.keys.to(wide).mT).view(b, k, h // k, r, n)
        if self.mask is not None:
            at = rows[:, None, :, None].expand(-1, self.mask.shape[1], -1, n)
            s = s.masked_fill(~self.mask.expand(b, -1, -1, -1).gather(2, at)[:, :, None], -torch.inf)
        elif self.query.shape[2] > 1:
            s = s.masked_fill(torch.arange(n, device=s.device) > rows[:, None, None, :, None], -torch.inf)
        seen = (s.amax(dim=-1, keepdim=True) > -torch.inf).to(wide)
        p = torch.softmax(s, dim=-1).nan_to_num(0.0) * seen * weights[:, None, None, :, None].to(wide)
        return p.sum(dim=3).mean(dim=2)

    def of_last(self, window: int) -> Tensor:
        """What each entry receives from each of the last real queries, on average, (b k n)."""
        m = self.query.shape[2]
        real = self.real[:, -m:]
        last = real & (real.flip(1).cumsum(dim=1).flip(1) <= window)
        rows = last.long().argsort(dim=1, descending=True, stable=True)[:, : min(window, m)]
        weights = last.gather(1, rows).to(self.query.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        at = rows[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        return self.given(self.query.gather(2, at), rows, weights)

    def of_all(self) -> Tensor:
        """What each entry receives from all real queries, (b k n)."""
        m, total = self.query.shape[2], 0
        rows, real = torch.arange(m, device=self.query.device).expand(len(self.query), m), self.real[:, -m:]
        for part in rows[0].split(STEP):
            part = slice(int(part[0]), int(part[-1]) + 1)
            total = total + self.given(self.query[:, :, part], rows[:, part], real[:, part])
        return total


def grown(x: Tensor, m: int, value: Any) -> Tensor:
    """Something of each entry, with a value for m new ones."""
    return torch.nn.functional.pad(x, (0, m), value=value)


def both(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Something of each entry, (b n) or (b k n), twice alike."""
    if x.dim() == y.dim():
        return x, y
    x, y = (t if t.dim() == 3 else t[:, None] for t in (x, y))
    return x.expand(-1, y.shape[1], -1) if x.shape[1] == 1 else x, y.expand(-1, x.shape[1], -1) if y.shape[1] == 1 else y


def compressed_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of all that came, noting which of it is padding."""
    RUNNING.get().real = attention_mask
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def compressed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention of a block over the entries that it has, behind which the method says which of them stay."""
    cache = RUNNING.get()
    layer = cache.layers[module.layer_idx]
    if not isinstance(layer, Entries):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    odd = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if odd or key is not layer.keys:
        got = f"{odd[0]}" if odd else "other keys than the cache returned"
        raise ValueError(f"A compressor needs plain attention over the keys of its cache, got {got}. Choose another model.")
    b, h, m, _ = query.shape
    mask = layer.hides(attention_mask)
    shown = mask if mask is None or mask.shape[1] == 1 else mask.repeat_interleave(h // mask.shape[1], dim=1)
    out = sdpa_attention_forward(module, query, key, value, shown, scaling=scaling, **kwargs)
    layer.reads += 1
    method = layer.compressor
    real = torch.ones(b, layer.seen, dtype=torch.bool, device=key.device) if cache.real is None else cache.real[:, : layer.seen].bool()
    scores = GivenScores(query, layer, mask, query.shape[-1] ** -0.5 if scaling is None else scaling, real)
    if "received" in method.signals:
        layer.received = scores.of_all() if layer.received is None else layer.received + scores.of_all()
    if m > 1 or method.decodes or layer.seen == 1:
        method.dims.kv_heads = key.shape[1]
        own, origins = both(real, layer.origins)
        layer.keep(own.gather(-1, origins), scores, m > 1 or layer.seen == 1)
    return out


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """`model.generate` with a cache that a method compresses; its knobs are arguments too.

    Raises:
        ValueError: A knob is out of its bounds, or the model or the arguments do not go with a compressed cache.
    """
    knobs = {name: kwargs.pop(name, value) for name, value in KNOBS.items()}
    for name, bounds in LIMITS.items():
        for bound, holds in (("ge", float.__ge__), ("gt", float.__gt__), ("le", float.__le__), ("lt", float.__lt__)):
            if bound in bounds and isinstance(knobs[name], (int, float)) and not holds(float(knobs[name]), float(bounds[bound])):
                raise ValueError(f"`{name}` is bounded by {bounds}, got {knobs[name]}. Choose another value.")
    argument = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    given = kwargs.get("cache"), kwargs.get("past_key_values"), kwargs.get("cache_implementation")
    if any(value is not None for value in given) or kwargs.get("use_cache") is False:
        raise ValueError("A compressor brings a cache of its own, got arguments for another one. Leave them out.")
    if model.config.is_encoder_decoder:
        raise ValueError(f"A compressor needs a decoder alone, got {type(model).__name__}. Choose another model.")
    config = model.config.get_text_config()
    cache = CompressedCache(config, Compressor, type(CONFIG_NAME, (SimpleNamespace,), {})(**knobs))
    AttentionInterface.register(INTERFACE, compressed_attention)
    AttentionMaskInterface.register(INTERFACE, compressed_mask)
    before, running = config._attn_implementation, RUNNING.set(cache)
    try:
        config._attn_implementation = INTERFACE
        out = model.generate(*args, **{argument: cache}, **kwargs)
    finally:
        config._attn_implementation = before
        RUNNING.reset(running)
    for layer in cache.layers:
        if isinstance(layer, Entries):
            layer.check_read()
    return out


class PlainCompressor:
    """What a method has unless it says otherwise."""

    decodes, slack = False, 0

    def __init__(self, config: Any, dims: Any):
        self.config, self.dims = config, dims

    @classmethod
    def check(cls, *args: Any) -> None:
        """Refuse knobs that do not go together."""


# -- the method: here one that keeps all -------------------------------------------------------------------------------
INTERFACE, CONFIG_NAME, KNOBS, LIMITS = "compressed", "Config", {"layers": None}, {}


class Compressor(PlainCompressor):
    signals = ("newer",)

    def score(self, newer: Tensor) -> Tensor:
        return -newer

    def budget(self, length: int, seen: int) -> int:
        return length
