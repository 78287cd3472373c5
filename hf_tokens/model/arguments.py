"""The arguments of a block that lie over its tokens: which these are, by name and shape, and how each is cut for those that are left."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError, explain
from ..tokens.entries import Stored
from ..tokens.ledger import TokenLedger, hide
from ..tokens.token_map import take

# Arguments that belong to another sequence, to a sample, or to a step, never to the tokens of this stream.
FOREIGN = re.compile(r"^(encoder_hidden|timestep|class_labels|added_cond|pooled|guidance|layer_head_mask|past|cache|use_cache|output_)")
CROSS = re.compile(r"encoder|cross(?!_attention_gate)|context|memory|image_attention")
EMBEDDING = re.compile(r"(^|_)(temb|conditioning|modulation|adaln\w*)($|_)|^(emb|time_emb\w*)$")
SLOPES = re.compile(r"alibi")  # a bias by distance beside a mask: cut, but nothing is hidden in it
BETWEEN = re.compile(r"mask|bias|alibi|^rel(_\w+)?_pos$|^rel_pos$")  # tables from token to token
OF_TOKENS = re.compile(r"^(audio_token_mask|query_attn_mask)$")  # masks that say something of a block's own tokens, and not of its keys
PAIRS = re.compile(r"bias|(^|_)rel(ative)?_|bbox")  # the same, whatever stands beside the two tokens
HIDES = re.compile(r"masked$|padding_mask$")  # a bool mask that is True where a token is hidden
LENGTHS = re.compile(r"^(query_length|num_memory_tokens|segments)$")  # how many tokens in front are of another kind
SEGMENTS = re.compile(r"^cu_(seq|window)")


def realign(ledger: TokenLedger, name: str, value: Any, stored: Stored | None) -> Any:
    """A block's argument, cut and reordered for the tokens that are left."""
    if isinstance(value, Tensor):
        known = ledger.memo.get(id(value))
        if known is not None and known[0] is value and stored is None:
            return known[1]
        out = cut_tensor(ledger, name, value, stored)
        if stored is None:
            ledger.memo[id(value)] = (value, out)
        return out
    if type(value) in (tuple, list):
        complex_pair = len(value) == 2 and all(isinstance(v, Tensor) and v.is_complex() for v in value)
        if complex_pair and len(value[1]) == ledger.context:  # rotary tables of the picture and of the text
            return type(value)((realign(ledger, name, value[0], stored), value[1]))
        return type(value)(realign(ledger, name, item, stored) for item in value)
    if type(value) is dict:
        return {key: realign(ledger, f"{name}.{key}" if "mask" in name else key, item, stored) for key, item in value.items()}
    return count_in_front(ledger, name, value) if type(value) is int and LENGTHS.match(name) else value


def count_in_front(ledger: TokenLedger, name: str, value: int) -> int:
    """How many of the first tokens are left, which must stand in front in every sample."""
    inside = ledger.rows < value
    count = inside.sum(dim=1)
    if bool((count != count[0]).any()) or not bool(inside[:, : int(count[0])].all()):
        raise unlike_samples(ledger, name)
    return int(count[0])


def cut_tensor(ledger: TokenLedger, name: str, value: Tensor, stored: Stored | None) -> Tensor:
    """A block's tensor, cut for the tokens that are left."""
    if ledger.untouched and not BETWEEN.search(name):
        return value
    if SEGMENTS.match(name):
        return torch.searchsorted(ledger.rows[0].contiguous(), value.to(ledger.rows.dtype)).to(value.dtype)
    if FOREIGN.match(name) or value.dim() == 0:
        return value
    if is_mask(ledger, name, value):
        hides = HIDES.search(name) and value.dtype == torch.bool
        return ~cut_mask(ledger, name, ~value, stored) if hides else cut_mask(ledger, name, value, stored)
    pair = [d for d in range(value.dim()) if value.shape[d] == ledger.n]
    if len(pair) > 1 and PAIRS.search(name) and ledger.n != ledger.batch and not CROSS.search(name):
        if value.shape[0] == 1 and ledger.uniform():  # it has no batch, and need get none
            return value.index_select(pair[1], ledger.rows[0]).index_select(pair[0], ledger.rows[0])
        return take_axis(ledger, name, take_axis(ledger, name, value, pair[1]), pair[0])
    axis = token_axis(ledger, name, value)
    return value if axis is None else take_axis(ledger, name, value, axis)


