"""How a pass begins: what the cache has seen, what the masks show, and what the methods of the stream refuse."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..kv.layer import TokenCacheLayer
from ..model import families
from ..model.arguments import find_padding, find_segments, find_views, token_masks
from ..model.classes import class_name
from ..model.signatures import STATES
from ..model.streams import TOKENS_FIRST
from ..roles.base import Method
from ..tokens.altered import altered
from ..tokens.entries import Arrival, Stored
from ..tokens.ledger import TokenLedger
from .call import BlockCall
from .context import ForwardContext
from .handler import handler_of
from .run import REAL, Memory, StreamRun
from .supply import remember_pictures

if TYPE_CHECKING:
    from .block import BlockSurgery
    from .surgery import StreamSurgery


def seen_before(block: BlockSurgery, cache: Cache | None) -> int:
    """Tokens that the cache of a block has seen."""
    layer = cache.layers[block.layer_idx] if cache is not None and block.layer_idx in range(len(cache.layers)) else None
    return int(layer.get_seq_length()) if isinstance(layer, CacheLayerMixin) else 0


def refuse_cache(methods: list[Method], block: BlockSurgery, cache: Cache | None) -> None:
    """A method that reads the whole sequence cannot be right for a part of it."""
    seen = seen_before(block, cache)
    whole = sorted({type(method).__name__ for method in methods if not method.caches})
    if seen and whole:
        rule = f"{', '.join(whole)} must see the whole sequence in one pass"
        raise UnsupportedError(explain(rule, f"a cache of {seen} tokens", "Pass no cache, and `use_cache=False` to `generate`."))


def refuse_order(surgery: StreamSurgery, context: ForwardContext, call: BlockCall, start: int) -> None:
    """Where each token sees all, a cache that holds what methods have put in or left out is not what masks are for, or tells places."""
    methods = [m for m in surgery.plan.methods if m.moves_tokens and m.config != m.config.at_zero()] if start else []
    moving = sorted({type(method).__name__ for method in methods})
    widths = {mask.shape[-1] for mask in token_masks(call.arguments)} if moving else set()
    if widths and max(widths) < start + call.hidden.shape[1]:
        rule = f"{', '.join(moving)} must see the whole sequence in one pass where its tokens have no order"
        raise UnsupportedError(explain(rule, f"a cache of {start} tokens", "Pass no cache, and `use_cache=False` to `generate`."))
    given = find_cache(context.arguments.values()) is not None
    if moving and given and not surgery.stream.causal and not context.gives_places:
        rule = f"{', '.join(moving)} must be told the places of tokens that go on from a cache, where its tokens have no order"
        raise UnsupportedError(explain(rule, f"a cache of {start} tokens alone", "Pass `position_ids`, or no cache."))


def refuse_state(methods: list[Method], context: ForwardContext) -> None:
    """A method that must know where in the sequence a token stands cannot go on from a state that does not tell."""
    carried = [name for name in STATES if context.arguments.get(name) is not None]
    placing = sorted({type(method).__name__ for method in methods if method.moves_tokens or not method.caches})
    if carried and placing:
        rule = f"{', '.join(placing)} must be told how long the sequence is that goes on"
        raise UnsupportedError(explain(rule, f"a model's own `{carried[0]}`", "Pass none, and `use_cache=False` to `generate`."))


def open_pass(surgery: StreamSurgery, context: ForwardContext, block: BlockSurgery, call: BlockCall) -> StreamRun:
    """Begin a pass at a block; refused where a method of the stream cannot be right for such a pass."""
    plan = surgery.plan
    refuse_cache(plan.methods, block, call.cache)
    refuse_state(plan.methods, context)
    layers, start, memory, known = [], 0, Memory(), {}
    if plan.moves:
        cache = call.cache
        if cache is not None:
            slots = {i: b.layer_idx for i, b in surgery.blocks.items() if b.layer_idx is not None and b.layer_idx < len(cache.layers)}
            known = {i: cache.layers[slot] for i, slot in slots.items()}
            known = {i: known[i] for i in sorted(known) if isinstance(known[i], TokenCacheLayer)}
            layers = list(known.values())
            left = [layer.seen for i, layer in known.items() if i >= block.index]  # blocks before have been run
            start = min(left) if left else 0
    if not layers:
        start = seen_before(block, call.cache)
        refuse_order(surgery, context, call, start)
    for each in surgery.blocks.values() if not start and not torch.compiler.is_compiling() else ():
        each.check_in_place()
    if layers:
        memory = layers[0].memory if start and layers[0].memory is not None else memory
        layers[0].remember(memory)
        memory.tokens.clear()  # what was noted of those of the pass before
    facts = dict(context=call.context, behind=call.behind, prefix=surgery.prefix, additive=block.additive_mask, heads=surgery.stream.heads)
    facts["laid_over_heads"] = block.facts.laid_over_heads
    facts["tokens_first"] = surgery.stream.layout == TOKENS_FIRST
    facts["rotary_of_heads"] = families.ROTARY_OF_HEADS.search(class_name(block.module)) is not None
    ledger = TokenLedger.open(call.hidden, start, surgery.stream.causal and not plan.sees_all, **facts)
    whole = torch.compiler.is_compiling() and context.pictures_alone  # a mask is made there in any case
    real, first = (None, None) if whole else find_padding(call.arguments, ledger, context.gives_mask)
    ledger = ledger if real is not None else altered(ledger, plain=ledger.n - surgery.prefix - surgery.suffix)
    apart = None if surgery.stream.causal or whole else find_views(call.arguments, ledger, real)
    segments = None if start else call.segments(real, context.gives_places)
    if segments is None and apart is not None and surgery.stream.kind == "vision":  # a chunk of sound that stands apart is no sample
        segments = find_segments(apart)
    refuse_packed(surgery, segments, call.cache is not None)
    admit_pass(plan.methods, memory, ledger)
    if layers:
        first = begin_rows(layers, ledger, real, first)
    whole = find_gaps(memory, ledger, real, first)
    visual = context.visual
    if plan.remembers and visual is not None and visual.shape[1] == ledger.n:
        remember_pictures(call.hidden, visual.to(call.hidden.device), ledger, memory.rows)
    return StreamRun(context, ledger, real, first, memory, layers=layers, caches=known, apart=apart, segments=segments, real=whole)


def begin_rows(layers: list[TokenCacheLayer], ledger: TokenLedger, real: Tensor | None, first: Tensor | None) -> Tensor | None:
    """Place of each row's first real token (b), noted in the pass that had it: a sliding window hides it from later masks."""
    layer, end = layers[0], ledger.start + ledger.n
    if real is not None:
        first = torch.where(real.any(dim=1), first, end)  # a row of padding has yet to begin
    if layer.placed and ledger.start:
        if layer.first is None or first is None:
            return layer.first
        begins = layer.first >= ledger.start
        first = torch.where(begins, first, layer.first)
        late = (begins & (first < end)).nonzero()[:, 0].tolist()
        if late and any(one.banks for one in layers):
            rule = "Tokens go in front of a prompt in its first pass, which must hold a real token of each row"
            remedy = "Choose a larger `prefill_chunk_size`, or pad less."
            raise UnsupportedError(explain(rule, f"only padding in rows {late}", remedy))
    layer.place_rows(first)
    return first


