"""Attention edits: what the self-attention of a block returns for each token."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import check_in_rows, own_attention
from ..engine.run import Site
from ..engine.supply import ask
from ..errors import UnsupportedError, explain
from ..model.signatures import positional
from ..model.streams import first_of, with_first
from ..roles.attention_edit import AttentionEdit


@handles("AttentionEdit")
class AttentionEditHandler(Handler):
    def phases(self, method: AttentionEdit) -> tuple[str, ...]:
        return ("attention",)

    def hooks(self, method: AttentionEdit) -> set[str]:
        return {"edit"}

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        attention = own_attention(block)
        check_in_rows(block)
        return [attention.register_forward_hook(partial(edit_output, block), with_kwargs=True)]


def edit_output(block: BlockSurgery, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    """Behind the attention of a block: what it returns instead."""
    editors = [method for _, method in block.called_inside("attention")]
    if not editors:
        return None
    update = first_of(output)
    if not isinstance(update, Tensor):
        rule, remedy = "An edit of attention needs a self-attention that returns a tensor", "Choose other layers or another model."
        raise UnsupportedError(explain(rule, f"a {type(update).__name__} at {block.path}", remedy))
    hidden = args[0] if args else kwargs[positional(type(module))[0]]
    for method in editors:
        update = edited_update(method, block.tap.site, hidden, update)
    return with_first(output, update)


def edited_update(method: AttentionEdit, site: Site, hidden: Tensor, update: Tensor) -> Tensor:
    """What the attention returns, edited; another sequence that the block carries along stays as it is."""
    m, ledger, captured = site.local.m, site.local, site.block.signals.captured
    if update.dim() != 3 or len(update) != ledger.batch or update.shape[1] not in (m, m + ledger.context):
        rule = "An edit of attention needs a self-attention that answers each token of the stream"
        got = f"{tuple(update.shape)} for {ledger.batch} x {m} tokens at {site.block.path}"
        raise UnsupportedError(explain(rule, got, "Give the model one image a call, or choose other layers."))
    if hidden.shape[-1] != method.dims.width and "attention_input" in method.asks and [*method.parameters()]:
        rule = f"{type(method).__name__} reads what an attention is given, in {method.dims.width} features, as wide as its stream"
        remedy = "Choose other layers or another model."
        raise UnsupportedError(explain(rule, f"{hidden.shape[-1]} at {site.block.path}", remedy))
    own = slice(0, m) if ledger.behind or update.shape[1] == m else slice(ledger.context, None)
    captured |= {"attention_input": hidden[:, own], "attention_output": update[:, own]}
    edited = ask(method, site.inside(site.hidden, routed=None))
    if site.surgery.heard:
        site.surgery.acted(site.block, method, 0 if edited is None else update[..., 0].numel(), update[..., 0].numel())
    if edited is None:
        return update
    captured["attention_output"] = edited = edited.to(update.dtype)
    return torch.cat([update[:, : own.start], edited, update[:, own.start + m :]], dim=1) if update.shape[1] > m else edited
