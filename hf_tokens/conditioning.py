"""Tokens of a bank in the prompt that a denoiser is given: which samples take them, where they stand, and what each block reads of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import families
from .anatomy import PROMPT
from .errors import UnsupportedError, explain
from .roles import FeatureCache, TokenBank
from .signatures import positional
from .token_map import TokenMap, take

if TYPE_CHECKING:
    from .layer import BlockSurgery
    from .root import Root
    from .surgery import Runtime

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Gift:
    """What a bank puts into a prompt: tokens (b k d), samples that take them (b); the place of the only block that reads them, or None."""

    key: str
    place: int | None
    tokens: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Layout:
    """Where the tokens of single blocks stand: behind the `length` that all of them read, by key and place of their bank."""

    length: int
    total: int
    own: dict[tuple[str, int], range]


def in_prompt(root: Root) -> list[tuple[BlockSurgery, TokenBank]]:
    """The active banks that act on the prompt, each with its block."""
    sides = (side for runtime in root.runtimes for side in runtime.sides.values())
    return [(side, method) for side in sides for method in side.active() if isinstance(method, TokenBank) and method.site == "prompt"]


# -- what the banks say ----------------------------------------------------------------------------------------------


def ask(side: BlockSurgery, bank: TokenBank, call: Arguments, word: str) -> Tensor | None:
    """Call a word of a bank with the signals that it names."""
    runtime = side.runtime
    supply: dict[str, Callable[[], Any]] = {
        "hidden": lambda: call[PROMPT],
        "mask": lambda: real(call),
        "kind": lambda: runtime.stream.kind,
        "layer": lambda: side.index,
        "layers": lambda: len(runtime.stream),
        "progress": lambda: runtime.progress,
    }
    names = [name for name in bank.words[word] if name not in bank.ignores]
    found = {name: supply[name]() if name in supply else runtime.inputs[name] for name in names}
    return getattr(bank, word)(**{**dict.fromkeys(bank.words[word]), **found})


def gather(banks: list[tuple[BlockSurgery, TokenBank]], call: Arguments) -> list[Gift]:
    """What the banks put into the prompt of a call, as far as any sample takes it."""
    prompt, gifts, takers = call.get(PROMPT), [], {}
    for side, bank in banks:
        time = side.runtime.inputs["time"]
        if not isinstance(prompt, Tensor) or prompt.dim() != 3 or time is not None and len(time) != len(prompt):
            rule = f"{type(bank).__name__} adds to the prompt of a denoiser, `{PROMPT}` as (batch, tokens, features), one for each sample"
            came = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
            raise UnsupportedError(explain(rule, came, "Pass one, or disable the adapter."))
        if bank.key not in takers:
            rows = ask(side, bank, call, "takes")
            rows = ~side.runtime.inputs["negative"] if rows is None else rows
            takers[bank.key] = rows if bool(rows.any()) else None
        tokens = None if takers[bank.key] is None else ask(side, bank, call, "tokens")
        if tokens is None or tokens.shape[-2] == 0:
            continue
        if tokens.shape[-1] != prompt.shape[-1]:
            rule = f"{type(bank).__name__} was made for a prompt of {tokens.shape[-1]} features"
            raise UnsupportedError(explain(rule, prompt.shape[-1], "Encode the prompt as the model's config says."))
        tokens = tokens.to(prompt).expand(len(prompt), -1, -1)
        gifts.append(Gift(bank.key, bank.dims.place if bank.deep else None, tokens, takers[bank.key]))
    return gifts


def groups(gifts: list[Gift]) -> list[Tensor]:
    """Samples that take the same gifts, as indices: what they read differs in length, and not every model can hide a part of it."""
    takers = {gift.key: gift.rows for gift in gifts}
    which = torch.stack([*takers.values()], dim=1).unique(dim=0, return_inverse=True)[1]
    return [(which == i).nonzero()[:, 0] for i in range(int(which.max()) + 1)]


def refuse_parts(root: Root) -> None:
    """What a method keeps from one call to the next is of all samples; a call in parts has some of them."""
    keeping = sorted({type(method).__name__ for method in root.methods() if isinstance(method, FeatureCache)})
    keeping += ["noise or guidance"] if root.denoising.listens else []
    if keeping or vars(root.model).get("_cache_config") is not None:
        rule = "Where only some samples of a call take tokens into their prompt, as under guidance, nothing may be kept from call to call"
        remedy = "Call the denoiser once for each half, within `cache_context('cond')` and `cache_context('uncond')`."
        raise UnsupportedError(explain(rule, keeping or "a cache of diffusers' own", remedy))


# -- the prompt ------------------------------------------------------------------------------------------------------


def masks(call: Arguments) -> dict[str, Tensor]:
    """The masks of the prompt among the arguments of a call."""
    return {name: value for name, value in call.items() if families.PROMPT_MASKS.match(name) and isinstance(value, Tensor)}


def real(call: Arguments) -> Tensor:
    """Which tokens of the prompt are there, (b l) bool."""
    prompt, found = call[PROMPT], next(iter(masks(call).values()), None)
    if found is None:
        return torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
    shown = found != 0 if found.dim() == 2 or found.dtype == torch.bool else found > -1  # a mask, or a bias that is added
    return shown.flatten(1, -2).any(dim=1) if shown.dim() > 2 else shown


def tell(call: Arguments, gifts: list[Gift]) -> tuple[Arguments, Layout | None]:
    """The call with the gifts in its prompt: those for all blocks behind its last real token, those for single blocks behind its end."""
    for name, value in call.items():
        if value is not None and (families.PROMPT_LENGTHS.search(name) or name == "attention_mask" and counts(value, call)):
            rule = f"Tokens can be added to a prompt that is described by masks named as {families.PROMPT_MASKS.pattern}"
            raise UnsupportedError(explain(rule, f"`{name}`", "Leave it out, or choose another model."))
    shared = [gift.tokens for gift in gifts if gift.place is None]
    if shared:
        seen = real(call)
        call = widen(call, torch.cat(shared, dim=1), seen.shape[1] - seen.flip(1).long().argmax(dim=1))
    single = [gift for gift in gifts if gift.place is not None]
    if not single:
        return call, None
    at = length = call[PROMPT].shape[1]
    call = widen(call, torch.cat([gift.tokens for gift in single], dim=1), torch.full_like(gifts[0].rows, length, dtype=torch.long))
    own = {}
    for gift in single:
        own[gift.key, gift.place] = range(at, at := at + gift.tokens.shape[1])
    return call, Layout(length, at, own)


def counts(value: Any, call: Arguments) -> bool:
    """Whether an argument may run over the tokens of the prompt."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[-1] == call[PROMPT].shape[1]