def find_gaps(memory: Memory, ledger: TokenLedger, real: Tensor | None, first: Tensor | None) -> Tensor | None:
    """Real tokens of the whole sequence (b start+n) bool, where padding stands between some, as in a batch of chats; None where not."""
    start, known = ledger.start, memory.rows.get(REAL)
    if real is None and known is None:
        return None
    place = torch.arange(start + ledger.n, device=ledger.rows.device).expand(ledger.batch, -1)
    begun = torch.ones_like(place, dtype=torch.bool) if first is None else place >= first[:, None]
    before = begun[:, :start] if known is None else known[:, :start]
    whole = torch.cat([before, begun[:, start:] if real is None else real], dim=1)
    if known is None and not torch.compiler.is_compiling() and bool((whole == begun).all()):
        return None
    memory.rows[REAL] = whole
    return whole


def refuse_packed(surgery: StreamSurgery, segments: Tensor | None, cached: bool) -> None:
    """A method that thinks of one sample a row cannot be right for several in one; without a cache, one that needs it does nothing."""
    several = segments is not None and len(segments) > 1
    alone = [m for m in surgery.plan.methods if not m.packed and (cached or not handler_of(m).needs_cache)] if several else []
    if alone:
        rule = f"The stream {surgery.stream.name!r} packs its samples into one row, and these methods take one sample a call"
        got = f"{len(segments)} segments and {', '.join(sorted({type(method).__name__ for method in alone}))}"
        remedy = "Pass `packing=False` to the trainer, give it one sample or picture a call, or name another stream."
        raise UnsupportedError(explain(rule, got, remedy))


