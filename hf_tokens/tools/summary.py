"""What methods did in a run: what acted, how often, what became of each token, and what it cost beside the model without."""

from __future__ import annotations

import contextlib
import html
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..engine.block import BlockSurgery
from ..engine.model import ModelSurgery
from ..engine.run import StreamRun
from ..engine.surgery import StreamSurgery
from ..errors import UnsupportedError, explain
from ..kv.layer import TokenCacheLayer, count_bytes
from ..roles.base import Method
from .measure import UNCOUNTED, Cost, TokenCounts, measure, without_gradients
from .surgeries import models_in, surgeries_of, surgery_of

COLUMNS = ("method", "role", "blocks", "acted", "what", "share")


@dataclass
class Acted:
    """What a method did in a run.

    Attributes:
        name: Of the method, with its place in the adapter where two have one name.
        role: Its role.
        blocks: The blocks in which it acted, by the name of their stream.
        calls: How often it acted, in all blocks.
        counts: What is counted of it (`Method.counts`).
        left, of: The sums: so many of so many. Tokens, samples or bytes.
    """

    name: str
    role: str
    counts: str
    blocks: dict[str, set[int]] = field(default_factory=dict)
    calls: int = 0
    left: Tensor | float = 0
    of: int = 0

    @property
    def share(self) -> float:
        """So much of what is counted: 1 is all."""
        return float(self.left) / self.of if self.of else 1.0

    def cells(self) -> list[str]:
        """A row of the table."""
        blocks = "; ".join(spans(indices) if len(self.blocks) == 1 else f"{name} {spans(indices)}" for name, indices in self.blocks.items())
        return [self.name, self.role, blocks or "-", str(self.calls), self.counts or "-", f"{self.share:.1%}" if self.of else "-"]


@dataclass(frozen=True)
class BlockFate:
    """What became of the tokens that entered a stream, behind one of its blocks.

    Attributes:
        slot: Where each lives, those that joined at one place, -1 for one that is gone, (b n).
        skipped: Those that are there and did not run the block, (b n) bool.
        inserted: Tokens that stand beside them, in each row.
    """

    slot: Tensor
    skipped: Tensor
    inserted: int

    @property
    def gone(self) -> Tensor:
        """Those that are not there any more, (b n) bool."""
        return self.slot < 0

    @property
    def joined(self) -> Tensor:
        """Those that stand together with others, (b n) bool."""
        at = self.slot.clamp(min=0)
        held = at.new_zeros(len(at), int(at.max()) + 1).scatter_add(1, at, (~self.gone).long())
        return (held.gather(1, at) > 1) & ~self.gone


@dataclass
class Passage:
    """One pass of several tokens through a stream.

    Attributes:
        stream: The stream's name.
        blocks: How many blocks it has.
        prefix, suffix: Special tokens in front and behind, such as a class token.
        real: Tokens that are no padding, (b n) bool.
        picture: Height and width of the picture, where it is one.
        visual: Tokens of pictures in a text, (b n) bool, or None.
        ids: The text's token ids, (b n), or None.
        fates: What became of the tokens behind each block where a method acted, by its index.
    """

    stream: str
    blocks: int
    prefix: int
    suffix: int
    real: Tensor
    picture: tuple[int, ...] | None = None
    visual: Tensor | None = None
    ids: Tensor | None = None
    fates: dict[int, BlockFate] = field(default_factory=dict)

    def behind(self, index: int) -> BlockFate:
        """What became of the tokens behind any block: where no method acted, what had before."""
        earlier = [i for i in self.fates if i <= index]
        none = torch.zeros_like(self.real)
        if not earlier:
            return BlockFate(torch.arange(none.shape[1]).expand(none.shape), none, 0)
        last = self.fates[max(earlier)]
        return last if index in self.fates else BlockFate(last.slot, none, last.inserted)