def is_mask(ledger: TokenLedger, name: str, value: Tensor) -> bool:
    """Whether a tensor is a table from token to token of this stream."""
    if not BETWEEN.search(name) or OF_TOKENS.match(name):
        return False
    seen = (ledger.n, ledger.start + ledger.n, ledger.n + ledger.context)
    return value.dim() >= 2 and (value.shape[-1] in seen or value.dim() == 4 and value.shape[-2] == ledger.n)


def token_axis(ledger: TokenLedger, name: str, value: Tensor) -> int | None:
    """The axis of a tensor that runs over the tokens of the stream; None if there is none."""
    sizes = {ledger.n, ledger.n + ledger.context, ledger.n - ledger.prefix}
    last = value.dim() > 2 and value.is_floating_point() and "position_ids" not in name  # features, maybe as many as tokens
    dims = [d for d in range(value.dim() - last) if value.shape[d] in sizes]
    if CROSS.search(name):
        return None
    if value.dim() > 1 and 0 in dims and value.shape[0] == ledger.batch and (len(dims) > 1 or EMBEDDING.search(name)):
        dims.remove(0)
    if not dims or EMBEDDING.search(name) and value.dim() < 3:
        return None
    if value.dim() == 2 and len(dims) == 2:
        return 1 if value.shape[0] in (1, ledger.batch) and ledger.n != ledger.batch else 0
    return dims[0]


def take_axis(ledger: TokenLedger, name: str, value: Tensor, axis: int) -> Tensor:
    """A tensor whose axis runs over the tokens of the stream, cut there."""
    index = ledger.rows
    if value.shape[axis] == ledger.n + ledger.context and ledger.context:
        index = ledger.joint()
    elif value.shape[axis] != ledger.n:
        index = rows_behind_prefix(ledger, name)
    if axis > 0 and value.shape[0] in (1, ledger.batch):
        return take(value, index, axis)
    if axis == 2 and value.shape[1] in (1, ledger.batch):  # M-RoPE: sections x batch x tokens
        return take(value.movedim(1, 0), index, axis).movedim(0, 1)
    if ledger.uniform():
        return value.index_select(axis, index[0])
    if axis > 0 and value.shape[0] % ledger.batch == 0:  # heads folded into the batch
        return take(value.unflatten(0, (ledger.batch, -1)), index, axis + 1).flatten(0, 1)
    raise unlike_samples(ledger, name)


def rows_behind_prefix(ledger: TokenLedger, name: str) -> Tensor:
    """Rows of a table that has none for the special tokens in front."""
    behind = ledger.rows >= ledger.prefix
    if not bool((behind == behind[:1]).all()):
        raise unlike_samples(ledger, name)
    return ledger.rows[:, behind[0]] - ledger.prefix


def unlike_samples(ledger: TokenLedger, name: str) -> UnsupportedError:
    """The error for a table that cannot be cut for each sample apart."""
    rule = f"A table that all samples share ({name}) needs the same tokens in each sample"
    return UnsupportedError(explain(rule, f"a batch of {ledger.batch} that keeps different ones", "Run one sample at a time."))


def cut_mask(ledger: TokenLedger, name: str, value: Tensor, stored: Stored | None) -> Tensor:
    """A mask (b|1 n), (b n n) or (b|1 h|1 n|1 n) over the full sequence, cut to the tokens that are left and those stored."""
    if value.dim() == 3 and value.shape[0] not in (1, ledger.batch):  # heads folded into the batch
        return cut_mask(ledger, name, value.unflatten(0, (ledger.batch, -1)), stored).flatten(0, 1)
    if value.dim() == 3:
        return cut_mask(ledger, name, value[:, None], stored)[:, 0]
    cross = CROSS.search(name) is not None
    if value.dim() == 2 and len(value) not in (1, ledger.batch) and not cross:  # queries by keys, for all samples
        out = cut_mask(ledger, name, value[None, None], stored)[:, 0]
        if not ledger.uniform():
            raise unlike_samples(ledger, name)
        return out[0]
    if value.dim() == 2:
        return value if cross else cut_mask_of_keys(ledger, value, stored)
    if ledger.context and not cross and value.shape[-1] == ledger.n + ledger.context:
        return cut_joint_mask(ledger, value)
    out = take(value, ledger.rows, 2) if value.shape[2] == ledger.n and (ledger.n > 1 or ledger.m != 1) else value
    if cross or value.shape[-1] == 1 < ledger.start + ledger.n:
        return out
    columns = ledger.columns(value.shape[-1], stored)
    out = take(out, columns, 3) if columns.dim() == 2 else ledger.take_heads(out, columns)
    if SLOPES.search(name):
        return out
    visible = ledger.visible(stored)
    if visible is not None:
        behind = out.shape[-1] - visible.shape[-1]  # keys of another sequence
        out = hide(out, torch.nn.functional.pad(visible, (0, behind), value=True) if behind > 0 else visible)
    return ledger.weigh(out, ledger.sizes_with(stored)) if "mask" in name else out  # a bias comes beside a mask


