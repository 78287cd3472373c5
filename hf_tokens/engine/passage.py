"""The passage of the tokens through one block: which of them run it and how often, with the tokens that are there for this block only."""

from __future__ import annotations

import functools
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from hf_tokens_kernels import routed_gather, routed_scatter
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..kv.adopt import place
from ..kv.layer import GAPS, TokenCacheLayer
from ..kv.static import FrontedLayer
from ..model.arguments import token_masks
from ..model.streams import SIDE_BY_SIDE
from ..roles.signals import AT_SITE, HOOKED, OF_THE_BLOCK
from ..tokens.altered import altered
from ..tokens.entries import Stored
from ..tokens.ledger import TokenLedger
from ..tokens.token_map import TokenMap, take
from .call import BlockCall
from .handler import handler_of
from .opening import expect, lend
from .plan import PassPlan
from .rotation import shifted
from .run import BESIDE, BlockTokens, Site
from .supply import ask, own_tokens

if TYPE_CHECKING:
    from .block import BlockSurgery

OF_THE_TOKENS = {"hidden", "entered", *HOOKED}  # signals that are as wide as the tokens


def run_block(pass_plan: PassPlan, call: BlockCall, site: Site) -> Any:
    """Run the block on the site's tokens, as often as its routers decide, each run on what the one before returned; returns the output."""
    gates, dense = find_gates(pass_plan, site)
    tell_routed(site, gates)
    output, hidden = run_once(pass_plan, call, site, gates[0] if gates else None, dense)
    for number, gate in enumerate(gates[1:], start=1):
        if bool((gate != 0).any()):
            again = altered(site, hidden=hidden, layer=layer_of_rerun(pass_plan, call, site, number))
            with place(call.cache, site.block.layer_idx, again.layer):
                output, hidden = run_once(pass_plan, call, again, gate, dense)
    site.put(hidden)
    return output


def find_gates(pass_plan: PassPlan, site: Site) -> tuple[list[Tensor], bool]:
    """The gate of each token in each run of the block, (b m) each, none if no router decides; and whether skipped tokens run too."""
    rows = site.run.ledger.rows
    if site.block.index >= site.surgery.plan.exit:
        return [torch.zeros_like(rows, dtype=site.hidden.dtype)], False
    of_routers, dense = [], False
    for handler, method in pass_plan.of("gate"):
        gates = handler.gate(method, site)
        if gates is not None:
            of_routers.append(gates)
            dense |= method.training and method.trains_dense and gates[0].requires_grad
    runs = max([len(gates) for gates in of_routers]) if of_routers else 0
    return [functools.reduce(torch.mul, [gates[min(number, len(gates) - 1)] for gates in of_routers]) for number in range(runs)], dense


def tell_routed(site: Site, gates: list[Tensor]) -> None:
    """Tell the listeners which tokens run the block, once at least."""
    if gates and site.surgery.heard:
        runs = functools.reduce(torch.logical_or, [gate != 0 for gate in gates]) & site.run.ledger.flags(site.run.ledger.filled, True)
        for listener in site.surgery.model.listeners:
            listener.routed(site.block, runs)


def layer_of_rerun(pass_plan: PassPlan, call: BlockCall, site: Site, number: int) -> TokenCacheLayer | None:
    """Where a block's keys of a later run are stored; None without a cache."""
    block, surgery = site.block, site.surgery
    cached = call.cache is not None and block.layer_idx is not None and not block.drops_cache
    of_caches = {
        "a cache that no surgery keeps": cached and site.layer is None,
        "keys of another sequence in its cache": call.cache is not None and surgery.stream.mixers[block.index] == "cross",
    }
    reasons = {
        "a block that carries a second sequence along": surgery.stream.context_index(block.index) is not None,
        "blocks that read the keys of another one": surgery.plan.shares_keys,
        "a method beside it that looks into the block": any(OF_THE_BLOCK & {*m.signals, *m.observes} for m in pass_plan.methods),
        "a cache compressor beside it": any(handler_of(method).reads_cache for method in pass_plan.methods),
        **of_caches,
    }
    for reason, holds in reasons.items():
        if holds:
            rule = "A block that runs several times needs one sequence and a dynamic cache, and nothing that tells its runs apart"
            choose = "Pass `use_cache=False`, or choose" if reason in of_caches else "Choose"
            remedy = f"{choose} other layers, or a method that runs a block once."
            raise UnsupportedError(explain(rule, f"{reason}, at {block.path}", remedy))
    return site.layer.rerun_layer(number, site.run.ledger.start) if cached else None


