"""The attention call of one block: noted for the methods, and computed by the cache itself where that can be."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention.call import AttentionCall, Scores
from ..attention.tap import BACKENDS, TAPPED_PREFIX, close_tap, open_tap, tapped_now
from ..errors import UnsupportedError, explain
from ..kv.layer import TokenCacheLayer
from ..model import families
from ..model.arguments import shown_by
from ..model.classes import class_name
from ..roles.base import Method
from ..roles.signals import SCORED, TAPPED
from ..tokens.altered import altered
from ..tokens.entries import cells_of
from ..tokens.ledger import TokenLedger
from .handler import handler_of
from .hooks import own_attention
from .run import Site

if TYPE_CHECKING:
    from .block import BlockSurgery


def taps(method: Method, names: set[str]) -> bool:
    """Whether a method that names these signals needs to see the attention call."""
    return "tap" in handler_of(method).hooks(method) or SCORED in names or bool(TAPPED & names)


class AttentionTap:
    """What stands between a block and its attention function.

    Attributes:
        noting: Whether the call that is under way is to be noted.
        readers: Tokens in front of it that only read.
        site: Where it is.
        call: The arguments of the attention function.
    """

    def __init__(self, block: BlockSurgery):
        self.block = block
        self.noting, self.readers, self.site = False, 0, None
        self.call: AttentionCall | None = None
        self.hands_on = False  # whether the attention call is known to get the keys and values that the cache returned
        self.same_keys = self.same_values = False  # whether it is known to get them head by head, each several times or once
        self.opened = False

    def open(self) -> None:
        """See the attention call from now on, whatever backend someone has switched to since."""
        if not self.opened or not tapped_now(self.block.attention):
            open_tap(own_attention(self.block), self)
            self.opened = True

    def close(self) -> None:
        """Give the attention its own backend back."""
        if self.opened:
            close_tap(self.block.attention, self)
            self.opened = False

    @contextlib.contextmanager
    def running(self, noting: bool, readers: int, site: Site) -> Iterator[None]:
        """Let the hooks inside of the block work while it runs at a site, with so many tokens in front that only read."""
        before = self.noting, self.readers, self.site
        self.noting, self.readers, self.site = noting, readers, site
        try:
            yield
        finally:
            self.noting, self.readers, self.site = before

    def forget(self) -> None:
        """Forget the call: the block is done."""
        self.call = None

    def note_call(self, call: AttentionCall) -> list[Callable[[], AttentionCall]]:
        """Hold the attention call until the verbs have been called; returns the calls that take its place.

        Tokens that only read have no key and no value in it; they stand in front. A mask or a bias that the block had no argument for is
        put in.
        """
        site = self.site
        local, layer = site.local, site.layer
        returned = None if layer is None else layer.returned
        as_stored = returned is not None and call.k is returned[0] and call.v is returned[1]
        self.hands_on = as_stored and call.bias is None and not call.strange and shared_mask(call.mask)
        if returned is not None:
            pairs = zip((call.k, call.v), returned, strict=True)
            self.same_keys, self.same_values = (read_alike(states, cached) for states, cached in pairs)
            self.same_values &= not families.MIXES_HEADS.search(class_name(self.block.attention))
        mask = site.mask if call.mask is None else call.mask
        bias = call.bias if site.bias is None else site.bias
        n, p = call.k.shape[2], self.readers
        mask, bias = (t[..., p:] if p and t is not None and t.shape[-1] == n else t for t in (mask, bias))
        own = n <= (local.m if layer is None else layer.num_returned) and call.q.shape[0] in (1, local.batch)
        strange = call.strange if own else (*call.strange, "other keys than those")
        noted = altered(call, k=call.k[:, :, p:], v=call.v[:, :, p:], mask=mask, bias=bias, strange=strange)
        self.call = noted
        shaping = self.block.plan.attends
        return [lambda: noted] if shaping is None else handler_of(shaping).attend(shaping, site, noted)

    def read_packed(self, call: AttentionCall) -> Tensor | None:
        """What the attention call returns, (b m h f), where it reads packed entries as they are; None else."""
        layer = self.site.layer
        if layer is None or not layer.reads_packed or not self.hands_on:
            return None
        weighs = any(SCORED in method.asks for method in self.block.plan.acting)
        out, weights = layer.attend(call.q, call.sinks, weighs, scaling=call.scaling, softcap=call.softcap)
        if weighs:
            call.known["sum", "key", torch.is_grad_enabled()] = weights
        return out.transpose(1, 2)

    def read_summed(self) -> Tensor | None:
        """What the attention call returns, (b m h f), where it is computed along with the sums that a method reads; None else."""
        block, site = self.block, self.site
        wanted = block.plan.sums and site.run.prefill and block.plan.attends is None and not block.module.training
        real = site.local_real() if wanted else None
        return self.call.with_columns(real) if wanted and self.call.sums_along(real) else None

    def watches(self, layer: TokenCacheLayer | None) -> bool:
        """Whether to see the attention call because it might read a cache as it lies."""
        if layer is None or not layer.packed:
            return False
        attention = self.block.attention
        config = None if attention is None else vars(attention).get("config")
        return config is not None and (config._attn_implementation or "").removeprefix(TAPPED_PREFIX) in BACKENDS

    def check_read(self, layer: TokenCacheLayer | None) -> None:
        """Refuse an attention that should have read a cache as it lies, and did not: it got other keys than the cache returned."""
        if layer is not None and layer.reads_packed:
            rule = "An attention must get the keys as the cache returns them in each pass, as it did before"
            raise UnsupportedError(explain(rule, f"other ones in {type(self.block.attention).__name__}", "Choose other layers."))

    def reads_itself(self, layer: TokenCacheLayer, ledger: TokenLedger, masks: Iterable[Tensor] = ()) -> bool:
        """Whether the next attention call may read the cache by itself, as it lies: one query that sees all its entries by these masks, in
        a block that is given no bias."""
        block = self.block
        if not self.hands_on or block.plan.attends is not None or block.module.training or torch.is_grad_enabled():
            return False
        if block.plan.needs_scores or block.surgery.examines:
            return False
        alone = ledger.m == 1 and ledger.untouched and layer.readable and not block.surgery.plan.shares_keys
        if not alone or block.attention.config._attn_implementation.removeprefix(TAPPED_PREFIX) != "sdpa":
            return False
        return all(hides_none(mask, layer) for mask in masks)

    def noted(self) -> AttentionCall:
        """The attention call of this block; refused where there was none that we could see."""
        if self.call is None:
            rule = "Queries, keys, scores and masks of our own need an attention that calls the attention interface of Transformers"
            remedy = "Choose another model, or a method that looks at no attention and keeps as many tokens in each sample."
            raise UnsupportedError(explain(rule, type(self.block.attention).__name__, remedy))
        return self.call

    def check_heads(self, layer: TokenCacheLayer, alike: bool = False, values: bool = False) -> None:
        """Refuse an attention whose heads do not read the heads of its cache one after the other, each several times or once.

        Where all read the one head that there is, it may hold what their keys are made of, unless they must be `alike`.
        """
        if self.same_keys and (self.same_values or not values) or layer.heads == 1 and not alike:
            return
        rule = "What the heads of an attention are to a cache needs keys and values that are read as they are stored, head by head"
        got = f"others in {type(self.block.attention).__name__}, whose cache holds {layer.heads}"
        raise UnsupportedError(explain(rule, got, "Choose a method, or a setting of it, that looks at no head of the attention."))

    def by_head(self, layer: TokenCacheLayer, x: Tensor) -> Tensor:
        """What the key heads of the attention call received (b g n), the mean of those that read each head of the cache, (b k n)."""
        self.check_heads(layer)
        return x if x.shape[1] == layer.heads else x.unflatten(1, (layer.heads, -1)).mean(dim=2)

    def signal(self, name: str, site: Site) -> Any:
        """A signal of the attention call, over the tokens of the stream."""
        if site.whole_cache and name in ("keys", "values"):
            return site.layer.keys if name == "keys" else site.layer.values
        call = self.noted()
        if name != "queries":
            call.check()
        if name == "scores":
            back = site.from_call if site.whole_cache else site.from_local
            return Scores(call, site.local_real(), back, partial(self.by_head, site.layer) if site.whole_cache else None)
        if site.whole_cache:
            self.check_heads(site.layer, alike=True)
        return site.from_local({"queries": call.q, "keys": call.k, "values": call.v}[name], 2)


def shared_mask(mask: Tensor | None) -> bool:
    """Whether a mask (b h|1 m n) only hides keys, from all heads alike, and so may come from the model: Doge's attention makes its own."""
    if mask is None or mask.dtype == torch.bool:
        return mask is None or mask.shape[1] == 1
    if mask.shape[1] > 1 or torch.compiler.is_compiling():
        return False
    return bool(((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2)).all())


def read_alike(states: Tensor, cached: Tensor) -> bool:
    """Whether keys or values of an attention call (b g n e) are those of a cache (b k n e), each head as often as the next."""
    if states is cached:
        return True
    wide = cached.repeat_interleave(max(1, states.shape[1] // cached.shape[1]), dim=1)
    return wide.shape == states.shape and torch.equal(wide, states)


def hides_none(mask: Tensor, layer: TokenCacheLayer) -> bool:
    """Whether a mask of one query, (b|1 1 1 n) over the tokens seen, hides no entry that is stored."""
    if mask.dim() != 4 or mask.shape[1:3] != (1, 1) or mask.shape[3] <= layer.seen:
        return False
    seen = shown_by(mask)[:, :, 0].expand(len(layer.origins), -1, -1)  # b 1 n
    if bool(seen.all()):
        return True
    places = cells_of(layer.origins, layer.heads)
    hidden = ~seen.expand(-1, places.shape[1], -1).gather(2, places) & layer.there
    return not bool(hidden.any() | ~seen[..., layer.seen].all())
