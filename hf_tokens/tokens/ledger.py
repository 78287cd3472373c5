"""The ledger of one pass through a stream: which tokens are left, where they came from, and the masks that they need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .altered import altered
from .entries import Stored, append
from .token_map import TokenMap, put_back, take


@dataclass(frozen=True)
class TokenLedger:
    """The tokens at one place of a stream.

    Attributes:
        n, batch: Length and batch of the sequence that entered.
        start: Tokens that the cache saw before this pass.
        rows: Entry token whose place each token takes, (b m).
        slot: Where each entry token lives now, -1 where it is gone, (b n).
        causal: Whether a token sees only what stands before it.
        fresh: Inserted tokens, (b m) bool, or None.
        filled: Tokens that are there at all, (b m) bool, or None for all.
        alone: Whether those that are not run all the same, each seen by itself alone.
        sizes: How many entry tokens each token stands for, (b m), or None for one each.
        context: Length of the second sequence that the blocks get, to carry it along or to read it.
        behind: Whether it stands behind the tokens in what they share, and not in front.
        tokens_first: Whether tables of tokens and samples have the tokens first.
        laid_over_heads: Whether a table (n d) that all samples share may have a row for each, (b 1 n d).
        rotary_of_heads: Whether rotary tables are of tokens and heads, for all samples.
        prefix: Special tokens in front that a table of positions may leave out.
        additive: Whether the backend wants masks to be added, not bool.
        proportional: Whether a key counts by its size.
        dtype: Of the tokens, and of a mask that is made for them.
        heads: Query heads of the blocks, for a mask that is not the same in all of them.
        losses: Maps so far under which a token may have vanished.
        plain: Tokens of each row that are real and neither special nor inserted, where that is known without a look; None else.
    """

    n: int
    batch: int
    start: int
    rows: Tensor
    slot: Tensor
    causal: bool
    fresh: Tensor | None = None
    filled: Tensor | None = None
    alone: bool = False
    sizes: Tensor | None = None
    context: int = 0
    behind: bool = False
    tokens_first: bool = False
    laid_over_heads: bool = False
    rotary_of_heads: bool = False
    prefix: int = 0
    additive: bool = False
    proportional: bool = False
    dtype: torch.dtype = torch.float32
    heads: int = 1
    losses: int = 0
    plain: int | None = None
    untouched: bool = True
    memo: dict[int, tuple[Any, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, hidden: Tensor, start: int, causal: bool, **more: Any) -> TokenLedger:
        """The ledger of a sequence that nothing has changed yet, hidden (b n d)."""
        batch, n = hidden.shape[:2]
        rows = torch.arange(n, device=hidden.device).expand(batch, n)
        return cls(n, batch, start, rows, rows, causal, dtype=hidden.dtype, **more)

    @property
    def m(self) -> int:
        return self.rows.shape[1]

    def move(self, tokens: TokenMap) -> TokenLedger:
        """The ledger behind a map of the tokens."""
        gather = lambda flags: None if flags is None else flags.gather(1, tokens.source)
        fresh, filled = gather(self.fresh), gather(self.filled)
        if tokens.fresh is not None:
            fresh = tokens.fresh if fresh is None else fresh | tokens.fresh
            filled = None if filled is None else filled | tokens.fresh
        if tokens.filled is not None:
            filled = tokens.filled if filled is None else filled & tokens.filled
        sizes = tokens.count(self.all_sizes())
        if tokens.fresh is not None:
            sizes = torch.where(tokens.fresh, 1.0, sizes)
        slot = torch.where(self.slot < 0, -1, tokens.slot.gather(1, self.slot.clamp(min=0)))
        rows = self.rows.gather(1, tokens.source)
        plain = None if self.plain is None or tokens.gone is None else self.plain - tokens.gone
        moved = dict(rows=rows, slot=slot, fresh=fresh, filled=filled, sizes=sizes, losses=self.losses + tokens.loses, plain=plain)
        return altered(self, **moved, untouched=False, memo={})

    def cut(self, whole: Tensor, inside: Tensor) -> Tensor:
        """The tokens that are left of a sequence (b n d) that was changed outside; inserted ones stay as they are `inside` (b m d)."""
        out = take(whole, self.rows)
        return out if self.fresh is None else torch.where(self.fresh[..., None], inside.to(out), out)

    def restore(self, tokens: Tensor, whole: Tensor) -> Tensor:
        """The sequence (b n d) with the tokens (b m d) back in their places; one that is gone keeps its row of `whole`."""
        return put_back(tokens, self.slot, whole)

    def all_sizes(self) -> Tensor:
        """How many entry tokens each token stands for, (b m) float."""
        return self.rows.new_ones(self.rows.shape, dtype=torch.float32) if self.sizes is None else self.sizes

    def flags(self, flags: Tensor | None, default: bool) -> Tensor:
        """A flag per token, with None spelled out."""
        return torch.full_like(self.rows, default, dtype=torch.bool) if flags is None else flags

    def real(self, padding: Tensor | None) -> Tensor:
        """Tokens that are there at all and no padding, (b m) bool, given the real ones of the sequence that entered, (b n)."""
        flags = self.flags(self.filled, True)
        return flags if padding is None else flags & padding.gather(1, self.rows)

    def uniform(self) -> bool:
        """Whether every sample of the batch keeps the same places; a graph that is recorded is for those that do not."""
        return self.batch == 1 or not torch.compiler.is_exporting() and bool((self.rows == self.rows[:1]).all())

    def sizes_with(self, stored: Stored | None) -> Tensor | None:
        """How many tokens each key counts for, (b s) or (b k s); None if for one each."""
        if not self.proportional and (stored is None or stored.sizes is None):
            return None
        new = self.all_sizes() if self.proportional else torch.ones_like(self.rows, dtype=torch.float32)
        if stored is None:
            return new
        return append(torch.ones_like(stored.origins, dtype=torch.float32) if stored.sizes is None else stored.sizes, new)

    def weigh(self, mask: Tensor | None, sizes: Tensor | None) -> Tensor | None:
        """Add log(size) of each key to a mask (proportional attention), sizes (b s) or (b k s)."""
        if sizes is None:
            return mask
        bias = sizes.double().log().to(self.dtype)
        bias = bias[:, None, None] if bias.dim() == 2 else self.to_heads(bias)[:, :, None]
        if mask is None:
            return bias
        if mask.shape[-1] > bias.shape[-1]:  # keys of another sequence stand behind
            bias = torch.nn.functional.pad(bias, (0, mask.shape[-1] - bias.shape[-1]))
        if mask.dtype == torch.bool:
            return torch.where(mask, bias, torch.finfo(bias.dtype).min)
        return mask + bias.to(mask.dtype)

    def to_heads(self, x: Tensor) -> Tensor:
        """Something of each key head (b k ...), for each query head."""
        return x.repeat_interleave(max(1, self.heads // x.shape[1]), dim=1)

    def take_heads(self, value: Tensor, columns: Tensor) -> Tensor:
        """The columns of a mask (b 1|h m n) at the keys of each key head, (b k s)."""
        columns = self.to_heads(columns)
        wide = value.expand(len(columns), columns.shape[1], *value.shape[2:])
        return wide.gather(3, columns[:, :, None].expand(-1, -1, wide.shape[2], -1))

    def joint(self) -> Tensor:
        """Places in the joint sequence of the tokens that are left and of the second one's, (b m+context)."""
        other = torch.arange(self.context, device=self.rows.device).expand(self.batch, -1)
        return torch.cat([self.rows, other + self.n] if self.behind else [other, self.rows + self.context], dim=1)

    def beside(self, flags: Tensor, value: float) -> Tensor:
        """Something of each token (b m), with a value for those of the second sequence."""
        return torch.nn.functional.pad(flags, (0, self.context) if self.behind else (self.context, 0), value=value)

    def columns(self, width: int, stored: Stored | None) -> Tensor:
        """Places in the full sequence of the keys that this block sees, (b s) or (b k s); those of another sequence stand behind."""
        full = self.start + self.n
        if width > full and (stored is not None or not self.start):
            own = self.rows if stored is None else self.columns(full, stored)
            return append(own, torch.arange(full, width, device=own.device).expand(len(own), -1))
        if stored is None:
            return self.rows + (width - self.n if self.start and width != self.n else 0)
        return append(stored.origins, self.rows + self.start)

    def filled_with(self, stored: Stored | None) -> Tensor | None:
        """Keys that are there at all, (b s) or (b k s); None if all are."""
        if stored is None:
            return self.filled
        if stored.filled is None and self.filled is None:
            return None
        old = torch.ones_like(stored.origins, dtype=torch.bool) if stored.filled is None else stored.filled
        return append(old, self.flags(self.filled, True))

    def visible(self, stored: Stored | None) -> Tensor | None:
        """What the mask of the full sequence cannot know: filler, and the order of inserted tokens; (b 1|k 1|m s) bool, or None."""
        filled, visible = self.filled_with(stored), None
        if filled is not None:
            visible = filled[:, None, None] if filled.dim() == 2 else self.to_heads(filled)[:, :, None]
            if self.alone:
                itself = torch.eye(self.m, dtype=torch.bool, device=filled.device)  # m m, query by key
                visible = visible | torch.nn.functional.pad(itself, (filled.shape[-1] - self.m, 0))
        if self.fresh is not None and self.causal:
            place = torch.arange(self.m, device=self.rows.device)
            later = place[None, :] > place[:, None]  # m m, query by key
            either = self.fresh[:, :, None] | self.fresh[:, None, :]
            order = ~(later & either)[:, None]  # b 1 m m
            if stored is not None:
                order = torch.nn.functional.pad(order, (stored.length, 0), value=True)
            visible = order if visible is None else order & visible
        return visible

    def implied_mask(self, hidden: Tensor, stored: Stored | None) -> Tensor | None:
        """The mask where the model gave none: it relied on the order of the tokens, which may not be enough any more."""
        filled = self.filled_with(stored)
        if not self.causal:
            return self.weigh(None if filled is None else self.dress(self.visible(stored), hidden), self.sizes_with(stored))
        past = stored is not None and stored.length > 0
        sizes = self.sizes_with(stored)
        if filled is None and sizes is None and (not past or self.m == 1):
            return None
        origins = self.columns(self.start + self.n, stored)
        origins = origins[:, None] if origins.dim() == 2 else self.to_heads(origins)
        seen = origins[:, :, None] <= (self.rows + self.start)[:, None, :, None]  # b 1|k m s
        visible = self.visible(stored)
        return self.weigh(self.dress(seen if visible is None else seen & visible, hidden), sizes)

    def dress(self, seen: Tensor, hidden: Tensor) -> Tensor:
        """A bool mask as the backend wants it; a query that sees nothing sees everything."""
        seen = seen | ~seen.any(dim=-1, keepdim=True)
        if not self.additive:
            return seen
        zeros = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
        return torch.where(seen, zeros, torch.finfo(hidden.dtype).min)


def hide(mask: Tensor, visible: Tensor) -> Tensor:
    """Take keys out of a bool, integer or additive mask; a query left with nothing sees everything, since no one reads it."""
    if visible.dim() == 4 and visible.shape[1] > 1:
        heads = max(mask.shape[1], visible.shape[1])
        visible = visible.repeat_interleave(heads // visible.shape[1], dim=1)
    visible = visible.expand(torch.broadcast_shapes(visible.shape, mask.shape))
    if mask.dtype == torch.bool:
        out = mask & visible
        return out | ~out.any(dim=-1, keepdim=True)
    if not mask.is_floating_point():
        return mask * visible
    return torch.where(visible, mask, torch.finfo(mask.dtype).min)
