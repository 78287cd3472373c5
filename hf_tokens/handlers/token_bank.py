"""Token banks: tokens put into the stream, for one block or until its end, or in the place of embeddings or behind a denoiser's prompt."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention.call import AttentionCall
from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import SharedHook
from ..engine.model import ModelSurgery
from ..engine.results import ModelCall
from ..engine.rotation import Turning
from ..engine.run import BlockTokens, Site, StreamRun
from ..engine.supply import ask, real_tokens, token_mask
from ..errors import UnsupportedError, explain
from ..kv.layer import TokenCacheLayer
from ..roles.signals import TURNED
from ..roles.token_bank import TokenBank
from ..tokens.altered import altered
from ..tokens.ledger import TokenLedger
from ..tokens.token_map import TokenMap, overwrite
from . import prompt, words
from .embedding import check_look_up, put_in, rewrite_rows

SCORES_AT_A_TIME = 1 << 24  # of an attention call that a method shapes
# site of a bank -> the phases of a block in which it takes part
BANK_PHASES = {"input": ("before",), "block": ("insert",), "query": ("insert",), "embedding": ("before", "arrive"), "prompt": ()}
READS = "query tokens have read"


@handles("TokenBank")
class TokenBankHandler(Handler):
    arrive = staticmethod(check_look_up)
    after_model = staticmethod(prompt.join_parts)

    def phases(self, method: TokenBank) -> tuple[str, ...]:
        closes = method.is_first_block and bool(method.words["conclude"])
        return (*BANK_PHASES[method.site], *(("close",) if closes else ()))

    def hooks(self, method: TokenBank) -> set[str]:
        table = {"table"} if method.site == "embedding" and method.is_first_block else set()
        table |= {TURNED} if method.turns else set()
        return table | ({"tap"} if method.site == "query" or method.words["attend"] else set())

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        table = block.base.get_submodule(block.surgery.stream.table)
        return [table.register_forward_hook(SharedHook(block, put_in), with_kwargs=True)]

    def quiet(self, method: TokenBank) -> bool:
        """Whether all that it does in a block is to give tokens."""
        return method.site == "block" and not method.observes

    def settled(self, method: TokenBank, layer: TokenCacheLayer) -> bool:
        """Whether the cache holds its tokens already."""
        return method.key in layer.banks

    def fronts(self, method: TokenBank) -> bool:
        return method.site == "block" and not method.observes

    def before(self, method: TokenBank, site: Site) -> None:
        if method.site == "embedding":
            rewrite_rows(method, site)
        else:
            self._give(method, site)
        if method.shifts and method.is_first_block:
            site.run.shift(ask(method, site, "shift"))

    def _give(self, method: TokenBank, site: Site) -> None:
        """Insert the tokens, or write them anew where they are."""
        run, hidden = site.run, site.hidden
        mark = run.memory.tokens.get(method.key)
        inserted = mark is not None and mark.shape[1] == run.ledger.m
        if not inserted and method.words["follow"]:
            self._follow(method, site)
            return
        if not inserted and not admits_sequence(method, run):
            return
        tokens = tokens_of(method, site)
        if tokens is None:
            return
        if inserted:
            site.put(overwrite(hidden, mark, tokens))
            return
        real = token_mask(site)
        start = real.long().argmax(dim=1)
        end = real.shape[1] - real.flip(1).long().argmax(dim=1)
        at = method.place(start, end) if run.segments is None else run.starts(run.ledger)
        tell_inserted(method, site, tokens)
        opened = TokenMap.insert(run.ledger.m, at, tokens.shape[1], len(hidden), hidden.device, beside=torch.minimum(at, end - 1))
        site.move(opened, opened.fill(hidden, tokens))
        run.memory.tokens[method.key] = opened.fresh

    def _follow(self, method: TokenBank, site: Site) -> None:
        """Put the tokens behind those that it follows."""
        marked = ask(method, site, "follow") if method.is_first_block else None
        marked = None if marked is None else marked & real_tokens(site)
        tokens = None if marked is None or not bool(marked.any()) else tokens_of(method, site)
        if tokens is not None:
            tell_inserted(method, site, tokens)
            opened = TokenMap.follow(marked, tokens.shape[1])
            site.move(opened, opened.fill(site.hidden, tokens))
            site.run.memory.tokens[method.key] = opened.fresh

    def close(self, method: TokenBank, site: Site) -> None:
        """Note what has become of its tokens, where this pass has some."""
        if method.key in site.run.memory.tokens:
            conclusion = ask(method, site, "conclude")
            if conclusion is not None:
                site.surgery.model.conclusions[method.key] = conclusion.detach()

    def insert(self, method: TokenBank, site: Site) -> BlockTokens | None:
        run, x, ledger, layer = site.run, site.hidden, site.run.ledger, site.layer
        tokens = tokens_of(method, site) if admits(method, layer, ledger) else None
        if tokens is None:
            return None
        tell_inserted(method, site, tokens)
        if layer is not None and method.site == "block":
            layer.banks[method.key] = layer.seen
        at = beside = run.first_real(ledger) if run.segments is None else run.starts(ledger)
        if run.segments is None and site.surgery.stream.mixers[site.block.index] != "other":
            at = 0  # a state space reads its tokens in order, those that only read stand in front
        opened = TokenMap.insert(x.shape[1], at, tokens.shape[1], len(x), x.device, beside=beside)
        return BlockTokens(method, opened, x, opened.fill(x, tokens), only_read=method.site == "query")

    def remove(self, method: TokenBank, site: Site, summary: Tensor) -> bool:
        read = method.at_hand(partial(method.read, summary))
        if read is not None:
            held = site.surgery.call.held
            held[READS] = held[READS] + read if READS in held else read
        return True

    def after_head(self, call: ModelCall, hidden: Tensor | None, output: Tensor) -> Tensor:
        """Add what query tokens have read."""
        reads = [surgery.call.held.pop(READS) for surgery in call.model.streams if READS in surgery.call.held]
        if not reads:
            return output
        if output.shape != reads[0].shape:
            rule = f"What query tokens read adds to a head with one output {tuple(reads[0].shape)} a sample"
            raise UnsupportedError(explain(rule, tuple(output.shape), "Load the model with a classification head."))
        return output + sum(reads).to(output.dtype)

    def attend(self, method: TokenBank, site: Site, call: AttentionCall) -> list[Callable[[], AttentionCall]]:
        """The attention call of a block, its keys read as the bank decides, in parts that hold not too many scores each."""
        if site.block.tap.readers:
            rule = f"{type(method).__name__} shapes an attention call in which each query has a key"
            got = f"{site.block.tap.readers} tokens that only ask at {site.block.path}"
            raise UnsupportedError(explain(rule, got, "Give them different layers."))
        call.check()
        local = site.local
        if (call.q.shape[0], call.q.shape[2]) != (local.batch, local.m):
            rule = f"{type(method).__name__} shapes an attention call with a query for each token of each sample"
            got = f"queries {tuple(call.q.shape)} for {local.batch} x {local.m} tokens at {site.block.path}"
            raise UnsupportedError(explain(rule, got, "Choose other layers or another model."))
        whole = site.inside(site.hidden, routed=None)
        call = altered(call, turn=Turning(whole).turn) if method.turns else call

        def shaped(part: slice) -> AttentionCall:
            rows = call.rows(part)
            attending = ask(method, altered(whole, call=rows, part=part), "attend")
            return rows if attending is None else rows.attending(attending)

        (b, h, m, _), n = call.q.shape, call.k.shape[2]
        step = max(1, SCORES_AT_A_TIME // (b * h * n))
        return [partial(shaped, slice(first, first + step)) for first in range(0, m, step)]

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if words.read_again(call):
            args, kwargs = (), call.context.arguments
        return prompt.before_model(call, args, kwargs)

    def stands_around(self, model: ModelSurgery) -> bool:
        return any(bank.deep for _, bank in (*prompt.banks_in_prompt(model), *words.banks_at_words(model)))

    def around(self, block: BlockSurgery, run: Callable, args: tuple, kwargs: dict) -> Any:
        return words.read_own(block, lambda block, *call: prompt.on_its_own(block, run, *call), args, kwargs)


def tell_inserted(method: TokenBank, site: Site, tokens: Tensor) -> None:
    """Tell the listeners how many tokens (b k d) go in, beside those that are there."""
    if site.surgery.heard:
        site.surgery.acted(site.block, method, tokens.shape[:2].numel(), site.hidden.shape[:2].numel())


def tokens_of(method: TokenBank, site: Site) -> Tensor | None:
    """The tokens that a bank gives at a site, (b k d); None if it gives none."""
    tokens = ask(method, site)
    if tokens is None or tokens.shape[-2] == 0:
        return None
    tokens, streams = tokens.to(site.hidden), site.hidden.shape[-1] // tokens.shape[-1]
    tokens = tokens if streams == 1 else tokens.repeat(*[1] * (tokens.dim() - 1), streams)  # one for each parallel stream
    return tokens.expand(len(site.hidden), -1, -1) if tokens.dim() == 2 else tokens


def admits(method: TokenBank, layer: TokenCacheLayer | None, ledger: TokenLedger) -> bool:
    """Whether a bank's tokens are inserted: those whose keys the cache holds already, or that a state has read, are not given again."""
    if method.site == "query":
        return True
    return ledger.start == 0 if layer is None else method.key not in layer.banks


def admits_sequence(method: TokenBank, run: StreamRun) -> bool:
    """The same for tokens that stay until the end of the stream."""
    if not run.layers:
        return run.ledger.start == 0
    if method.key in run.layers[0].banks:
        return False
    run.layers[0].banks[method.key] = run.ledger.start
    return True
