"""Where ids stand in a row of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def match_ids(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """Place in `wanted` of each token id, -1 where it is not there, for ids of any shape."""
    if not wanted:
        return torch.full_like(ids, -1, dtype=torch.long)
    known, place = torch.tensor(wanted, device=ids.device).sort()
    at = torch.searchsorted(known, ids.long().contiguous()).clamp(max=len(wanted) - 1)
    return torch.where(known[at] == ids, place[at], -1)


def match_sequence(ids: Tensor, sequence: Sequence[int]) -> Tensor:
    """Place in `sequence` of each token where all of it stands in a row of ids (b n), -1 elsewhere; of overlapping ones the first."""
    k = len(sequence)
    if not k:
        return torch.full_like(ids, -1, dtype=torch.long)
    windows = F.pad(ids, (0, k - 1), value=-1).unfold(1, k, 1)  # b n k
    starts = (windows == torch.tensor(sequence, device=ids.device)).all(dim=-1)
    count = F.pad(starts.long().cumsum(dim=1), (k, 0))
    starts = starts & (count[:, k - 1 : -1] == count[:, :-k])  # none among the k - 1 tokens before
    index = torch.arange(ids.shape[1], device=ids.device)
    place = index - torch.where(starts, index, -k).cummax(dim=1).values
    return torch.where(place < k, place, -1)
