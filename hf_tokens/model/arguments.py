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
FOREIGN = re.compile(
    r"^(encoder_hidden|timestep|labels$|class_labels|added_cond|pooled|guidance|layer_head_mask|past|cache|use_cache|output_|state$|lang_ids|t_cond|"
    r"embedded_timestep|spatial_shapes|level_start|valid_ratios|rel_embeddings|global_hidden|text_(feat|embed|att|self|pos|enc)|image_hidden|"
    r"visual(_feats)?$|vision_(encoder|features)|(ca_|temb_ca_|temb_)?audio_(enc|hidden|rotary|scale|gate)|temb_audio)"
)
CROSS = re.compile(r"encoder|cross(?!_attention_gate)|context|memory|image_attention|^full_text_row")
EMBEDDING = re.compile(r"(^|_)(temb|conditioning|modulation|adaln\w*)($|_)|^(emb|time_emb\w*)$")
SLOPES = re.compile(r"alibi")  # a bias by distance beside a mask: cut, but nothing is hidden in it
BETWEEN = re.compile(r"mask|bias|alibi|^rel(_\w+)?_pos$|^rel_pos$")  # tables from token to token
OF_TOKENS = re.compile(r"^(audio_token_mask|query_attn_mask)$")  # masks that say something of a block's own tokens, and not of its keys
PAIRS = re.compile(r"bias|(^|_)rel(ative)?_|bbox")  # the same, whatever stands beside the two tokens
PAIR_BIAS = "position_bias"  # of three axes, what it adds for each pair of tokens
HIDES = re.compile(r"masked$|padding_mask$")  # a bool mask that is True where a token is hidden
LENGTHS = re.compile(r"^(query_length|num_memory_tokens|segments)$")  # how many tokens in front are of another kind
SEGMENTS = re.compile(r"^cu_(seq|window)")
# How a tensor over the tokens (n) lies, by its number of axes; the first form that fits its sizes counts, so that one which is that of
# another axis by chance changes nothing. b: the samples, or one for all; h: these times heads; s: sections of a rotary table; d: features.
FORMS = {1: ("n",), 2: ("nd",), 3: ("bnd", "hnd"), 4: ("bndd", "bbnd", "sbnd", "bdnd")}
PLACE_FORMS = {1: ("n",), 2: ("bn", "nd"), 3: ("sbn", "bnd", "bbn"), 4: ("bndd", "bbnd")}  # of whole numbers and flags
PAIR_FORMS = ("nn", "bnn", "nnd", "nndd")
SECTIONS, MOST_AXES = (3, 4), 4
ROTARY = "rotary_emb"
# The same by name, tried in front of these.
NAMED_FORMS = (
    (re.compile(r"mask|gate|paddings"), ("bn",)),
    (re.compile(r"position_ids"), ("sbn", "bn")),
    (re.compile(r"^freqs_ci$"), ("nbd",)),
    (re.compile(r"^image_rotary_emb$"), ("bnd", "ndd")),
    (re.compile(r"^(sinusoidal_pos|query|key|query_point_embedding)$"), ("bbnd",)),
    (re.compile(r"^position_embeddings$"), ("sbnd",)),
)


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
    pair = pair_form(ledger, name, value)
    if pair == "bnn" and value.shape[0] == 1 and ledger.uniform():  # it has no batch, and need get none
        return value.index_select(2, ledger.rows[0]).index_select(1, ledger.rows[0])
    if pair is not None:
        first = pair.index("n")
        return take_axis(ledger, name, take_axis(ledger, name, value, pair, first + 1), pair, first)
    form = token_form(ledger, name, value)
    return value if form is None else take_axis(ledger, name, value, form, form.index("n"))


def pair_form(ledger: TokenLedger, name: str, value: Tensor) -> str | None:
    """How a table of all pairs of the stream's tokens lies; None if it is none."""
    forms = PAIR_FORMS if PAIRS.search(name) and not CROSS.search(name) else ()
    forms = ("nnd",) if name == PAIR_BIAS and value.dim() == 3 else forms
    return next((form for form in forms if lies(ledger, form, value)), None)