def widen(call: Arguments, tokens: Tensor, at: Tensor) -> Arguments:
    """The call with tokens (b k d) in front of place `at` (b) of its prompt, seen wherever the prompt is masked."""
    prompt = call[PROMPT]
    opened = TokenMap.insert(prompt.shape[1], at, tokens.shape[1], len(prompt), prompt.device, beside=(at - 1).clamp(min=0))
    told: Arguments = {PROMPT: opened.fill(prompt, tokens)}
    for name, mask in masks(call).items():
        wide = take(mask.expand(len(prompt), *mask.shape[1:]), opened.source, mask.dim() - 1)
        fresh = opened.fresh.view(len(wide), *[1] * (wide.dim() - 2), -1)
        told[name] = wide.masked_fill(fresh, 1 if mask.dim() == 2 or mask.dtype == torch.bool else 0)
    for name in families.PROMPT_PLACES:
        if isinstance(call.get(name), Tensor):
            told[name] = places(name, call[name], opened)
    return {**call, **told}


def places(name: str, table: Tensor, opened: TokenMap) -> Tensor:
    """The places of a widened prompt: a token that was added has that of the one in front of it."""
    if table.dim() == 3:
        return opened.gather(table)
    alike = bool((opened.source == opened.source[:1]).all()) or bool((table == table[:1]).all())
    if not alike:
        rule = f"Samples that share `{name}` must have as many real tokens in their prompts"
        raise UnsupportedError(explain(rule, "different numbers", "Give the model one sample a call."))
    return table[opened.source[0]]


# -- a call in parts -------------------------------------------------------------------------------------------------


