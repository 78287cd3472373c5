"""Cache compressors: what they decide, done to the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..engine.handler import Handler, handles
from ..engine.results import ModelCall
from ..engine.run import Site
from ..engine.supply import ask, cells, counterparts, note_received, real_entries
from ..errors import UnsupportedError, explain
from ..kv.formats import Polar
from ..kv.layer import TokenCacheLayer
from ..kv.ranking import highest, kept_places, lowest
from ..kv.storage import Part
from ..roles.cache_compressor import CacheCompressor, Holding
from ..roles.signals import OF_THE_CACHE, SCORED
from ..tokens.altered import altered
from ..tokens.entries import alike
from .budgets import (
    BEYOND,
    EPSILON,
    alike_counts,
    among_real,
    blocks_of,
    brings_any,
    count_entries,
    holds,
    share_among_blocks,
    shares_of,
    spread_budgets,
)
from .eviction import drop_entry, fold_entries, leave_place, note_change
from .recital import not_said_again, recite, score_recital

WAITING = "blocks whose entries are shared out once all have run"
RECITAL = "methods that wait for the prompt to be said again, and where they do"


@handles("CacheCompressor")
class CacheCompressorHandler(Handler):
    needs_cache = reads_cache = True

    def phases(self, method: CacheCompressor) -> tuple[str, ...]:
        listens, waits = SCORED in method.asks, method.allots and method.recites is None
        return (*(("listen",) if listens else ()), "after", *(("close",) if waits else ()))

    def hooks(self, method: CacheCompressor) -> set[str]:
        return {"tap"} if method.by_head else set()

    def quiet(self, method: CacheCompressor) -> bool:
        """Whether it scores a generated token by what is in the cache alone."""
        return method.asks_decoding <= OF_THE_CACHE

    def notes_later(self, method: CacheCompressor) -> bool:
        """It notes what each entry receives, for a later prompt."""
        return bool(method.observes) or SCORED in method.asks

    def needs_scores(self, method: CacheCompressor) -> bool:
        """A compressor gets the keys of the cache, and what they received."""
        return any({"scores", "affinity"} & {*names} for word, names in method.words.items() if word != "examine")

    def listen(self, method: CacheCompressor, site: Site) -> None:
        if site.local is not None and site.layer is not None:
            note_received(site)
            note_change(site)

    def after(self, method: CacheCompressor, site: Site) -> None:
        if site.local is None or site.layer is None:
            return
        method.note_heads(site.layer.heads)
        if site.run.context.recital is not None:
            score_recital(method, site)
        elif method.recites is not None:
            await_recital(method, site)
        else:
            compress(method, site)

    def close(self, method: CacheCompressor, site: Site) -> None:
        if site.run.prefill and not site.surgery.examines:
            allot(method, site, site.run.held.pop((WAITING, method.key), []), site.run.notes.pop(method.key, {}))

    def after_model(self, call: ModelCall, output: Any) -> Any:
        for method, sites in call.held.pop(RECITAL, {}).values():
            scores = recite(method, call, sites, output)
            for site in sites:
                site.layer.record.entries[method.key] = scores[site.block.index]
            allot(method, sites[0], sites, {})
        return output


def compress(method: CacheCompressor, site: Site) -> None:
    """Behind a block: score the entries of its cache, and keep as many as the method's budget allows."""
    run = site.run
    if method.pairs:
        lower = partner(method, site)
        if lower is None:
            return
        check_pair(lower, site.layer)
        site = altered(site, below=lower)
        site = altered(site, alike=counterparts(site, lower))
    if site.surgery.examines:
        scores = examined_scores(method, site)
        if scores is not None:
            site.surgery.report(site.block, method, scores.detach())
        return
    if not run.prefill and not method.decodes:
        return
    if method.allots and run.prefill:
        score = None if "budget" in method.signals else score_entries(method, site)
        if score is not None:
            site.layer.record.entries[method.key] = score  # another compressor may let entries go before they are shared out
        run.held.setdefault((WAITING, method.key), []).append(site)
        return
    limit(method, site)
    tell_stored(method, site)


