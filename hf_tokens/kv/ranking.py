"""Which entries of a cache are the highest by their scores, and where those lie that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from .storage import FEW


def lowest(score: Tensor, real: Tensor | None = None) -> Tensor:
    """The place of the lowest of each row, or of its real ones, of two equal ones the last, (... 1)."""
    score, most = score.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), score.shape[-1] - 1
    turned = (score if real is None else score.masked_fill_(~real, torch.inf)).flip(-1)
    place = most - turned.argmin(dim=-1, keepdim=True)
    if real is None or bool((there := real.gather(-1, place)).all()):
        return place
    last = most - real.flip(-1).max(dim=-1, keepdim=True).indices
    return torch.where(there, place, last)  # where all real ones are infinite


def highest(score: Tensor, budgets: Tensor, real: Tensor) -> Tensor:
    """As many of the highest of the real entries of each row as its budget says, bool; of two equal ones the earlier."""
    goes = real.sum(dim=-1) - budgets
    most = int(goes.max())
    if most > FEW:
        place, index = torch.arange(score.shape[-1], device=score.device), score.argsort(dim=-1, descending=True, stable=True)
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, index, place < budgets[..., None]) & real
    stays = real
    for gone in range(most):  # without a sort of all
        last, leaves = lowest(score, stays), (goes > gone)[..., None]
        stays = stays.scatter(-1, last, stays.gather(-1, last) & ~leaves)
    return stays


def kept_places(stays: Tensor) -> tuple[Tensor, Tensor | None]:
    """Where the entries are that stay, in their order, as an index of each row, and which of it count; others fill it up."""
    many = stays.sum(dim=-1, keepdim=True)
    most = max(1, int(many.max()))
    if bool((many == most).all()):
        return stays.nonzero()[:, -1].view(*stays.shape[:-1], most), None
    place = torch.arange(stays.shape[-1], device=stays.device)
    behind = torch.where(stays, stays.cumsum(dim=-1) - 1, many + (~stays).cumsum(dim=-1) - 1)
    index = torch.empty_like(behind).scatter_(-1, behind, place.expand_as(behind))[..., :most]
    return index, place[:most] < many


def closed(filled: Tensor, until: int) -> tuple[Tensor, Tensor | None]:
    """Where the entries are if those in front of a place close up, as an index of each row, and which of it count; None if all do."""
    index, counts = kept_places(filled[..., :until])
    place, behind = torch.arange(until, filled.shape[-1], device=filled.device), filled[..., until:]
    if counts is None and bool(behind.all()):
        return torch.cat([index, place.expand_as(behind)], dim=-1), None
    counts = torch.ones_like(index, dtype=torch.bool) if counts is None else counts
    return torch.cat([index, place.expand_as(behind)], dim=-1), torch.cat([counts, behind], dim=-1)
