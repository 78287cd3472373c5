"""A cache layer that holds what is left of a sequence: valid per row and head, honest about the length it has seen, growing in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import CacheLayerMixin

from ..errors import UnsupportedError, explain
from ..tokens.entries import Arrival, Record, Stored, alike, append, bring, cells_of, pick_entries
from .formats import KVFormat
from .ranking import closed
from .states import KVStates
from .storage import Change

BLANK = {"sizes": 1.0}  # what a new entry has where its layer keeps books of each entry; zero of all that is not named

GAPS = 64  # places that a row and head may leave empty before all close up
LITTLE = 32  # of so many entries one may be filler where all lie in one tensor


def join(old: Tensor | None, new: Tensor | None, old_like: Tensor, new_like: Tensor, default: bool) -> Tensor | None:
    """Append flags of new entries to those of old ones; None stands for all of them at the default."""
    if old is None and new is None:
        return None
    old = torch.full_like(old_like, default, dtype=torch.bool) if old is None else old
    return append(old, torch.full_like(new_like, default, dtype=torch.bool) if new is None else new)


def nearly_whole(filled: Tensor) -> bool:
    """Whether the heads of each row keep alike, and rows differ by so little (b k n) that parts would cost more than they save."""
    return bool((filled == filled[:, :1]).all()) and int((~filled).sum()) * LITTLE <= filled.numel()


class TokenCacheLayer(CacheLayerMixin):
    """Keys and values of the tokens that this layer kept, (b k n e).

    `get_seq_length` counts the tokens seen, not those kept, so that positions and masks of later turns stay those of the base model.
    Where the keys and values lie, and in what formats, is for `kv` to know; `keys` and `values` unpack them.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, window: int | None = None):
        self.window, self.record_past = window, False
        self.is_sliding = window is not None
        self.reset()

    def reset(self) -> None:
        self.kv = KVStates()
        self.reads_packed = False  # whether the block that runs next reads packed entries as they are
        self.returned: tuple[Tensor, Tensor] | None = None  # what the last `update` returned
        self.is_initialized = False
        self.origins: Tensor | None = None  # b n
        self.filled: Tensor | None = None  # b n, or b k n
        self.fresh: Tensor | None = None  # b n
        self.gaps = self.gaps_until = 0  # how often entries have left their places empty since all closed up, and the length then
        self.seen = 0
        self.contiguous = True  # whether the last tokens seen are stored, as many as there are entries
        self.num_returned = 0  # entries among it
        self.returned_at: Tensor | None = None  # where among these each entry lies, (b n) or (b k n), if some have left since
        self.arrival: Arrival | None = None
        self.banks: dict[str, int] = {}  # token banks whose keys are stored, and the tokens seen before them
        self.first: Tensor | None = None  # place of each row's first real token, (b); None if it is 0
        self.placed = False  # whether `first` is known
        self.memory: Any = None  # what the methods remember of this sequence
        self.record = Record()  # what they remember of its rows and entries here
        self.reruns: list[TokenCacheLayer] = []  # the same of the block's later runs, where it runs several times in a pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype and device from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """All keys in their order, unpacked (b k n e)."""
        return None if self.origins is None else self.kv.ordered()[0]

    @property
    def values(self) -> Tensor | None:
        """All values in their order, unpacked (b k n e)."""
        return None if self.origins is None else self.kv.ordered()[1]

    def release(self) -> None:
        """Forget the unpacked states: the block that read them is done."""
        self.kv.release()
        self.returned = self.returned_at = None

    def bring(self, x: Tensor, dim: int) -> Tensor:
        """Of something of each key that the last `update` returned, along an axis of x (b h ...), that of the entries, in their order."""
        x = x.narrow(dim, x.shape[dim] - self.num_returned, self.num_returned)
        if self.returned_at is None and self.kv.slots is None:
            return x.narrow(dim, self.num_returned - self.length, self.length)  # a sliding window has dropped the first ones since
        return bring(x, self._places() if self.returned_at is None else self.returned_at, dim)

    def _places(self) -> Tensor:
        """Where each entry lies among those that were returned, (b n) or (b k n), as long as none has left since."""
        order = torch.arange(self.length, device=self.origins.device).expand_as(self.origins) if self.kv.slots is None else self.kv.slots
        return order + self.num_returned - self.length

    @property
    def length(self) -> int:
        """Entries that are stored, filler included."""
        return 0 if self.origins is None else self.origins.shape[-1]

    @property
    def heads(self) -> int:
        """Key heads."""
        return self.kv.heads

    @property
    def sizes(self) -> Tensor | None:
        """How many tokens each entry stands for, (b n) or (b k n); None if one each."""
        return self.record.entries.get("sizes")

    @property
    def whole(self) -> bool:
        """Whether it holds every token seen, and nothing else."""
        return self.length == self.seen and self.filled is None and self.fresh is None and self.sizes is None and not self.reruns

    @property
    def plain(self) -> bool:
        """Whether its keys and values are all that is to be known of it."""
        return self.whole and not self.packed and not self.record and not self.record.entries

    def tensors(self) -> list[Tensor]:
        """All that is stored of keys and values; what two layers share is one tensor."""
        return [*self.kv.tensors(), *(t for rerun in self.reruns for t in rerun.tensors())]

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

    def read_packed(self) -> None:
        """Let the next attention read packed entries as they are."""
        self.reads_packed = True

    def expect(self, arrival: Arrival) -> None:
        """Announce the tokens of the next `update`."""
        self.arrival, self.reads_packed = arrival, False

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store new keys and values (b k m e); returns all that is stored."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, m = key_states.shape[0], key_states.shape[2]
        arrival, self.arrival = self.arrival, None
        if arrival is None:
            if not self.whole:
                got = f"{self.length} entries of {self.seen} tokens and a model without it"
                rule = "A cache that a surgery changed is read by that surgery only"
                raise UnsupportedError(explain(rule, got, "Start a new cache after switching the adapter off."))
            origins = torch.arange(self.seen, self.seen + m, device=key_states.device).expand(batch, m)
            arrival = Arrival(origins, None, None, self.seen + m)
        if arrival.origins.shape[-1] != m:
            rule, got = "A block stores a key of each of its tokens", f"{m} of {arrival.origins.shape[-1]}"
            raise UnsupportedError(explain(rule, got, "Pass no cache, and `use_cache=False` to `generate`."))
        if self.origins is None:
            self.origins = arrival.origins.new_empty(batch, 0)
        self.record.entries = {name: pad(t, (0, m), value=BLANK.get(name, 0)) for name, t in self.record.entries.items()}
        if arrival.sizes is not None:
            old = torch.ones_like(self.origins, dtype=torch.float32) if self.sizes is None else self.sizes[..., :-m]
            self.record.entries["sizes"] = append(old, arrival.sizes)
        self.filled = join(self.filled, arrival.filled, self.origins, arrival.origins, True)
        self.fresh = join(self.fresh, arrival.fresh, self.origins, arrival.origins, False)
        self.origins = append(self.origins, arrival.origins)
        self.contiguous &= m == arrival.total - self.seen
        self.seen = arrival.total
        self.kv.append(key_states, value_states, self.filled)
        self.returned, self.num_returned, self.returned_at = self.kv.hand_out(blank=self.reads_packed), self.length, None
        self._slide()
        return self.returned

    @property
    def packed(self) -> bool:
        """Whether an attention function reads it by a detour: unpacked, or with the sizes of its entries in a mask."""
        return self.kv.parts is not None or self.sizes is not None

    @property
    def readable(self) -> bool:
        """Whether an attention can read all entries as they lie."""
        return self.window is None and self.kv.readable and (self.filled is None or self.kv.parts is not None)

    @property
    def there(self) -> Tensor:
        """The entries that are stored, filler left out, (b k n) bool."""
        if self.kv.parts is not None:
            return torch.stack([part.where for part in self.kv.parts]).any(dim=0)
        return cells_of(torch.ones_like(self.origins, dtype=torch.bool) if self.filled is None else self.filled, self.heads)

    def attend(self, q: Tensor, sinks: Tensor | None, weighs: bool, **shape: Any) -> tuple[Tensor, Tensor | None]:
        """What queries (b h 1 e) read of entries as they lie, and if `weighs` the probability of each, the mean of its head, (b k n)."""
        self.reads_packed = False
        sizes = None if self.sizes is None else cells_of(self.sizes, self.heads)
        return self.kv.attend(q, sizes, sinks, weighs, **shape)

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
        if first > 0:
            self.kv.drop_first(first)
            self._map_entries(lambda t: t[..., first:])

    def keep(self, index: Tensor, filled: Tensor | None = None, gone: Tensor | None = None) -> None:
        """Keep the entries of `index`, (b r), or (b k r) for each key head; `filled` marks those that count.

        Where heads keep different numbers, filler takes no room. `gone` are the entries that are not in the index, where they are known.
        """
        self.contiguous, self.gaps = False, 0
        if self.returned is not None and self.returned_at is None:
            self.returned_at = self._places()
        if self.filled is not None:
            old = pick_entries(self.filled, index)
            filled = old if filled is None else torch.logical_and(*alike(filled, old))
        if filled is not None and filled.dim() == 3 and not nearly_whole(filled):
            self.kv.split(self.filled)
        self.kv.keep(index, filled, gone, in_place=self.window is None)
        self._map_entries(lambda t: pick_entries(t, index))
        self.filled = filled

    def vacate(self, place: Tensor, leaves: Tensor) -> None:
        """Let the entry at a place of each row and head go, (b k 1), where it leaves, (b k 1) bool; these lie in parts.

        The places stay empty for a while.
        """
        self.contiguous, self.gaps, self.gaps_until = False, self.gaps + 1, self.length
        self.kv.vacate(place, leaves)
        filled = cells_of(torch.ones_like(self.origins, dtype=torch.bool) if self.filled is None else self.filled, self.heads)
        self.filled = filled.scatter(-1, place, filled.gather(-1, place) & ~leaves)

    def close_up(self) -> None:
        """Let the entries take the places that others have left, as if these had closed up at once."""
        if self.gaps:
            index, filled = closed(self.filled, min(self.gaps_until, self.length))
            self.filled = None
            self.keep(index, filled)

    def _map_entries(self, change: Change) -> None:
        """Change what is noted of the entries by a function of any (b n) or (b k n)."""
        self.origins = change(self.origins)
        self.filled = None if self.filled is None else change(self.filled)
        self.fresh = None if self.fresh is None else change(self.fresh)
        self.returned_at = None if self.returned_at is None else change(self.returned_at)
        self.record.entries = {name: change(t) for name, t in self.record.entries.items()}

    def stored(self) -> Stored | None:
        """The books of the entries that are there now, as they lie; None if there never were any."""
        return None if self.origins is None else Stored(self.origins, self._visible(), self.record.entries, self.kv.slots)

    @property
    def outlives(self) -> bool:
        """Whether it may hold entries that have left its window: the cache alone hides them in Moshi, whose mask is a causal one."""
        return self.window is not None and self.seen >= self.window and not self.contiguous

    def _visible(self) -> Tensor | None:
        """The entries that are there and that a later query can see, (b n) or (b k n); None if all are."""
        if not self.outlives:
            return self.filled
        live = self.origins > self.seen - self.window
        return live if self.filled is None else torch.logical_and(*alike(live, self.filled))

    def mark(self, name: str, flags: Tensor) -> None:
        """Mark some of the last tokens that were stored, (b m) bool, under a name."""
        entries, n = self.record.entries, min(flags.shape[1], self.length)
        old = entries.get(name, torch.zeros_like(self.origins, dtype=torch.bool))
        entries[name] = append(old[..., : self.length - n], flags[:, flags.shape[1] - n :])

    def rewrite(self, keys: Tensor, values: Tensor, sizes: Tensor | None) -> None:
        """Put other keys, values (b k n e) and sizes (b k n) in the places of those that are stored."""
        self.kv.rewrite(keys, values)
        if sizes is not None:
            self.record.entries["sizes"] = sizes

    def hold(self, where: Tensor, keys: KVFormat, values: KVFormat, scale: Tensor | None = None) -> None:
        """Store the entries of `where` (b k n) in other formats; those that are in them already are not touched.

        Args:
            where: The entries.
            keys, values: Formats of their keys and values.
            scale: Factor on each channel of the keys, (b k 1 e), before they are packed; the first one of a format stays.
        """
        self.kv.convert(where, (keys, values), scale, self.filled)

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
        if self.memory is not None and tokens_to_remove < 0:
            self.memory.crop(max(self.seen + tokens_to_remove, 0))
        self.kv.release()
        for rerun in self.reruns:
            rerun.crop(tokens_to_remove)
        self.seen = max(self.seen + tokens_to_remove, 0)
        self.banks = {bank: before for bank, before in self.banks.items() if before < self.seen}
        if self.origins is None:
            return
        live = self.origins < self.seen
        if tokens_to_remove < 0 and not bool(live.all()):
            self.filled = live if self.filled is None else (live if live.dim() == self.filled.dim() else live[:, None]) & self.filled
            self.origins = self.origins.masked_fill(~live, 0)  # what stays as a gap stands at a place that there is
            anywhere = live.flatten(0, -2).any(dim=0)
            width = int(anywhere.sum())
            if bool(anywhere[:width].all()):
                self.kv.keep_slice(slice(0, width))
                self._map_entries(lambda t: t[..., :width])
            if bool(self.filled.all()):
                self.filled = None
        recording, self.record_past = self.record_past, False
        self._slide()
        self.record_past = recording

    def _map_rows(self, change: Change) -> None:
        self.first = None if self.first is None else change(self.first)
        for name, value in self.record.items():
            self.record[name] = change(value)
        if self.memory is not None:
            self.memory.map_rows(change)
        for rerun in self.reruns:
            rerun._map_rows(change)
        if self.origins is None:
            return
        self.kv.map_rows(change)
        self._map_entries(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search."""
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        self._move(torch.device("cpu"))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device) -> None:
        for rerun in self.reruns:
            rerun._move(device)
        self.kv.move(device)


def count_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
