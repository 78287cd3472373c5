"""Tokens of a bank in the prompt that a denoiser is given: which samples take them, where they stand, and what each block reads of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.context import ForwardContext
from ..engine.handler import handler_of
from ..engine.model import ModelSurgery
from ..engine.results import ModelCall, Replays, in_backward
from ..engine.trial import run_or_refuse
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.classes import class_name
from ..model.pipelines import SHARED_CACHES, their_caches
from ..model.signatures import positional
from ..model.streams import PROMPT
from ..roles.token_bank import TokenBank
from ..tokens.altered import altered
from ..tokens.token_map import TokenMap, take

Arguments = dict[str, Any]


@dataclass(frozen=True)
class PromptInsert:
    """What a bank puts into a prompt: tokens (b k d), samples that take them (b); the place of the only block that reads them, or None."""

    key: str
    place: int | None
    tokens: Tensor
    rows: Tensor


@dataclass(frozen=True)
class PromptLayout:
    """Where the tokens of single blocks stand: behind the `length` that all of them read, by key and place of their bank."""

    length: int
    total: int
    own: dict[tuple[str, int], range]


APART = "samples that ran apart"


class PromptReplays(Replays[PromptLayout | None]):
    """The layout of the prompt at each call of a block, for a checkpoint that runs the block again."""


def banks_in_prompt(model: ModelSurgery) -> list[tuple[BlockSurgery, TokenBank]]:
    """The active banks that add to the prompt, each with its block."""
    acting = ((block, method) for block in model.blocks() for method in block.plan.acting)
    return [(block, method) for block, method in acting if method.site == "prompt" and method.word(method.config) is None]


def before_model(call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Let banks add to a denoiser's prompt; samples that take other tokens than the last ones do run here."""
    banks = banks_in_prompt(call.model)
    if not banks:
        return args, kwargs
    arguments, steps = call.context.arguments, call.context.steps_of_denoiser
    context = altered(call.context, negative=steps.negative(arguments))
    inserts = gather_inserts(banks, arguments, context)
    if not inserts:
        refuse_shared(call, banks, context)
        return args, kwargs
    groups = group_samples(inserts)
    if len(groups) == 1:
        extended, layout = extend_prompt(arguments, inserts)
        lay_out(call, context, layout)
        return (), extended
    refuse_parts(call)
    parts = call.held[APART] = []
    for rows in groups:
        of_rows, inserts_of_rows = part_of_call(arguments, inserts, rows)
        extended, layout = extend_prompt(of_rows, inserts_of_rows) if inserts_of_rows else (of_rows, None)
        lay_out(call, part_of_context(context, rows), layout)
        parts.append((rows, None if rows is groups[-1] else call.model.inner(**extended)))
    return (), extended


def lay_out(call: ModelCall, context: ForwardContext, layout: PromptLayout | None) -> None:
    """Let the streams be called in this context, with the prompt laid out so."""
    for surgery in call.model.streams:
        surgery.begin(context, surgery.call.keeps_final)
        surgery.call.held[PromptLayout] = layout


def join_parts(call: ModelCall, output: Any) -> Any:
    """The output for all samples."""
    parts = call.held.get(APART)
    return output if parts is None else join_outputs([*parts[:-1], (parts[-1][0], output)])


def refuse_shared(call: ModelCall, banks: list[tuple[BlockSurgery, TokenBank]], context: ForwardContext) -> None:
    """Refuse a negative prompt without the tokens beside a cache that keeps the same for it and for the prompt with them."""
    if context.negative is None or not bool(context.negative.any()):
        return
    if shared := [name for name in their_caches(call.model.base) if SHARED_CACHES.search(name)]:
        rule = f"Beside a cache of diffusers' own that is one for both prompts, {type(banks[0][1]).__name__} gives its tokens to both"
        remedy = "Give them to the negative prompt too, or enable another cache, such as FirstBlockCacheConfig."
        raise UnsupportedError(explain(rule, f"{shared} and a negative prompt without them", remedy))


def refuse_parts(call: ModelCall) -> None:
    """What a method keeps from one call to the next is of all samples, and so is an attention that joins them; a call in parts has some."""
    if call.context.steps_of_denoiser.joined is not None:
        rule = "Where only some samples of a call take tokens into their prompt, as under guidance, its attention reads each sample alone"
        got = f"{call.context.steps_of_denoiser.joined} joins them"
        raise UnsupportedError(explain(rule, got, "Turn that off (PAG by `pag_scale=0`), or give the tokens to the negative prompt too."))
    keeping = sorted({type(method).__name__ for method in call.model.methods() if handler_of(method).keeps_steps})
    keeping += ["noise or guidance"] if call.context.steps_of_denoiser.keeps_output else []
    keeping = keeping or their_caches(call.model.base)
    if keeping:
        rule = "Where only some samples of a call take tokens into their prompt, as under guidance, nothing may be kept from call to call"
        remedy = "Call the denoiser once for each half, within `cache_context('cond')` and `cache_context('uncond')`."
        raise UnsupportedError(explain(rule, keeping, remedy))


