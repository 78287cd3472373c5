"""Photographs of solar cells by their own light, from a package: sound ones and broken ones, of two kinds of silicon.

pip install --no-deps elpv-dataset==1.0.0.post1      # 2,624 pictures of 300 x 300 grey pixels, CC-BY-NC-SA-4.0; pillow and numpy
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 126  # of each of the two kinds of silicon, sound and broken


@dataclass(frozen=True)
class Cells:
    """Pictures (n 1 size size) in [0, 1], whether each is broken (n), and its class of four, of silicon and state (n)."""

    pictures: Tensor
    broken: Tensor
    of_four: Tensor


def cells(size: int) -> tuple[Cells, Cells]:
    """Cells whose state is beyond doubt, as many broken as sound ones of each silicon: those to learn from, and those held out."""
    pictures, chance, silicon = importlib.import_module("elpv_dataset.utils").load_dataset()
    broken, mono = torch.tensor(chance == 1), torch.tensor(silicon == "mono")
    of_four, draw = 2 * mono + broken, torch.Generator().manual_seed(0)
    sure = torch.tensor((chance == 0) | (chance == 1))
    each = [torch.nonzero(sure & (of_four == one))[:, 0] for one in range(4)]
    each = [found[torch.randperm(len(found), generator=draw)] for found in each]
    pairs = [min(len(each[2 * kind]), len(each[2 * kind + 1])) for kind in (0, 1)]
    held_out = torch.cat([found[:HELD_OUT] for found in each])
    learnt = torch.cat([found[HELD_OUT : pairs[one // 2]] for one, found in enumerate(each)])
    return tuple(_at(size, torch.from_numpy(pictures), some, broken, of_four) for some in (learnt, held_out))


def _at(size: int, pictures: Tensor, some: Tensor, broken: Tensor, of_four: Tensor) -> Cells:
    scaled = F.interpolate(pictures[some, None] / 255, size=(size, size), mode="bilinear", antialias=True)
    return Cells(scaled, broken[some].long(), of_four[some])
