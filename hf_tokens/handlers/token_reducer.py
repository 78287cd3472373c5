"""Token reducers: tokens that join or vanish, for the rest of the stream, for a span of blocks, or for one sublayer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import check_in_rows, lacks
from ..engine.results import ModelCall
from ..engine.run import Site, Span
from ..engine.supply import ask
from ..engine.surgery import StreamSurgery
from ..errors import UnsupportedError, explain
from ..model.pipelines import WHOLE_BLOCKS, their_caches
from ..model.streams import first_of, with_first
from ..roles.signals import OF_THE_BLOCK
from ..roles.token_reducer import TokenReducer
from ..tokens.altered import altered
from ..tokens.token_map import TokenMap
from .sublayers import Sublayer, Sublayers, refuse_stored, run_merged

# site of a reducer -> the phases of a block in which it takes part
REDUCER_PHASES = {"before": ("before",), "middle": ("between", "after"), "after": ("after",), "sublayer": ("sublayer",)}


@handles("TokenReducer")
class TokenReducerHandler(Handler):
    sublayer = staticmethod(run_merged)

    def phases(self, method: TokenReducer) -> tuple[str, ...]:
        if method.site == "before" and method.spans:
            return (*(("before",) if method.is_first_block else ()), *(("end",) if method.dims.is_last_block else ()))
        return REDUCER_PHASES[method.site]

    def hooks(self, method: TokenReducer) -> set[str]:
        return {"middle": {"middle"}, "sublayer": {"merge"}}.get(method.site, set())

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        if hook == "merge":
            return block.state(Sublayers).attach("merge")
        first, last, behind = block.surgery.stream.middle(block.index)
        if first is None or last is None:
            raise lacks(block, "a norm and an MLP behind it")
        check_in_rows(block)
        enter, leave, level = (partial(hook, block) for hook in (enter_middle, leave_middle, level_middle))
        handles = [first.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
        return handles if behind is None else [*handles, behind.register_forward_pre_hook(level)]

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if call.context.begins:
            reducers = sorted({type(m).__name__ for m in call.model.methods() if isinstance(m, TokenReducer) and m.site != "sublayer"})
            caches = [name for name in their_caches(call.model.base) if not WHOLE_BLOCKS.search(name)] if reducers else []
            if caches:
                rule = "Where tokens of a block join or vanish, no cache of diffusers' own keeps what parts of it returned for others"
                raise UnsupportedError(explain(rule, [*reducers, *caches], "Enable FirstBlockCacheConfig, or disable the adapter."))
            reducing = {block: [m for m in block.plan.acting if isinstance(m, TokenReducer)] for block in call.model.blocks()}
            names = sorted({type(method).__name__ for methods in reducing.values() for method in methods})
            refuse_stored(names, [block.module for block, methods in reducing.items() if methods])
        return args, kwargs

    def takes_sublayer(self, method: TokenReducer, sublayer: Sublayer) -> bool:
        return sublayer.part in method.parts

    def before(self, method: TokenReducer, site: Site) -> None:
        reduce_tokens(method, site)

    def after(self, method: TokenReducer, site: Site) -> None:
        if method.site == "middle":
            settle(method, site)
        elif site.local is not None or not OF_THE_BLOCK & set(method.signals):
            reduce_tokens(method, site)

    def end(self, method: TokenReducer, site: Site) -> None:
        """Bring the tokens of its span back; refused where another method's span that began later goes on."""
        run = site.run
        if method.key not in [span.method.key for span in run.spans]:
            return
        span = run.spans[-1].hold(site.hidden)
        if span.method.key != method.key:
            rule = "Of two spans of blocks one lies in the other, or behind it"
            got = f"that of {type(method).__name__}, which ends at block {site.block.index} inside that of {type(span.method).__name__}"
            raise UnsupportedError(explain(rule, got, "Choose other layers, or another order of the methods."))
        site.put(span.regain(run.memory, site.block.index, run.padding, bool(run.layers)))
        run.end_span(span)


def reducing_blocks(surgery: StreamSurgery) -> list[int]:
    """The blocks of a stream in which a reducer acts for the rest of the stream."""
    acts = lambda method: isinstance(method, TokenReducer) and method.site != "sublayer"
    return [index for index, block in surgery.blocks.items() if any(acts(method) for method in block.plan.acting)]


def reduce_tokens(method: TokenReducer, site: Site) -> None:
    """Let the tokens follow the reducer's map."""
    report_finding(method, site)
    tokens = ask(method, site)
    if tokens is None:
        return
    if tokens.reads is not None and not method.spans:
        rule = "Tokens read other slots than their own behind a span of blocks only"
        raise UnsupportedError(explain(rule, f"`reads` from {type(method).__name__}", "Set its `spans`, or leave `reads` out."))
    tell_kept(method, site, tokens)
    slots = tokens.apply(site.hidden, site.run.ledger.sizes)
    site.move(tokens, slots, method.proportional, begin_span(method, tokens, site, slots) if method.spans else None)


