"""Tokens of a bank in the place of embeddings that the model looks up, before it adds their positions."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.opening import seen_before
from ..engine.run import Memory, Site, StreamRun
from ..engine.supply import ask
from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..model.streams import Stream
from ..roles.token_bank import TokenBank
from ..tokens.ledger import TokenLedger


@dataclass
class LookUp:
    """What a stream's embedding table last looked up: the ids (b n), and for each bank, by its key, the rows that it put in (b n)."""

    ids: Tensor
    rows: dict[str, Tensor] = field(default_factory=dict)


class Missed(set):
    """The banks, by their keys, that were told once that a batch to learn from held none of their tokens."""


class LookUps(dict):
    """By bank, the ids of the last call of a stream that reached its first block: a prompt in chunks may cut apart what it looks for."""

    def __reduce__(self) -> tuple:
        return LookUps, ()


def put_in(block: BlockSurgery, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The embeddings (b n d) that the table of a stream, whose first block this is, returned for its ids, with the banks' tokens in the
    places that the banks find."""
    ids, hidden, rows = args[0] if args else next(iter(kwargs.values())), output, {}
    flat, call = ids.reshape(-1, ids.shape[-1] if ids.dim() else 1), block.surgery.call
    for _, bank in block.plan.always.of("arrive"):
        ledger = TokenLedger.open(hidden.reshape(-1, *hidden.shape[-2:]), 0, True)  # there is no pass yet
        tokens = ask(bank, Site(block.surgery, block, StreamRun(call.context, ledger, None, None, Memory()), hidden, None))
        if tokens is not None:
            at = bank.find(flat).view(ids.shape)
            rows = {key: others.masked_fill(at >= 0, -1) for key, others in rows.items()} | {bank.key: at}  # the later bank counts
            hidden = write_rows(hidden, at, tokens)
    if ids.dim() > 1:  # some models look up a single id to compare with
        call.held[LookUp] = LookUp(ids, rows)
    return hidden


@torch.no_grad()
def looked_up(block: BlockSurgery, ids: Tensor, banks: Collection[TokenBank]) -> Tensor:
    """The embeddings (b n d) of ids (b n) with the tokens of these banks, which read nothing, outside of any call of the model."""
    hidden = block.base.get_submodule(block.surgery.stream.table).forward(ids)
    for _, bank in block.plan.always.of("arrive"):
        tokens = bank.at_hand(bank.tokens) if bank in banks else None
        if tokens is not None:
            hidden = write_rows(hidden, bank.find(ids), tokens)
    return hidden


def write_rows(hidden: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Write row r of tokens (k d) over each token of hidden (b n d) with that in rows (b n); -1 and rows from k on stand for none."""
    if not len(tokens):
        return hidden
    chosen = (rows >= 0) & (rows < len(tokens))
    return torch.where(chosen[..., None], tokens.to(hidden)[rows.clamp(0, len(tokens) - 1)], hidden)


def check_look_up(bank: TokenBank, block: BlockSurgery, args: tuple, kwargs: dict) -> None:
    """At the first block: refuse embeddings that bypass the table, given ones too where later blocks must know their ids, and a prompt cut
    apart within the words that a bank looks for."""
    surgery = block.surgery
    look_up, arguments = surgery.call.held.get(LookUp), surgery.call.context.arguments
    ready = not arguments or any("inputs_embeds" in name and value is not None for name, value in arguments.items())
    if look_up is None and bank.deep:
        rule = f"{type(bank).__name__} finds its tokens by their ids, in every block"
        raise UnsupportedError(explain(rule, f"embeddings in their place, at {block.path}", "Pass `input_ids` to the whole model."))
    if look_up is None and not ready:
        rule = f"{type(bank).__name__} replaces what {surgery.stream.table} looks up"
        raise UnsupportedError(explain(rule, "embeddings that came past it", "Take off adapters that read the table by themselves."))
    if look_up is not None and bank.training and torch.is_grad_enabled():
        warn_of_missing_tokens(bank, look_up, surgery.state(Missed))
    ids, known = None if look_up is None else look_up.ids, surgery.state(LookUps)
    before, known[bank.key] = known.get(bank.key), ids
    seen = seen_before(block, find_cache((*args, *kwargs.values())))
    if ids is None or before is None or not seen or 1 in (ids.shape[1], before.shape[1]) or len(ids) != len(before):
        return
    missed = (bank.find(torch.cat([before, ids], dim=1))[:, : before.shape[1]] >= 0) & (bank.find(before) < 0)
    if bool(missed.any()):
        rule = f"The words that {type(bank).__name__} looks for must come in one pass"
        raise UnsupportedError(explain(rule, "a prompt in chunks that cut them apart", "Choose a larger `prefill_chunk_size`."))


def warn_of_missing_tokens(bank: TokenBank, look_up: LookUp, missed: Missed) -> None:
    """Say once that a bank learns nothing from a batch: a tokenizer may join its words with the text beside them."""
    ids = list(bank.prompt_ids(bank.config))
    rows = look_up.rows.get(bank.key)
    if not ids or bank.key in missed or rows is not None and bool((rows >= 0).any()):
        return
    missed.add(bank.key)
    name = type(bank).__name__
    lost = f"hf-tokens: no row of this batch holds the token ids {ids}, so {name} learns nothing from it."
    warnings.warn(f"{lost} Tokenize its words by themselves and join the ids, not the text.", stacklevel=2)


def rewrite_rows(bank: TokenBank, site: Site) -> None:
    """Note at the first block which embeddings a bank gave; at a later one, rewrite what has become of them."""
    run, hidden = site.run, site.hidden
    if bank.is_first_block:
        look_up = site.surgery.call.held.get(LookUp)
        rows = None if look_up is None else look_up.rows.get(bank.key)
        if rows is not None:
            run.memory.tokens[bank.key] = rows_of_stream(site.surgery.stream, run.ledger, rows)
        return
    rows, tokens = run.memory.tokens.get(bank.key), ask(bank, site)
    if rows is None or tokens is None:
        return
    rows = rows.masked_fill(run.ledger.flags(run.ledger.fresh, False), -1)  # what was inserted beside a token is not that token
    site.put(write_rows(hidden, rows, tokens.repeat(1, hidden.shape[-1] // tokens.shape[-1])))  # for each parallel stream


def rows_of_stream(stream: Stream, ledger: TokenLedger, rows: Tensor) -> Tensor:
    """The rows of a look-up (b n) for the tokens that are left of a stream (b m), which must have begun with those looked up."""
    if rows.numel() != ledger.batch * ledger.n:
        rule = f"A bank that rewrites its tokens needs the tokens of {stream.table} in {stream.paths[0]}"
        got = f"{ledger.batch} x {ledger.n} of {tuple(rows.shape)}"
        raise UnsupportedError(explain(rule, got, "Choose another model, or one block."))
    return rows.view(ledger.batch, ledger.n).gather(1, ledger.rows).masked_fill(ledger.flags(ledger.fresh, False), -1)
