"""Feature caches: what of a denoiser's block is computed again at a step, and what an earlier step's is reused."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from ..model.pictures import grid
from ..model.pipelines import their_caches
from ..roles.feature_cache import FeatureCache
from ..tokens.token_map import take
from .sublayers import Sublayer, Sublayers, refuse_on_picture

FROM_FEATURES = {"influence": "attention", "doubt": "cross_attention", "shared_doubt": "cross_attention"}


@dataclass
class Feature:
    """What a sublayer returned, or what a block added, and how many steps ago each token of it was computed."""

    output: Tensor  # b n d
    age: Tensor  # b n
    context: Tensor | None = None  # what a block added to a second sequence, b c d
    form: tuple[type, int] | None = None  # of a block's results, where they are several

    def fits(self, hidden: Tensor, context: Tensor | None) -> bool:
        """Whether it can be added to these tokens."""
        return self.output.shape == hidden.shape and (self.context is None or context is not None and self.context.shape == context.shape)

    @classmethod
    def fresh(cls, output: Tensor, context: Tensor | None = None, form: tuple[type, int] | None = None) -> Feature:
        """A feature that was computed just now."""
        return cls(output, torch.zeros(output.shape[:2], dtype=torch.long, device=output.device), context, form)


class Features(dict):
    """What a stream keeps from step to step: denoising context -> what it is of -> name -> value."""

    def __init__(self):
        super().__init__()
        self._ran: weakref.WeakKeyDictionary[Sublayer, weakref.ref] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple:
        return Features, ()

    def ran(self, sublayer: Sublayer, run: Any) -> bool:
        """Note that a sublayer runs in a pass; returns whether it did so before."""
        before, self._ran[sublayer] = self._ran.get(sublayer), weakref.ref(run)
        return before is not None and before() is run


@handles("FeatureCache")
class FeatureCacheHandler(Handler):
    keeps_steps = True

    def phases(self, method: FeatureCache) -> tuple[str, ...]:
        return ("call", "sublayer") if method.site == "block" else ("sublayer",)

    def hooks(self, method: FeatureCache) -> set[str]:
        return {"features" if method.site == "sublayer" else "reuse"}

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        return block.state(Sublayers).attach("sublayer" if hook == "features" else "block")

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if call.context.begins:
            for surgery in call.model.streams:
                surgery.state(Features).clear()
            caching = sorted({type(method).__name__ for method in call.model.methods() if isinstance(method, FeatureCache)})
            if caching and (theirs := their_caches(call.model.base)):
                rule = "A feature cache stands alone, without a cache of diffusers' own"
                raise UnsupportedError(explain(rule, [*caching, *theirs], "Call `disable_cache()`, or disable the adapter."))
        return args, kwargs

    def takes_sublayer(self, method: FeatureCache, sublayer: Sublayer) -> bool:
        return method.site == "sublayer" or wants(method, sublayer)

    def sublayer(self, method: FeatureCache, sublayer: Sublayer, hidden: Tensor, arguments: dict[str, Any]) -> Any:
        block, part = sublayer.block, sublayer.part
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
                store["block"] = Feature(kept.output, kept.age + 1, kept.context, kept.form)
                return pack_block(block, kept, hidden + kept.output, context)
        output = block.inner(*args, **kwargs)
        store["block"] = added_by_block(block, output, hidden, context)
        if surgery.examines:
            value = method.examine(**supply_features(method, block, method.words["examine"], hidden, store["block"], "block"))
            if value is not None:
                surgery.report(block, method, value)
        return output


def added_by_block(block: BlockSurgery, output: Any, hidden: Tensor, context: Tensor | None) -> Feature:
    """What a block added to its tokens, and to the second sequence that it carries along."""
    stream, index = block.surgery.stream, block.index
    returned = stream.read(index, output)
    if returned.shape != hidden.shape or hidden.dim() != 3:
        rule = "A block can be reused if it returns as many tokens as it got, as (batch, tokens, features)"
        raise UnsupportedError(explain(rule, f"{tuple(hidden.shape)} in and {tuple(returned.shape)} out", "Choose other layers."))
    if isinstance(output, Tensor):
        return Feature.fresh(returned - hidden)
    second = stream.context_index(index)
    beside = None if second is None else output[second.returned]
    if any(item is not None and item is not returned and item is not beside for item in output):
        rule = "A block can be reused if it returns its tokens, and those of a second sequence, alone"
        raise UnsupportedError(explain(rule, f"{len(output)} results of {type(block.module).__name__}", "Choose other layers."))
    return Feature.fresh(returned - hidden, None if beside is None else beside - context, (type(output), len(output)))


def pack_block(block: BlockSurgery, kept: Feature, output: Tensor, context: Tensor | None) -> Any:
    """A block's results in the form that they had."""
    if kept.form is None:
        return output
    stream, index = block.surgery.stream, block.index
    kind, length = kept.form
    items: list[Any] = [None] * length
    items[stream.hidden_index(index).returned] = output
    if kept.context is not None:
        items[stream.context_index(index).returned] = context + kept.context
    return kind(items)


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


