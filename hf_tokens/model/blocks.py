"""What is read off a block: what it counts by itself, which mask and cache slot are its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import families
from .arguments import BETWEEN, CROSS, HIDES, OF_TOKENS
from .classes import class_name
from .parts import attentions, checks_mask, mixer_of
from .signatures import bound_arguments, parameters, read_once

SLOT_OFFSET = "cycle_offset"  # HRM's stacks run several times in a pass, each time with other slots
BIAS, CROSS_BIAS = "position_bias", "encoder_decoder_position_bias"  # T5's first block makes them and hands them on


def counts_tokens(block: nn.Module) -> tuple[bool, bool]:
    """Whether a block counts its tokens by itself: whatever it is given, and where it is not given their places."""
    names = [word for name, module in block.named_modules() for word in (name, class_name(module))]
    return tuple(any(pattern.search(name) for name in names) for pattern in (families.COUNTS, families.TABLES))


def hands_on(block: nn.Module) -> bool:
    """Whether a block gets what the one before returned for each token beside its hidden states."""
    return any(map(families.HANDED_ON.match, parameters(type(block))))


def mixes_more(block: nn.Module) -> bool:
    """Whether a block mixes its tokens by a convolution or a second self-attention too."""
    return len(attentions(block)) > 1 or any(isinstance(m, nn.Conv1d) and m.kernel_size[0] > 1 for m in block.modules())


def bias_maker(block: nn.Module) -> nn.Module | None:
    """The block's attention, if it makes a bias of the distances: in T5 that of the first block, in UMT5 that of each."""
    attention = next(iter(attentions(block)), None)
    makes = attention is not None and vars(attention).get("has_relative_attention_bias") is True
    return attention if makes and "compute_bias" in dir(type(attention)) else None


@dataclass(frozen=True, eq=False)
class BlockFacts:
    """What is read off a block once, so that nothing of it is looked for while it runs.

    Attributes:
        counts: Whether it counts its tokens by itself: whatever it is given, and where it is not given their places.
        mixes_more: Whether it mixes its tokens by more than one attention.
        bias_maker: Its attention, if that makes a bias of the distances.
        hands_on: Whether it gets what the block before returned for each token beside its hidden states.
        several_slots: Whether its self-attentions store their keys in several slots of a cache.
        moves_slots: Whether it is told which slot is its own, another one each time that it runs in a pass.
        full_mask: Whether its attention takes no mask but one with a row for each query.
        laid_over_heads: Whether what it lays over the heads of its tokens (n d) may be another for each sample (b 1 n d).
        foreign: Names of arguments that are not of its own tokens, though they do not say so, and how many axes they then have.
    """

    counts: tuple[bool, bool]
    mixes_more: bool
    bias_maker: nn.Module | None
    hands_on: bool
    several_slots: bool
    moves_slots: bool
    full_mask: bool
    laid_over_heads: bool
    foreign: tuple[tuple[re.Pattern, int | None], ...]

    @classmethod
    def of(cls, block: nn.Module) -> BlockFacts:
        """Those of a block."""
        foreign = tuple((names, axes) for classes, names, axes in families.FOREIGN_OF if classes.search(class_name(block)))
        slots = several_slots(block), moves_slots(block)
        full_mask = any(checks_mask(type(attention)) for attention in attentions(block))
        laid_over_heads = bool(families.LAID_OVER_HEADS.search(class_name(block)))
        return cls(counts_tokens(block), mixes_more(block), bias_maker(block), hands_on(block), *slots, full_mask, laid_over_heads, foreign)

    def is_foreign(self, name: str, value: Any) -> bool:
        """Whether an argument is not of the block's own tokens, though its name does not say so."""
        axes = value.dim() if isinstance(value, Tensor) else None
        return any(names.search(name) and number in (None, axes) for names, number in self.foreign)


def passed_on(output: Any, argument: Tensor) -> bool:
    """Whether a block returned an argument unchanged; a reentrant checkpoint returns another tensor over the same memory."""
    if output is argument or not isinstance(output, Tensor) or torch.compiler.is_compiling():
        return output is argument
    return output.shape == argument.shape and output.numel() > 0 and output.data_ptr() == argument.data_ptr()


@read_once
def mask_name(*names: str) -> str | None:
    """Of the names of a block's arguments, the first that is a mask of its own tokens."""
    own = [name for name in names if "mask" in name and not any(r.search(name) for r in (CROSS, HIDES, OF_TOKENS))]
    return next((name for name in own if "head" not in name), None)


def tells_no_places(block: nn.Module, facts: BlockFacts, args: tuple, kwargs: dict) -> bool:
    """Whether a block is given no mask, makes no bias of the places, and does not count its tokens by itself."""
    if any(facts.counts) or facts.bias_maker is not None:
        return False
    return all(value is None or not stands_between(name) for name, value in bound_arguments(block, args, kwargs).items())


@read_once
def stands_between(name: str) -> bool:
    """Whether an argument of this name has something for each pair of tokens, as a mask does."""
    return BETWEEN.search(name) is not None


def borrows_keys(attention: nn.Module | None) -> bool:
    """Whether an attention reads the keys that an earlier block of its type stored."""
    return attention is not None and vars(attention).get("is_kv_shared_layer") is True


def several_slots(block: nn.Module) -> bool:
    """Whether the self-attentions of a block store their keys in several slots of a cache."""
    slots = (vars(attention).get("layer_idx") for attention in attentions(block))
    return moves_slots(block) or len({slot for slot in slots if slot is not None}) > 1


def moves_slots(block: nn.Module) -> bool:
    """Whether a block is told which slot of a cache is its own, another one each time that it runs in a pass."""
    return any(SLOT_OFFSET in parameters(type(attention)) for attention in attentions(block))


def layer_index(block: nn.Module, attention: nn.Module | None) -> int | None:
    """The cache slot of a block's own tokens; None if it has none, reads the keys of another block, or stores those of another sequence."""
    if borrows_keys(attention) or mixer_of(block) == "cross":
        return None
    modules = [module for module in (attention, block, *block.modules()) if module is not None]
    slots = (vars(module).get(name) for name in ("layer_idx", "layer_id") for module in modules)
    return next((slot for slot in slots if isinstance(slot, int)), None)