def run_once(pass_plan: PassPlan, call: BlockCall, site: Site, gate: Tensor | None, dense: bool) -> tuple[Any, Tensor]:
    """Run the block on the tokens that are routed to it, between the tokens that are there for this block only."""
    block, run, hidden, layer = site.block, site.run, site.hidden, site.layer
    refuse_width(pass_plan, site)
    ledger, x, routed = route_tokens(gate, dense, run.ledger, hidden)
    if block.blank and ledger.m == 1 and ledger.filled is not None and not bool(ledger.filled.any()):  # nothing is left to compute
        if layer is not None:
            layer.see(ledger.start + ledger.n)
        return block.blank[0], hidden
    ledger, x, inserted = insert_tokens(pass_plan, altered(site, hidden=x, routed=routed, run=altered(run, ledger=ledger)))
    m, lack = ledger.m, 0 if ledger.untouched else -ledger.m % block.window
    maps = [*([] if routed is None else [routed]), *(tokens.opened for tokens in inserted)]
    if lack:
        maps.append(TokenMap.pad(m, lack, len(x), x.device))
        ledger, x = ledger.move(maps[-1]), maps[-1].gather(x)
    stored = announce(call, site, ledger)
    site.local_tokens(ledger, routed, tuple(maps))
    mask, bias = call.missing_mask(x, ledger), call.missing_bias(ledger, stored)
    missing = mask is not None or bias is not None
    noting = missing or (block.plan.taps if run.prefill else block.plan.taps_decode) or block.tap.watches(layer)
    if noting:
        block.tap.open()
    readers = sum(tokens.opened.m - tokens.opened.n for tokens in inserted if tokens.only_read)
    inside = altered(site, hidden=x, run=altered(run), mask=mask, bias=bias)
    with block.open_while_it_runs(partial(block.tap.running, noting or readers > 0, readers, inside)):
        output = call.run(block.call, x, ledger, stored, shifted(site, call.arguments))
    if ledger is not run.ledger and block.facts.hands_on:
        run.held[BESIDE] = True
    attends = block.plan.attends
    if missing or readers or attends is not None:
        block.tap.noted()
    block.tap.check_read(layer)
    if attends is not None and layer is not None:
        layer.mark(attends.key, own_tokens(altered(site, key=attends.key)))
    if not site.within.get("reused"):
        site.surgery.count(block, x.shape[0] * x.shape[1])
    block.learn_blank(call.blank(output))
    y = call.read(output)
    check_tokens(block, x, y, ledger)
    y = remove_tokens(call, site, inserted, y[:, :m])
    if not ledger.untouched:
        refuse_other_width(block, hidden, y)
    return output, y if gate is None else join_routed(gate, routed, hidden.to(y.dtype), y)


def refuse_width(pass_plan: PassPlan, site: Site) -> None:
    """A method's own weights are as wide as the stream; the first block of a few families is not."""
    stream, width = site.surgery.stream, site.hidden.shape[-1]
    if width == stream.width or stream.layout in SIDE_BY_SIDE:
        return
    inside = [m for m in pass_plan.methods if OF_THE_TOKENS & m.asks or "insert" in handler_of(m).phases(m)]
    sized = sorted({type(method).__name__ for method in inside if method.site not in AT_SITE and [*method.parameters()]})
    if sized:
        rule = f"{', '.join(sized)} must act in blocks that are as wide as their stream, {stream.width}"
        raise UnsupportedError(explain(rule, f"{width} features at {site.block.path}", "Choose other layers."))


def refuse_other_width(block: BlockSurgery, given: Tensor, returned: Tensor) -> None:
    """Tokens that are gone keep their rows of what the block was given, beside those that it returned."""
    if given.shape[-1] != returned.shape[-1]:
        rule = "A block that gets other tokens than the model gave, or behind which some go, must keep their width"
        got = f"{given.shape[-1]} features in and {returned.shape[-1]} out, at {block.path}"
        raise UnsupportedError(explain(rule, got, "Choose other layers."))


def check_tokens(block: BlockSurgery, x: Tensor, y: Tensor, ledger: TokenLedger) -> None:
    """Refuse a block that returns other tokens than those that it was given, unless it merely leaves out some of the model's own."""
    if y.shape[:2] != x.shape[:2] and (not ledger.untouched or y.shape[1] > x.shape[1] or len(y) != len(x)):
        rule = "A block must return as many tokens as it was given"
        got = f"{tuple(x.shape[:2])} (samples, tokens) in and {tuple(y.shape[:2])} out, at {block.path} ({type(block.module).__name__})"
        raise UnsupportedError(explain(rule, got, "Run one sample at a time, without a cache, or choose other layers or another model."))


