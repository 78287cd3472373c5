"""Tokens of a bank in the place of a word that a pipeline's text encoders read: they read the prompt again in each call of the denoiser."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.block import BlockSurgery
from ..engine.context import ForwardContext
from ..engine.hooks import hooked
from ..engine.model import ModelSurgery
from ..engine.results import ModelCall, Replays
from ..errors import UnsupportedError, explain
from ..model.encoders import POOLED, READ_BESIDE
from ..model.parts import VALUES, cross_attentions
from ..model.signatures import positional
from ..model.streams import PROMPT
from ..roles.config import MethodConfig
from ..roles.registry import method_info
from ..roles.token_bank import TokenBank
from ..tokens.altered import altered
from ..tokens.matching import match_sequence
from .encoders import AGAIN, EncoderCall, Encoding, TextEncoder, TextEncoders
from .prompt import Arguments, ask_at_prompt, banks_in_prompt, check_time, held_at

Bank = tuple[BlockSurgery, TokenBank]
KeysAndValues = tuple[Tensor, Tensor | None]  # what keys and values read; None where the values read the same


class BlockContexts(dict[BlockSurgery, KeysAndValues]):
    """What each block reads in the place of the prompt."""


class ContextReplays(Replays[BlockContexts | None]):
    """The same at each call of a block, for a checkpoint that runs the block again."""


class Told(set):
    """The banks, by their keys, that were told once that a batch to learn from held none of their words."""


@dataclass(frozen=True)
class Writing:
    """What a bank writes: its tokens in the place of a word, and what the values read besides, each (b k d); rows that take them, (b)."""

    word: str
    tokens: Tensor
    beside: Tensor | None
    rows: Tensor


def word_of(config: MethodConfig) -> str | None:
    """The word that a method of this config stands for; None where it stands for none."""
    cls = method_info(config.method, config.version).cls
    return cls.word(config) if issubclass(cls, TokenBank) else None


def banks_at_words(model: ModelSurgery) -> list[Bank]:
    """The active banks that stand for a word of the prompt, each with its block."""
    return [(block, m) for block in model.blocks() for m in block.plan.acting if m.site == "prompt" and m.word(m.config) is not None]


def read_again(call: ModelCall) -> bool:
    """Give the denoiser what its text encoders make of the banks' words; returns whether any bank stands for one."""
    banks = banks_at_words(call.model)
    if not banks:
        return False
    if any(bank.deep for _, bank in banks) and (beside := banks_in_prompt(call.model)):
        rule = "Where each block reads a prompt of its own, for its word, nothing is added behind the prompt"
        names = sorted({type(bank).__name__ for _, bank in beside})
        raise UnsupportedError(explain(rule, names, "Give each a word of its own, or an adapter of its own, and switch between them."))
    world = next((world for world in call.model.worlds if isinstance(world, TextEncoders)), None)
    if world is None:
        rule = f"{type(banks[0][1]).__name__} stands for a word that a pipeline's text encoders read"
        remedy = "Pass the pipeline to `get_token_model` or `hf_tokens.load`, and not its denoiser."
        raise UnsupportedError(explain(rule, "a denoiser that no pipeline was passed with", remedy))
    arguments, contexts = reread(call, banks, world.encoders)
    call.replace_arguments(arguments)
    for surgery in call.model.streams:
        surgery.begin(call.context, surgery.call.keeps_final)
        surgery.call.held[BlockContexts] = contexts
    return True


def reread(call: ModelCall, banks: list[Bank], encoders: list[TextEncoder]) -> tuple[Arguments, BlockContexts]:
    """The arguments of a call whose prompt was read again for what all blocks share, and what single blocks read."""
    arguments, context = call.context.arguments, call.context
    prompt = arguments.get(PROMPT)
    sources = find_sources(encoders, prompt)
    at = {m.word(m.config): [match_sequence(ids, e.ids(m.word(m.config))) for e, (ids, _) in zip(encoders, sources, strict=True)]
          for _, m in banks}  # fmt: skip
    context = altered(context, negative=torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device))
    written = [(block, bank, writing_of(block, bank, prompt, context, at, encoders)) for block, bank in banks]
    writings = [(block, bank, writing) for block, bank, writing in written if writing is not None]
    shared = [writing for _, bank, writing in writings if not bank.deep]
    own: dict[BlockSurgery, list[Writing]] = {}
    for block, bank, writing in writings:
        if bank.deep:
            own[block] = [*own.get(block, shared), writing]
    places = [*([shared] if shared else []), *own.values()]
    taken = [writing.rows for place in places for writing in place if bool(writing.rows.any())]
    if not taken:
        return arguments, BlockContexts()
    refuse_beside(arguments, banks)
    rows = torch.stack(taken).any(dim=0).nonzero()[:, 0]
    read = [
        encode(encoder, source, at, places, rows, i, encoders) for i, (encoder, source) in enumerate(zip(encoders, sources, strict=True))
    ]
    join = lambda name, place: prompt.index_copy(0, rows, torch.cat([getattr(e[place], name) for e in read], dim=-1).to(prompt))
    shifted = [any(writing.beside is not None for writing in place) for place in places]
    contexts = [(join("states", i), join("values", i) if shifts else None) for i, shifts in enumerate(shifted)]
    if shared:
        arguments = {**arguments, PROMPT: contexts.pop(0)[0], **pooled_again(arguments, rows, [e[0].pooled for e in read])}
    return arguments, BlockContexts(zip(own, contexts, strict=True))


