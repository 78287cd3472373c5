"""Blocks that run as they came: those around which nothing is to be done, and those of a generated token in which only the cache is looked
at."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..kv.adopt import find_cache
from ..kv.static import FrontedLayer
from ..model.blocks import tells_no_places
from ..model.streams import LAYOUTS
from ..tokens.altered import altered
from .call import BlockCall
from .handler import handler_of
from .passage import announce_to, ask_behind, cache_layer, fronted_layer
from .plan import PassPlan
from .run import BESIDE, Site

if TYPE_CHECKING:
    from ..kv.layer import TokenCacheLayer
    from .block import BlockSurgery


def changes_anything(block: BlockSurgery, pass_plan: PassPlan, args: tuple, kwargs: dict) -> bool:
    """Whether anything is to be done around a block, or its arguments are to be cut."""
    plan, run, index = block.surgery.plan, block.surgery.call.run, block.index
    if standing_front(block, args, kwargs) is not None:
        return False
    if pass_plan.methods or index >= plan.exit or plan.sees_all or plan.remembers and index == 0:
        return True
    if run is not None and (not run.ledger.untouched or BESIDE in run.held) or index == plan.exit - 1 and plan.last:
        return True
    if plan.closing and index == block.surgery.depth - 1 and run is not None and run.prefill:
        return True
    if block.shares_keys and run is not None:
        lent, stored = run.lent.get(block.layer_type, (None, None))
        return stored is not None or lent is not None and not lent.untouched
    layer = cache_layer(block, find_cache((*args, *kwargs.values()))) if plan.moves and block.layer_idx is not None else None
    return layer is not None and not layer.whole  # its mask must be cut


def standing_front(block: BlockSurgery, args: tuple, kwargs: dict) -> FrontedLayer | None:
    """The block's layer of a static cache, if tokens stand in front of it already: all that is to be done is to see them."""
    layer = fronted_layer(block, find_cache((*args, *kwargs.values()))) if block.surgery.plan.fronts else None
    return None if layer is None or layer.front is None else layer


def run_as_it_came(block: BlockSurgery, args: tuple, kwargs: dict) -> Any:
    """Run a block around which nothing is to be done."""
    fronted = standing_front(block, args, kwargs)
    if fronted is not None:
        fronted.expect(0)
        args, kwargs = BlockCall(block.surgery.stream, block.index, block.facts, args, kwargs).behind_front(fronted)
    surgery, output = block.surgery, block.inner(*args, **kwargs)
    if surgery.model.listeners:
        hidden = surgery.stream.bind(block.index, args, kwargs)
        surgery.count(block, hidden.numel() // hidden.shape[-1])
    if block.index == surgery.depth - 1 and surgery.call.keeps_final:
        run, to_rows = surgery.call.run, LAYOUTS[surgery.stream.layout][0]
        surgery.call.note_final(to_rows(surgery.stream.read(block.index, output)), None if run is None else run.padding)
    return output


def is_quiet(block: BlockSurgery, pass_plan: PassPlan, layer: TokenCacheLayer, args: tuple, kwargs: dict) -> bool:
    """Whether a block runs on a generated token as it came: no method is called before it is done, and no mask is cut to its cache."""
    surgery = block.surgery
    run = surgery.call.run
    if layer.outlives or not pass_plan.quiet or not run.ledger.untouched:
        return False
    ends = block.index >= min(surgery.plan.exit, surgery.depth) - 1 or surgery.plan.sees_all
    shaped = block.shares_keys or block.drops_cache or block.plan.attends is not None
    if ends or shaped or surgery.examines or torch.is_grad_enabled() and block.checkpointed_outside:
        return False
    if (layer.filled is not None or layer.packed) and not (layer.packed and block.tap.reads_itself(layer, run.ledger)):
        return False
    settled = all(handler_of(method).settled(method, layer) for method in pass_plan.methods)
    return settled and tells_no_places(block.module, block.facts, args, kwargs)


def run_quietly(block: BlockSurgery, layer: TokenCacheLayer, args: tuple, kwargs: dict) -> Any:
    """Run such a block."""
    surgery = block.surgery
    run = surgery.call.run
    run.enter(block.index, run.ledger.context)
    site = Site(surgery, block, run, surgery.stream.bind(block.index, args, kwargs), layer, local=run.ledger)
    announce_to(site, run.ledger, layer.packed, cuts=surgery.plan.shares_keys)
    output = read_as_it_lies(site, args, kwargs) if layer.packed else block.inner(*args, **kwargs)
    surgery.count(block, run.ledger.batch)
    layer.release()  # nobody asks for what the attention call got
    if block.plan.decode.of("after"):
        ask_behind(block.plan.decode, altered(site, hidden=surgery.stream.read(block.index, output)))
    block.forget()
    return output


def read_as_it_lies(site: Site, args: tuple, kwargs: dict) -> Any:
    """Run a block whose attention reads its cache as it lies."""
    tap = site.block.tap
    tap.open()
    with site.block.open_while_it_runs(partial(tap.running, True, 0, site)):
        output = site.block.inner(*args, **kwargs)
    tap.check_read(site.layer)
    return output
