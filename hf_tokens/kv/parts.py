"""All parts of a layer together: read, put, left and swept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hf_tokens_kernels import merge_attention
from torch import Tensor

from .formats import GroupTable, Packed, QuantizedTokens, Shared
from .storage import BOTH, KVFormats, Part, Spots, Tables


def common_tables(parts: list[Part], forms: KVFormats, like: tuple[Tensor, Tensor]) -> Tables:
    """The tables of formats that pack several rows together: those that the parts have, or new ones."""

    def table(which: int) -> GroupTable | None:
        form = forms[which]
        if not isinstance(form, QuantizedTokens):
            return None
        known = (part.tables[which] for part in parts if part.forms[which] == form)
        return next(known, None) or GroupTable(like[which], form.width)

    return table(0), table(1)


def sweep(parts: list[Part]) -> None:
    """Let the scales of groups go that no entry is in any more."""
    for which in BOTH:
        grouped = [part for part in parts if part.tables[which] is not None]
        tables = {id(part.tables[which]): part.tables[which] for part in grouped}
        for table in tables.values():
            sharing = [part for part in grouped if part.tables[which] is table]
            stays = torch.zeros(len(table.scale), dtype=torch.bool, device=table.scale.device)
            for part in sharing:
                stays[part.packed[which][1][part.cells[part.where], 0].long()] = True
            if bool(stays.all()):
                continue
            place = stays.cumsum(0).int() - 1
            for part in sharing:
                cells, (codes, number) = part.cells[part.where], part.packed[which]
                renamed = codes, number.index_copy(0, cells, place[number[cells].long()])
                part.packed = (renamed, part.packed[1]) if which == 0 else (part.packed[0], renamed)
            table.keep(stays)


def attend(
    parts: list[Part], q: Tensor, sizes: Tensor | None, sinks: Tensor | None, weighs: bool, **shape: Any
) -> tuple[Tensor, Tensor | None]:
    """What queries (b h 1 e) read of parts (b h 1 f), and if it `weighs` the probability of each entry, (b k n), where it lies."""
    read = [part.attend(q, sizes, scores=weighs, **shape) for part in parts]
    out = merge_attention([some[:2] for some in read], sinks)
    if not weighs:
        return out, None
    logs = torch.stack([log for _, log, _ in read])
    logs = logs if sinks is None else torch.cat([logs, sinks.to(logs).view(1, 1, -1, 1).expand_as(logs[:1])])
    return out, weights(parts, [scores for _, _, scores in read], logs.logsumexp(dim=0))


def weights(parts: list[Part], scores: list[Tensor], log: Tensor) -> Tensor:
    """The probability of each entry, the mean of the queries of its head (b k n), by scores of the cells (h/k c) and the log (b h 1)."""
    cells, many = parts[0].cells, scores[0].shape[1]
    for part, its in zip(parts[1:], scores[1:], strict=True):
        cells, many = torch.where(part.where, part.cells + many, cells), many + its.shape[1]
    each = torch.cat(scores, dim=1)[:, cells.clamp(min=0)].movedim(0, 2) - log.unflatten(1, (cells.shape[1], -1))  # b k g n
    return each.exp().mean(dim=2).masked_fill(cells < 0, 0)


def dense(parts: list[Part], which: int, width: int) -> Tensor:
    """The keys (0) or values (1) of parts, (b k n e); zeros where there is none."""
    shape = parts[0].cells.shape
    out: Tensor | None = None
    for part in parts:
        spots = part.where.nonzero(as_tuple=True)
        rows = part.read(which, part.cells[spots], spots)
        if len(parts) == 1 and len(rows) == shape.numel():
            return rows.view(*shape, width)
        out = rows.new_zeros(*shape, width) if out is None else out
        out[spots] = rows
    return out


def read(parts: list[Part], which: int, spots: Spots) -> Tensor:
    """Keys (0) or values (1) of entries of parts, (r e)."""
    out: Tensor | None = None
    for part in parts:
        cells = part.cells[spots]
        inside = cells >= 0
        rows = part.read(which, cells[inside], tuple(spot[inside] for spot in spots))
        out = rows.new_zeros(len(cells), rows.shape[1]) if out is None else out
        out[inside] = rows
    return out


def put(parts: list[Part], part: Part) -> list[Part]:
    """Parts with the entries of one more, which leave the others."""
    same = next((old for old in parts if old.forms == part.forms), None)
    others = leave([old for old in parts if old is not same], part.where.nonzero(as_tuple=True))
    return filled_parts([*others, part if same is None else same.join(part)])


def leave(parts: list[Part], spots: Spots) -> list[Part]:
    """Parts without some entries."""
    inside = [part.cells[spots] >= 0 for part in parts]
    return [part.without(tuple(x[i] for x in spots)) if bool(i.any()) else part for part, i in zip(parts, inside, strict=True)]


@dataclass(frozen=True)
class Packing:
    """Entries, packed to be stored.

    Attributes:
        spots: Where they stand among all.
        packed: What is stored of their keys and values.
        where: The same entries, (b k n) bool.
        forms, scale, tables: As a part has them.
    """

    spots: Spots
    packed: tuple[Packed, Packed]
    where: Tensor
    forms: KVFormats
    scale: Tensor | None = None
    tables: Tables = (None, None)

    def part(self) -> Part:
        """A part of their own."""
        return Part.tight(self.where, self.forms, self.packed, self.scale, self.tables)

    def join(self, parts: list[Part], leaving: list[Part]) -> list[Part]:
        """Parts with these entries more, which leave some of them; in place if that may be."""
        same = next((part for part in parts if part.forms == self.forms), None)
        if same is None or same.fixed or any(isinstance(x, Shared) or x.requires_grad for states in self.packed for x in states):
            return put(parts, self.part())
        left = dict(zip(map(id, leaving), leave(leaving, self.spots), strict=True))
        return filled_parts([*(left.get(id(part), part) for part in parts if part is not same), same.take_in(self.spots, self.packed)])


def filled_parts(parts: list[Part]) -> list[Part]:
    """The parts that hold entries, or the first if none does."""
    return [part for part in parts if part.count] or parts[:1]