def refuse_beside(arguments: Arguments, banks: list[Bank]) -> None:
    """Another network has read the prompt as its encoders made it, where the denoiser is about to read its words anew."""
    if given := [name for name in READ_BESIDE if arguments.get(name) is not None]:
        names = sorted({type(bank).__name__ for _, bank in banks})
        rule = f"Where {', '.join(names)} stands for a word of the prompt, nothing but the denoiser reads it"
        remedy = "Leave out the ControlNet, or leave out `word`: the tokens then stand behind the encoded prompt."
        raise UnsupportedError(explain(rule, f"`{given[0]}` of another network", remedy))


def find_sources(encoders: list[TextEncoder], prompt: Any) -> list[tuple[Tensor, dict[str, Any]]]:
    """For each encoder the ids (b n) that it made each sample of a prompt from, and its other arguments; refused where it did not."""
    rule = "A prompt with words that a bank stands for is what the pipeline's text encoders made of it lately"
    if not isinstance(prompt, Tensor) or prompt.dim() != 3:
        got = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise UnsupportedError(explain(rule, got, AGAIN))
    widths = [encoder.base.config.hidden_size for encoder in encoders]
    if sum(widths) != prompt.shape[2]:
        raise UnsupportedError(explain(rule, f"{prompt.shape[2]} features, where they have {widths}", AGAIN))
    return [source_of(e, part, rule) for e, part in zip(encoders, prompt.detach().split(widths, dim=2), strict=True)]


def source_of(encoder: TextEncoder, part: Tensor, rule: str) -> tuple[Tensor, dict[str, Any]]:
    """The ids (b n) that an encoder made each sample of its part of a prompt from; -1 for one of zeros, which holds no word."""
    ids = torch.full(part.shape[:2], -1, dtype=torch.long, device=part.device)
    known, more = ~part.flatten(1).any(dim=1), None
    for made_by, rows, twice in encoder.match(part):
        made = rows >= 0
        its_ids, its_more = made_by.rows(rows.clamp(min=0).to(made_by.ids.device))
        its_ids = its_ids.to(ids)
        twice = twice | made & known & (ids >= 0).any(dim=1) & (ids != its_ids).any(dim=1)
        if bool(twice.any()):
            encoder.calls.clear()  # the table may have other values from now on
            got = f"two prompts of other ids that `{encoder.row.encoder}` makes the same of"
            remedy = "Give the row of the word in its table values of its own, such as 1.01 times those it has."
            raise UnsupportedError(explain(rule, got, remedy))
        fresh = made & ~known
        if bool(fresh.any()):
            if more is not None and its_more.keys() != more.keys():
                raise UnsupportedError(explain(rule, f"calls with {sorted(more)} and with {sorted(its_more)}", AGAIN))
            more = {name: choose(fresh, value, (more or {}).get(name)) for name, value in its_more.items()}
            ids = torch.where(fresh[:, None], its_ids, ids)
        known = known | made
    if not bool(known.all()):
        raise UnsupportedError(explain(rule, f"{int((~known).sum())} of {len(known)} that are none of `{encoder.row.encoder}`", AGAIN))
    return ids, more or {}


def choose(rows: Tensor, value: Any, before: Any) -> Any:
    """An argument of an encoder whose rows are taken from this value, the others from the one before."""
    if before is None or not isinstance(value, Tensor) or len(value) != len(rows):
        return value
    return torch.where(rows.view(-1, *[1] * (value.dim() - 1)), value, before)


def writing_of(block: BlockSurgery, bank: TokenBank, prompt: Tensor, context: ForwardContext, at: dict, encoders: list) -> Writing | None:
    """What a bank writes into the prompts of a call; None where it has no tokens."""
    check_time(block, bank, prompt, context)
    word, name = bank.word(bank.config), type(bank).__name__
    ids = [encoder.ids(word) for encoder in encoders]
    own = torch.cat([e.table.weight[i].to(prompt.device) for e, i in zip(encoders, ids, strict=True)], dim=1)
    asked = {PROMPT: own.detach().expand(len(prompt), -1, -1)}
    tokens, taken = ask_at_prompt(block, bank, asked, context, "tokens"), ask_at_prompt(block, bank, asked, context, "takes")
    tokens, beside = tokens if isinstance(tokens, tuple) else (tokens, None)
    holds = torch.stack([(found >= 0).any(dim=1) for found in at[word]]).any(dim=0)
    if tokens is None or tokens.shape[-2] == 0:
        return None
    if beside is not None and not bank.deep:
        rule = "A bank whose values read something besides is deep: each block reads its own"
        raise UnsupportedError(explain(rule, name, "Return the tokens alone, or set `deep`."))
    if any(len(i) != tokens.shape[-2] for i in ids):
        rule = f"A word that {name} stands for is as many tokens as it has vectors, {tokens.shape[-2]}"
        remedy = "Choose another word or number, or add it to the tokenizers by `add_tokens` and resize the encoders' tables."
        raise UnsupportedError(explain(rule, f"{word!r} of {ids[0]}", remedy))
    warn_of_missing(block, bank, word, holds)
    wide = lambda x: None if x is None else x.expand(len(prompt), -1, -1)
    return Writing(word, wide(tokens), wide(beside), holds if taken is None else holds & taken)