def ask_at_prompt(block: BlockSurgery, bank: TokenBank, call: Arguments, context: ForwardContext, word: str) -> Tensor | None:
    """Call a word of a bank with the signals that it names."""
    supply: dict[str, Callable[[], Any]] = {
        "hidden": lambda: call[PROMPT],
        "mask": lambda: prompt_mask(call),
        "kind": lambda: block.surgery.stream.kind,
        "layer": lambda: block.index,
        "layers": lambda: len(block.surgery.stream),
        "progress": lambda: block.surgery.model.progress,
    }
    names = [name for name in bank.words[word] if name not in bank.ignores]
    signals = {name: supply[name]() if name in supply else getattr(context, name) for name in names}
    return bank.at_hand(functools.partial(getattr(bank, word), **{**dict.fromkeys(bank.words[word]), **signals}))


def check_time(block: BlockSurgery, bank: TokenBank, prompt: Any, context: ForwardContext) -> None:
    """Refuse a call without a prompt for each sample, and one at a timestep that a bank cannot make sense of."""
    time = context.time
    if not isinstance(prompt, Tensor) or prompt.dim() != 3 or time is not None and len(time) != len(prompt):
        rule = f"{type(bank).__name__} adds to the prompt of a denoiser, `{PROMPT}` as (batch, tokens, features), one for each sample"
        got = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise UnsupportedError(explain(rule, got, "Pass one, or disable the adapter."))
    if time is None and any("time" in names for names in bank.words.values()):
        rule = f"{type(bank).__name__} needs to know how much noise a timestep means"
        got = f"a timestep of {type(block.surgery.model.base).__name__} in a unit that is not known"
        raise UnsupportedError(explain(rule, got, "Call it from a pipeline whose scheduler counts to `num_train_timesteps`."))


def gather_inserts(banks: list[tuple[BlockSurgery, TokenBank]], call: Arguments, context: ForwardContext) -> list[PromptInsert]:
    """What the banks put into the prompt of a call, as far as any sample takes it."""
    prompt, inserts, takers = call.get(PROMPT), [], {}
    for block, bank in banks:
        check_time(block, bank, prompt, context)
        if bank.key not in takers:
            rows = ask_at_prompt(block, bank, call, context, "takes")
            rows = ~context.negative if rows is None else rows
            takers[bank.key] = rows if bool(rows.any()) else None
        tokens = None if takers[bank.key] is None else ask_at_prompt(block, bank, call, context, "tokens")
        if tokens is None or tokens.shape[-2] == 0:
            continue
        if tokens.shape[-1] != prompt.shape[-1]:
            rule = f"{type(bank).__name__} was made for a prompt of {tokens.shape[-1]} features"
            raise UnsupportedError(explain(rule, prompt.shape[-1], "Encode the prompt as the model's config says."))
        tokens = tokens.to(prompt).expand(len(prompt), -1, -1)
        inserts.append(PromptInsert(bank.key, bank.dims.place if bank.deep else None, tokens, takers[bank.key]))
    return inserts


def group_samples(inserts: list[PromptInsert]) -> list[Tensor]:
    """Samples that take the same tokens, as indices: what they read differs in length, and not every model can hide a part of it."""
    takers = {insert.key: insert.rows for insert in inserts}
    which = torch.stack([*takers.values()], dim=1).unique(dim=0, return_inverse=True)[1]
    return [(which == i).nonzero()[:, 0] for i in range(int(which.max()) + 1)]


def prompt_masks(call: Arguments) -> dict[str, Tensor]:
    """The masks of the prompt among the arguments of a call."""
    return {name: value for name, value in call.items() if families.PROMPT_MASKS.match(name) and isinstance(value, Tensor)}


def prompt_mask(call: Arguments) -> Tensor:
    """Which tokens of the prompt are there, (b l) bool."""
    prompt, mask = call[PROMPT], next(iter(prompt_masks(call).values()), None)
    if mask is None:
        return torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
    shown = mask != 0 if mask.dim() == 2 or mask.dtype == torch.bool else mask > -1  # a mask, or a bias that is added
    return shown.flatten(1, -2).any(dim=1) if shown.dim() > 2 else shown


