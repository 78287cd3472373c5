"""Where each signal comes from. A verb names those that it gets; nothing else is computed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..kv.layer import TokenCacheLayer
from ..model.pictures import grid, grids_in_text, picture_places
from ..roles.base import Method
from ..roles.signals import HOOKED, OF_A_QUERY, PICTURED, TAPPED
from ..tokens.altered import altered
from ..tokens.entries import alike, cells_of, pick_entries, stretch
from ..tokens.ledger import TokenLedger
from ..tokens.token_map import in_float32, indices, take
from .handler import handler_of
from .rotation import Turning
from .run import Site


def real_entries(site: Site) -> Tensor:
    """Cached entries that are real, (b n) or (b k n) bool."""
    layer, run = site.layer, site.run
    flags = torch.ones_like(layer.origins, dtype=torch.bool) if layer.filled is None else layer.filled
    lead = (-1, *[1] * (layer.origins.dim() - 2))
    if run.real is not None:
        flags = torch.logical_and(*alike(flags, pick_entries(run.real, layer.origins)))
    elif run.first is not None:
        flags = flags & (layer.origins >= run.first.view(*lead, 1))
    if run.real is None and run.padding is not None:
        place = layer.origins - run.ledger.start
        real = run.padding.view(lead[0], *lead[1:], run.ledger.n).expand(*place.shape[:-1], -1)
        flags = flags & ((place < 0) | real.gather(-1, place.clamp(min=0)))
    if site.alike is not None:
        flags = cells(layer, flags) & (site.alike >= 0)
    if layer.window is not None:  # what no later query sees is freed late, and counts no more
        seen = layer.origins > layer.seen - layer.window
        flags = flags & (seen if seen.dim() == flags.dim() else seen[:, None])
    return flags


def all_real(site: Site) -> bool:
    """Whether the books alone tell that every cached entry is real."""
    layer, run = site.layer, site.run
    return all(reason is None for reason in (layer.filled, layer.window, run.real, run.first, run.padding, site.alike))


def cells(layer: TokenCacheLayer, x: Tensor) -> Tensor:
    """Something of each entry, (b n) or (b k n), as (b k n)."""
    return cells_of(x, layer.heads)


def counterparts(site: Site, other: TokenCacheLayer) -> Tensor:
    """For each entry of a layer the one of the same token in another layer, -1 where there is none, (b k n)."""

    def places_of(at: Site) -> Tensor:
        real = real_entries(at) if at.layer.fresh is None else real_entries(at) & ~at.layer.fresh
        return torch.where(cells(at.layer, real), cells(at.layer, at.layer.origins), -1)

    places = places_of(site)
    known, order = places_of(altered(site, layer=other)).sort(dim=-1, stable=True)
    at = torch.searchsorted(known, places.contiguous()).clamp(max=known.shape[-1] - 1)
    return torch.where((known.gather(-1, at) == places) & (places >= 0), order.gather(-1, at), -1)


def lower_states(site: Site, name: str) -> Tensor:
    """The `keys_below` and `values_below` signals."""
    states = site.below.keys if name == "keys" else site.below.values
    return states.gather(2, site.alike.clamp(min=0)[..., None].expand(-1, -1, -1, states.shape[3]))


def token_mask(site: Site) -> Tensor:
    """The `mask` signal."""
    return real_entries(site) if site.whole_cache else site.run.ledger.real(site.run.padding)


def token_positions(site: Site) -> Tensor:
    """The `positions` signal."""
    ledger = site.run.ledger
    return site.run.position(site.layer.origins if site.whole_cache else ledger.rows + ledger.start)


def fresh_tokens(site: Site) -> Tensor:
    """The `fresh` signal."""
    ledger, suffix = site.run.ledger, site.surgery.suffix
    fresh = ledger.flags(ledger.fresh, False)
    return fresh | (ledger.rows >= ledger.n - suffix) if suffix else fresh


def patch_grid(site: Site) -> tuple[int, int] | None:
    """The `grid` signal."""
    kind, picture = site.surgery.stream.kind, site.run.context.picture
    n = site.run.ledger.n - site.surgery.prefix - site.surgery.suffix
    if kind == "denoiser" or kind in ("vision", "video") and picture is not None:
        return grid(n, picture)
    return None if kind in ("vision", "video") else (1, n)


def modality_span(site: Site, name: str) -> Tensor:
    """A modality span of the tokens at this moment."""
    spans = site.run.context.visual
    ledger = site.run.ledger
    if spans is None:
        if not site.run.context.arguments:
            rule = "Which tokens are visual is read off the `input_ids` that the whole model is called with"
            remedy = "Call the model, with `output_hidden_states=True` for what is inside, or disable the adapter."
            raise UnsupportedError(explain(rule, f"a call of a part of it that holds {site.surgery.stream.paths[0]}", remedy))
        if ledger.start:
            return torch.zeros_like(ledger.rows, dtype=torch.bool)
        rule, remedy = "This method acts on visual tokens", "Give the model `input_ids` that hold them, or disable the adapter."
        raise UnsupportedError(explain(rule, "an input without any image or video token", remedy))
    spans = spans.to(ledger.rows.device)
    if spans.shape != (ledger.batch, ledger.n):
        rule, remedy = "The visual tokens of `input_ids` are those of the stream", "Choose another method, or disable the adapter."
        raise UnsupportedError(explain(rule, f"{tuple(spans.shape)} ids for a stream of {(ledger.batch, ledger.n)}", remedy))
    visual = spans.gather(1, ledger.rows)
    if name == "visual":
        return visual & ~ledger.flags(ledger.fresh, False)
    place = torch.arange(spans.shape[1], device=spans.device)
    last = torch.where(spans, place, -1).amax(dim=1, keepdim=True)
    behind = (ledger.rows > last) & (last >= 0)
    return behind & token_mask(site)


def picture_indices(site: Site) -> list[Tensor]:
    """The `pictures` signal."""
    if not bool(modality_span(site, "visual").any()):
        return []
    ledger, context, model = site.run.ledger, site.run.context, site.surgery.model
    placed, grids = grids_in_text(model.seen, model.base, context.arguments, context.visual)
    return picture_places(placed.to(ledger.rows.device), grids, ledger)


THERE, SINCE = f"{PICTURED}.there", f"{PICTURED}.since"


def remember_pictures(hidden: Tensor, visual: Tensor, ledger: TokenLedger, rows: dict[str, Tensor]) -> None:
    """Add the visual ones (b n) bool of the tokens that enter a stream (b n d) to those of the sequence, and where their pictures begin."""
    index = indices(visual)
    begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    since = (ledger.rows + ledger.start).masked_fill(~begins, -1).cummax(dim=1).values
    for name, value in ((PICTURED, hidden), (THERE, visual), (SINCE, since)):
        rows[name] = torch.cat([rows[name], take(value, index)], dim=1) if name in rows else take(value, index)


def pictured_tokens(site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """The `pictured` signal."""
    modality_span(site, "visual")
    rows, none = site.run.memory.rows, site.run.ledger.rows[:, :0]
    if PICTURED not in rows:
        return site.hidden[:, :0], none.bool(), none
    if rows[PICTURED].requires_grad and site.block.module.training and not torch.is_grad_enabled():  # it knows no tensor but its inputs
        rule = "Where a method remembers tokens, gradient checkpointing must be non-reentrant"
        raise UnsupportedError(explain(rule, "a reentrant one", "Use non-reentrant checkpointing."))
    first = site.run.first
    return rows[PICTURED], rows[THERE], rows[SINCE] if first is None else rows[SINCE] - first[:, None]


def step_output(site: Site, name: str) -> Tensor | None:
    """What the denoiser put out at the step before, for each of the tokens at this moment."""
    ledger = site.run.ledger
    output = getattr(site.run.context.steps_of_denoiser, name)(ledger.n)
    if output is not None and len(output) != ledger.batch:
        rule = f"The signal {name!r} has a row for each token of each sample"
        got = f"{len(output)} samples, of which {site.block.path} makes {ledger.batch}, as where frames are samples"
        raise UnsupportedError(explain(rule, got, "Choose other layers or another model."))
    return None if output is None else take(output, ledger.rows)


def noted(site: Site, name: str) -> Tensor:
    """What a part of the block got or returned, for each token of the stream; refused where it has no row for each token of each sample."""
    x, batch = site.block.signals.captured[name], site.local.batch
    if x.dim() == 2 and len(x) == batch * site.local.m:  # the samples one behind the other
        x = x.unflatten(0, (batch, -1))
    if x.dim() != 3 or len(x) != batch:
        rule = f"The signal {name!r} has a row for each token of each sample"
        got = f"{tuple(x.shape)} for {batch} x {site.local.m} tokens at {site.block.path}"
        raise UnsupportedError(explain(rule, got, "Choose other layers or another model."))
    return site.from_local(x, 1)


def attended_residual(site: Site) -> Tensor:
    """The `attended` signal: a token that skipped the block got nothing from its attention."""
    captured = site.block.signals.captured
    if "attended" not in captured:  # the block's branches stand side by side
        return site.entered + noted(site, "update")
    out = noted(site, "attended")
    if site.routed is None:
        return out
    return torch.where((site.routed.slot < 0)[..., None], site.entered.to(out), out)


def real_tokens(site: Site) -> Tensor:
    """The `real` signal."""
    return token_mask(altered(site, whole_cache=False))


def entry_sizes(site: Site) -> Tensor:
    """The `sizes` signal."""
    if not site.whole_cache:
        return site.run.ledger.all_sizes()
    sizes = site.layer.sizes
    return torch.ones_like(site.layer.origins, dtype=torch.float32) if sizes is None else sizes


def newer_entries(site: Site) -> Tensor:
    """The `newer` signal."""
    layer = site.layer
    if all_real(site):
        return torch.arange(layer.length - 1, -1, -1, device=layer.origins.device).expand_as(layer.origins)
    count = real_entries(site).cumsum(dim=-1)
    return count[..., -1:] - count


def recited_entries(site: Site) -> Tensor:
    """The `recited` signal."""
    recital, place = site.run.context.recital, token_positions(altered(site, whole_cache=True))
    said = (place >= recital.first) & (place < recital.end)
    return said if site.layer.fresh is None else said & ~site.layer.fresh


def note_received(site: Site) -> None:
    """Add to each cached entry the attention that it gets in this pass."""
    grouped = in_float32(site.block.tap.signal("scores", altered(site, whole_cache=True)).columns(heads="key"))  # b k n
    entries = site.layer.record.entries
    entries["received"] = entries["received"] + grouped if "received" in entries else grouped


@dataclass(frozen=True)
class EntryStates:
    """The `states` signal."""

    layer: TokenCacheLayer

    @property
    def widths(self) -> tuple[int, int]:
        """Of a key and of a value."""
        return self.layer.kv.shape[1:]

    def __call__(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of all entries in their order, (b k n e), or of those of an index (b k r)."""
        return self.layer.kv.ordered() if index is None else self.layer.kv.pick(index)