def warn_of_missing(block: BlockSurgery, bank: TokenBank, word: str, holds: Tensor) -> None:
    """Say once that a bank learns nothing from a batch."""
    told = block.surgery.state(Told)
    if bank.training and torch.is_grad_enabled() and bank.key not in told and not bool(holds.any()):
        told.add(bank.key)
        warnings.warn(f"hf-tokens: no prompt of this batch holds {word!r}, so {type(bank).__name__} learns nothing from it.", stacklevel=2)


def encode(encoder: TextEncoder, source: tuple, at: dict, places: list, rows: Tensor, i: int, encoders: list) -> list[Encoding]:
    """What an encoder makes of some samples for each place, which has writings of its own; all places in one call."""
    widths = [e.base.config.hidden_size for e in encoders]
    ids, more = EncoderCall(*source, source[0]).rows(rows)
    own = lambda value: isinstance(value, Tensor) and len(value) == len(rows)
    more = {name: value.repeat(len(places), *[1] * (value.dim() - 1)) if own(value) else value for name, value in more.items()}

    def write(hidden: Tensor, part: Callable[[Writing], Tensor | None], into: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        states = list(hidden.chunk(len(places)))
        for place, writings in enumerate(places):
            for writing in writings:
                tokens = part(writing)
                if tokens is not None:
                    where = at[writing.word][i].masked_fill(~writing.rows[:, None], -1)[rows]  # r n
                    tokens = tokens.split(widths, dim=2)[i][rows].to(hidden)
                    tokens = tokens.gather(1, where.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[2]))
                    states[place] = torch.where((where >= 0)[..., None], into(states[place], tokens), states[place])
        return torch.cat(states)

    put = lambda hidden: write(hidden, lambda w: w.tokens, lambda old, new: new)
    shift = lambda hidden: write(hidden, lambda w: w.beside, lambda old, new: old + old.norm(dim=-1, keepdim=True) * new)
    shifts = any(writing.beside is not None for writings in places for writing in writings)
    whole = encoder.read(ids.repeat(len(places), 1), more, put, shift if shifts else None)
    parts = [(None,) * len(places) if x is None else x.chunk(len(places)) for x in (whole.states, whole.values, whole.pooled)]
    return [Encoding(*each) for each in zip(*parts, strict=True)]


def pooled_again(arguments: Arguments, rows: Tensor, pooled: list[Tensor | None]) -> Arguments:
    """The argument with what encoders pooled, as they do now; none where they are not asked for it."""
    name, key = POOLED
    new, held = next((p for p in pooled if p is not None), None), arguments.get(name)
    if new is None or not isinstance(held, dict) or key not in held:
        return {}
    return {name: {**held, key: held[key].index_copy(0, rows, new.to(held[key]))}}


def read_own(block: BlockSurgery, run: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a block on the prompt that was read for it alone."""
    contexts = held_at(block, block.surgery.stream.bind(block.index, args, kwargs), ContextReplays, BlockContexts)
    if not contexts or block not in contexts:
        return run(block, args, kwargs)
    (keys, values), names = contexts[block], positional(type(block.module))[: len(args)]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    given = arguments.get(PROMPT)
    arguments[PROMPT] = (keys, *given[1:]) if isinstance(given, tuple) else keys
    changed = []

    def swap(module: Any, inputs: tuple) -> tuple | None:
        if values is None or inputs[0] is not keys:
            return None
        changed.append(module)
        return values, *inputs[1:]

    projections = [child for _, module in cross_attentions(block.module) for name, child in module.named_children() if name == VALUES]
    with hooked([projection.register_forward_pre_hook(swap) for projection in projections]):
        cut = tuple(arguments.pop(name) for name in names)
        output = run(block, (*cut, *args[len(names) :]), arguments)
    if values is not None and not changed:
        rule = "A bank whose word has other values than keys needs blocks with a projection of the prompt's values alone"
        got = f"none that was called with the prompt at {block.path}"
        raise UnsupportedError(explain(rule, got, "Unfuse the projections, or choose another model."))
    return output