class RunRecord(TokenCounts):
    """What `record` notes of a run.

    Attributes:
        acts: What each method did, by its key.
        passages: The passes of several tokens, in their order.
        entries: Entries that each row and head holds in each block behind the run, (b k), by stream and block.
        seen: Tokens that its cache has seen by then, by stream and block.
        bytes: Bytes of its keys and values, by stream and block.
        flops: Of matrix products and attention.
        kv_bytes: Of the keys and values in all caches.
    """

    def __init__(self):
        super().__init__()
        self.acts: dict[str, Acted] = {}
        self.passages: list[Passage] = []
        self.entries: dict[tuple[str, int], Tensor] = {}
        self.seen: dict[tuple[str, int], int] = {}
        self.bytes: dict[tuple[str, int], int] = {}
        self.flops = self.kv_bytes = 0
        self._layers: dict[tuple[str, int], TokenCacheLayer] = {}
        self._runs: dict[int, tuple[StreamRun, Passage]] = {}  # what is under way in each stream
        self._skipped: Tensor | None = None

    def acted(self, block: BlockSurgery, method: Method, left: Tensor | int, of: int) -> None:
        known = self.acts.setdefault(method.key, Acted(method.config.method, method.role, method.counts))
        known.blocks.setdefault(block.surgery.stream.name, set()).add(block.index)
        known.calls, known.left, known.of = known.calls + 1, known.left + left, known.of + of

    def routed(self, block: BlockSurgery, runs: Tensor) -> None:
        run = block.surgery.call.run
        if run is not None and run.ledger.n > 1:
            self._skipped = (~runs).gather(1, run.ledger.slot.clamp(min=0)) & (run.ledger.slot >= 0)

    def passed(self, block: BlockSurgery, run: StreamRun) -> None:
        if run.ledger.n == 1 or run.context.recital is not None:
            return
        surgery, slot = block.surgery, run.ledger.slot
        known = self._runs.get(id(surgery))
        if known is None or known[0] is not run:
            known = self._runs[id(surgery)] = run, passage_of(surgery, run)
            self.passages.append(known[1])
        skipped = torch.zeros_like(slot, dtype=torch.bool) if self._skipped is None else self._skipped
        inserted = 0 if run.ledger.fresh is None else int(run.ledger.fresh.sum(dim=1).max())
        self._skipped = None
        known[1].fates[block.index] = BlockFate(slot.cpu(), skipped.cpu(), inserted)

    def closed(self, surgery: StreamSurgery, run: StreamRun) -> None:
        self._runs.pop(id(surgery), None)
        if run.context.recital is not None:  # a prompt that is said again is no pass of the user's, and what it stores is not kept
            return
        self._layers |= {(surgery.stream.name, index): layer for index, layer in run.caches.items()}

    def settle(self, flops: int) -> None:
        """The run is over: read off what its caches hold, which some methods compress behind the pass."""
        self.flops, held = flops, {key: layer for key, layer in self._layers.items() if layer.origins is not None}
        self._layers = {}
        self.kv_bytes = count_bytes(t for layer in held.values() for t in layer.tensors())  # some share theirs
        for key, layer in held.items():
            self.entries[key], self.seen[key], self.bytes[key] = layer.there.sum(dim=-1).cpu(), layer.seen, layer.nbytes


def passage_of(surgery: StreamSurgery, run: StreamRun) -> Passage:
    """What is known of a pass when its first block has run."""
    context, ledger, arguments = run.context, run.ledger, run.context.arguments or {}
    pixels = arguments.get("pixel_values")
    of_pixels = tuple(pixels.shape[-2:]) if isinstance(pixels, Tensor) and pixels.dim() == 4 and len(pixels) == ledger.batch else None
    real = torch.ones(ledger.batch, ledger.n, dtype=torch.bool) if run.padding is None else run.padding.cpu()
    as_tokens = lambda t: t.cpu() if isinstance(t, Tensor) and t.shape == real.shape else None
    visual, ids = as_tokens(context.visual), as_tokens(arguments.get("input_ids"))
    picture = context.picture or (of_pixels if visual is not None or surgery.stream.kind == "vision" else None)
    return Passage(surgery.stream.name, len(surgery.stream), surgery.prefix, surgery.suffix, real, picture, visual, ids)


RECORDED: weakref.WeakKeyDictionary[ModelSurgery, RunRecord] = weakref.WeakKeyDictionary()  # the last of each model, for `summary`


@contextlib.contextmanager
def record(model: Any, flops: bool = True) -> Iterator[RunRecord]:
    """Note what the methods do in what runs inside, a forward, a generation or a run of a pipeline; nothing is learnt there.

    Args:
        model: A model or a diffusers pipeline with a surgery.
        flops: Whether FLOPs are counted, too, which slows small operations down and is nothing for a compiled model.

    Raises:
        UnsupportedError: The model has no surgery.

    >>> import hf_tokens
    >>> from hf_tokens.testing import zoo
    >>> base = zoo.build("vit")
    >>> model = hf_tokens.get_token_model(base.model, hf_tokens.ToMeConfig(r=2))
    >>> with hf_tokens.record(model) as run:
    ...     output = model(**base.inputs)
    >>> run.passages[0].behind(3).joined.shape
    torch.Size([2, 17])
    """
    surgeries, noted = surgeries_of(model), RunRecord()
    with contextlib.ExitStack() as stack:
        for inner in models_in(model).values():
            stack.enter_context(without_gradients(inner))
        for surgery in surgeries.values():
            stack.enter_context(surgery.listening(noted))
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=UNCOUNTED)) if flops else None
        yield noted
    noted.settle(counter.get_total_flops() if counter is not None else 0)
    for surgery in surgeries.values():
        RECORDED[surgery] = noted