def is_mask(ledger: TokenLedger, name: str, value: Tensor) -> bool:
    """Whether a tensor is a table from token to token of this stream."""
    if not BETWEEN.search(name) or OF_TOKENS.match(name) or value.dim() == 3 and name == PAIR_BIAS:
        return False
    seen = (ledger.n, ledger.start + ledger.n, ledger.n + ledger.context)
    return value.dim() >= 2 and (value.shape[-1] in seen or value.dim() == 4 and value.shape[-2] == ledger.n)


def token_form(ledger: TokenLedger, name: str, value: Tensor) -> str | None:
    """How a tensor lies whose one axis runs over the tokens of the stream, a letter for each axis; None if there is none."""
    if CROSS.search(name) or EMBEDDING.search(name) and value.dim() < 3:
        return None
    own = next((forms for names, forms in NAMED_FORMS if names.search(name)), ())
    usual = FORMS if value.is_floating_point() or value.is_complex() else PLACE_FORMS
    first = ("nbd",) if ledger.tokens_first else ()
    own = ("ndd",) if ledger.rotary_of_heads and ROTARY in name else own
    forms = (*own, *first, *usual.get(min(value.dim(), MOST_AXES), ()))
    return next((form for form in forms if lies(ledger, form, value)), None)


def lies(ledger: TokenLedger, form: str, value: Tensor) -> bool:
    """Whether a tensor has the sizes of a form; more axes than forms tell are features."""
    tokens = (ledger.n, ledger.n + ledger.context, ledger.n - ledger.prefix)
    sizes = {"n": tokens, "b": (1, ledger.batch), "s": SECTIONS}
    fits = {**{axis: sizes[axis].__contains__ for axis in sizes}, "h": lambda size: size % ledger.batch == 0, "d": lambda size: True}
    return len(form) == min(value.dim(), MOST_AXES) and all(fits[axis](size) for axis, size in zip(form, value.shape, strict=False))


def take_axis(ledger: TokenLedger, name: str, value: Tensor, form: str, axis: int) -> Tensor:
    """A tensor whose axis runs over the tokens of the stream, cut there."""
    index = ledger.rows
    if value.shape[axis] == ledger.n + ledger.context and ledger.context:
        index = ledger.joint()
    elif value.shape[axis] != ledger.n:
        index = rows_behind_prefix(ledger, name)
    if form[0] == "b":
        return take(value, index, axis)
    if form == "nd" and ledger.laid_over_heads:
        return take(value[None], index, 1)[:, None]
    if form[0] == "s":  # M-RoPE: sections x batch x tokens
        return take(value.movedim(1, 0), index, axis).movedim(0, 1)
    if ledger.uniform():
        return value.index_select(axis, index[0])
    if form[0] == "h":  # heads folded into the batch
        return take(value.unflatten(0, (ledger.batch, -1)), index, axis + 1).flatten(0, 1)
    raise unlike_samples(ledger, name)


def rows_behind_prefix(ledger: TokenLedger, name: str) -> Tensor:
    """Rows of a table that has none for the special tokens in front."""
    if ledger.plain is not None and ledger.m == ledger.prefix + ledger.plain:  # no special one has left, and none was inserted
        return ledger.rows[:, ledger.prefix :] - ledger.prefix
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
    if value.dim() == 2 and (len(value) not in (1, ledger.batch) or "causal" in name) and not cross:  # queries by keys, for all samples
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
    if filled is None or filled.dim() == 3:
        return out
    return torch.where(of_ones(value), out * filled, hide(out, filled)) if out.is_floating_point() else hide(out, filled)


def cut_joint_mask(ledger: TokenLedger, value: Tensor) -> Tensor:
    """The same of a mask (b|1 h|1 n|1 n) over both sequences of a joint block."""
    joint = ledger.joint()
    out = take(value, joint if value.shape[2] == value.shape[3] else ledger.rows, 2) if value.shape[2] > 1 else value
    out = take(out, joint, 3)
    out = out if ledger.filled is None else hide(out, ledger.beside(ledger.filled, True)[:, None, None])
    return ledger.weigh(out, ledger.beside(ledger.all_sizes(), 1.0) if ledger.proportional else None)