def extend_prompt(call: Arguments, inserts: list[PromptInsert]) -> tuple[Arguments, PromptLayout | None]:
    """The call with the tokens in its prompt: those for all blocks behind its last real token, those for single blocks behind its end."""
    for name, value in call.items():
        if value is not None and (families.PROMPT_LENGTHS.search(name) or name == "attention_mask" and runs_over_prompt(value, call)):
            rule = f"Tokens can be added to a prompt that is described by masks named as {families.PROMPT_MASKS.pattern}"
            raise UnsupportedError(explain(rule, f"`{name}`", "Leave it out, or choose another model."))
    shared = [insert.tokens for insert in inserts if insert.place is None]
    if shared:
        seen = prompt_mask(call)
        call = widen_prompt(call, torch.cat(shared, dim=1), seen.shape[1] - seen.flip(1).long().argmax(dim=1))
    single = [insert for insert in inserts if insert.place is not None]
    if not single:
        return call, None
    at = length = call[PROMPT].shape[1]
    behind = torch.full_like(inserts[0].rows, length, dtype=torch.long)
    call = widen_prompt(call, torch.cat([insert.tokens for insert in single], dim=1), behind)
    places = {}
    for insert in single:
        places[insert.key, insert.place] = range(at, at := at + insert.tokens.shape[1])
    return call, PromptLayout(length, at, places)


def runs_over_prompt(value: Any, call: Arguments) -> bool:
    """Whether an argument may run over the tokens of the prompt, alone or beside those of the picture."""
    prompt, picture = call[PROMPT], call.get("hidden_states")
    beside = picture.shape[1] if isinstance(picture, Tensor) and picture.dim() == 3 else 0
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] in (prompt.shape[1], prompt.shape[1] + beside)


def widen_prompt(call: Arguments, tokens: Tensor, at: Tensor) -> Arguments:
    """The call with tokens (b k d) in front of place `at` (b) of its prompt, seen wherever the prompt is masked."""
    prompt = call[PROMPT]
    opened = TokenMap.insert(prompt.shape[1], at, tokens.shape[1], len(prompt), prompt.device, beside=(at - 1).clamp(min=0))
    extended: Arguments = {PROMPT: opened.fill(prompt, tokens)}
    for name, mask in prompt_masks(call).items():
        wide = take(mask.expand(len(prompt), *mask.shape[1:]), opened.source, mask.dim() - 1)
        fresh = opened.fresh.view(len(wide), *[1] * (wide.dim() - 2), -1)
        extended[name] = wide.masked_fill(fresh, 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0)
    for name in families.PROMPT_PLACES:
        if isinstance(call.get(name), Tensor):
            extended[name] = widen_places(name, call[name], opened)
    return {**call, **extended}


def widen_places(name: str, table: Tensor, opened: TokenMap) -> Tensor:
    """The places of a widened prompt: a token that was added has that of the one in front of it."""
    if table.dim() == 3:
        return opened.gather(table)
    alike = bool((opened.source == opened.source[:1]).all()) or bool((table == table[:1]).all())
    if not alike:
        rule = f"Samples that share `{name}` must have as many real tokens in their prompts"
        raise UnsupportedError(explain(rule, "different numbers", "Give the model one sample a call."))
    return table[opened.source[0]]


