"""Sums and rows of attention probabilities, without the attention matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from . import reference
from .fused import attend
from .look import Look, look

__all__ = ["attention_columns", "attention_entropy", "attention_lse", "attention_rows", "attention_with_columns"]

HEADS = ("query", "key", "mean")
REDUCE = ("sum", "max")


def attention_columns(
    q: Tensor,
    k: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    weights: Tensor | None = None,
    queries: Tensor | None = None,
    window: int | None = None,
    reduce: str = "sum",
    heads: str = "query",
    lse: Tensor | None = None,
) -> Tensor:
    """What every key receives from the queries: the columns of softmax(q k^T * scaling), summed.

    Args:
        q: Queries, (b h m e).
        k: Keys, (b g n e), h a multiple of g.
        scaling: Factor on the dot products.
        mask: Bool (True is seen) or additive mask, (b|1 h|1 m|1 n).
        causal: Without a mask, whether query i sees only the keys up to its own place; the last query stands at the last key.
        query_positions: Query i sees the keys whose position is not above its own, (b m), in the place of `causal`.
        key_positions: Those of the keys, (b n) or (b g n).
        key_mask: Keys that are there, (b n) or (b g n) bool.
        softcap: The scores become softcap * tanh(score / softcap), before the mask.
        sinks: The score of a key that every query sees and that is not returned, (h).
        weights: How much each query counts, (b m), or (b r) of those chosen; 0 leaves it out.
        queries: Look at these queries alone, (b r).
        window: Look at so many last queries alone.
        reduce: `sum` over queries or `max`.
        heads: `query` for each query head, `key` for the mean of those that share a key head, `mean` for the mean of all.
        lse: The log-sum-exp of each query's scores, sink included, (b h m), where it is known; it is taken as a constant.

    Returns:
        (b h n), (b g n) or (b n), float32 at least.

    Raises:
        ValueError: Shapes do not fit, or an option has no such value.
    """
    if reduce not in REDUCE or heads not in HEADS:
        raise ValueError(f"reduce is one of {REDUCE} and heads one of {HEADS}, got {reduce!r} and {heads!r}. Choose among these.")
    if queries is not None and window is not None:
        raise ValueError("attention_columns takes queries or a window, got both. Leave one out.")
    looks = look(q, k, scaling, mask, causal and mask is None, query_positions, key_positions, key_mask, softcap, sinks)
    m, n = q.shape[2], k.shape[2]
    if window is not None and window < m:
        q, looks = q[:, :, -window:], looks.last(window)
        weights, lse = (None if t is None else t[..., -window:] for t in (weights, lse))
    if queries is not None:
        looks, at = looks.rows(queries, m, n), queries[:, None].expand(-1, q.shape[1], -1)
        q = q.gather(2, at[..., None].expand(*at.shape, q.shape[3]))
        lse = None if lse is None else lse.gather(2, at)
    out = _columns(q, k, looks, weights, reduce, lse)
    if heads == "query":
        return out
    return out.mean(dim=1) if heads == "mean" else out.unflatten(1, (k.shape[1], -1)).mean(dim=2)


def _columns(q: Tensor, k: Tensor, looks: Look, weights: Tensor | None, reduce: str, lse: Tensor | None) -> Tensor:
    given = [q, k, *looks.tensors(), *(t for t in (weights, lse) if t is not None)]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    apart = learns and (lse is not None or any(t.requires_grad for t in looks.tensors()))
    refuses = "a gradient of a mask, of sinks or beside a known log-sum-exp" if apart else None
    forms = _twin() if choose("attention_columns", *given, refuses=refuses) else reference
    if not learns or apart:  # what has no backward of its own goes through that of torch, chunk by chunk
        known = forms.lse(q, k, looks) if lse is None and forms is not reference else lse
        return forms.columns(q, k, looks, weights, reduce, known)[0]
    return Columns.apply(q, k, weights, looks, reduce, forms)


class Columns(torch.autograd.Function):
    """The columns with a backward pass that computes the probabilities again."""

    @staticmethod
    def forward(ctx, q, k, weights, looks, reduce, forms):
        lse = forms.lse(q, k, looks)
        out, best = forms.columns(q, k, looks, weights, reduce, lse, choice=True)
        ctx.save_for_backward(q, k, weights, lse, best)
        ctx.looks, ctx.forms = looks, forms
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, weights, lse, best = ctx.saved_tensors
        dq, dk, dw = ctx.forms.columns_backward(grad.contiguous(), q, k, ctx.looks, weights, lse, best)
        return dq.to(q.dtype), dk.to(k.dtype), None if weights is None else dw.sum(dim=1).to(weights.dtype), None, None, None


def attention_lse(
    q: Tensor,
    k: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The log-sum-exp of each query's scores, to be used again; arguments as in `attention_columns`.

    Returns:
        (b h m), float32 at least; inf for a query that sees no key. Its gradient is not taken.
    """
    looks = look(q, k, scaling, mask, causal and mask is None, query_positions, key_positions, key_mask, softcap, sinks)
    forms = _twin() if choose("attention_lse", q, k, *looks.tensors()) else reference
    with torch.no_grad():
        return forms.lse(q, k, looks)


def attention_with_columns(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The attention itself, and with it the sums of `attention_columns`, for little more than the attention alone.

    Args:
        q, k, v: Queries (b h m e), keys (b g n e) and values (b g n f), h a multiple of g.
        mask: Bool (True is seen), (b|1 h|1 m|1 n).
        scaling, causal, weights: As in `attention_columns`.

    Returns:
        (b m h f) in the dtype of q, zeros for a query that sees no key, and (b h n), float32 at least. Torch alone does it: where the
        Triton twin of `attention_columns` runs, a fused attention and that one are quicker.

    Raises:
        ValueError: Shapes do not fit, the mask is not bool, or a gradient is wanted.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"The mask of attention_with_columns must be bool, got {mask.dtype}. Pass one that is True where a key is seen.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must be (b g n f), here {(*k.shape[:3], 'f')}, got {tuple(v.shape)}. Pass the values of these keys.")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        rule = "attention_with_columns takes no gradient"
        raise ValueError(f"{rule}, got inputs that require one. Call attention_columns beside an attention, or torch.no_grad().")
    return attend(q, k, v, look(q, k, scaling, mask, causal and mask is None), weights)


def attention_rows(
    q: Tensor,
    k: Tensor,
    index: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The probabilities of chosen queries: index (b r) into q (b h m e), to (b h r n); the rest as in `attention_columns`.

    What is returned is as large as what is computed, so torch alone does it.
    """
    return reference.rows(q, k, index, look(q, k, scaling, mask, causal and mask is None, softcap=softcap, sinks=sinks))


def attention_entropy(q: Tensor, k: Tensor, *, scaling: float, mask: Tensor | None = None, pooled: bool = False) -> Tensor:
    """How undecided every query is: the entropy of its probabilities in nats, q (b h m e) and k (b g n e) to (b h m).

    With `pooled` it is that of the mean of the heads' probabilities, (b m). Torch alone does it: it is asked of a prompt's few keys.
    """
    return reference.entropy(q, k, look(q, k, scaling, mask), pooled)


def _twin():
    from . import twin

    return twin
