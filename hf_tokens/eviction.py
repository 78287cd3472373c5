"""What a cache compressor decides, done to the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache import TokenCacheLayer
from .roles import CacheCompressor, Method
from .signals import Moment, stored

if TYPE_CHECKING:
    from .surgery import Runtime

EPSILON = 1e-9  # so that a share of a whole number of tokens is that number


def compress(runtime: Runtime, method: CacheCompressor, moment: Moment) -> None:
    """Behind a block: score the entries of its cache, and keep as many as the method's budget allows."""
    layer, now = moment.layer, moment.now
    if runtime.records is not None:
        runtime.records.setdefault(moment.side.index, []).append((method.key, score_entries(runtime, method, moment).detach()))
        return
    if not now.prefill and not method.decodes:
        return
    if method.allots and now.prefill:
        now.waiting.setdefault(method.key, []).append((method, moment, score_entries(runtime, method, moment)))
        if moment.side.index == max(i for i, side in runtime.sides.items() if any(m.key == method.key for m in side.active())):
            allot(method, now.waiting.pop(method.key))
        return
    real = stored(moment)
    lengths, seen = real.sum(dim=-1), brought(moment, real)  # b, or b k
    if method.allots:
        budgets = (layer.shares * seen + EPSILON).long().clamp(min=1).minimum(lengths)
    else:
        pairs = zip(lengths.flatten().tolist(), seen.flatten().tolist(), strict=True)
        budgets = torch.tensor([min(n, method.budget(n, s)) for n, s in pairs], device=lengths.device).view_as(lengths)
    if overfull(layer, lengths, budgets):
        evict(layer, runtime.ask(method, moment), real, budgets)


def score_entries(runtime: Runtime, method: CacheCompressor, moment: Moment) -> Tensor:
    """The score of every entry, -inf where there is none."""
    score, real = runtime.ask(method, moment), stored(moment)
    return score.masked_fill(~(real[:, None] if score.dim() > real.dim() else real), -torch.inf)


def brought(moment: Moment, real: Tensor) -> Tensor:
    """How many tokens each row (b), or head (b k), was given so far, real or inserted, of which these are left."""
    seen = moment.now.seen().view(-1, *[1] * (real.dim() - 2)).expand(real.shape[:-1])
    return seen if moment.layer.fresh is None else seen + (moment.layer.fresh & real).sum(dim=-1)


def overfull(layer: TokenCacheLayer, lengths: Tensor, budgets: Tensor) -> bool:
    """Whether rows have more real entries than they may, or more room than any of them needs."""
    return bool((budgets < lengths).any()) or int(lengths.max()) < layer.length


def allot(method: CacheCompressor, waiting: list[tuple[Method, Moment, Tensor]]) -> None:
    """Every block has scored its entries: share them out."""
    real = {m.side.index: stored(m) for _, m, _ in waiting}
    budgets = method.leader.allot({m.side.index: score for _, m, score in waiting})
    for _, moment, score in waiting:
        layer = moment.side.index
        lengths = real[layer].sum(dim=-1)
        allowed = budgets[layer].minimum(lengths)
        moment.layer.shares = allowed.double() / brought(moment, real[layer])
        if overfull(moment.layer, lengths, allowed):
            evict(moment.layer, score, real[layer], allowed)


def evict(layer: TokenCacheLayer, score: Tensor, real: Tensor, budgets: Tensor) -> None:
    """Keep the highest of the real entries, as many as each row (b) or head (b k) may have; of two equal ones the earlier."""
    if score.dim() == 3 and real.dim() == 2:
        real, budgets = real[:, None].expand_as(score), budgets[:, None].expand(score.shape[:2])
    if score.dim() == 2 and real.dim() == 3:
        score = score[:, None].expand_as(real)
    score = score.masked_fill(~real, -torch.inf)
    if layer.fresh is not None:
        score = score.masked_fill(layer.fresh if score.dim() == layer.fresh.dim() else layer.fresh[:, None], torch.inf)
    most = max(1, int(budgets.max()))
    index = score.argsort(dim=-1, descending=True, stable=True)[..., :most]
    kept = torch.arange(most, device=index.device) < budgets[..., None]
    order = torch.where(kept, index, score.shape[-1]).sort(dim=-1)
    filled = order.values < score.shape[-1]
    layer.keep(order.values.clamp(max=score.shape[-1] - 1), None if bool(filled.all()) else filled)