@dataclass(frozen=True, repr=False)
class Summary:
    """A table of what methods did, in text and in a notebook.

    Attributes:
        rows: What each method of the model did; one that did nothing stands there too.
        cost: Of what ran.
        base: Of the same without the adapter; None if that did not run.
        run: What was recorded, for pictures of it.
    """

    rows: list[Acted]
    cost: Cost
    base: Cost | None = None
    run: RunRecord | None = None

    def costs(self) -> list[list[str]]:
        """The rows of the second table: what was counted, so many, of as many without the adapter, and the share."""
        names = {"tokens": "tokens computed", "flops": "FLOPs", "kv_bytes": "bytes of the KV cache"}
        out = []
        for name, title in names.items():
            got, base = getattr(self.cost, name), None if self.base is None else getattr(self.base, name)
            out.append([title, f"{got:,}", "-" if base is None else f"{base:,}", f"{got / base:.1%}" if base else "-"])
        return out

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        rows = [{"method": row.name, "role": row.role, "acted": row.calls, "counts": row.counts, "share": row.share} for row in self.rows]
        return {"methods": rows, "cost": vars(self.cost), "base": None if self.base is None else vars(self.base)}

    def tables(self) -> list[list[list[str]]]:
        """The rows of both tables, each with its head."""
        return [[[*COLUMNS], *(row.cells() for row in self.rows)], [["", "with", "without", "share"], *self.costs()]]

    def __repr__(self) -> str:
        return "\n\n".join(map(in_columns, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(map(as_html, self.tables()))


def summary(model: Any, **inputs: Any) -> Summary:
    """What the methods of a model did: in one forward of these inputs, beside the same without the adapter; or in what was recorded last.

    Args:
        model: A model with a surgery; a pipeline only without inputs.
        inputs: Keyword arguments of its forward. Without any it is said of the last `with record(model):`.

    Raises:
        UnsupportedError: The model has no surgery, or nothing was recorded of it.

    >>> import hf_tokens
    >>> from hf_tokens.testing import zoo
    >>> base = zoo.build("llama")
    >>> model = hf_tokens.get_token_model(base.model, [hf_tokens.DeepPromptConfig(tokens=3), hf_tokens.SnapKVConfig(budget=0.5)])
    >>> print(hf_tokens.summary(model, **base.inputs, use_cache=True))  # doctest: +ELLIPSIS
    method       role             blocks  acted  what      share
    deep-prompt  TokenBank        0-3     4      inserted  ...
    snapkv       CacheCompressor  0-3     4      cache     ...
    <BLANKLINE>
                           with  without  share
    tokens computed        ...
    """
    base = None
    if inputs:
        surgery = surgery_of(model)
        with record(model) as run:
            output = model(**inputs)
        del output
        base = cost_without(surgery, model, inputs)
    else:
        run = next((RECORDED[surgery] for surgery in surgeries_of(model).values() if surgery in RECORDED), None)
    if run is None:
        rule = "A summary is of inputs, or of what was recorded"
        remedy = "Pass the arguments of a forward, or run the model inside of `with hf_tokens.record(model):` first."
        raise UnsupportedError(explain(rule, "neither", remedy))
    return Summary(rows_of_run(model, run), Cost(run.tokens, run.flops, run.kv_bytes), base, run)


def cost_without(surgery: ModelSurgery, model: nn.Module, inputs: dict[str, Any]) -> Cost:
    """What a forward costs without the adapter."""
    with surgery.without_adapters():
        return measure(model, **inputs)


def rows_of_run(model: Any, run: RunRecord) -> list[Acted]:
    """What each method that acts in a model did, one that did nothing too."""
    methods = {method.key: method for surgery in surgeries_of(model).values() for method in surgery.methods()}
    names = [method.config.method for method in methods.values()]
    rows = []
    for key, method in methods.items():
        row = run.acts.get(key, Acted(method.config.method, method.role, method.counts))
        row.name = method.config.method if names.count(method.config.method) == 1 else f"{method.config.method}.{key}"
        rows.append(row)
    return rows


def spans(indices: set[int]) -> str:
    """Numbers, those that follow each other as a span: 0-3, 7."""
    parts: list[list[int]] = []
    for i in sorted(indices):
        if parts and parts[-1][-1] == i - 1:
            parts[-1].append(i)
        else:
            parts.append([i])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def in_columns(rows: list[list[str]]) -> str:
    """A table of plain columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_html(rows: list[list[str]]) -> str:
    """The same for a notebook."""
    head, *body = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(f'<tr>{row}</tr>' for row in body)}</tbody></table>"