def own_tokens(site: Site) -> Tensor:
    """The tokens that a block ran on and a bank put in, (b m) bool."""
    marks = site.local_notes(site.key)
    return torch.zeros_like(site.local.rows, dtype=torch.bool) if marks is None else marks


def own_keys(site: Site) -> Tensor:
    """The `own_keys` signal."""
    own, heads = own_tokens(site), site.call.k.shape[1]
    if site.past is None:
        return own[:, None].expand(-1, heads, -1)
    marks = site.past.entries(site.key)
    own = stretch(torch.zeros_like(site.past.origins, dtype=torch.bool) if marks is None else marks, own)
    return own.expand(-1, heads, -1)


def key_positions(site: Site) -> Tensor:
    """The `key_positions` signal."""
    own = site.local.rows + site.run.ledger.start
    return site.run.position(own[:, None] if site.past is None else stretch(site.past.origins, own))


def own_states(site: Site) -> Tensor:
    """The `own` signal."""
    marks = site.run.memory.tokens[site.key]
    index = indices(marks)
    return take(site.hidden, index).masked_fill(~take(marks, index)[..., None], 0)


OF_A_STEP = ("step", "steps", "remaining", "timestep", "elapsed", "time", "targets")  # as the call's context has them
SUPPLY: dict[str, Callable[[Site], Any]] = {
    **{name: (lambda m, name=name: m.block.tap.signal(name, m)) for name in TAPPED},
    **{name: (lambda m, name=name: getattr(m, name)) for name in ("hidden", "entered", "budget", "stays", "goes")},
    **{name: (lambda m, name=name: getattr(m.run.context, name)) for name in OF_A_STEP},
    "mask": token_mask,
    "sizes": entry_sizes,
    "positions": token_positions,
    "fresh": fresh_tokens,
    "plain": lambda m: m.run.ledger.plain,
    "prefix": lambda m: m.surgery.prefix,
    "visual": lambda m: modality_span(m, "visual"),
    "pictures": picture_indices,
    "pictured": pictured_tokens,
    "instruction": lambda m: modality_span(m, "instruction"),
    **{name: (lambda m, name=name: noted(m, name)) for name in HOOKED if name != "attended"},
    "grid": patch_grid,
    "kind": lambda m: m.surgery.stream.kind,
    "layer": lambda m: m.block.index,
    "layers": lambda m: len(m.surgery.stream),
    "noise": lambda m: step_output(m, "noise"),
    "contrast": lambda m: step_output(m, "contrast"),
    "guidance": lambda m: step_output(m, "guidance"),
    "downsampling": lambda m: m.run.context.steps_of_denoiser.downsampling(m.run.ledger.n),
    "progress": lambda m: m.surgery.model.progress,
    "prefill": lambda m: m.run.prefill,
    "memory": lambda m: m.run.memory,
    "real": real_tokens,
    "attended": attended_residual,
    "newer": newer_entries,
    "recited": recited_entries,
    "reciting": lambda m: m.layer.origins >= m.run.context.recital.length,
    "received": lambda m: m.layer.record.entries["received"],
    "record": lambda m: m.layer.record.own(m.key),
    "states": lambda m: EntryStates(m.layer),
    "rotation": Turning,
    "affinity": lambda m: m.call.affinity,
    "key_positions": key_positions,
    "own_keys": own_keys,
    "own_tokens": lambda m: m.run.memory.tokens.get(m.key, torch.zeros_like(m.run.ledger.rows, dtype=torch.bool)),
    "own": own_states,
    "answers": lambda m: m.run.held.get(("answers", m.key)),
    "keys_below": lambda m: lower_states(m, "keys"),
    "values_below": lambda m: lower_states(m, "values"),
}


