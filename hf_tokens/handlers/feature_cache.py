"""Feature caches: what of a denoiser's block is computed again at a step, and what an earlier step's is reused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from hf_tokens_kernels import attention_columns, attention_entropy, routed_scatter
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import hooked
from ..engine.results import ModelCall
from ..errors import UnsupportedError, explain
from ..model.pipelines import their_caches
from ..roles.feature_cache import FeatureCache
from ..tokens.token_map import take
from .kept_features import (
    Feature,
    Features,
    added_by_block,
    check_alone,
    needs_gradient,
    pack_block,
    reuse,
    store_of,
    supply_features,
    tell_computed,
)
from .stacks import decide_inside, decides_inside, run_stack
from .sublayers import Sublayer, Sublayers, refuse_on_picture, refuse_stored

FROM_FEATURES = {"influence": "attention", "doubt": "cross_attention", "shared_doubt": "cross_attention"}


@handles("FeatureCache")
class FeatureCacheHandler(Handler):
    keeps_steps = True

    def phases(self, method: FeatureCache) -> tuple[str, ...]:
        return ("sublayer",) if method.site == "sublayer" else ("call", "sublayer")

    def hooks(self, method: FeatureCache) -> set[str]:
        return {"features" if method.site == "sublayer" else "reuse"}

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        return block.state(Sublayers).attach("sublayer" if hook == "features" else "block")

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if call.context.denoising is not None:
            for surgery in call.model.streams:
                surgery.state(Features).enter(call.context.denoising[-1], call.context.begins)
        if call.context.begins:
            caching = sorted({type(method).__name__ for method in call.model.methods() if isinstance(method, FeatureCache)})
            if caching and (theirs := their_caches(call.model.base)):
                rule = "A feature cache stands alone, without a cache of diffusers' own"
                raise UnsupportedError(explain(rule, [*caching, *theirs], "Call `disable_cache()`, or disable the adapter."))
            if caching:
                refuse_stored(caching, [block.module for block in call.model.blocks()])
        return args, kwargs

    def takes_sublayer(self, method: FeatureCache, sublayer: Sublayer) -> bool:
        return decides_inside(method, sublayer) if method.site == "stack" else method.site == "sublayer" or wants(method, sublayer)

    def sublayer(self, method: FeatureCache, sublayer: Sublayer, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        block, part = sublayer.block, sublayer.part
        if method.site == "stack":
            return decide_inside(method, sublayer, hidden, arguments)
        if method.site == "block":
            return run_whole(method, sublayer, store_of(method, block), hidden, arguments)
        if needs_gradient(block, hidden):
            sublayer.count(hidden.shape[0] * hidden.shape[1])
            return sublayer.inner(hidden, **arguments)
        check_alone(method, block)
        block.state(Sublayers).check_module(part, sublayer.module)  # a pipeline may have set another processor since
        if block.surgery.state(Features).ran(sublayer, block.surgery.call.run):
            rule = "A feature cache needs sublayers that run once a step"
            raise UnsupportedError(explain(rule, f"a second call of the {part}", "Do not chunk it (`disable_forward_chunking`)."))
        store = store_of(method, block)
        kept, index = store.get(part), None
        if kept is not None and kept.output.shape[:2] == hidden.shape[:2]:
            index = reuse(method, block, hidden, kept, part)
        tell_computed(method, block, hidden, hidden[..., 0].numel() if index is None else index.numel())
        if index is None:
            sublayer.count(hidden.shape[0] * hidden.shape[1])
            output = run_whole(method, sublayer, store, hidden, arguments)
            store[part] = Feature.fresh(output[0] if isinstance(output, tuple) else output)
            return output
        sublayer.count(index.numel())
        output, age, rest = kept.output, kept.age + 1, ()
        if index.shape[1] or joins(sublayer, arguments):
            fresh, rest = run_some(sublayer, hidden, index, arguments)
            output = routed_scatter(output, fresh, index)
            age = age.scatter(1, index, 0)
        store[part] = Feature(output, age)
        return (output, *rest) if rest else output

    @torch.compiler.disable  # which blocks run is decided at each step
    def call(self, method: FeatureCache, block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
        """The block's forward; at a step that reuses it, what it added at an earlier one."""
        if method.site == "stack":
            return run_stack(method, block, args, kwargs)
        stream, index, surgery = block.surgery.stream, block.index, block.surgery
        hidden, context = stream.bind(index, args, kwargs), stream.bind_context(index, args, kwargs)
        if needs_gradient(block, hidden):
            return block.inner(*args, **kwargs)
        check_alone(method, block)
        store = store_of(method, block)
        kept = store.get("block")
        if not surgery.examines and kept is not None and kept.fits(hidden, context):
            chosen = reuse(method, block, hidden, kept, "block")
            if chosen is not None and chosen.shape[1]:
                rule = "A feature cache of whole blocks computes all tokens of a block, or none"
                raise UnsupportedError(explain(rule, f"{chosen.shape[1]} of {hidden.shape[1]}", "Return None, or indices (b 0)."))
            if chosen is not None:
                block.tap.site.within["reused"] = True
                tell_computed(method, block, hidden, 0)
                store["block"] = Feature(kept.output, kept.age + 1, kept.context, kept.form)
                return pack_block(block, kept.form, hidden + kept.output, None if kept.context is None else context + kept.context)
        tell_computed(method, block, hidden, hidden[..., 0].numel())
        output = block.inner(*args, **kwargs)
        store["block"] = added_by_block(block, output, hidden, context)
        if surgery.examines:
            value = method.examine(**supply_features(method, block, method.words["examine"], hidden, store["block"], "block"))
            if value is not None:
                surgery.report(block, method, value)
        return output


