"""One call of a block: its arguments by name, its tokens as (b n d), whatever the model's own layout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..attention.tap import BACKENDS, TAPPED_PREFIX
from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..kv.static import FrontedLayer
from ..model import families
from ..model.arguments import SEGMENTS, cut_mask, realign
from ..model.blocks import BIAS, CROSS_BIAS, BlockFacts, mask_name, passed_on
from ..model.classes import class_name
from ..model.parts import qualified_name
from ..model.signatures import positional
from ..model.streams import LAYOUTS, PACKED, Stream, axes, rebuilt
from ..tokens.altered import altered
from ..tokens.entries import Stored
from ..tokens.ledger import TokenLedger
from .trial import run_or_refuse


class BlockCall:
    """One call of a block, its arguments by name, its hidden states as (b n d)."""

    def __init__(self, stream: Stream, index: int, facts: BlockFacts, args: tuple, kwargs: dict):
        block = stream.blocks[index]
        self.stream, self.index, self.facts, self.block = stream, index, facts, block
        self.names = positional(type(block))[: len(args)]
        self.rest = args[len(self.names) :]
        self.arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.hidden_name = stream.hidden_index(index).name
        raw = self.raw = self.arguments[self.hidden_name]
        usual = {2: "n d", 3: "b n d"}
        self.layout = usual.get(raw.dim(), stream.layout) if stream.layout in usual.values() else stream.layout
        if self.layout not in LAYOUTS or raw.dim() != axes(self.layout):
            rule, got = f"The tokens of a stream must lie as one of {sorted(LAYOUTS)}", f"{tuple(raw.shape)}, read as {stream.layout!r}"
            raise UnsupportedError(explain(rule, f"{got}, at {stream.paths[index]}", "Choose another stream."))
        self.hidden: Tensor = LAYOUTS[self.layout][0](raw)
        context = stream.context_index(index)
        self.context = 0 if stream.causal else self._length("encoder_hidden_states" if context is None else context.name)
        self.behind = bool(families.CONTEXT_BEHIND.search(class_name(block)))

    @property
    def where(self) -> str:
        """Class and path of the block, for an error."""
        return f"{type(self.block).__name__} at {self.stream.paths[self.index]}"

    def _length(self, name: str) -> int:
        """Length of a sequence among the arguments; 0 if there is none."""
        value = self.arguments.get(name)
        return value.shape[1] if isinstance(value, Tensor) and value.dim() == 3 else 0

    def segments(self, real: Tensor | None, gives_places: bool) -> Tensor | None:
        """Where each sample begins in a packed row, (s), by the real tokens (b n) and whether the call may say their places; None if each
        has a row of its own. Several packed rows are refused."""
        if self.layout == PACKED:
            bounds = next((v for name, v in self.arguments.items() if SEGMENTS.match(name) and isinstance(v, Tensor)), None)
            return None if bounds is None else bounds[:-1].long().unique()
        places, (batch, n) = self.arguments.get("position_ids"), self.hidden.shape[:2]
        if not gives_places or n == 1 or not isinstance(places, Tensor) or places.dim() != 2:
            return None
        if places.shape[1] != n or places.shape[0] not in (1, batch):
            return None
        again = places[:, 1:] <= places[:, :-1]  # a sequence whose positions begin anew
        again = again if real is None else again & real[:, 1:] & real[:, :-1]
        if not bool(again.any()):
            return None
        if batch > 1:
            got = f"a batch of {batch} in which positions begin anew"
            raise UnsupportedError(explain("Packed samples must lie in one row", got, "Pack them into one row, or pad them."))
        return torch.nn.functional.pad(again[0].nonzero()[:, 0] + 1, (1, 0))

    @property
    def cache(self) -> Cache | None:
        """The cache among the arguments."""
        return find_cache(self.arguments.values())

    def run(self, inner: Callable, hidden: Tensor, ledger: TokenLedger, stored: Stored | None, moved: dict[str, Any]) -> Any:
        """Call the block on these tokens with every argument cut to fit, but for those of places that some have moved on to."""
        original = self.pack(hidden)
        self._refuse_handed_on(ledger)
        if ledger.untouched and stored is None:
            return self._apply(inner, {**self.arguments, self.hidden_name: original})
        self._refuse_counting()
        self._refuse_filler(ledger)
        self._spell_out_bias(ledger)
        whole_names = (self.hidden_name, families.INDEXED.get(class_name(self.block)))
        kept = moved.keys() | {name for name, value in self.arguments.items() if name in whole_names or self.facts.is_foreign(name, value)}
        cut = {name: value if name in kept else realign(ledger, name, value, stored) for name, value in self.arguments.items()}
        cut |= {**moved, self.hidden_name: original}
        name = self._mask_name()
        if name is not None and self.layout != "n d":
            cut[name] = self._implied(cut.get(name), hidden, ledger, stored)
        return self._give_back(self._try(inner, cut, ledger), cut, ledger)

    def _try(self, inner: Callable, cut: dict, ledger: TokenLedger) -> Any:
        rule = f"The blocks of a stream must run on another number of tokens than the model gave ({ledger.m}, not {ledger.n})"
        if ledger.m == ledger.n:
            rule = f"The blocks of a stream must run on {ledger.m} tokens of which a mask hides some, or weighs them"
        words, whole = (rule, self.where, "Choose other layers or another model."), self._ordered(self.arguments)
        return run_or_refuse(partial(self._apply, inner, cut), self.block, whole, self._ordered(cut), words)

    def again(self, inner: Callable, hidden: Tensor) -> Tensor:
        """What something returns for other tokens (b n d), called as the block was but for its cache."""
        arguments = {name: None if find_cache((value,)) is not None else value for name, value in self.arguments.items()}
        return self.read(self._apply(inner, {**arguments, self.hidden_name: self.pack(hidden)}))

    @property
    def attends(self) -> bool:
        """Whether the block mixes its tokens by an attention."""
        return self.stream.mixers[self.index] == "attention"

    def _implied(self, value: Any, hidden: Tensor, ledger: TokenLedger, stored: Stored | None) -> Any:
        """A mask as the model gave it; where it gave none, the one that these tokens need."""
        if value is not None and not (isinstance(value, dict) and None in value.values()):
            return value
        mask = self._ordered_by_flag(ledger).implied_mask(hidden, stored) if self.attends else ledger.filled
        mask = mask.expand(-1, -1, hidden.shape[1], -1) if mask is not None and self.facts.full_mask else mask
        if value is None or mask is None:
            return mask if value is None else value
        rule = "Rows that keep different numbers of tokens need one mask a block, or all of its masks said"
        raise UnsupportedError(explain(rule, f"the masks {sorted(value)}, of which some are None", "Run one sample at a time."))

    def _ordered_by_flag(self, ledger: TokenLedger) -> TokenLedger:
        """The ledger, causal only if a query sees nothing behind it without a mask: backends go by the call's flag, or the attention's."""
        told = self.arguments.get("is_causal")
        flag = (getattr(self.stream.attention(self.index), "is_causal", True) if told is None else told) is not False
        return altered(ledger, causal=ledger.causal and flag and not families.OPEN_UNMASKED.search(qualified_name(type(self.block))))

    def _refuse_filler(self, ledger: TokenLedger) -> None:
        """A mask keeps filler from one attention; a state space can be kept from it as from padding: in front of a whole sequence."""
        if ledger.filled is None or self.attends and not self.facts.mixes_more:
            return
        behind = bool((ledger.filled[:, :-1] & ~ledger.filled[:, 1:]).any())
        if self.attends or not self.stream.causal or ledger.start or behind:
            rule = "Blocks that mix tokens by something else than one attention need as many tokens in each row of the batch"
            got = f"{self.where} and rows that keep different numbers"
            raise UnsupportedError(explain(rule, got, "Run one sample at a time, or choose other layers."))

    def _refuse_counting(self) -> None:
        """A block that counts its tokens by itself would give those that are left other places than they had."""
        always, by_default = self.facts.counts
        has_places = any(families.PLACES.search(name) and value is not None for name, value in self.arguments.items())
        if always or by_default and not has_places and self.facts.bias_maker is None:
            rule = "A block must be told the places of its tokens, or all of them must be there"
            raise UnsupportedError(explain(rule, f"{self.where}, which counts them by itself", "Choose other layers or another model."))

    def _spell_out_bias(self, ledger: TokenLedger) -> None:
        """Where the first block would count the places for its relative bias by itself, give it the bias of the whole sequence."""
        maker, context = self.facts.bias_maker, self.arguments.get("encoder_hidden_states")
        missing = {name for name in positional(type(self.block)) if self.arguments.get(name) is None}
        if BIAS in missing and maker is not None:
            self.arguments[BIAS] = maker.compute_bias(ledger.n, ledger.start + ledger.n, past_seen_tokens=ledger.start)
        if CROSS_BIAS in missing and context is not None:
            self.arguments[CROSS_BIAS] = context.new_zeros(1, self.stream.heads, ledger.n, context.shape[1])

    @property
    def biased(self) -> bool:
        """Whether the block's attention adds a bias to its scores."""
        return self.facts.bias_maker is not None or any(self.arguments.get(name) is not None for name in (BIAS, CROSS_BIAS))

    def missing_bias(self, ledger: TokenLedger, stored: Stored | None) -> Tensor | None:
        """The bias that the scores of these tokens need where the block has no argument for one."""
        maker, named = self.facts.bias_maker, BIAS in positional(type(self.block))
        if ledger.untouched and stored is None or maker is None or named:
            return None
        return cut_mask(ledger, BIAS, maker.compute_bias(ledger.n, ledger.start + ledger.n, past_seen_tokens=ledger.start), stored)

    def see_all(self, ledger: TokenLedger, real: Tensor | None) -> None:
        """Let what a token sees see it too, by a mask that the block is given (refused if it takes none); an encoder stores nothing."""
        name = self._mask_name()
        mask = None if name is None else self.arguments.get(name)
        config = self.stream.config
        backend = config._attn_implementation if "_attn_implementation_internal" in vars(config or object) else "eager"
        square = mask is None or isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (ledger.n, ledger.n)
        if name is None or not square or not self.attends or (backend or "eager").removeprefix(TAPPED_PREFIX) not in BACKENDS:
            rule = f"Blocks without their causal mask need an argument for a mask from token to token, and one of the backends {BACKENDS}"
            got = f"{self.where} with {backend!r}"
            raise UnsupportedError(explain(rule, got, "Call `model.set_attn_implementation('sdpa')`, or choose another model."))
        seen = torch.ones(1, 1, ledger.n, ledger.n, dtype=torch.bool, device=self.hidden.device)
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = seen | seen.mT
        seen = seen if real is None else seen & real[:, None, None]
        self.arguments = {key: None if find_cache((value,)) is not None else value for key, value in self.arguments.items()}
        self.arguments[name] = ledger.dress(seen.expand(ledger.batch, -1, -1, -1), self.hidden)

    def missing_mask(self, hidden: Tensor, ledger: TokenLedger) -> Tensor | None:
        """The mask that these tokens need where the block has no argument for one."""
        named = self._mask_name() is not None and self.layout != "n d"
        return None if ledger.untouched or named or not self.attends else ledger.implied_mask(hidden, None)

    def _mask_name(self) -> str | None:
        return mask_name(*self.arguments, *positional(type(self.block)))

    def _apply(self, inner: Callable, arguments: dict) -> Any:
        args, kwargs = self._ordered(arguments)
        return inner(*args, **kwargs)

    def behind_front(self, layer: FrontedLayer) -> tuple[tuple, dict]:
        """The block's arguments where the tokens of a surgery stand in front of its cache already."""
        name = self._mask_name()
        mask = self.arguments.get(name)
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[3] != layer.max_cache_len:
            rule = "A static cache with tokens in front needs a mask over all its places in each block"
            got = f"{tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} for {layer.max_cache_len}, at {self.where}"
            raise UnsupportedError(explain(rule, got, "Leave out `cache_implementation`."))
        return self._ordered({**self.arguments, name: layer.widened(mask)})

    def _ordered(self, arguments: dict) -> tuple[tuple, dict]:
        by_name = {name: value for name, value in arguments.items() if name not in self.names}
        return (*(arguments[name] for name in self.names), *self.rest), by_name

    def _give_back(self, output: Any, cut: dict, ledger: TokenLedger) -> Any:
        """An argument that the block passes on leaves it whole: the next block cuts it anew."""
        if not isinstance(output, (tuple, list)):
            return output
        pairs = [(part, self.arguments[name]) for name, part in cut.items() if isinstance(part, Tensor) and name in self.arguments]
        items = tuple(next((whole for part, whole in pairs if passed_on(item, part)), item) for item in output)
        self._refuse_skipped(items, ledger)
        if not self.facts.hands_on:
            self._refuse_beside([item if item is before else None for item, before in zip(items, output, strict=True)], ledger)
        return rebuilt(output, items)

    def _refuse_beside(self, items: list, ledger: TokenLedger) -> None:
        """What a block returns for each token beside its hidden states, who reads it would take for that of all tokens."""
        own = [
            index.returned for index in (self.stream.hidden_index(self.index), self.stream.context_index(self.index)) if index is not None
        ]
        beside = [item for at, item in enumerate(items) if at not in own and isinstance(item, Tensor) and item.dim() == 3]
        if any(item.shape[:2] == (ledger.batch, ledger.m) for item in beside):
            rule = "A block returns for each token its hidden states and nothing else, or all of its tokens must be there"
            got = f"{[tuple(item.shape) for item in beside]} beside them, from {self.where}"
            raise UnsupportedError(explain(rule, got, "Choose other layers or another model."))

    def _refuse_skipped(self, items: tuple, ledger: TokenLedger) -> None:
        """A second sequence that a block changes must stay as it was in a sample that skips the block."""
        if ledger.filled is None or bool(ledger.filled.any(dim=1).all()):
            return
        own, given = self.stream.hidden_index(self.index), [v for v in self.arguments.values() if isinstance(v, Tensor) and v.dim() == 3]
        second = [item for at, item in enumerate(items) if at != own.returned and isinstance(item, Tensor) and item.dim() == 3]
        if any(item.shape == value.shape for item in second for value in given if all(item is not other for other in given)):
            rule = "A block that changes a second sequence must run for all samples of the batch or for none"
            raise UnsupportedError(explain(rule, f"a part of them at {self.where}", "Run one sample at a time, or choose other layers."))

    def _refuse_handed_on(self, ledger: TokenLedger) -> None:
        """What the block before returned for each token must be of those that this one gets."""
        for name, value in self.arguments.items():
            if not families.HANDED_ON.match(name) or not isinstance(value, Tensor):
                continue
            places = name == families.PLACES_OF_KEYS
            if places and dict(self.stream.attention(self.index).named_children()).get("indexer") is not None:
                continue  # it finds them anew
            if value.shape[1] not in ((ledger.m,) if places else (ledger.m, ledger.n)):
                rule = f"A block that is given `{name}` by the one before must get the tokens that this one had"
                raise UnsupportedError(explain(rule, f"other ones at {self.where}", "Act on the blocks before or behind that place."))

    def read(self, output: Any) -> Tensor:
        """The hidden states in a block's output, (b m d)."""
        hidden = self.stream.read(self.index, output)
        if not isinstance(hidden, Tensor):
            rule = "A block must return its hidden states as a tensor, or first in a tuple"
            raise UnsupportedError(explain(rule, f"a {type(hidden).__name__} from {self.where}", "Choose another stream or model."))
        return LAYOUTS[self.layout][0](hidden)

    def pack(self, hidden: Tensor) -> Tensor:
        """(b n d) in the layout of the model."""
        return LAYOUTS[self.layout][1](hidden, self.raw)

    def write(self, output: Any, hidden: Tensor) -> Any:
        """A block's output with other hidden states."""
        return hidden if output is None else self.stream.write(self.index, output, hidden)

    def blank(self, output: Any) -> tuple:
        """A block's output without its hidden states, in a tuple of one; an empty one if it holds more than these."""
        rest = None if isinstance(output, Tensor) else self.stream.write(self.index, output, None)
        return (rest,) if rest is None or all(item is None for item in rest) else ()