def route_tokens(gate: Tensor | None, dense: bool, ledger: TokenLedger, hidden: Tensor) -> tuple[TokenLedger, Tensor, TokenMap | None]:
    """The tokens that run the block, and the map to them; in dense training all do, the others seen by themselves alone."""
    if gate is None:
        return ledger, hidden, None
    runs = (gate != 0) & ledger.flags(ledger.filled, True)
    if dense:
        return altered(ledger, filled=runs, alone=True, untouched=False, memo={}), hidden, None
    if bool(runs.all()):
        return ledger, hidden, None
    routed = TokenMap.select(runs)
    return ledger.move(routed), routed_gather(hidden, routed.source), routed


def join_routed(gate: Tensor, routed: TokenMap | None, hidden: Tensor, y: Tensor) -> Tensor:
    """The tokens, with what the block made of those that ran, each by its gate: exactly that where it is one."""
    if routed is None:
        return torch.lerp(hidden, y, gate[..., None].to(y.dtype))
    index = routed.source if routed.filled is None else routed.source.masked_fill(~routed.filled, -1)
    return routed_scatter(hidden, y, index, gate.gather(1, routed.source))


def announce(call: BlockCall, site: Site, ledger: TokenLedger) -> Stored | None:
    """Announce the tokens of a block to its cache; returns what is stored there, where its mask must be cut for it."""
    layer, block = site.layer, site.block
    fronted = fronted_layer(block, call.cache)
    if fronted is not None:
        fronted.expect(ledger.m - ledger.n, site.run.first_real(site.run.ledger))
    masks = [*token_masks(call.arguments)] if layer is not None and layer.packed else []
    packed = layer is not None and layer.packed and not call.biased and block.tap.reads_itself(layer, ledger, masks)
    stored = announce_to(site, ledger, packed)
    return (Stored(ledger.rows[:, :0]) if masks else None) if packed else stored  # no mask is needed


def announce_to(site: Site, ledger: TokenLedger, packed: bool, cuts: bool = True) -> Stored | None:
    """Announce the tokens of a block to its layer, which the attention reads as it lies where it is `packed`; returns what is stored, where
    something `cuts` a mask to it."""
    layer = site.layer
    if layer is not None and layer.gaps > (GAPS if packed else 0):
        layer.close_up()
    stored = lend(site.surgery, site.block, ledger, site.run, expect(layer, ledger, cuts))
    if packed:
        layer.read_packed()
    return stored


def insert_tokens(pass_plan: PassPlan, site: Site) -> tuple[TokenLedger, Tensor, list[BlockTokens]]:
    """Put the tokens in that are there for this block only."""
    inserted: list[BlockTokens] = []
    last = site.surgery.plan.last if site.block.index == site.surgery.plan.exit - 1 else ()
    for handler, method in (*pass_plan.of("insert"), *last):
        tokens = handler.insert(method, site)
        if tokens is not None:
            inserted.append(tokens)
            site = altered(site, hidden=tokens.after, run=altered(site.run, ledger=site.run.ledger.move(tokens.opened)))
    return site.run.ledger, site.hidden, inserted


def remove_tokens(call: BlockCall, site: Site, inserted: list[BlockTokens], y: Tensor) -> Tensor:
    """Behind the block, take out the tokens that were there for it only; what those gathered that only read is passed on."""
    for tokens in reversed(inserted):
        summary, y = tokens.opened.inserted(y), take(y, tokens.opened.slot)
        if not tokens.only_read:
            continue
        alone = handler_of(tokens.method).remove(tokens.method, site, summary)
        learns = tokens.before.requires_grad or torch.is_grad_enabled() and site.block.needs_gradient(call.arguments.values())
        if alone and not learns:
            y = y.detach()  # no token saw them, so no gradient of theirs need go through the tokens
    return y


def ask_behind(pass_plan: PassPlan, site: Site) -> None:
    """Call the methods behind a block."""
    for handler, method in pass_plan.of("listen")[:1]:
        handler.listen(method, site)
    for method in pass_plan.methods:
        if method.observes_prompts and not site.run.prefill:
            continue
        # a method that needs a cache has nothing to observe without one
        if method.observes and site.local is not None and (site.layer is not None or not handler_of(method).needs_cache):
            note = ask(method, site, "observe")
            if note is not None:
                site.run.notes.setdefault(method.key, {})[site.block.index] = note
    for handler, method in pass_plan.of("after"):
        handler.after(method, site)


def fronted_layer(block: BlockSurgery, cache: Any) -> FrontedLayer | None:
    """The layer of a block in a static cache, where tokens may stand in front of it."""
    layer = cache.layers[block.layer_idx] if cache is not None and block.layer_idx in range(len(cache.layers)) else None
    return layer if isinstance(layer, FrontedLayer) else None


def cache_layer(block: BlockSurgery, cache: Any) -> TokenCacheLayer | None:
    """Our layer of a block in a cache."""
    layer = cache.layers[block.layer_idx] if cache is not None and block.layer_idx in range(len(cache.layers)) else None
    return layer if isinstance(layer, TokenCacheLayer) else None