def needs_gradient(block: BlockSurgery, hidden: Tensor) -> bool:
    """Whether a gradient is wanted: what an earlier step computed has none."""
    return torch.is_grad_enabled() and block.needs_gradient((hidden,))


def wants(method: FeatureCache, sublayer: Sublayer) -> bool:
    """Whether a method names a signal that is read off this attention."""
    examined = method.words["examine"] if sublayer.block.surgery.examines else ()
    return any(FROM_FEATURES.get(name) == sublayer.part for name in (method.signals if method.site == "sublayer" else examined))


def check_alone(method: FeatureCache, block: BlockSurgery) -> None:
    """Refuse company that would let a feature stand for other tokens."""
    active, untouched = block.plan.acting, block.surgery.call.run.ledger.untouched
    others = any(other.moves_tokens for other in active) or sum(isinstance(other, FeatureCache) for other in active) > 1
    if others or not untouched:
        rule = "A feature cache stands alone: no other one beside it, and no method that changes the number of tokens"
        raise UnsupportedError(explain(rule, [type(m).__name__ for m in active], "Give them different layers or models."))


def reuse(method: FeatureCache, block: BlockSurgery, hidden: Tensor, kept: Feature, part: str) -> Tensor | None:
    """The method's verb."""
    signals = supply_features(method, block, method.signals, hidden, kept, part)
    return method.at_hand(partial(getattr(method, method.verb), **signals))


def supply_features(
    method: FeatureCache, block: BlockSurgery, names: tuple[str, ...], hidden: Tensor, kept: Feature, part: str
) -> dict[str, Any]:
    """The signals of these names."""
    surgery, n = block.surgery, hidden.shape[1]
    context = surgery.call.context
    sources: dict[str, Callable[[], Any]] = {
        "hidden": lambda: hidden,
        "part": lambda: part,
        "age": lambda: kept.age + 1,
        "influence": lambda: store_of(method, block).get("influence"),
        "doubt": lambda: store_of(method, block).get("doubt"),
        "shared_doubt": lambda: store_of(method, block).get("shared_doubt"),
        "grid": lambda: grid(n, context.picture),
        "noise": lambda: context.steps_of_denoiser.noise(n),
        "contrast": lambda: context.steps_of_denoiser.contrast(n),
        "guidance": lambda: context.steps_of_denoiser.guidance(n),
        "layer": lambda: block.index,
        "layers": lambda: len(surgery.stream),
        "memory": lambda: kept_under(block, (method.key, *hidden.shape[:2])),
    }
    return {name: sources[name]() if name in sources else getattr(context, name) for name in names}


def store_of(method: FeatureCache, block: BlockSurgery) -> dict:
    """What was kept for a block and this denoising context."""
    return kept_under(block, (method.key, block.index))


def kept_under(block: BlockSurgery, key: tuple) -> dict:
    """What was kept under a key for this denoising context."""
    return block.surgery.state(Features).setdefault(block.surgery.call.context.denoising, {}).setdefault(key, {})