def tell_kept(method: TokenReducer, site: Site, tokens: TokenMap) -> None:
    """Tell the listeners how many of the tokens a map leaves."""
    if site.surgery.heard:
        rows = len(tokens.slot)
        left = rows * tokens.m if tokens.filled is None else tokens.filled.sum()
        site.surgery.acted(site.block, method, left, rows * tokens.n)


def report_finding(method: TokenReducer, site: Site) -> None:
    """Pass on to the listeners what the reducer returns when it is examined."""
    if site.surgery.examines and type(method).examine is not TokenReducer.examine:
        finding = ask(method, site, "examine")
        if finding is not None:
            site.surgery.report(site.block, method, finding)


def begin_span(method: TokenReducer, tokens: TokenMap, site: Site, slots: Tensor) -> Span:
    """Note the tokens that a map is about to put together, and what their slots hold, (b m d)."""
    run, place = site.run, torch.arange(tokens.m, device=slots.device).expand(slots.shape[:2])
    return Span(method, tokens, run.ledger, site.hidden, slots, slots, place, dict(run.memory.tokens), dict(run.memory.rows))


def settle(method: TokenReducer, site: Site) -> None:
    """Behind the block, a merge in its middle becomes one of the stream: the mean of x + mlp(mean x) is mean x + mlp(mean x)."""
    tokens = None if site.local is None else decided(method, site)
    if tokens is not None:
        tell_kept(method, site, tokens)
        site.move(tokens, tokens.apply(site.hidden, site.run.ledger.sizes), method.proportional)


def decided(method: TokenReducer, site: Site) -> TokenMap | None:
    """The map that a reducer has made in the middle of the block."""
    if id(method) not in site.within:
        raise lacks(site.block, "an MLP that it calls behind its attention, and a norm in front of it")
    return site.within[id(method)]


def enter_middle(block: BlockSurgery, module: nn.Module, args: tuple) -> tuple | None:
    """In front of the MLP or its norm: the tokens that the MLP gets, which are merged between attention and MLP."""
    for _, method in block.called_inside("between"):
        return (merged(method, block.tap.site, args[0]), *args[1:])
    return None


def merged(method: TokenReducer, site: Site, x: Tensor) -> Tensor:
    """The tokens (b m d) behind the reducer's map, which is made once a call."""
    if x.dim() != 3 or x.shape[1] != site.local.m:
        got = f"{tuple(x.shape)} of {site.local.m} in each sample, at {site.block.path}"
        raise UnsupportedError(explain("The MLP of a block must get all of its tokens at once, in rows", got, "Choose other layers."))
    if id(method) not in site.within:
        with torch.no_grad():  # a checkpoint that runs the block again must find the same graph, and calls no verb
            site.within[id(method)] = ask(method, altered(site, hidden=x))
    tokens = site.within[id(method)]
    if tokens is None:
        return x
    front = site.local.m - tokens.n  # tokens of this block only
    joined = tokens.apply(x[:, front:], site.run.ledger.sizes)
    return torch.cat([x[:, :front], joined], dim=1) if front else joined


def leave_middle(block: BlockSurgery, module: nn.Module, args: tuple, output: Any) -> Any:
    """Behind the MLP: each token gets what its slot got."""
    for _, method in block.called_inside("between"):
        y, tokens, front = first_of(output), *in_the_middle(method, block.tap.site)
        if tokens is None or y.shape[1] != front + tokens.m:
            return None
        back = tokens.slots.unmerge(y[:, front:])
        return with_first(output, torch.cat([y[:, :front], back], dim=1) if front else back)
    return None


def level_middle(block: BlockSurgery, module: nn.Module, args: tuple) -> tuple | None:
    """In front of a norm behind the MLP: tokens that join are alike before it, for the norm of a mean is not the mean of the norms."""
    for _, method in block.called_inside("between"):
        x, tokens, front = args[0], *in_the_middle(method, block.tap.site)
        if tokens is None:
            return None
        level = tokens.restore(tokens.apply(x[:, front:], block.tap.site.run.ledger.sizes), x[:, front:])
        return (torch.cat([x[:, :front], level], dim=1) if front else level, *args[1:])
    return None


def in_the_middle(method: TokenReducer, site: Site) -> tuple[TokenMap | None, int]:
    """The map of a reducer between attention and MLP, and how many tokens of this block only stand in front of its own."""
    tokens = decided(method, site)
    return tokens, 0 if tokens is None else site.local.m - tokens.n
