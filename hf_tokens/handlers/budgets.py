"""How many entries a row of a cache, or a key head of it, may hold: what there is, what came, and what each block is allotted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ..engine.run import Site
from ..engine.supply import cells, real_entries
from ..kv.layer import TokenCacheLayer
from ..roles.cache_compressor import CacheCompressor

EPSILON = 1e-9  # so that a share of a whole number of tokens is that number
SHARES = "the part of the tokens seen that a layer may hold"
BEYOND = "beyond"  # entries that are stored in another format, in the books of each entry


def holds(method: CacheCompressor) -> bool:
    """Whether a method stores the entries beyond the budget in another format."""
    return type(method).hold is not CacheCompressor.hold


def blocks_of(method: CacheCompressor, site: Site) -> list[int]:
    """The blocks of a stream that a method acts in."""
    return [i for i, block in sorted(site.surgery.blocks.items()) if any(m.key == method.key for m in block.plan.acting)]


def among_real(score: Tensor, site: Site) -> Tensor:
    """Scores, -inf where there is no entry."""
    real = real_entries(site)
    score = score[:, None].expand_as(real) if score.dim() < real.dim() else score
    return score.masked_fill(~(real[:, None] if score.dim() > real.dim() else real), -torch.inf)


def brought(site: Site, real: Tensor) -> Tensor:
    """How many tokens each row (b), or head (b k), was given so far, real or inserted, of which these are left."""
    seen = site.run.seen().view(-1, *[1] * (real.dim() - 2)).expand(real.shape[:-1])
    fresh = site.layer.fresh
    if fresh is None:
        return seen
    return seen + ((cells(site.layer, fresh) if real.dim() == 3 else fresh) & real).sum(dim=-1)


def count_entries(method: CacheCompressor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """Entries that a method decides on, how many these are, and how many tokens there were so far: of each row (b) or head (b k).

    One that drops entries decides on all, whatever their format; one that stores them otherwise on those that are stored as they came.
    """
    there, beyond = real_entries(site), site.layer.record.entries.get(BEYOND)
    real = cells(site.layer, there) & ~beyond if beyond is not None and holds(method) else there
    lengths, seen = real.sum(dim=-1), brought(site, there)
    return real, lengths, seen if seen.shape == lengths.shape else seen[:, None].expand_as(lengths)


def alike_counts(count: Tensor, other: Tensor) -> Tensor:
    """A number of each row (b), or head (b k), that goes with another one."""
    return count[:, None] if count.dim() < other.dim() else count


def spread_budgets(budgets: Tensor, lengths: Tensor) -> Tensor:
    """Budgets as (b) or (b k), none above what there is: one number for each of `lengths`, or one for each key head."""
    if budgets.dim() == 1:
        return budgets.view_as(lengths).minimum(lengths)
    if lengths.dim() == 1:
        return budgets.minimum(lengths[:, None])
    heads = budgets.view(*lengths.shape, -1)  # b k k: what the lengths of each head let every head have
    return heads.diagonal(dim1=1, dim2=2).minimum(lengths)


def shares_of(method: CacheCompressor, layer: TokenCacheLayer) -> Tensor:
    """The part of the tokens seen that a layer may hold, (b) on the CPU, as the method allotted it."""
    return layer.record[method.key, SHARES]


def share_among_blocks(method: CacheCompressor, last: Site, waiting: list[Site], notes: dict[int, Tensor]) -> dict[int, Tensor]:
    """The pass is over: share the entries of each row out among the blocks that it ran; returns the scores of these blocks."""
    named = {site.block.index: (site, site.layer.record.entries.pop(method.key, None)) for site in waiting}
    scores = {index: among_real(score, site) for index, (site, score) in named.items() if score is not None}
    shares = {site.block.index: [] for site in waiting}
    for rows, ran in rows_by_blocks(waiting):
        given = [{i: found[i][rows] for i in ran if i in found} for found in (scores, notes)]
        for index, part in method.at_hand(partial(method.stream_first.allot, *given)).items():
            shares[index].append((rows, as_shares(part, rows, *count_entries(method, named[index][0])[1:])))
    for index in blocks_of(method, last):
        layer = last.run.caches.get(index)
        if layer is not None:
            note_shares(method, layer, len(last.hidden), shares.get(index, []))
    return scores


def rows_by_blocks(waiting: list[Site]) -> Iterator[tuple[Tensor | slice, list[int]]]:
    """Rows that ran the same of these blocks, and which these are: a router may send each row elsewhere."""
    if not waiting:
        return
    indices, ran = [site.block.index for site in waiting], torch.stack([brings_any(site) for site in waiting], dim=1)  # b l
    if bool(ran.all()):
        yield slice(None), indices
        return
    for blocks in ran.unique(dim=0):
        if bool(blocks.any()):
            yield (ran == blocks).all(dim=1), [i for i, runs in zip(indices, blocks.tolist(), strict=True) if runs]


def brings_any(site: Site) -> Tensor:
    """Whether a row brought this block's cache a real token in this pass, (b)."""
    real = site.local_real()
    return torch.ones_like(site.local.rows[:, 0], dtype=torch.bool) if real is None else real.any(dim=1)


def as_shares(part: Tensor, rows: Tensor | slice, lengths: Tensor, seen: Tensor) -> Tensor:
    """What some rows are allotted of a block, (b) or (b k), as a part of the tokens seen: it may have been said in entries."""
    if not part.is_floating_point():
        lengths, seen = (t[rows].amax(dim=1) if t.dim() > part.dim() else alike_counts(t[rows], part) for t in (lengths, seen))
        part = part.minimum(lengths).double() / seen
    return part.double().cpu()  # it is read at each token, and a device would have to be waited for


def note_shares(method: CacheCompressor, layer: TokenCacheLayer, batch: int, allotted: list[tuple[Tensor | slice, Tensor]]) -> None:
    """Note the shares of a block; a row that did not run it keeps the share it had, and one that never did all that comes."""
    known = layer.record.get((method.key, SHARES))
    shares = torch.ones(batch, dtype=torch.float64) if known is None else known.clone()
    for rows, part in allotted:
        shares = shares if shares.dim() == part.dim() else shares[:, None].repeat(1, part.shape[1])
        shares[rows if isinstance(rows, slice) else rows.cpu()] = part
    layer.record[method.key, SHARES] = shares