def joins(sublayer: Sublayer, arguments: dict[str, Any]) -> bool:
    """Whether this call computes the tokens of a second sequence too."""
    joint = sublayer.block.state(Sublayers).joint
    return joint and sublayer.part == "attention" and arguments.get("encoder_hidden_states") is not None


def run_some(sublayer: Sublayer, hidden: Tensor, index: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, tuple]:
    """The chosen tokens (b r d), and what is returned beside them: the chosen are the queries, all have keys."""
    refuse_on_picture(sublayer.part, arguments)
    if not joins(sublayer, arguments):
        if sublayer.part == "attention" and arguments.get("encoder_hidden_states") is None:
            arguments["encoder_hidden_states"] = hidden
        return sublayer.inner(take(hidden, index), **arguments), ()
    queries = index if index.shape[1] else index.new_zeros(len(index), 1)  # an attention needs a query
    whole = lambda module, args: (hidden, *args[1:])
    handles = [sublayer.module.get_submodule(f"to_{letter}").register_forward_pre_hook(whole) for letter in "kv"]
    with hooked(handles):
        output = sublayer.inner(take(hidden, queries), **arguments)
    return output[0][:, : index.shape[1]], output[1:]


def run_whole(method: FeatureCache, sublayer: Sublayer, store: dict, hidden: Tensor, arguments: dict) -> Any:
    """All tokens, and the signals of them that the method names."""
    if not wants(method, sublayer):
        return sublayer.inner(hidden, **arguments)
    with AttentionCalls() as calls, noted_projections(sublayer.module) as projected:
        output = sublayer.inner(hidden, **arguments)
    if calls.noted:
        q, k, mask, scaling = calls.noted[0]
    elif {"q", "k"} <= projected.keys():  # an attention by matrix products
        q, k = (split_heads(projected[letter], sublayer.module.heads) for letter in "qk")
        mask, scaling = spread_mask(arguments, hidden), sublayer.module.scale
    else:
        rule, got = "What an attention gives to its tokens is read off torch's attention function", type(sublayer.module).__name__
        raise UnsupportedError(explain(rule, f"{got} without a call of it", "Choose another attention backend."))
    if sublayer.part == "attention":
        ledger = sublayer.block.surgery.call.run.ledger  # a second sequence stands beside the tokens
        first = 0 if ledger.behind else k.shape[2] - ledger.n
        store["influence"] = attention_columns(q, k, scaling=scaling, mask=mask, heads="mean")[:, first : first + ledger.n]
    else:
        store["doubt"] = store["shared_doubt"] = attention_entropy(q, k, scaling=scaling, mask=mask, pooled=True)
        if "shared_doubt" in method.asks and sublayer.block.surgery.call.context.steps_of_denoiser.halves():
            mask = None if mask is None else mask.expand(*q.shape[:2], *mask.shape[2:])
            q, k, mask = (None if x is None else beside(x) for x in (q, k, mask))
            store["shared_doubt"] = attention_entropy(q, k, scaling=scaling, mask=mask, pooled=True).repeat(2, 1)
    return output


def beside(x: Tensor) -> Tensor:
    """The heads of a batch's second half behind those of its first, (b h ...) to (b/2 2h ...)."""
    return torch.cat(x.chunk(2), dim=1)


class AttentionCalls(TorchFunctionMode):
    """Notes the calls of torch's attention function while it is entered: query, key, mask and scaling of each."""

    def __init__(self):
        super().__init__()
        self.noted: list[tuple[Tensor, Tensor, Tensor | None, float]] = []

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            arguments = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
            scaling = arguments.get("scale") or arguments["query"].shape[-1] ** -0.5
            self.noted.append((arguments["query"], arguments["key"], arguments.get("attn_mask"), scaling))
        return func(*args, **kwargs)


@contextmanager
def noted_projections(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Keep what the projections to queries and keys return."""
    noted: dict[str, Tensor] = {}
    inside = module._modules
    sources = {letter: inside.get(f"norm_{letter}") or inside.get(f"to_{letter}") for letter in "qk"}

    def keep(letter: str) -> Callable:
        return lambda module, args, output: noted.__setitem__(letter, output)

    handles = [source.register_forward_hook(keep(letter)) for letter, source in sources.items() if source is not None]
    with hooked(handles):
        yield noted


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b n (h e)) or (b h n e) to (b h n e)."""
    return x if x.dim() == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


def spread_mask(arguments: dict[str, Any], hidden: Tensor) -> Tensor | None:
    """The mask of a call, (b|1 h|1 m|1 n)."""
    mask = arguments.get("attention_mask")
    if mask is None:
        return None
    mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    return mask if mask.shape[0] == len(hidden) else mask.view(len(hidden), -1, *mask.shape[2:])


def wants(method: FeatureCache, sublayer: Sublayer) -> bool:
    """Whether a method names a signal that is read off this attention."""
    examined = method.words["examine"] if sublayer.block.surgery.examines else ()
    return any(FROM_FEATURES.get(name) == sublayer.part for name in (method.signals if method.site == "sublayer" else examined))