def some(name: str, value: Any, rows: Tensor, batch: int) -> Any:
    """An argument for some of the samples."""
    if isinstance(value, dict):
        return {key: some(key, item, rows, batch) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(some(name, item, rows, batch) for item in value)
    split = isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch and not families.SHARED.search(name)
    return value[rows.to(value.device)] if split else value


def part(call: Arguments, gifts: list[Gift], rows: Tensor) -> tuple[Arguments, list[Gift]]:
    """The call of some samples, and what these take."""
    batch = len(call[PROMPT])
    mine = [Gift(g.key, g.place, g.tokens[rows], g.rows[rows]) for g in gifts if bool(g.rows[rows[0]])]
    return {name: some(name, value, rows, batch) for name, value in call.items()}, mine


def join(parts: list[tuple[Tensor, Any]]) -> Any:
    """What a model put out for some samples after the others, in the order of all."""
    order = torch.cat([rows for rows, _ in parts]).argsort()

    def put(values: list[Any]) -> Any:
        one = values[0]
        if isinstance(one, Tensor):
            return torch.cat(values)[order]
        if isinstance(one, dict):
            return type(one)(**{name: put([value[name] for value in values]) for name in one})
        return type(one)(put(list(items)) for items in zip(*values, strict=True)) if isinstance(one, (tuple, list)) else one

    return put([output for _, output in parts])


# -- at a block ------------------------------------------------------------------------------------------------------


class Layouts:
    """The layout of the prompt at each call of a block: that of the model's call, or, run again by a checkpoint, that of the one before."""

    def __init__(self, root: Root):
        self.root = root
        self.now: Layout | None = None
        self.held: dict[BlockSurgery, list[tuple[weakref.ref, Layout | None]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "now": None, "held": {}}

    def at(self, side: BlockSurgery, hidden: Tensor) -> Layout | None:
        """The layout of this call of a block."""
        if torch._C._current_graph_task_id() == -1:
            if torch.is_grad_enabled() and side.checkpointed_outside and any(bank.deep for _, bank in in_prompt(self.root)):
                alive = [(came, layout) for came, layout in self.held.get(side, ()) if came() is not None]
                self.held[side] = [*alive, (weakref.ref(hidden), self.now)]
            return self.now
        if not any(bank.deep for _, bank in in_prompt(self.root)):
            return None
        found = [layout for came, layout in self.held.get(side, ()) if came() is hidden]
        if not found:
            rule = "Gradient checkpointing of whole blocks must hand the block the same tensors again"
            came = f"other ones at {side.runtime.stream.paths[side.index]}"
            raise UnsupportedError(explain(rule, came, "Use non-reentrant checkpointing."))
        return found[-1]


def on_its_own(runtime: Runtime, side: BlockSurgery, run: Callable, args: tuple, kwargs: dict) -> Any:
    """Run a block on its own part of the prompt only; what it returns has the whole prompt again."""
    layout = runtime.root.layouts.at(side, runtime.stream.bind(side.index, args, kwargs))
    if layout is None:
        return run(side, args, kwargs)
    own, more, give_back = cut(layout, runtime, side, args, kwargs)
    try:
        return give_back(run(side, own, more))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        if isinstance(error, UnsupportedError):
            raise
        rule = "A block with a prompt of its own must run on another number of its tokens than the model was given"
        came = f"{type(side.block).__name__} at {runtime.stream.paths[side.index]}, which says: {error}"
        raise UnsupportedError(explain(rule, came, "Choose another model, or one prompt for all blocks.")) from error


def cut(layout: Layout, runtime: Runtime, side: BlockSurgery, args: tuple, kwargs: dict) -> tuple[tuple, dict, Callable[[Any], Any]]:
    """The arguments of a block with its own part of the prompt only; and what gives the prompt back in what it returns."""
    index = runtime.stream.context_index(side.index)
    names = positional(type(side.block))[: len(args)]
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    context, n = arguments.get(PROMPT if index is None else index.name), runtime.stream.bind(side.index, args, kwargs).shape[1]
    if not isinstance(context, Tensor) or context.shape[1] != layout.total:
        rule = f"{sorted({key for key, _ in layout.own})} add to the prompt for single blocks, which must get it as the model was given it"
        came = f"{tuple(context.shape) if isinstance(context, Tensor) else type(context).__name__} at {runtime.stream.paths[side.index]}"
        raise UnsupportedError(explain(rule, came, "Choose another model, or one prompt for all blocks."))
    keys = {(method.key, method.dims.place) for method in side.active() if isinstance(method, TokenBank)}
    keep = [*range(layout.length), *(i for key, own in layout.own.items() if key in keys for i in own)]
    kept = torch.tensor(keep, device=context.device)
    own = {name: narrow(name, value, context, kept, n, side) for name, value in arguments.items()}
    more = {name: value for name, value in own.items() if name not in names}
    return (*(own[name] for name in names), *args[len(names) :]), more, lambda output: give_back(output, index, context, layout)


def narrow(name: str, value: Any, context: Tensor, keep: Tensor, n: int, side: BlockSurgery) -> Any:
    """An argument over the prompt, or over prompt and picture, for these tokens of the prompt."""
    if value is context:
        return context[:, keep]
    if isinstance(value, (tuple, list)):
        return type(value)(narrow(name, item, context, keep, n, side) for item in value)
    if not isinstance(value, Tensor):
        return value
    total = context.shape[1]
    if families.PROMPT_MASKS.match(name) and value.shape[-1] == total:
        return value.index_select(-1, keep)
    if families.SHARED.search(name) and value.dim() == 2 and len(value) in (total, total + n):
        picture = torch.arange(n, device=keep.device)
        behind = families.CONTEXT_BEHIND.search(type(side.block).__name__)
        return value[keep if len(value) == total else torch.cat([picture, keep + n] if behind else [keep, picture + total])]
    return value


def give_back(output: Any, index: Any, context: Tensor, layout: Layout) -> Any:
    """What a block returned, with the tokens of other blocks behind its prompt again."""
    if index is None or not isinstance(output, tuple) or output[index.returned] is None:
        return output
    prompt = torch.cat([output[index.returned][:, : layout.length], context[:, layout.length :]], dim=1)
    return type(output)((*output[: index.returned], prompt, *output[index.returned + 1 :]))
