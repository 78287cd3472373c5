"""Poolers: what is made of the tokens that leave a stream.

A pooler of the site `stream` is called where the model's own readers look: behind the norm that takes the whole sequence, else behind the
last block. Every place gets the pooled vector, so that no head is named: one that reads the first token, the last real one, the mean, or
attends to all of them finds it. A pooler of the site `output` is called behind the model, and its vectors take the place of
`last_hidden_state`; what the model itself made of its tokens has seen all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import SharedHook
from ..engine.results import ModelCall
from ..engine.run import BlockTokens, Site
from ..engine.supply import ask
from ..engine.surgery import StreamSurgery
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.callers import callers
from ..model.classes import class_name
from ..model.streams import LAYOUTS
from ..roles.pooler import Pooler
from ..tokens.altered import altered
from ..tokens.token_map import TokenMap, take

CALLERS = 40  # frames up the stack: modules, hooks and decorators between a library and its model


@dataclass
class Leaving:
    """The tokens of a pass that have left the blocks, until the poolers that wait are called."""

    site: Site
    stream: list[Pooler] = field(default_factory=list)
    output: list[Pooler] = field(default_factory=list)


@handles("Pooler")
class PoolerHandler(Handler):
    def phases(self, method: Pooler) -> tuple[str, ...]:
        return ("leave", "last") if method.words["ask"] else ("leave",)

    def hooks(self, method: Pooler) -> set[str]:
        return {"final_norm"} if method.site == "stream" else set()

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        norm = block.surgery.stream.final_norm
        return [] if norm is None else [norm.register_forward_hook(SharedHook(block, leave_norm), with_kwargs=True)]

    def insert(self, method: Pooler, site: Site) -> BlockTokens | None:
        """Tokens that only read, in the last block that runs."""
        readers, x = ask(method, site, "ask"), site.hidden
        if readers is None:
            return None
        if site.run.ledger.causal:
            rule = f"Tokens of {type(method).__name__} that only ask need a stream in which each token sees all"
            raise UnsupportedError(explain(rule, f"the causal stream {site.surgery.stream.name!r}", "Set its `sees_all`."))
        if site.routed is not None or site.run.ledger.alone:
            rule = f"Tokens of {type(method).__name__} ask all tokens, in the last block that runs"
            remedy = "Give the router layers that leave that block out."
            raise UnsupportedError(explain(rule, f"a router that lets some skip {site.block.path}", remedy))
        site.block.tap.open()
        tokens, beside = readers
        opened = TokenMap.insert(x.shape[1], torch.zeros_like(beside), 1, len(x), x.device, beside=beside)
        return BlockTokens(method, opened, x, opened.fill(x, tokens.to(x)), only_read=True)

    def remove(self, method: Pooler, site: Site, summary: Tensor) -> bool:
        site.run.held["answers", method.key] = summary
        return False

    def leave(self, method: Pooler, site: Site, whole: Tensor, replaying: bool) -> Tensor:
        """Behind the last block: the sequence (b n d) that the model gets; no pooler waits in a block that is run again."""
        at_norm = site.surgery.stream.final_norm is not None
        if method.site == "stream" and method.strength and not at_norm:
            whole = hand_out(method, site, whole)
        if not replaying:
            held = site.surgery.call.held
            if Leaving not in held or held[Leaving].site.run is not site.run:
                held[Leaving] = Leaving(site)
            leaving = held[Leaving]
            leaving.stream += [method] if method.site == "stream" and method.strength and at_norm else []
            leaving.output += [method] if method.site == "output" else []
        return whole

    def after_model(self, call: ModelCall, output: Any) -> Any:
        """The model's output, with the vectors of the poolers that make it shorter; refused where it has no place for them, or where a
        pooler was never called."""
        for surgery in call.model.streams:
            leaving = surgery.call.held.pop(Leaving, None)
            if leaving is not None and leaving.stream:
                raise unread(surgery, "a norm that was not called")
            for method in leaving.output if leaving is not None else ():
                output = shorten_output(method, leaving.site, output)
        return output


def leave_norm(block: BlockSurgery, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
    """Behind the norm of a stream whose last block this is: what its readers get."""
    surgery = block.surgery
    leaving = surgery.call.held.get(Leaving)
    if not block.plan.acting or leaving is None or not leaving.stream:
        return None
    to_rows, back = LAYOUTS[surgery.stream.layout]
    whole, ledger = to_rows(output), leaving.site.run.ledger
    if whole.shape[:2] != (ledger.batch, ledger.n):
        raise unread(surgery, f"a norm that took {tuple(next(iter((*args, *kwargs.values()))).shape)}")
    for method in leaving.stream:
        whole = hand_out(method, leaving.site, whole)
    leaving.stream.clear()
    return back(whole, output)


def tell_pooled(method: Pooler, site: Site, vectors: Tensor) -> None:
    """Tell the listeners how many vectors (b d) or (b k d) stand for the tokens."""
    if site.surgery.heard:
        site.surgery.acted(site.block, method, vectors[..., 0].numel(), site.run.ledger.rows.numel())


def hand_out(method: Pooler, site: Site, whole: Tensor) -> Tensor:
    """The pooled vector in every place of the sequence (b n d), filler and padding too; a row of padding alone has none and stays."""
    padding = site.run.padding
    empty = None if padding is None else ~padding.any(dim=1, keepdim=True)  # b 1
    if empty is not None:
        real = None if site.run.real is None else site.run.real | empty
        site = altered(site, run=altered(site.run, padding=padding | empty, real=real))
    vector = pool(method, site, whole)
    if vector is None:
        return whole
    tell_pooled(method, site, vector)
    pooled = vector[:, None].to(whole.dtype).expand_as(whole)
    pooled = pooled if empty is None else torch.where(empty[..., None], whole, pooled)
    return pooled.contiguous() if method.strength == 1 else torch.lerp(whole, pooled, method.strength)  # a head may want a view of it


def shorten_output(method: Pooler, site: Site, output: Any) -> Any:
    """The model's output, with what a pooler makes of its tokens in the place of `last_hidden_state`, or of a retriever's vectors."""
    late = families.LATE_INTERACTION.search(class_name(site.surgery.model.base))
    at, ledger = (families.VECTORS if late else "last_hidden_state") if isinstance(output, dict) else 0, site.run.ledger
    whole = output.get(at) if isinstance(output, dict) else output[at] if isinstance(output, tuple) else None
    if not isinstance(whole, Tensor) or whole.dim() != 3 or whole.shape[:2] != (ledger.batch, ledger.n):
        rule = f"{type(method).__name__} gives the short sequence out in the place of `last_hidden_state`"
        got = f"the outputs {sorted(output)}" if isinstance(output, dict) else type(output).__name__
        raise UnsupportedError(explain(rule, got, "Load the encoder alone, such as AutoModel does."))
    vectors = pool(method, site, whole)
    if vectors is None:
        return output
    tell_pooled(method, site, vectors)
    refuse_readers_by_mask(method)
    if isinstance(output, dict):
        output[at] = vectors.to(whole.dtype)
        return output
    return (vectors.to(whole.dtype), *output[1:])


def refuse_readers_by_mask(method: Pooler) -> None:
    """Who called the model must look for as many vectors as there are, and not for one of each token that its mask shows."""
    names = {frame.f_globals.get("__name__", "").partition(".")[0] for frame in callers(CALLERS)}
    if reading := sorted(names & {*families.READS_BY_MASK}):
        rule = f"{type(method).__name__} returns fewer vectors than there are tokens, and its caller may not cut them by the text's mask"
        remedy = "Append `hf_tokens.sentence_transformers.TokenPooling` to the encoder's modules instead, or call the model itself."
        raise UnsupportedError(explain(rule, reading[0], remedy))


def pool(method: Pooler, site: Site, whole: Tensor) -> Tensor | None:
    """What a pooler makes of the tokens that are left of a sequence (b n d); those that were inserted have no place there."""
    ledger = site.run.ledger
    if ledger.untouched:
        return ask(method, altered(site, hidden=whole))
    if ledger.fresh is not None:
        ledger = altered(ledger, filled=ledger.flags(ledger.filled, True) & ~ledger.fresh)
    return ask(method, altered(site, hidden=take(whole, ledger.rows), run=altered(site.run, ledger=ledger)))


def unread(surgery: StreamSurgery, got: str) -> UnsupportedError:
    """The error for a stream whose readers look elsewhere than its structure shows."""
    rule = f"A Pooler needs a norm behind the blocks of the stream {surgery.stream.name!r} that takes every token, or none"
    return UnsupportedError(explain(rule, f"{got}, in {type(surgery.model.base).__name__}", "Choose another stream or model."))
