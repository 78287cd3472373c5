"""Keys and values in a few bits, and decode attention that reads them as they are packed."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import choose
from ..precision import of_autocast
from ..ragged_attention import check, refuses, scores_of
from . import reference
from .bits import pack_bits, unpack_bits
from .forms import Coded, Kept, Packed, Rounded, decode, encode, pack, pack_along, round_rows, unpack

__all__ = [
    "Coded",
    "Kept",
    "Packed",
    "Rounded",
    "decode",
    "encode",
    "pack",
    "pack_along",
    "pack_bits",
    "packed_attention",
    "round_rows",
    "unpack",
    "unpack_bits",
]


def packed_attention(
    q: Tensor,
    keys: Packed,
    values: Packed,
    starts: Tensor,
    lengths: Tensor,
    *,
    scaling: float,
    sizes: Tensor | None = None,
    softcap: float | None = None,
    longest: int | None = None,
    scores: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Attention of few queries over packed cells of each row and key head; no more than a chunk of them is ever unpacked.

    Args:
        q: Queries, (b h m e).
        keys: Keys of all cells, packed: `Rounded` or `Coded`, or as they are: `Kept`.
        values: Their values, in the one or the other form.
        starts, lengths, scaling, sizes, softcap, longest, scores: As in `ragged_attention`.

    Returns:
        What is read (b h m f), zeros where there is no cell, and the log of the sum of exponentials (b h m), float32 at least.
        With `scores` those of each cell too, (h/g*m c).

    Raises:
        ValueError: The shapes do not fit.
    """
    check(q, starts, lengths)
    if keys.width != q.shape[3] or len(keys.codes) != len(values.codes):
        came = f"{len(keys.codes)} keys of {keys.width} channels and {len(values.codes)} values for queries {tuple(q.shape)}"
        raise ValueError(f"Packed keys must have the channels of the queries, and a value each, got {came}. Pack the cells together.")
    cast, apart = of_autocast(q.device)
    q = cast(q)
    tables = [t for states in (keys, values) for t in states.tensors()]
    told = scores_of(q, starts, len(keys.codes)) if scores else None
    with apart:
        if choose("packed_attention", q, starts, lengths, *tables, refuses=refuses(q, starts, values.width, *tables)):
            from .twin import packed_attention as twin

            out = twin(q, keys, values, starts, lengths, scaling, sizes, softcap, longest, told)
        else:
            out = reference.packed_attention(q, keys, values, starts, lengths, scaling, sizes, softcap, told)
    return out if told is None else (*out, told)
