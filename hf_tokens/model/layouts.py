"""How a model may lay out its tokens: to (b n d), and back."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

PACKED = "n d"  # samples one behind the other in one row
# layout -> to (b n d), and back, with the model's own tensor for its shape; parallel residual streams (c) count as one token
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "b n d": (lambda x: x, lambda x, raw: x),
    PACKED: (lambda x: x[None], lambda x, raw: x[0]),
    "n b d": (lambda x: x.transpose(0, 1), lambda x, raw: x.transpose(0, 1)),
    "b n c d": (lambda x: x.flatten(2), lambda x, raw: x.unflatten(2, raw.shape[2:])),
    "b n (c d)": (lambda x: x, lambda x, raw: x),
    "(b t) n d": (lambda x: x, lambda x, raw: x),
    "b c n d": (lambda x: x.flatten(0, 1), lambda x, raw: x.unflatten(0, raw.shape[:2])),
    "c b n d": (
        lambda x: x.permute(1, 2, 0, 3).flatten(2),
        lambda x, raw: x.unflatten(2, (raw.shape[0], raw.shape[3])).permute(2, 0, 1, 3),
    ),
}


def axes(layout: str) -> int:
    """The number of axes of a layout."""
    return len(re.sub(r"\(.*?\)", "x", layout).split())