def tell_stored(method: CacheCompressor, site: Site) -> None:
    """Tell the listeners how many bytes a block's cache holds behind a prompt, of as many as without."""
    if site.surgery.heard and site.run.prefill:
        ledger, layer, (heads, *widths) = site.run.ledger, site.layer, site.layer.kv.shape
        tokens = ledger.batch * (ledger.start + ledger.n)
        site.surgery.acted(site.block, method, layer.nbytes, tokens * heads * sum(widths) * layer.dtype.itemsize)


def await_recital(method: CacheCompressor, site: Site) -> None:
    """The prompt is compressed once the model has said it again, but what a window drops."""
    if site.run.prefill and not site.run.ledger.start:
        call = site.surgery.model.call
        if call is None:
            raise not_said_again(method, f"a call of a part of {type(site.surgery.model.base).__name__}", "Call the model itself.")
        held = call.held.setdefault(RECITAL, {})
        held.setdefault(method.key, (method, []))[1].extend([site] if site.layer.window is None and bool(brings_any(site).any()) else [])


def partner(method: CacheCompressor, site: Site) -> TokenCacheLayer | None:
    """The cache of the lower block of the pair of which this is the upper one; None if it is not, or no token ran the lower one."""
    layers = [site.run.caches[i] for i in blocks_of(method, site) if i in site.run.caches]
    alike = [layer for layer in layers if layer.window == site.layer.window]
    place = next(i for i, layer in enumerate(alike) if layer is site.layer)
    return alike[place - 1] if place % 2 and alike[place - 1].origins is not None else None


def examined_scores(method: CacheCompressor, site: Site) -> Tensor | None:
    """What `calibrate` gets of a block: the scores of a budget for all, if the method does not define it."""
    if type(method).examine is not CacheCompressor.examine:
        site.block.tap.check_heads(site.layer)
        return ask(method, site, "examine")
    lengths = real_entries(site).sum(dim=-1)
    return score_entries(method, altered(site, budget=lengths if lengths.dim() == 2 else lengths[:, None]))


def score_entries(method: CacheCompressor, site: Site) -> Tensor:
    """The score of every entry, -inf where there is none."""
    return among_real(ask(method, site), site)


def limit(method: CacheCompressor, site: Site, score: Tensor | None = None) -> None:
    """Let a block keep what its budget allows."""
    layer, spare, slack = site.layer, surplus(method, site), 0 if site.run.prefill else method.slack
    if spare is not None and spare <= slack:
        return
    if spare == 1:
        site = altered(site, budget=torch.full((len(layer.origins), 1), layer.length - 1, device=layer.origins.device))
        drop_entry(method, site, lowest(ask(method, site) if score is None else score))
        return
    real, lengths, seen = count_entries(method, site)
    if method.allots:
        shares = shares_of(method, layer).to(lengths.device)
        budgets = (
            (alike_counts(shares, seen) * alike_counts(seen, shares) + EPSILON).long().clamp(min=1).minimum(alike_counts(lengths, shares))
        )
    else:
        pairs = [*zip(lengths.flatten().tolist(), seen.flatten().tolist(), strict=True)]
        known = {pair: method.budget(*pair) for pair in dict.fromkeys(pairs)}
        returned = [known[pair] for pair in pairs]
        if returned[0] is None:
            score = ask(method, site)
            real = cells(layer, real) if score.dim() == 3 else real
            budgets = ((score > 0) & real).sum(dim=-1)
            lengths = real.sum(dim=-1)
        else:
            budgets = spread_budgets(torch.tensor(returned, device=lengths.device), lengths)
    if overfull(method, layer, lengths, budgets, slack):
        site = altered(site, budget=budgets if budgets.dim() == 2 else budgets[:, None])
        score = ask(method, site) if score is None else score
        if (by := divider(method, site)) is not None:
            budgets = divide(by, site, score, budgets, lengths)
            site = altered(site, budget=budgets)
        evict(method, site, score, real, budgets)


