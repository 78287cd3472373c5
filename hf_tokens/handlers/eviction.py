"""How entries leave a cache: those that stay may take them in, and close up or leave their places empty."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.run import Site
from ..engine.supply import ask, cells
from ..kv.ranking import lowest
from ..roles.cache_compressor import CacheCompressor, Folded
from ..tokens.altered import altered


def note_change(site: Site, gone: Tensor | None = None) -> None:
    """Note for a later crop that the cache changed in this pass, or that the entries of the tokens at the places `gone` did."""
    ledger = site.run.ledger
    site.run.memory.note_change(ledger.start, ledger.start + ledger.n, None if gone is None else gone.min())


def drop_entry(method: CacheCompressor, site: Site, gone: Tensor) -> None:
    """Let one entry of each row (b 1) or head (b k 1) go."""
    layer = site.layer
    note_change(site)
    if method.folds(method.config):
        goes = cells(layer, torch.arange(layer.length, device=gone.device) == gone)
        fold_entries(method, altered(site, stays=~goes, goes=goes))
    index = torch.arange(layer.length - 1, device=gone.device)
    layer.keep(index + (index >= gone), gone=gone)


def leave_place(method: CacheCompressor, site: Site, score: Tensor, real: Tensor, leaves: Tensor) -> None:
    """Let the lowest of the real entries (b k n) go, in the heads where one leaves, (b k 1); its place stays empty."""
    layer, gone = site.layer, lowest(score, real)
    note_change(site, cells(layer, layer.origins).gather(-1, gone).masked_fill(~leaves, layer.seen))
    site.block.tap.check_heads(layer, values=True)
    if method.folds(method.config):
        goes = torch.zeros_like(real).scatter(-1, gone, leaves)
        fold_entries(method, altered(site, stays=real ^ goes, goes=goes))
    layer.vacate(gone, leaves)


def fold_entries(method: CacheCompressor, site: Site) -> None:
    """Let entries that stay take in those that go."""
    layer, folded = site.layer, ask(method, site, "fold")
    if isinstance(folded, Folded):
        layer.kv.write(*folded[:3])
        if folded.sizes is not None:
            layer.record.entries["sizes"] = folded.sizes
    elif folded is not None:
        layer.rewrite(*folded)
    if folded is not None:
        note_change(site)
