"""One call of an attention function: its arguments, and the probabilities it stands for, computed on demand, never as a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from hf_tokens_kernels import attention_columns, attention_rows, attention_with_columns
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..tokens.altered import altered
from ..tokens.token_map import in_float32, indices


class Attending(NamedTuple):
    """How an attention call reads its keys.

    Attributes:
        index: The keys that are read, (b k r) for each key head; None reads all.
        bias: Added to the scores of each query with these, (b h m r), -inf where it must not look; None adds nothing.
        by: How many places further on those keys are read than they stand, (b 1|k r); None reads them where they stand.

    All queries of one head read keys 0 and 2 alone:

    >>> Attending(index=torch.tensor([[[0, 2]]]), bias=None).index.shape
    torch.Size([1, 1, 2])
    """

    index: Tensor | None
    bias: Tensor | None
    by: Tensor | None = None


@dataclass(frozen=True)
class AttentionCall:
    """The arguments of an attention function.

    Attributes:
        q, k, v: Queries (b h m e), keys and values (b g n e); the last m keys belong to the queries.
        mask: (b|1 h|1 m n) bool or additive, or None.
        scaling: Factor on the dot products.
        causal: Whether a query sees only what is before it, where there is no mask.
        bias: Added to the scores, (b|1 h m n), or None.
        softcap: The scores become softcap * tanh(score / softcap); None leaves them.
        sinks: The score of a key without a value, (h), or None.
        strange: What else shapes the keys or the probabilities.
        turn: Turns keys or queries (b h r e) to places further on, (b 1|h r); None where no method asked for it.
        known: Sums over all real queries that are computed already, by `reduce`, `heads` and whether with a gradient.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scaling: float
    causal: bool
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    strange: tuple[str, ...] = ()
    turn: Callable[[Tensor, Tensor], Tensor] | None = None
    known: dict[tuple[str, str, bool], Tensor] = field(default_factory=dict, repr=False)

    def check(self) -> None:
        """Refuse a call whose keys or probabilities are not those of an attention among the tokens, but shaped by what we do not know."""
        if self.strange:
            rule = "Keys and scores need an attention among the stream's own tokens: a softmax of products, mask, bias, soft cap and sinks"
            raise UnsupportedError(explain(rule, f"one with {', '.join(self.strange)}", "Choose a method that does not look at attention."))

    def affinity(self, index: Tensor | None = None, by: Tensor | None = None, of_queries: Tensor | None = None) -> Tensor:
        """The scores before the softmax, -inf where a query does not look, of all keys (b h m n) or those of index (b g r), (b h m r).

        Keys are read so many places further on, (b 1|g r), and queries ask from so many, (b 1 m).
        """
        keys = self.k if index is None else pick_keys(self.k, index)
        keys = keys if by is None else self.turn(keys, by)
        keys = keys.repeat_interleave(self.q.shape[1] // keys.shape[1], dim=1)
        queries = self.q if of_queries is None else self.turn(self.q, of_queries)
        scores = in_float32(queries @ keys.mT) * self.scaling
        scores = scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
        mask = self._added(index)
        return scores if mask is None else added(mask, scores)

    def attending(self, reading: Attending) -> AttentionCall:
        """The call that reads its keys so."""
        index, bias, by = reading
        k, v = (t if index is None else pick_keys(t, index.expand(-1, t.shape[1], -1)) for t in (self.k, self.v))
        k = k if by is None else self.turn(k, by)
        mask = self._added(index)
        if bias is not None:
            mask = bias if mask is None else added(mask, bias)
            mask = mask.clamp(min=torch.finfo(self.q.dtype).min).to(self.q.dtype)
        return altered(self, k=k, v=v, mask=mask, bias=None)

    def rows(self, part: slice) -> AttentionCall:
        """The same call for some of its queries."""
        m, n = self.q.shape[2], self.k.shape[2]
        mask, bias = (t if t is None or t.shape[2] == 1 else t[:, :, part] for t in (self.mask, self.bias))
        if mask is None and self.causal and m > 1:
            place = torch.arange(n, device=self.q.device)
            mask = (place <= place[n - m :][part, None])[None, None]
        return altered(self, q=self.q[:, :, part], mask=mask, bias=bias, causal=False, known={})

    def sums_along(self, real: Tensor | None) -> bool:
        """Whether `with_columns` computes what `scaled_dot_product_attention` would, no later than that and the columns apart."""
        (b, _, m, _), n, mask = self.q.shape, self.k.shape[2], self.mask
        shaped = self.strange or any(x is not None for x in (self.bias, self.softcap, self.sinks))
        learns = torch.is_grad_enabled() or torch.compiler.is_compiling()
        elsewhere = self.q.device.type != "cpu" or torch.is_autocast_enabled("cpu")  # there a fused attention and its columns are quicker
        if shaped or learns or elsewhere or m == 1 or {self.q.dtype, self.k.dtype, self.v.dtype} != {torch.float32}:
            return False
        if mask is None:
            hides = not self.causal or m == n
        else:
            hides = mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[3] == n
        return hides and len(self.k) == b and (real is None or real.shape == (b, m))

    def with_columns(self, real: Tensor | None) -> Tensor:
        """What the queries read, (b m h f); what each key gets from the real ones, (b m), is known from now on."""
        weights, looks = None if real is None else real.to(self.q.dtype), dict(scaling=self.scaling, mask=self.mask, causal=self.causal)
        out, columns = attention_with_columns(self.q, self.k, self.v, weights=weights, **looks)
        self.known["sum", "query", torch.is_grad_enabled()] = columns
        return out

    def _added(self, index: Tensor | None) -> Tensor | None:
        """What is added to the products, or bool where they are only hidden: of all keys, or for each query head of those of an index."""
        mask = self.shape()["mask"]
        mask = self._causal_mask() if mask is None else mask
        if mask is None or index is None:
            return mask
        wide = index.repeat_interleave(self.q.shape[1] // index.shape[1], dim=1)[:, :, None]
        return mask.expand(*self.q.shape[:3], self.k.shape[2]).gather(3, wide.expand(-1, -1, self.q.shape[2], -1))

    def _causal_mask(self) -> Tensor | None:
        """The mask (1 1 m n) that the call goes by where it is given none; None if every query sees all."""
        m, n = self.q.shape[2], self.k.shape[2]
        return torch.ones(m, n, dtype=torch.bool, device=self.q.device).tril(n - m)[None, None] if self.causal and m > 1 else None

    def shape(self) -> dict[str, Any]:
        """What the kernels must know to compute the same probabilities."""
        mask, causal = self.mask, self.causal and self.q.shape[2] > 1
        if self.bias is not None:
            mask = self._causal_mask() if mask is None else mask
            hides = mask is not None and mask.dtype == torch.bool
            mask = self.bias if mask is None else self.bias.masked_fill(~mask, -torch.inf) if hides else self.bias + mask
        return dict(scaling=self.scaling, mask=mask, causal=causal, softcap=self.softcap, sinks=self.sinks)


def pick_keys(x: Tensor, index: Tensor) -> Tensor:
    """The keys of an index (b g r) of x (b g n e), (b g r e)."""
    return x.gather(2, index[..., None].expand(*index.shape, x.shape[3]))


def added(mask: Tensor, scores: Tensor) -> Tensor:
    """Scores with a bool or additive mask, -inf where that hides them."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return (scores + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -torch.inf)


def mean_of_heads(x: Tensor, groups: int) -> Tensor:
    """Something of each query head (b h n), its mean over the heads of each group, (b g n)."""
    return x.unflatten(1, (groups, -1)).mean(dim=2)


@dataclass
class Scores:
    """Attention probabilities of one call, computed in chunks on demand, never as a matrix.

    Attributes:
        call: The attention call.
        real: Queries that are real tokens, (b m) bool.
        back: Brings what the call's keys received back to the tokens of the stream.
        group: Brings what the call's key heads received (b g n) to those of the cache, (b k n).
    """

    call: AttentionCall
    real: Tensor | None = None
    back: Callable[[Tensor, int], Tensor] | None = None
    group: Callable[[Tensor], Tensor] | None = None

    def columns(
        self,
        weights: Tensor | None = None,
        reduce: str = "sum",
        heads: str = "query",
        queries: Tensor | None = None,
        among: Tensor | None = None,
    ) -> Tensor:
        """What each key receives over all real queries or those with a weight, (b m).

        Args:
            weights: How much each query counts, (b m), or (b r) of those chosen.
            reduce: `sum` over the queries, or `max`.
            heads: `query` for each query head, `key` for the mean of those on each key head, `mean` for the mean of all.
            queries: Look at these alone, (b r).
            among: Keys among which the softmax is, (b n) or (b k n) bool; the others are hidden.

        Returns:
            (b h n), (b g n) or (b n), by `heads`.
        """
        key, plain = (reduce, heads, torch.is_grad_enabled()), weights is None and queries is None and among is None
        out = self.call.known.get(key) if plain else None
        if out is None:
            real = None if self.real is None else self.real.to(self.call.q.dtype)
            real = real if real is None or queries is None else real.gather(1, queries)
            counted = real if weights is None else weights if real is None else weights * real
            some = dict(weights=counted, queries=queries, reduce=reduce, heads=heads, key_mask=self._of_call(among))
            of_query_heads = self.call.known.get((reduce, "query", key[2])) if plain and reduce == "sum" else None
            if of_query_heads is None:
                out = attention_columns(self.call.q, self.call.k, **some, **self.call.shape())
            else:
                out = mean_of_heads(of_query_heads, self.call.k.shape[1] if heads == "key" else 1)
                out = out if heads == "key" else out[:, 0]
            if plain:
                self.call.known[key] = out
        out = self.group(out) if heads == "key" and self.group is not None else out
        return out if self.back is None else self.back(out, out.dim() - 1)

    def _of_call(self, among: Tensor | None) -> Tensor | None:
        """Flags of the tokens, or entries, (b n) or (b k n), for the keys of the call, (b g n)."""
        if among is None:
            return None
        b, g, n, _ = self.call.k.shape
        places = torch.arange(n, device=among.device).expand(b, g, n)
        places = places if self.back is None else self.back(places, 2)
        wide = among[:, None] if among.dim() == 2 else among.repeat_interleave(g // among.shape[1], dim=1)
        return torch.zeros(b, g, n, dtype=torch.bool, device=among.device).scatter(2, places, wide.expand_as(places))

    def of_last(self, window: int) -> Tensor:
        """What each key receives from each of the last `window` real queries, on average, mean of the heads on its key head, (b k n)."""
        q = self.call.q
        real = torch.ones(len(self.call.k), q.shape[2], dtype=torch.bool, device=q.device) if self.real is None else self.real
        last = real & (real.flip(1).cumsum(dim=1).flip(1) <= window)
        index = indices(last, min(window, q.shape[2]))
        weights = last.gather(1, index).to(q.dtype)
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        return in_float32(self.columns(weights, heads="key", queries=index))

    def rows(self, index: Tensor) -> Tensor:
        """The probabilities of chosen queries: index (b r) to (b h r n)."""
        out = attention_rows(self.call.q, self.call.k, index, **self.call.shape())
        return out if self.back is None else self.back(out, 3)