def divider(method: CacheCompressor, site: Site) -> CacheCompressor | None:
    """What gives each key head a number of entries of its own, by a method's scores of all: itself, or one that does so for its stack."""
    if holds(method):
        return None
    if type(method).divide is not CacheCompressor.divide:
        return method
    return next((other for other in site.block.plan.acting if other.divides_others), None)


def divide(method: CacheCompressor, site: Site, score: Tensor, budgets: Tensor, lengths: Tensor) -> Tensor:
    """What each key head of a block keeps, (b k), none above what it has."""
    wide = (*lengths.shape[:1], site.layer.heads)
    budgets, lengths = ((x if x.dim() == 2 else x[:, None]).expand(wide) for x in (budgets, lengths))
    return method.divide(cells(site.layer, among_real(score, site)), budgets).minimum(lengths)


def allot(method: CacheCompressor, last: Site, waiting: list[Site], notes: dict[int, Tensor]) -> None:
    """Every block has run: let each keep what it is allotted."""
    scores = share_among_blocks(method, last, waiting, notes)
    for site in waiting:
        note_change(site)
        limit(method, site, scores.get(site.block.index))
        tell_stored(method, site)


def surplus(method: CacheCompressor, site: Site) -> int | None:
    """Entries that each row has beyond its budget, where all rows are alike and each entry is a token as it came; None where not."""
    layer, run = site.layer, site.run
    reasons = layer.filled, layer.fresh, layer.window, layer.record.entries.get(BEYOND), run.first, run.padding, run.real, site.alike
    if holds(method) or divider(method, site) is not None or any(reason is not None for reason in reasons):
        return None
    seen, n = run.ledger.start + run.ledger.n, layer.length
    if method.allots:
        shares = shares_of(method, layer)
        if shares.dim() == 2:
            return None
        budgets = [max(1, int(share * seen + EPSILON)) for share in shares.tolist()]
    else:
        budget = method.budget(n, seen)
        budgets = budget if isinstance(budget, list) else [budget]
    alike = type(budgets[0]) is int and budgets.count(budgets[0]) == len(budgets)
    return max(0, n - budgets[0]) if alike else None


def overfull(method: CacheCompressor, layer: TokenCacheLayer, lengths: Tensor, budgets: Tensor, slack: int) -> bool:
    """Whether rows have more real entries than they may, or more room than any of them needs; or the method stores those otherwise."""
    if holds(method):
        return True
    more = lengths if lengths.dim() == budgets.dim() else lengths[:, None]
    over = bool((budgets + slack < more).any())
    return over or not slack and int(lengths.max()) < layer.length - layer.gaps


def leaves_places(method: CacheCompressor, layer: TokenCacheLayer) -> bool:
    """Whether the place of an entry that leaves may stay empty: nothing is stored there where heads hold entries of their own."""
    apart = layer.kv.parts is not None and layer.origins.dim() == 3
    return apart and layer.readable and layer.fresh is None and not holds(method)


def evict(method: CacheCompressor, site: Site, score: Tensor, real: Tensor, budgets: Tensor) -> None:
    """Keep the highest of the real entries, as many as each row (b) or head (b k) may have; of two equal ones the earlier."""
    layer = site.layer
    if score.dim() == 3 or real.dim() == 3 or budgets.dim() == 2:
        score, real = cells(layer, score), cells(layer, real)
        budgets = budgets if budgets.dim() == 2 else budgets[:, None].expand(score.shape[:2])
    if score.dim() == 3 and leaves_places(method, layer):
        over = real.sum(dim=-1) - budgets
        if int(over.max()) == 1:
            leave_place(method, site, score, real, over[..., None] > 0)
            return
    if score.dim() == 3 and holds(method) and layer.fresh is None and bool((real.sum(dim=-1) - budgets == 1).all()):
        put_one_away(method, site, score, real)
        return
    score = score.masked_fill(~real, -torch.inf)
    if layer.fresh is not None:
        fresh = cells(layer, layer.fresh) if score.dim() == 3 else layer.fresh
        score = score.masked_fill(fresh & real, torch.inf)
    stays = highest(score, budgets, real)
    goes = real ^ stays
    note_change(site, torch.where(*alike(goes, layer.origins), layer.seen))
    if method.folds(method.config) or holds(method):
        site = altered(site, stays=cells(layer, stays), goes=cells(layer, goes))
    if holds(method):
        put_away(method, site)
        return
    if stays.dim() == 3 and layer.heads > 1:
        site.block.tap.check_heads(layer, values=True)
    if method.folds(method.config) and bool(site.goes.any()):
        fold_entries(method, site)
    layer.keep(*kept_places(stays))