def cut_mask_of_keys(ledger: TokenLedger, value: Tensor, stored: Stored | None) -> Tensor:
    """The same of a mask (b|1 n)."""
    if stored is not None and stored.sizes is not None:
        rule = "Keys that stand for several tokens need an attention whose mask says more than which keys are there"
        raise UnsupportedError(explain(rule, "a mask of shape (batch, keys)", "Call `model.set_attn_implementation('sdpa')`."))
    if ledger.context and value.shape[-1] == ledger.n + ledger.context:
        out, filled = take(value, ledger.joint()), None if ledger.filled is None else ledger.beside(ledger.filled, True)
    else:
        out, filled = take(value, ledger.columns(value.shape[-1], stored)), ledger.filled_with(stored)
    return out if filled is None or filled.dim() == 3 else hide(out, filled)


def cut_joint_mask(ledger: TokenLedger, value: Tensor) -> Tensor:
    """The same of a mask (b|1 h|1 n|1 n) over both sequences of a joint block."""
    joint = ledger.joint()
    out = take(value, joint if value.shape[2] == value.shape[3] else ledger.rows, 2) if value.shape[2] > 1 else value
    out = take(out, joint, 3)
    out = out if ledger.filled is None else hide(out, ledger.beside(ledger.filled, True)[:, None, None])
    return ledger.weigh(out, ledger.beside(ledger.all_sizes(), 1.0) if ledger.proportional else None)


def shown_by(mask: Tensor) -> Tensor:
    """What a bool, integer or additive mask lets through, bool."""
    if mask.dtype == torch.bool:
        return mask
    return mask > (torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else 0)


def token_masks(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """The masks of a block's own tokens among its arguments."""
    for name, value in arguments.items():
        if "mask" in name and not CROSS.search(name) and not OF_TOKENS.match(name):
            masks = [mask for mask in (value.values() if isinstance(value, dict) else [value]) if isinstance(mask, Tensor)]
            yield from (~mask if HIDES.search(name) and mask.dtype == torch.bool else mask for mask in masks)


def find_padding(arguments: dict[str, Any], ledger: TokenLedger) -> tuple[Tensor | None, Tensor | None]:
    """Real tokens of this chunk (b n) bool and the place of each row's first one (b), by the block's own mask; None if all are real."""
    for mask in token_masks(arguments):
        if mask.dim() not in (2, 3, 4):
            continue
        seen = shown_by(mask)
        if mask.dim() > 2:
            seen = seen.flatten(1, -2).any(dim=1)
        if seen.shape[-1] < ledger.start + ledger.n or seen.shape[0] not in (1, ledger.batch):
            continue
        seen = seen.expand(ledger.batch, -1)
        return seen[:, ledger.start : ledger.start + ledger.n], seen.long().argmax(dim=1)
    return None, None


def find_views(arguments: dict[str, Any], ledger: TokenLedger, padding: Tensor | None) -> Tensor | None:
    """The first token that each real one sees by the block's own mask, -1 for the others, (b n); None if all see the same."""
    for mask in token_masks(arguments):
        if mask.shape[-2:] != (ledger.n, ledger.n):
            continue
        seen = shown_by(mask)
        first = seen.reshape(-1, *seen.shape[-3:]).any(dim=1).long().argmax(dim=-1).expand(ledger.batch, -1)  # b n
        first = first if padding is None else first.masked_fill(~padding, -1)
        return None if bool((first == first.amax(dim=1, keepdim=True)).logical_or(first < 0).all()) else first
    return None