def of_samples(name: str, value: Any, rows: Tensor, batch: int) -> Any:
    """An argument for some of the samples."""
    if isinstance(value, dict):
        return {key: of_samples(key, item, rows, batch) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(of_samples(name, item, rows, batch) for item in value)
    split = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch and not families.SHARED_TABLES.search(name)
    return value[rows.to(value.device)] if split else value


def part_of_context(context: ForwardContext, rows: Tensor) -> ForwardContext:
    """The context of some of the samples."""
    batch = len(context.negative)
    return altered(context, **{f.name: of_samples(f.name, getattr(context, f.name), rows, batch) for f in fields(context)})


def part_of_call(call: Arguments, inserts: list[PromptInsert], rows: Tensor) -> tuple[Arguments, list[PromptInsert]]:
    """The call of some samples, and what these take."""
    batch = len(call[PROMPT])
    taken = [PromptInsert(i.key, i.place, i.tokens[rows], i.rows[rows]) for i in inserts if bool(i.rows[rows[0]])]
    return {name: of_samples(name, value, rows, batch) for name, value in call.items()}, taken


def join_outputs(parts: list[tuple[Tensor, Any]]) -> Any:
    """What a model put out for some samples after the others, in the order of all."""
    order = torch.cat([rows for rows, _ in parts]).argsort()

    def put(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat(values)[order]
        if isinstance(first, dict):
            return type(first)(**{name: put([value[name] for value in values]) for name in first})
        return type(first)(put(list(items)) for items in zip(*values, strict=True)) if isinstance(first, (tuple, list)) else first

    return put([output for _, output in parts])


def held_at(block: BlockSurgery, hidden: Tensor, kind: type[Replays], key: Any) -> Any:
    """What the model's call holds by a key, at a call of a block; run again by a checkpoint, what the one before held."""
    replays = block.surgery.state(kind)
    if in_backward():
        return replays.find_last(block, hidden)
    held = block.surgery.call.held.get(key)
    replays.hold(block, hidden, lambda: held)
    return held


def on_its_own(block: BlockSurgery, run: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a block on its own part of the prompt only; what it returns has the whole prompt again."""
    layout = held_at(block, block.surgery.stream.bind(block.index, args, kwargs), PromptReplays, PromptLayout)
    if layout is None:
        return run(block, args, kwargs)
    cut_args, cut_kwargs, restore = cut_to_own(layout, block, args, kwargs)
    rule = "A block with a prompt of its own must run on another number of its tokens than the model was given"
    words = (rule, f"{type(block.module).__name__} at {block.path}", "Choose another model, or one prompt for all blocks.")
    cut = (cut_args, cut_kwargs)
    return restore(run_or_refuse(lambda: run(block, *cut), block.module, (args, kwargs), cut, words))


def cut_to_own(layout: PromptLayout, block: BlockSurgery, args: tuple, kwargs: dict) -> tuple[tuple, dict, Callable[[Any], Any]]:
    """The arguments of a block with its own part of the prompt only; and what gives the prompt back in what it returns."""
    index = block.surgery.stream.context_index(block.index)
    names = positional(type(block.module))[: len(args)]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    context, n = arguments.get(PROMPT if index is None else index.name), block.surgery.stream.bind(block.index, args, kwargs).shape[1]
    if isinstance(context, tuple) and gives_pictures(block.surgery.model.base):
        context = context[0]
    if not isinstance(context, Tensor) or context.shape[1] != layout.total:
        rule = f"{sorted({key for key, _ in layout.own})} add to the prompt for single blocks, which must get it as the model was given it"
        got = f"{tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__} at {block.path}"
        raise UnsupportedError(explain(rule, got, "Choose another model, or one prompt for all blocks."))
    keys = {(method.key, method.dims.place) for method in block.plan.acting if method.site == "prompt"}
    keep = [*range(layout.length), *(i for key, own in layout.own.items() if key in keys for i in own)]
    kept = torch.tensor(keep, device=context.device)
    cut = {name: narrow_argument(name, value, context, kept, n, block) for name, value in arguments.items()}
    by_name = {name: value for name, value in cut.items() if name not in names}
    return (*(cut[name] for name in names), *args[len(names) :]), by_name, lambda output: restore_prompt(output, index, context, layout)


def gives_pictures(model: nn.Module) -> bool:
    """Whether the blocks of a model get the pictures of IP-Adapters behind their prompt."""
    name, value = families.PROMPT_AND_PICTURES
    return vars(model.config).get(name) == value  # diffusers sets the attribute alone


def narrow_argument(name: str, value: Any, context: Tensor, keep: Tensor, n: int, block: BlockSurgery) -> Any:
    """An argument over the prompt, or over prompt and picture, for these tokens of the prompt."""
    if value is context:
        return context[:, keep]
    if isinstance(value, (tuple, list)):
        return type(value)(narrow_argument(name, item, context, keep, n, block) for item in value)
    if not isinstance(value, Tensor):
        return value
    total = context.shape[1]
    if families.PROMPT_MASKS.match(name) and value.shape[-1] == total:
        return value.index_select(-1, keep)
    if families.SHARED_TABLES.search(name) and value.dim() == 2 and len(value) in (total, total + n):
        picture = torch.arange(n, device=keep.device)
        behind = families.CONTEXT_BEHIND.search(class_name(block.module))
        return value[keep if len(value) == total else torch.cat([picture, keep + n] if behind else [keep, picture + total])]
    return value


def restore_prompt(output: Any, index: Any, context: Tensor, layout: PromptLayout) -> Any:
    """What a block returned, with the tokens of other blocks behind its prompt again."""
    if index is None or not isinstance(output, tuple) or output[index.returned] is None:
        return output
    prompt = torch.cat([output[index.returned][:, : layout.length], context[:, layout.length :]], dim=1)
    return type(output)((*output[: index.returned], prompt, *output[index.returned + 1 :]))
