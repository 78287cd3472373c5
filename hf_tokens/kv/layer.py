"""A cache layer that holds what is left of a sequence: valid per row and head, honest about the length it has seen, growing in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedError, explain
from ..tokens.entries import Arrival, Stored, alike, cells_of, pick_entries, stretch
from ..tokens.token_map import indices
from .storage import BOTH, FEW, Change, KVFormat, Part, Plain, attend, dense, put, read

FIRST_CAPACITY = 64
BLANK = {"sizes": 1.0}  # what a new entry has where its layer keeps books of each entry; zero of all that is not named


def join(old: Tensor | None, new: Tensor | None, old_like: Tensor, new_like: Tensor, default: bool) -> Tensor | None:
    """Append flags of new entries to those of old ones; None stands for all of them at the default."""
    if old is None and new is None:
        return None
    old = torch.full_like(old_like, default, dtype=torch.bool) if old is None else old
    new = torch.full_like(new_like, default, dtype=torch.bool) if new is None else new
    if old.dim() == 3:
        new = new[:, None].expand(-1, old.shape[1], -1)
    return torch.cat([old, new], dim=-1)


class Record(dict):
    """What methods remember of the rows of one cache layer: tensors (b ...), which follow the rows.

    `entries` holds (b n) or (b k n) tensors that follow the entries; a new one has `BLANK` in them.
    """

    def __init__(self):
        super().__init__()
        self.entries: dict[str, Tensor] = {}


class TokenCacheLayer(CacheLayerMixin):
    """Keys and values of the tokens that this layer kept, (b k n e).

    `get_seq_length` counts the tokens seen, not those kept, so that positions and masks of later turns stay those of the base model.
    The first entries may be held in another form (`held`); `keys` and `values` then unpack them.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, window: int | None = None):
        self.window, self.record_past = window, False
        self.is_sliding = window is not None
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.held: list[Part] | None = None  # all entries, if some are held in another form or by some heads only
        self._states: tuple[Tensor, Tensor] | None = None  # keys and values else
        self._lent: tuple[Tensor, Tensor] | None = None  # all of them unpacked, while a block runs
        self.asked = False  # whether the block that runs next reads packed entries as they are
        self.given: tuple[Tensor, Tensor] | None = None  # what the last `update` returned
        self.is_initialized = False
        self._room: tuple[Tensor, Tensor] | None = None  # buffers that the states are views of
        self._begin = 0  # where in them the states begin
        self._slots: Tensor | None = None  # where among the states each entry lies, (b n) or (b k n); None if in order
        self.origins: Tensor | None = None  # b n
        self.filled: Tensor | None = None  # b n, or b k n
        self.fresh: Tensor | None = None  # b n
        self.seen = 0
        self.handed = 0  # entries that the last `update` returned
        self.arrival: Arrival | None = None
        self.banks: dict[str, int] = {}  # token banks whose keys are stored, and the tokens seen before them
        self.first: Tensor | None = None  # place of each row's first real token, (b); None if it is 0
        self.placed = False  # whether `first` is known
        self.shares: Tensor | None = None  # part of the tokens seen that the layer may hold, (b) on the CPU, if it was allotted one
        self.memory: Any = None  # what the methods remember of this sequence
        self.record = Record()  # what they remember of its rows and entries here
        self.folded = 0  # end of the tokens whose keys are part of other entries
        self.reruns: list[TokenCacheLayer] = []  # the same of the block's later runs, where it runs several times in a pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """All keys in their order, unpacked (b k n e)."""
        return None if self.origins is None else self._ordered()[0]

    @property
    def values(self) -> Tensor | None:
        """All values in their order, unpacked (b k n e)."""
        return None if self.origins is None else self._ordered()[1]

    def _ordered(self) -> tuple[Tensor, Tensor]:
        if self._slots is None:
            return self._unpacked()
        return self._taken(torch.arange(self._slots.shape[-1], device=self._slots.device).expand_as(self._slots))

    def in_order(self, x: Tensor, dim: int) -> Tensor:
        """Something of each entry as it lies, (b k|h ...), in the order of the entries."""
        if self._slots is None:
            return x
        slots = self._slots[:, None] if self._slots.dim() == 2 else self._slots.repeat_interleave(x.shape[1] // self._slots.shape[1], dim=1)
        slots = slots.view(*slots.shape[:2], *[1] * (dim - 2), -1, *[1] * (x.dim() - dim - 1))
        return x.gather(dim, slots.expand(*x.shape[:dim], -1, *x.shape[dim + 1 :]))

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        if self.held is None or self._lent is not None:
            return self._lent or self._states
        return tuple(dense(self.held, which, self._states[which].shape[3]) for which in BOTH)

    def release(self) -> None:
        """Forget the unpacked states: the block that read them is done."""
        self._lent = self.given = None

    @property
    def length(self) -> int:
        """Entries that are stored, filler included."""
        return 0 if self.origins is None else self.origins.shape[-1]

    @property
    def heads(self) -> int:
        """Key heads."""
        return self._states[0].shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Key heads, and the width of a key and of a value."""
        return self.heads, *(t.shape[3] for t in self._states)

    @property
    def sizes(self) -> Tensor | None:
        """How many tokens each entry stands for, (b n) or (b k n); None if one each."""
        return self.record.entries.get("sizes")

    @property
    def whole(self) -> bool:
        """Whether it holds every token seen, and nothing else."""
        return self.length == self.seen and self.filled is None and self.fresh is None and self.sizes is None and not self.reruns

    def tensors(self) -> list[Tensor]:
        """All that is stored of keys and values; what two layers share is one tensor."""
        packed = [t for part in self.held or () for t in part.tensors()]
        return [*packed, *(self._states or ()), *(t for rerun in self.reruns for t in rerun.tensors())]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return count_bytes(self.tensors())

    def see(self, total: int) -> None:
        """Note how many tokens have passed, whether they ran the block or not."""
        for layer in (self, *self.reruns):
            layer.seen = total

    def rerun_layer(self, number: int, seen: int) -> TokenCacheLayer:
        """The layer that holds what the block stores when it runs once more, for its second run from 1 on; `seen` passed before."""
        while len(self.reruns) < number:
            self.reruns.append(TokenCacheLayer(self.window))
            self.reruns[-1].seen, self.reruns[-1].record_past = seen, self.record_past
        return self.reruns[number - 1]

    def remember(self, memory: Any) -> None:
        """Hold what the methods remember of the sequence."""
        self.memory = memory

    def place_rows(self, first: Tensor | None) -> None:
        """Note the place of each row's first real token, (b); None if it is 0."""
        self.first, self.placed = first, True

    def share_out(self, shares: Tensor) -> None:
        """Note the part of the tokens seen that the layer may hold, (b)."""
        self.shares = shares

    def note_folded(self, end: int) -> None:
        """Tokens before this place are part of other entries."""
        self.folded = max(self.folded, end)

    def ask(self) -> None:
        """Let the next attention read packed entries as they are."""
        self.asked = True

    def expect(self, arrival: Arrival) -> None:
        """Announce the tokens of the next `update`."""
        self.arrival, self.asked = arrival, False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b k m e); returns all that is stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, m = key_states.shape[0], key_states.shape[2]
        arrival, self.arrival = self.arrival, None
        if arrival is None:
            if not self.whole:
                raise UnsupportedError(
                    explain(
                        "A cache that a surgery changed is read by that surgery only",
                        f"{self.length} entries of {self.seen} tokens and a model without it",
                        "Start a new cache after switching the adapter off.",
                    )
                )
            origins = torch.arange(self.seen, self.seen + m, device=key_states.device).expand(batch, m)
            arrival = Arrival(origins, None, None, self.seen + m)
        if self.origins is None:
            self.origins = arrival.origins.new_empty(batch, 0)
        self.record.entries = {name: pad(t, (0, m), value=BLANK.get(name, 0)) for name, t in self.record.entries.items()}
        if arrival.sizes is not None:
            old = torch.ones_like(self.origins, dtype=torch.float32) if self.sizes is None else self.sizes[..., :-m]
            new = arrival.sizes if old.dim() == 2 else arrival.sizes[:, None].expand(-1, old.shape[1], -1)
            self.record.entries["sizes"] = torch.cat([old, new], dim=-1)
        self.filled = join(self.filled, arrival.filled, self.origins, arrival.origins, True)
        self.fresh = join(self.fresh, arrival.fresh, self.origins, arrival.origins, False)
        new = arrival.origins if self.origins.dim() == 2 else arrival.origins[:, None].expand(-1, self.origins.shape[1], -1)
        self.origins = torch.cat([self.origins, new], dim=-1)
        self.seen = arrival.total
        self._lent = None
        if self.held is None:
            self._append(key_states, value_states)
        else:
            self._hand_in(key_states, value_states)
        if self.asked:
            keys, values = (t.new_full((), torch.nan).expand(*t.shape[:2], self.length, t.shape[3]) for t in self._states)
        else:
            keys, values = self._unpacked()
            self._lent = None if self.held is None else (keys, values)
        self.given, self.handed = (keys, values), self.length
        self._slide()
        return keys, values

    @property
    def packed(self) -> bool:
        """Whether an attention function reads it by a detour: unpacked, or with the sizes of its entries in a mask."""
        return self.held is not None or self.sizes is not None

    @property
    def readable(self) -> bool:
        """Whether an attention can read all entries as they lie."""
        parts = self.filled is None and not self._states[0].requires_grad if self.held is None else all(part.readable for part in self.held)
        return parts and self.window is None

    @property
    def there(self) -> Tensor:
        """The entries that are stored, filler left out, (b k n) bool."""
        if self.held is not None:
            return torch.stack([part.where for part in self.held]).any(dim=0)
        return cells_of(torch.ones_like(self.origins, dtype=torch.bool) if self.filled is None else self.filled, self.heads)

    def attend(self, q: Tensor, sinks: Tensor | None, weighs: bool, **shape: Any) -> tuple[Tensor, Tensor | None]:
        """What queries (b h 1 e) read of the entries as they lie, and if asked the probability of each, the mean of its head, (b k n)."""
        self.asked = False
        sizes = None if self.sizes is None else cells_of(self.sizes, self.heads)
        return attend([self._whole_part()] if self.held is None else self.held, q, sizes, sinks, weighs, **shape)

    def _whole_part(self) -> Part:
        """The states where they lie, as a part."""
        b, k, n, _ = self._states[0].shape
        buffers, begin = self._buffers()
        room = buffers[0].shape[2]
        device = self.origins.device
        starts = begin + room * torch.arange(b * k, device=device).view(b, k)
        slots = torch.arange(n, device=device).expand(b, n) if self._slots is None else self._slots
        packed = tuple((t.flatten(0, 2),) for t in buffers)
        cells, lengths = starts[..., None] + cells_of(slots, k), torch.full_like(starts, n)
        return Part(cells, (Plain(), Plain()), packed, starts, lengths, starts + room, b * k * n)

    def _append(self, k: Tensor, v: Tensor) -> None:
        if self._states is None:
            self._states = k, v
            return
        if torch.is_grad_enabled() and (k.requires_grad or self._states[0].requires_grad):
            self._states, self._room = tuple(torch.cat(pair, dim=2) for pair in zip(self._states, (k, v), strict=True)), None
            return
        old, m = self._states[0].shape[2], k.shape[2]
        new = old + m
        if self._slots is not None:
            own = torch.arange(old, new, device=self._slots.device)
            self._slots = torch.cat([self._slots, own.expand(*self._slots.shape[:-1], -1)], dim=-1)
        if self._room is None or self._room[0].shape[2] < self._begin + new:
            capacity = max(FIRST_CAPACITY, new + new // 2)
            room = tuple(t.new_empty(*t.shape[:2], capacity, t.shape[3]) for t in (k, v))
            for buffer, stored in zip(room, self._states, strict=True):
                buffer[:, :, :old] = stored
            self._room, self._begin = room, 0
        for buffer, states in zip(self._room, (k, v), strict=True):
            buffer.narrow(2, self._begin + old, m).copy_(states)
        self._states = tuple(buffer.narrow(2, self._begin, new) for buffer in self._room)

    def activate_past_recording(self) -> None:
        """Free nothing before the next `crop`: what is seen now may be taken back."""
        self.record_past = True
        for rerun in self.reruns:
            rerun.activate_past_recording()

    def _slide(self) -> None:
        """Free what no later query of a sliding window can see."""
        if self.window is None or self.record_past or self.length < self.window:
            return
        live = self.origins > self.seen - self.window
        first = int(live.flatten(0, -2).any(dim=0).long().argmax())
        if first == 0:
            return
        room = self._room if self.held is None else None
        self._select(slice(first, None), copy=room is None)
        if room is not None:
            self._room, self._begin = room, self._begin + first

    def _sort(self) -> None:
        """Let the states lie in the order of the entries."""
        if self._slots is not None:
            self._states, self._room, self._slots = self._ordered(), None, None

    def _select(self, place: slice, copy: bool = True) -> None:
        self._lent = None
        if self.held is None:
            self._sort()
            states = tuple(t[:, :, place] for t in self._states)
            self._states, self._room = (tuple(t.clone() for t in states), None) if copy else (states, None)
        self._change(lambda t: t[..., place])

    def keep(self, index: Tensor, filled: Tensor | None = None, gone: Tensor | None = None) -> None:
        """Keep the entries of `index`, (b r), or (b k r) for each key head; `filled` marks those that count.

        Where heads keep different numbers, filler takes no room. `gone` are the entries that are not in the index, where they are known.
        """
        self._lent = None
        if self.filled is not None:
            old = pick_entries(self.filled, index)
            filled = old if filled is None else torch.logical_and(*alike(filled, old))
        if filled is not None and filled.dim() == 3:
            self._open()
        if self.held is not None:
            self._settle(index, filled)
        elif self._room is not None and self.window is None and self.length - index.shape[-1] <= FEW:
            self._fill_up(index, self._others(index) if gone is None else gone)
        else:
            self._states, self._room, self._slots = self._taken(index), None, None
        self._change(lambda t: pick_entries(t, index), packed=False)
        self.filled = filled

    def _settle(self, index: Tensor, filled: Tensor | None) -> None:
        """Let what is packed be that of some entries."""
        lost = None if filled is None else ~filled if filled.dim() == 3 else ~filled[:, None]
        cells = [pick_entries(part.cells, index) for part in self.held]
        cells = cells if lost is None else [one.masked_fill(lost, -1) for one in cells]
        self.held = [part.settle(one) for part, one in zip(self.held, cells, strict=True)]

    def _others(self, index: Tensor) -> Tensor:
        """The entries that are not in an index, (b r) or (b k r)."""
        n = self.length
        leaves = torch.ones(*index.shape[:-1], n, dtype=torch.bool, device=index.device).scatter_(-1, index, False)
        return leaves.nonzero()[:, -1].view(*index.shape[:-1], n - index.shape[-1])

    def _fill_up(self, index: Tensor, gone: Tensor) -> None:
        """Let the last states move to where those lie that leave: the others stay where they are."""
        n, kept = self.length, index.shape[-1]
        lies = torch.arange(n, device=index.device).expand(len(index), n) if self._slots is None else self._slots
        slots, holes = pick_entries(lies, index), pick_entries(lies, gone)
        for i, last in enumerate(range(n - 1, kept - 1, -1)):
            hole = holes[..., i : i + 1]
            place = cells_of(hole, self.heads)[..., None]
            for states in self._states:
                states.scatter_(2, place.expand(-1, -1, -1, states.shape[3]), states[:, :, last : last + 1].clone())
            slots = torch.where(slots == last, hole, slots)
            holes = torch.where(holes == last, hole, holes) if i + 1 < n - kept else holes
        self._slots, self._states = slots, tuple(t[:, :, :kept] for t in self._states)

    def _change(self, change: Change, packed: bool = True) -> None:
        """Change the books of the entries, and what is packed of them, by a function of any (b n) or (b k n)."""
        if self.held is not None and packed:
            self.held = [part.settle(change(part.cells)) for part in self.held]
        self.origins = change(self.origins)
        self.filled = None if self.filled is None else change(self.filled)
        self.fresh = None if self.fresh is None else change(self.fresh)
        self.record.entries = {name: change(t) for name, t in self.record.entries.items()}

    def stored(self) -> Stored | None:
        """The books of the entries that are there now, as they lie; None if there never were any."""
        return None if self.origins is None else Stored(self.origins, self.filled, self.record.entries, self._slots)

    def mark(self, name: str, flags: Tensor) -> None:
        """Mark some of the last tokens that were stored, (b m) bool, under a name."""
        entries, n = self.record.entries, min(flags.shape[1], self.length)
        old = entries.get(name, torch.zeros_like(self.origins, dtype=torch.bool))
        new = stretch(old[..., : self.length - n], flags[:, flags.shape[1] - n :])
        entries[name] = new if old.dim() == 3 else new[:, 0]

    def states(self, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of all entries in their order, (b k n e), or of those of an index (b k r)."""
        if index is None:
            return self._ordered()
        if self.held is not None and self._lent is None:
            return tuple(read(self.held, which, index) for which in BOTH)
        return self._taken(index)

    def _taken(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of entries (b r) or (b k r) that are held as they came, or lent."""
        places = cells_of(index if self._slots is None else pick_entries(self._slots, index), self.heads)
        b, k, r = places.shape
        buffers, begin = self._buffers()
        if self._lent is not None or not all(t.is_contiguous() for t in buffers):
            return tuple(t.gather(2, places[..., None].expand(-1, -1, -1, t.shape[3])) for t in self._lent or self._states)
        starts = begin + buffers[0].shape[2] * torch.arange(b * k, device=places.device).view(b, k, 1)
        rows = (starts + places).flatten()
        return tuple(t.flatten(0, 2).index_select(0, rows).view(b, k, r, -1) for t in buffers)

    def _buffers(self) -> tuple[tuple[Tensor, Tensor], int]:
        """Where the states lie, and the place of the first."""
        return (self._states, 0) if self._room is None else (self._room, self._begin)

    def write(self, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put other keys and values (b k r e) in the places of some entries, (b k r); -1 stands for none."""
        self._lent = None
        there, index = index >= 0, index.clamp(min=0)
        new = keys, values
        if self.held is not None:
            plain = next(part for part in self.held if part.forms == (Plain(), Plain()))
            cells = plain.cells.gather(-1, index)[there]
            if bool((cells < 0).any()):
                raise UnsupportedError(explain("Entries are rewritten while they are held as they came", "others", "Fold before you hold."))
            plain.write(cells, tuple(t[there] for t in new))
            return
        places = index if self._slots is None else pick_entries(self._slots, index)
        where = (*there.nonzero(as_tuple=True)[:2], places[there])
        if self._room is None or any(t.requires_grad for t in new):
            self._states, self._room = tuple(t.index_put(where, x[there]) for t, x in zip(self._states, new, strict=True)), None
            return
        for states, x in zip(self._states, new, strict=True):
            states.index_put_(where, x[there])

    # -- other forms -------------------------------------------------------------------------------------------------

    def rewrite(self, keys: Tensor, values: Tensor, sizes: Tensor | None) -> None:
        """Put other keys, values (b k n e) and sizes (b k n) in the places of those that are stored."""
        self._lent = self._room = self._slots = self.held = None
        self._states = keys, values
        if sizes is not None:
            self.record.entries["sizes"] = sizes

    def hold(self, where: Tensor, keys: KVFormat, values: KVFormat, scale: Tensor | None = None) -> None:
        """Hold the entries of `where` (b k n) in a form; what is held in it already is not touched.

        Args:
            where: The entries.
            keys, values: Forms of their keys and values.
            scale: Factor on each channel of the keys, (b k 1 e), before they are packed; the first one of a form stays.
        """
        known = next((part for part in self.held or () if part.forms == (keys, values)), None)
        if known is not None:
            where, scale = where & ~known.where, known.scale
        index = indices(where)
        there = where.gather(-1, index)
        self.take(Part.of(tuple(t[there] for t in self.states(index)), where, (keys, values), scale))

    def take(self, part: Part) -> None:
        """Hold some entries as a part says."""
        self._lent = None
        self._open()
        self.held = put(self.held, part)

    def _open(self) -> None:
        """Be ready to hold entries in other forms."""
        if self.held is not None:
            return
        where = torch.ones(*self._states[0].shape[:3], dtype=torch.bool, device=self.origins.device)
        where = where if self.filled is None else where & cells_of(self.filled, self.heads)
        self.held = [Part.of((self.keys[where], self.values[where]), where, (Plain(), Plain()))]
        self._states, self._room, self._slots = tuple(t.new_empty(*t.shape[:2], 0, t.shape[3]) for t in self._states), None, None

    def _hand_in(self, k: Tensor, v: Tensor) -> None:
        """Hold new entries (b k m e) as they are."""
        m = k.shape[2]
        new = torch.ones(k.shape[:3], dtype=torch.bool, device=k.device)
        new = new if self.filled is None else new & cells_of(self.filled[..., -m:], self.heads)
        for part in self.held:
            part.grow(m)
        self.held = put(self.held, Part.of((k[new], v[new]), pad(new, (self.length - m, 0)), (Plain(), Plain())))

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask as the base model would build it."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens seen; the number is zero or negative, as in transformers."""
        if tokens_to_remove > 0:
            raise UnsupportedError(explain("`crop` takes zero or a negative number", tokens_to_remove, "Pass -k to remove k tokens."))
        if self.seen + tokens_to_remove < self.folded:
            came = f"{self.folded - self.seen - tokens_to_remove} of them"
            rule = "Tokens whose keys were folded into other entries cannot be taken back"
            raise UnsupportedError(explain(rule, came, "Start a new cache, and leave out assisted decoding."))
        self._lent = None
        for rerun in self.reruns:
            rerun.crop(tokens_to_remove)
        self.seen = max(self.seen + tokens_to_remove, 0)
        self.banks = {bank: before for bank, before in self.banks.items() if before < self.seen}
        if self.origins is None:
            return
        if tokens_to_remove == 0:
            self._free()
            return
        live = self.origins < self.seen
        if bool(live.all()):
            self._free()
            return
        self.filled = live if self.filled is None else (live if live.dim() == self.filled.dim() else live[:, None]) & self.filled
        width = int(live.flatten(0, -2).any(dim=0).sum())
        if bool(live.flatten(0, -2).any(dim=0)[:width].all()):
            self._select(slice(0, width))
        if bool(self.filled.all()):
            self.filled = None
        self._free()

    def _free(self) -> None:
        recording, self.record_past = self.record_past, False
        self._slide()
        self.record_past = recording

    def _map_rows(self, change: Change) -> None:
        self._lent = None
        self.first = None if self.first is None else change(self.first)
        self.shares = None if self.shares is None else change(self.shares)
        for name, value in self.record.items():
            self.record[name] = change(value)
        if self.memory is not None:
            self.memory.map_rows(change)
        for rerun in self.reruns:
            rerun._map_rows(change)
        if self.origins is None:
            return
        self._states, self._room = tuple(change(t) for t in self._states), None
        self._slots = None if self._slots is None else change(self._slots)
        self.held = None if self.held is None else [part.change_rows(change) for part in self.held]
        self._change(change, packed=False)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._map_rows(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        """Move the states to the CPU."""
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        """Move the states back to the layer's device."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for rerun in self.reruns:
            rerun._move(device)
        if self._states is not None and self._states[0].device != device:
            self._states = tuple(t.to(device, non_blocking=True) for t in self._states)
            self.held = None if self.held is None else [part.to(device) for part in self.held]
            self._slots = None if self._slots is None else self._slots.to(device)
            self._room = self._lent = None


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
