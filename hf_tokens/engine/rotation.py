"""How a block turns its keys: found at its first call, from the table that its model hands it and from keys of its own attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import HFTokensError, UnsupportedError, explain
from ..model.arguments import BETWEEN
from ..model.rotations import CACHES_OF_ATTENTION, FARTHEST, STEADY, TABLE_GIVEN, TABLE_KIND, TABLE_PLACES, TRIED, Rotation, find_rotation
from ..model.signatures import bound_arguments, parameters, positional, required
from .hooks import lacks, own_attention
from .run import SHIFT, Site
from .trial import stripped

if TYPE_CHECKING:
    from .block import BlockSurgery

OTHER_PRECISIONS = (torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class TableCall:
    """A call of a module that makes tables of cosines and sines.

    Attributes:
        module: The module.
        places: Of the tokens, (b n), or of each part of the channels, (s b n).
        more: Its other arguments, but the tensor that it takes its precision from.
        cos: The cosines that it returned.
    """

    module: nn.Module
    places: Tensor
    more: dict[str, Any]
    cos: Tensor

    def table(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of other places (n), in single precision, (n c)."""
        like = torch.empty(1, 1, 1, device=places.device)
        cos, sin = type(self.module).forward(self.module, like, places.expand(*self.places.shape[:-2], 1, -1), **self.more)
        return cos.flatten(0, -3)[0], sin.flatten(0, -3)[0]

    def like(self, cos: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of other places (b m), as precise as these, (b m c)."""
        return type(self.module).forward(self.module, cos, places.expand(*self.places.shape[:-2], -1, -1), **self.more)

    def made_alike(self, other: TableCall) -> bool:
        """Whether another call is of the same table."""
        return self.module is other.module and self.more == other.more


class SeenKeys(Exception):
    """An attention under trial has stored its keys."""


class TrialCache:
    """What stands for a cache in a trial of an attention: it takes the keys, and ends it."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> None:
        raise SeenKeys(keys, values)


class BlockRotation:
    """What is known of how a block turns its keys, and the last call of what makes its table."""

    def __init__(self, block: BlockSurgery):
        self.block = block
        self.calls: list[TableCall] = []  # until the block's own is known
        self.source: TableCall | None = None
        self.rotation: Rotation | None = None

    def attach(self) -> list[Any]:
        """Hang on the block what finds its table; refused where there can be none that grows with the place alone."""
        block = self.block
        around = dict.fromkeys(child for holder in block.surgery.holders for child in holder.children())
        makers = [module for module in around if TABLE_PLACES in parameters(type(module)) and TABLE_KIND in vars(module)]
        if TABLE_GIVEN not in parameters(type(own_attention(block))) or not makers:
            what = "keys that are turned by their places, by a table that the model hands to its attention,"
            raise lacks(block, what, ", or a setting that leaves keys as they are")
        kinds = {kind for module in makers for kind in table_kinds(module)}
        if unsteady := sorted(kinds - {*STEADY}):
            rule = f"A method that turns keys to other places needs angles that grow with the place alone, as in {list(STEADY)}"
            remedy = "Load the model with other `rope_parameters`, or choose a setting that leaves keys as they are."
            raise UnsupportedError(explain(rule, f"{unsteady} at {block.path}", remedy))
        handles = [module.register_forward_hook(self._note_table, with_kwargs=True) for module in makers]
        return [*handles, block.module.register_forward_pre_hook(self._note_block, with_kwargs=True)]

    def _note_table(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """A table was made."""
        arguments = bound_arguments(module, args, kwargs)
        more = {name: value for name, value in arguments.items() if name not in (TABLE_PLACES, positional(type(module))[0])}
        if not (isinstance(output, tuple) and len(output) == 2):
            return
        call = TableCall(module, arguments[TABLE_PLACES], more, output[0])
        if self.source is None:
            self.calls = [*(other for other in self.calls if not call.made_alike(other)), call]
        elif call.made_alike(self.source):
            self.source = TableCall(module, call.places, more, call.cos[:0])

    def _note_block(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The block is called: by which of the tables, if by nothing else that tells places."""
        if self.source is None:
            given = bound_arguments(module, args, kwargs)
            biased = any(value is not None for name, value in given.items() if BETWEEN.search(name) and "mask" not in name)
            cos = given[TABLE_GIVEN][0] if isinstance(given.get(TABLE_GIVEN), tuple) else None
            self.source = next((call for call in self.calls if call.cos is cos and not biased), None)
            self.calls = []

    def find(self) -> Rotation:
        """How the block turns its keys, tried when it is first asked for."""
        self.places()
        if self.rotation is None:
            keys = keys_of_one_token(self.block, self.source)
            self.rotation = find_rotation(keys, self.source.table, f"{type(self.block.attention).__name__} at {self.block.path}")
        return self.rotation

    def places(self) -> Tensor:
        """The places of the tokens in this call, by which they were turned, (b|1 n); refused where channels have several."""
        if self.source is None:
            raise lacks(self.block, "keys that are turned by a table of its model's, as it was made in this call,")
        places = self.source.places
        if places.dim() == 2:
            return places
        if places.shape[-1] > 1 and not bool((places == places[:1]).all()):
            rule = "A method that turns keys to other places needs tokens that have one place each"
            got = f"those of pictures, which have {len(places)}, at {self.block.path}"
            raise UnsupportedError(explain(rule, got, "Give the model text alone, or choose a setting that leaves keys as they are."))
        return places[0]


def shifted(site: Site, arguments: dict[str, Any]) -> dict[str, Any]:
    """A block's places and their table for the tokens that it is about to run on, of which some have moved on; nothing where none has."""
    by, local = site.local_notes(SHIFT), site.local
    if by is None:
        return {}
    given, rotation = arguments[TABLE_GIVEN], site.block.state(BlockRotation)
    known = local.memo.get(id(given))
    if known is None or known[0] is not given:
        places = rotation.places().expand(local.batch, -1).gather(1, local.rows) + by
        known = local.memo[id(given)] = given, {TABLE_PLACES: places, TABLE_GIVEN: rotation.source.like(given[0], places)}
    return {name: value for name, value in known[1].items() if arguments.get(name) is not None}


def table_kinds(module: nn.Module) -> set[str]:
    """The kinds of the tables that a module makes."""
    kinds = vars(module)[TABLE_KIND]
    return {*kinds.values()} if isinstance(kinds, dict) else {kinds}


@torch.no_grad()
def keys_of_one_token(block: BlockSurgery, source: TableCall) -> Tensor:
    """The keys that a block's attention stores of one token at the places that are tried, (k n e): computed by a copy of it."""
    attention, width = block.attention, block.surgery.stream.width
    twin = stripped(attention).eval()
    held = {name: made_single(t, source.places.device) for name, t in (*twin.named_parameters(), *twin.named_buffers())}
    hidden = pattern(torch.Size((width,)), source.places.device).expand(1, len(TRIED), -1)
    table = tuple(t[None] for t in source.table(torch.tensor(TRIED, device=source.places.device)))
    given = {name: None for name in required(type(attention))[1:]} | {TABLE_GIVEN: table}
    given |= {name: TrialCache() for name in parameters(type(attention)) if name in CACHES_OF_ATTENTION}
    try:
        with torch.autocast(hidden.device.type, enabled=False):
            functional_call(twin, held, (hidden,), given)
    except SeenKeys as seen:
        keys, values = (states[0] for states in seen.args)
        if bool((values - values[:, :1]).abs().amax() <= FARTHEST * values.abs().amax()):
            return keys
        raise lacks(block, "an attention that stores keys and values, of which the keys alone know their place,") from None
    except HFTokensError:
        raise
    except Exception as error:  # it is a trial of our own
        raise lacks(block, "an attention that can be tried on one token,") from error
    raise lacks(block, "an attention that stores keys of its own")


def made_single(t: Tensor, device: torch.device) -> Tensor:
    """A weight in single precision; one that is kept elsewhere has others in its place, for any would do."""
    return pattern(t.shape, device) if t.is_meta else t.float() if t.dtype in OTHER_PRECISIONS else t


def pattern(shape: torch.Size, device: torch.device) -> Tensor:
    """Numbers that bear no likeness to each other."""
    return torch.arange(1, shape.numel() + 1, device=device).square().float().mul(0.37).cos().view(shape)


@dataclass(frozen=True)
class Turning:
    """The `rotation` signal."""

    site: Site

    @property
    def places(self) -> Tensor:
        """The places by which the tokens of this pass were turned, (b m): those of one row differ from `positions` by a constant."""
        rows, by = self.site.run.ledger.rows, self.site.run.memory.tokens.get(SHIFT)
        places = self.site.block.state(BlockRotation).places().expand(len(rows), -1).gather(1, rows)
        return places if by is None else places + by

    def turn(self, x: Tensor, by: Tensor) -> Tensor:
        """Keys or queries (b h r e) so many places further on, (b|1 h|1 r|1)."""
        rotation = self._of_block()
        return x if rotation.pairing is None else rotation.turned(x, *self._angles(rotation, by))

    def ahead(self, x: Tensor, count: int) -> Tensor:
        """The same (... e), the mean of the next `count` places."""
        return self._of_block().ahead(x, count)

    def _angles(self, rotation: Rotation, by: Tensor) -> tuple[Tensor, Tensor]:
        """Those by which the block before turned, if it was as far: comparing costs less than a table, but a device would be waited for."""
        source, held = self.site.block.state(BlockRotation).source, self.site.run.held
        known = held.get(BlockRotation)
        if known is None or known[0] != rotation.pairing or not known[1].made_alike(source) or by.is_cuda or not torch.equal(known[2], by):
            known = held[BlockRotation] = rotation.pairing, source, by, rotation.angles(by)
        return known[3]

    def _of_block(self) -> Rotation:
        return self.site.block.state(BlockRotation).find()