def in_dtype_of(method: Method, signals: dict[str, Any]) -> dict[str, Any]:
    """The signals in the precision of the method's parameters, which is that of the model, or float32 where PEFT keeps these so."""
    dtype = method.dtype
    if dtype is None:
        return signals
    tensors = (t for value in signals.values() for t in (value if isinstance(value, tuple) else (value,)) if isinstance(t, Tensor))
    if all(t.dtype == dtype for t in tensors if t.is_floating_point()):
        return signals
    cast = lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
    return {name: tuple(map(cast, value)) if isinstance(value, tuple) else cast(value) for name, value in signals.items()}


def ask(method: Method, site: Site, word: str | None = None) -> Any:
    """Call a method's verb, or another of its words, with the signals that it names."""
    word = method.verb if word is None else word
    site = altered(site, whole_cache=handler_of(method).reads_cache, key=method.key)
    unused = method.ignores if not method.of_prompts or site.run.prefill else (*method.ignores, *method.of_prompts)
    supply = {name: SUPPLY[name] for name in method.words[word] if name not in unused}
    signals = {name: source(site) for name, source in supply.items()}
    if site.part is not None:
        signals = {name: value[:, site.part] if name in OF_A_QUERY else value for name, value in signals.items()}
    signals = {**dict.fromkeys(method.words[word]), **in_dtype_of(method, signals)}
    return method.at_hand(functools.partial(getattr(method, word), **signals))