def put_one_away(method: CacheCompressor, site: Site, score: Tensor, real: Tensor) -> None:
    """Store the lowest of the real entries (b k n) of each row and key head in other formats, and maybe those within the budget."""
    layer, gone = site.layer, lowest(score, real)
    note_change(site, cells(layer, layer.origins).gather(-1, gone))
    goes = torch.zeros_like(real).scatter_(-1, gone, True)
    put_away(method, altered(site, stays=real ^ goes, goes=goes), gone)


def put_away(method: CacheCompressor, site: Site, gone: Tensor | None = None) -> None:
    """Store the entries beyond the budget, and maybe those within it, in other formats; `gone` is the place of those, where each row and
    key head has one, (b k 1)."""
    layer, holding = site.layer, ask(method, site, "hold")
    if holding is None:
        return
    if holding.early is not None:
        put_early(site, holding)
    elif holding.kept is not None:
        layer.hold(site.stays, *holding.kept)
    if gone is None and not bool(site.goes.any()):
        return
    if site.below is not None:
        share_entries(site, holding.keys, holding.values)
        return
    if gone is None or not layer.kv.convert_each(gone, (holding.keys, holding.values)):
        layer.hold(site.goes, holding.keys, holding.values, None if holding.scale is None else holding.scale[:, :, None])
    note_beyond(layer, site.goes)


def put_early(site: Site, holding: Holding) -> None:
    """Store entries in the formats of those that are kept, wherever they are going."""
    layer = site.layer
    if bool(holding.early.any()):
        origins, early = alike(layer.origins, holding.early)
        note_change(site, origins.masked_fill(~early, layer.seen))
        layer.hold(holding.early, *holding.kept)


def note_beyond(layer: TokenCacheLayer, where: Tensor) -> None:
    """Note that entries are no more stored as they came."""
    entries = layer.record.entries
    entries[BEYOND] = entries[BEYOND] | where if BEYOND in entries else where


def share_entries(site: Site, keys: Polar, values: Polar) -> None:
    """Store entries of two layers in one format for both; both have them in the same order."""
    upper, lower, above = site.layer, site.below, site.goes
    under = torch.zeros(*above.shape[:2], lower.length + 1, dtype=torch.bool, device=above.device)  # one place more for what is not there
    under = under.scatter(-1, torch.where(above, site.alike, lower.length), True)[..., :-1]
    pairs = [keys.pack_pair(lower.keys[under], upper.keys[above]), values.pack_pair(lower.values[under], upper.values[above])]
    for place, (layer, where) in enumerate(((lower, under), (upper, above))):
        layer.kv.add_part(Part.tight(where, (keys, values), tuple(packed[place] for packed in pairs)), layer.filled)
        note_beyond(layer, where)


def check_pair(lower: TokenCacheLayer, upper: TokenCacheLayer) -> None:
    """Refuse to share the entries of layers that are not alike."""
    if lower.kv.shape != upper.kv.shape:
        rule = "Blocks that share their entries must have as many key heads, of the same width"
        raise UnsupportedError(explain(rule, f"{lower.kv.shape} and {upper.kv.shape}", "Choose other layers."))