def admit_pass(methods: list[Method], memory: Memory, ledger: TokenLedger) -> None:
    """A prompt of which a part was taken back is no more what was looked at."""
    cut = any(start < ledger.start < end for start, end in memory.prompts)
    whole = sorted({type(method).__name__ for method in methods if not method.chunks})
    if cut and whole:
        rule = "Methods that look at a prompt as a whole must get it in one pass"
        remedy = "Take back whole prompts, leave out assisted decoding, or pass the whole prompt to the model at once."
        raise UnsupportedError(explain(rule, f"{', '.join(whole)} and a prompt that was cropped", remedy))
    running = sorted({type(method).__name__ for method in methods if method.spans})
    if ledger.start < memory.end and running:
        rule = f"Tokens that {', '.join(running)} has read cannot be taken back"
        got = f"a cache cut from {memory.end} tokens to {ledger.start}"
        raise UnsupportedError(explain(rule, got, "Start a new cache, and leave out assisted decoding."))
    memory.note_pass(ledger.start, ledger.start + ledger.n)


def lend(surgery: StreamSurgery, block: BlockSurgery, ledger: TokenLedger, run: StreamRun, stored: Stored | None) -> Stored | None:
    """What is stored before a block's own keys; a block that reads the keys of another one must have the tokens that this one had."""
    if not block.shares_keys:
        run.lent[block.layer_type] = ledger, stored
        return stored
    lent, before = run.lent.get(block.layer_type, (None, None))
    if ledger is not lent and not (ledger.untouched and (lent is None or lent.untouched)):
        rule = "A block that reads the keys of another one must get the tokens that this one had"
        raise UnsupportedError(explain(rule, f"other ones at {block.path}", "Act on the blocks before that place."))
    return before


def expect(layer: TokenCacheLayer | None, ledger: TokenLedger, cuts: bool = True) -> Stored | None:
    """Announce the tokens of a block to its cache; returns what is stored there already, where its mask must be cut for it.

    Where nothing `cuts` a mask to the layer, it is not asked how its entries lie.
    """
    if layer is None:
        return None
    known = ledger.memo.get(id(ledger.rows))
    if known is None:
        known = ledger.memo[id(ledger.rows)] = ledger.rows, ledger.rows + ledger.start
    sizes = ledger.sizes if ledger.proportional else None
    layer.expect(Arrival(known[1], ledger.filled, ledger.fresh, ledger.start + ledger.n, sizes))
    if layer.origins is None:
        empty = ledger.rows.new_empty(ledger.batch, 0)
        return None if ledger.untouched and not ledger.start else Stored(empty)  # every token of the prompt may have skipped it
    return None if layer.whole and ledger.untouched or not cuts else layer.stored()