def shown_by(mask: Tensor) -> Tensor:
    """What a bool, integer or additive mask lets through, bool; a mask of keys (b n) in floats may be one of ones too."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return mask > 0
    added = mask > torch.finfo(mask.dtype).min / 2
    return torch.where(of_ones(mask), mask > 0, added) if mask.dim() == 2 else added


def of_ones(mask: Tensor) -> Tensor:
    """Whether a mask in floats says 1 for what is there, and is not added to scores, bool."""
    return ((mask == 0) | (mask == 1)).all() & (mask == 1).any()


def token_masks(arguments: dict[str, Any]) -> Iterator[Tensor]:
    """The masks of a block's own tokens among its arguments."""
    for name, value in arguments.items():
        if "mask" in name and not CROSS.search(name) and not OF_TOKENS.match(name):
            masks = [mask for mask in (value.values() if isinstance(value, dict) else [value]) if isinstance(mask, Tensor)]
            yield from (~mask if HIDES.search(name) and mask.dtype == torch.bool else mask for mask in masks)


def find_padding(arguments: dict[str, Any], ledger: TokenLedger, custom: bool = False) -> tuple[Tensor | None, Tensor | None]:
    """Real tokens of this chunk (b n) bool and the place of each row's first one (b), by the block's own mask; None if all are real.

    A `custom` mask is not made by the model: the padding of a batch may see itself in it, or everything.
    """
    for mask in token_masks(arguments):
        if mask.dim() not in (2, 3, 4):
            continue
        seen = shown_by(mask)
        if seen.shape[-1] < ledger.start + ledger.n or seen.shape[0] not in (1, ledger.batch):
            continue
        if custom and ledger.causal and ledger.batch > 1 and mask.dim() == 4 and mask.shape[2] == ledger.n:
            seen = seen_by_others(seen.any(dim=1), ledger.start)
        elif mask.dim() > 2:
            seen = seen.flatten(1, -2).any(dim=1)
        seen = seen.expand(ledger.batch, -1)
        return seen[:, ledger.start : ledger.start + ledger.n], seen.long().argmax(dim=1)
    return None, None


def seen_by_others(seen: Tensor, start: int) -> Tensor:
    """Keys that are seen by a causal mask (b m n), (b n); not those at the ends of a row that no query but their own sees: padding.

    A query that sees what is behind it is padding itself and tells nothing; so is the last one behind such ones, if the first is none.
    Where all see themselves alone, each key that is seen counts.
    """
    own, place = start + torch.arange(seen.shape[1], device=seen.device)[:, None], torch.arange(seen.shape[2], device=seen.device)
    ahead = (seen & (place > own)).any(dim=2)  # b m
    ahead[:, -1] |= ahead[:, -2:-1].any(dim=1) & ~ahead[:, 0]
    told = seen & ~ahead[..., None]
    among = told & (place != own)
    looks = told & (place == own) & among.any(dim=2, keepdim=True)
    real = (among | looks).any(dim=1).long()
    within = (real.cumsum(dim=1) > 0) & (real.flip(1).cumsum(dim=1).flip(1) > 0)
    return seen.any(dim=1) & (within | ~within.any(dim=1, keepdim=True))


def find_views(arguments: dict[str, Any], ledger: TokenLedger, padding: Tensor | None) -> Tensor | None:
    """The first token that each real one sees by the block's own mask, -1 for the others, (b n); None where none is square."""
    for mask in token_masks(arguments):
        if mask.shape[-2:] != (ledger.n, ledger.n):
            continue
        seen = shown_by(mask)
        first = seen.reshape(-1, *seen.shape[-3:]).any(dim=1).long().argmax(dim=-1).expand(ledger.batch, -1)  # b n
        return first if padding is None else first.masked_fill(~padding, -1)
    return None


def find_segments(views: Tensor) -> Tensor | None:
    """Where each sample begins in a row whose mask keeps them apart, by the first token that each one sees (1 n), (s); None where it does
    not: in a window each token sees from another one on."""
    if len(views) > 1:
        return None
    first = views[0].clamp(min=0)
    begins = (views[0] >= 0) & (first == torch.arange(len(first), device=first.device))
    apart = bool(((first[first] == first) | (views[0] < 0)).all())
    return begins.nonzero()[:, 0] if apart and int(begins.sum()) > 1 else None
