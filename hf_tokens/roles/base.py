"""What every method is: a config and one class with the one verb of one role, whose arguments name the signals that it gets."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import ConfigError, UnsupportedError, explain
from ..model.changes import FittedChange
from ..model.parts import check_plain
from ..model.shards import gathered
from .config import MethodConfig
from .signals import JUDGES, OF_A_WORD, SIGNALS


@dataclass(frozen=True)
class Dims:
    """What a method may know about the block that it sits in.

    >>> dims = Dims(width=4, heads=2, kv_heads=2, head_dim=2, layer=1, layers=4, kind="text", causal=True)
    >>> dims.layer + 1 == dims.layers  # is it the last block of its stream?
    False
    """

    width: int
    heads: int
    kv_heads: int  # for a CacheCompressor, once the block has stored keys: those of its cache
    head_dim: int
    layer: int
    layers: int
    kind: str
    causal: bool
    is_first_block: bool = True  # whether this block is the first that the method acts on
    is_last_block: bool = True  # whether it is the last
    place: int = 0  # of this block among all that the method acts on, over all streams
    places: int = 1
    outputs: int | None = None  # features that the model's head returns
    weights: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes of the block's weights that a WeightEdit may change
    table: nn.Module | None = None  # what looks up the embeddings of the stream's tokens
    prompt: int | None = None  # features of the prompt that a denoiser is given
    block: tuple[nn.Module, ...] = ()  # the stream's last block but one, if the method asks for one like it
    change: FittedChange | None = None  # how its output changes by what it computes first, where that was fitted

    def copy_block(self) -> dict[str, Tensor]:
        """The weights of the stream's last block but one, by name: those that a block like it starts from.

        Raises:
            UnsupportedError: One is packed, by a quantisation.
        """
        for block in self.block:
            for name, p in block.named_parameters():
                check_plain(p, f"{type(block).__name__}.{name}")
        return {name: p.detach().clone() for block in self.block for name, p in block.named_parameters()}

    @torch.no_grad()
    def embed(self, ids: Sequence[int]) -> Tensor:
        """The embeddings of these token ids, as the model looks them up, (k d).

        Raises:
            ConfigError: An id is not in the vocabulary.
        """
        size = next(module for module in self.table.modules() if isinstance(module, nn.Embedding)).num_embeddings
        if outside := [i for i in ids if not 0 <= i < size]:
            raise ConfigError(explain(f"A token id lies in [0, {size - 1}]", outside, "Take it from the model's own tokenizer."))
        weight = next(self.table.parameters())
        device = None if weight.is_meta else weight.device  # a weight that is kept elsewhere is brought to where it is read
        return self.table.forward(torch.tensor(tuple(ids), dtype=torch.long, device=device)).detach().clone()


class Method(nn.Module, abc.ABC):
    """Base of all roles. One instance stands in each block that the config names; its parameters and buffers are the adapter.

    Class attributes:
        kinds: Kinds of stream that the method supports; empty means every kind.
        usual_kinds: Those that it is for where it supports every kind: what is listed of it, and not refused elsewhere.
        causal: True or False if the method needs a causal or a bidirectional stream; None if it takes both.
        moves_tokens: The method changes the number of tokens or of cache entries.
        caches: The method is right under cached generation; False makes the engine refuse a cache.
        packed: The method is right where several samples are packed into one row.
        trains_dense: A gate that wants a gradient lets the skipped tokens run too in training, unseen by the others.
        teaches: `teach` gets the last hidden states of the model without the adapter.
        needs_head: It adds to the output of the model's head, so it acts on the stream that the head reads.
        proportional: A reducer's tokens attend by size: log(size) is added to the scores of each key.
        decodes: The method is called in the pass of each generated token too, and not only in that of a prompt or a whole sequence.
        parts: Sublayers that a reducer of the site `sublayer` merges in front of: attention, cross_attention, mlp, as a block has them.
        spans: A reducer at the site `before` is called in front of the first of its blocks; behind the last its tokens are there again.
        exit: Number of blocks of the stream that run; those behind are left out. None runs all.
        chunks: The method is right for a prompt that comes in several passes; False makes the engine refuse one in chunks, or cropped.
        placed: It sits in blocks, as an adapter; False for one that a function of its own applies.
        allots: A cache compressor shares out the entries of a prompt among all its blocks at once, by `allot`.
        ignores: Signals that its config has no use for; they are None and not computed.
        of_prompts: Signals that it has no use for in the pass of a generated token; they are None there.
        observes_prompts: `observe` is called behind prompts and whole sequences alone, not behind a generated token.
        sums_scores: It reads `scores.columns()` over all queries of a prompt, so that they are summed where the attention is computed.
        by_head: A cache compressor tells key heads apart though it names no signal of their attention.
        divides_others: A cache compressor's `divide` shares out what the other ones of its stack keep, too, by their scores.
        pairs: A cache compressor is called in the upper of two adjacent blocks that look equally far, for both.
        strength: A pooler's share in what the model's readers get; the rest is the token that stood there.
        replaces: The loss of an objective, or of `judge`, stands in the place of the model's own, and is not added to it.
        unit: What a loss that replaces is a mean over, "token" or "sample".
        evaluates: An objective is called in evaluation too; the others leave that to the model's own loss.
        weighs: `weigh` returns how much each target counts in a text model's own loss.
        exports: It decides nothing by the values of tensors where every token is real, so that `torch.export` can record what it does.
        side_by_side: It takes hidden states of several parallel residual streams as one wide one; False makes the engine refuse them.
        recites: A cache compressor scores a prompt as the model says it again behind itself, so many tokens at a time; None if it does not.
        tower: It acts in two streams: on the text, and in the block of the vision tower whose output the projector reads.
        sees_all: The stream's blocks run without their causal mask, and store nothing in a cache.
        counts: What is counted of what it does in a block, of all that is there: "kept" tokens, tokens that are "inserted", "routed",
            "computed", "edited" or "pooled", samples that are "run", bytes of the "cache"; empty for a role that acts outside of blocks.
        saves: What it saves where it acts, in words; empty for a role that saves nothing.
        shifts: A bank's tokens have places of their own: `shift` says how far the tokens behind them move on.
        turns: A bank's `attend` reads keys at other places than they stand at.
        leaves: Forms of `hf_tokens.export` that take it along; `leaves_as` says it of a config.
        lost: What is lost of it in the others; empty if nothing is.

    An example is at each role; `dims` in it is that of `Dims`. What the verb may name is in `hf_tokens.roles.SIGNALS`:

    >>> from hf_tokens.roles import SIGNALS
    >>> SIGNALS["layer"]
    'index of the block in its stream, int'
    """

    role: ClassVar[str]
    verb: ClassVar[str]
    counts: ClassVar[str] = ""
    saves: ClassVar[str] = ""
    signals: ClassVar[tuple[str, ...]] = ()
    observes: ClassVar[tuple[str, ...]] = ()
    placed: ClassVar[bool] = True
    further: ClassVar[tuple[str, ...]] = ("examine",)
    words: ClassVar[dict[str, tuple[str, ...]]] = {}
    vocabulary: ClassVar[frozenset[str]] = frozenset(SIGNALS) - JUDGES - frozenset().union(*OF_A_WORD.values())
    site: ClassVar[str] = "block"
    sites: ClassVar[tuple[str, ...]] = ("block",)
    kinds: ClassVar[tuple[str, ...]] = ()
    usual_kinds: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool | None] = None
    moves_tokens: ClassVar[bool] = True
    caches: ClassVar[bool] = True
    packed: ClassVar[bool] = False
    trains_dense: ClassVar[bool] = False
    teaches: ClassVar[bool] = False
    needs_head: ClassVar[bool] = False
    exports: ClassVar[bool] = False
    proportional: bool = False
    decodes: bool = True
    parts: tuple[str, ...] = ("attention",)
    spans: ClassVar[bool] = False
    exit: int | None = None
    chunks: ClassVar[bool] = True
    allots: bool = False
    ignores: tuple[str, ...] = ()
    of_prompts: ClassVar[tuple[str, ...]] = ()
    observes_prompts: ClassVar[bool] = False
    sums_scores: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
    divides_others: bool = False
    pairs: ClassVar[bool] = False
    strength: float = 1.0
    replaces: ClassVar[bool] = False
    unit: ClassVar[str] = "token"
    evaluates: ClassVar[bool] = False
    weighs: ClassVar[bool] = False
    side_by_side: ClassVar[bool] = False
    recites: int | None = None
    tower: ClassVar[bool] = False
    sees_all: bool = False
    shifts: bool = False
    turns: bool = False
    leaves: ClassVar[tuple[str, ...]] = ()
    lost: ClassVar[str] = "all that it does"
    in_block = True
    key: str = ""

    def __init__(self, config: MethodConfig, dims: Dims):
        super().__init__()
        self.config, self.dims = config, dims
        self.losses: list[Tensor] = []
        self._firsts: tuple[Method, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "losses": []}  # they belong to a forward, and no tensor of a graph can be copied

    @classmethod
    def take_words(cls, words: dict[str, tuple[str, ...]]) -> None:
        """Note the signals that each word names; `register` calls it."""
        cls.words, cls.signals, cls.observes = words, words[cls.verb], words["observe"]

    @property
    def asks(self) -> set[str]:
        """The signals that its words name and its config has a use for."""
        return {name for names in self.words.values() for name in names} - {*self.ignores}

    @property
    def asks_later(self) -> set[str]:
        """Those of them that are of use in the pass of a generated token."""
        return self._asked_later(self.words)

    @property
    def asks_decoding(self) -> set[str]:
        """Those of them that are of use there where no method is examined."""
        return self._asked_later(word for word in self.words if word != "examine")

    def _asked_later(self, words: Iterable[str]) -> set[str]:
        later = {name for word in words if word != "observe" or not self.observes_prompts for name in self.words[word]}
        return later - {*self.ignores, *self.of_prompts}

    @property
    def stream_first(self) -> Method:
        """The same method's instance in the first block that it acts on: the place of what all blocks share."""
        return self._firsts[0]

    @property
    def model_first(self) -> Method:
        """The same method's instance in the first block of all its streams, whose `dims.place` is 0: the place of what they all share."""
        return self._firsts[1]

    @property
    def is_first_block(self) -> bool:
        """Whether this instance is that of the first block that the method acts on."""
        return self.dims.is_first_block

    @property
    def dtype(self) -> torch.dtype | None:
        """Of its parameters, or of those that its instances share; None if it has none."""
        instances = () if self._bare else (self, *self._firsts)
        return next((p.dtype for method in instances for p in method.parameters() if p.is_floating_point()), None)

    @property
    def _bare(self) -> bool:
        """Whether neither it nor its first instances hold a tensor or a module."""
        return not any(m._parameters or m._buffers or m._modules for m in (self, *self._firsts))

    def forward(self, run: Callable[[], Any]) -> Any:
        """Run something while the parameters are there: libraries that keep them elsewhere bring them when a module is called."""
        return run()

    def at_hand(self, run: Callable[[], Any]) -> Any:
        """Run something of this instance, with what its first instances hold at hand too."""
        # what is recorded as a graph is told by its module where it is
        for method in () if self._bare and not torch.compiler.is_compiling() else dict.fromkeys((self, *self._firsts)):
            parts = gathered(method)
            run = partial(functional_call, method, parts, (run,)) if parts else partial(method, run)
        return run()

    def put_in_place(self, key: str, stream_first: Method, model_first: Method) -> None:
        """Note the name of the method's place in the adapter, and its first instances."""
        self.key, self._firsts = key, (stream_first, model_first)

    def note_heads(self, kv_heads: int) -> None:
        """Note how many key heads the cache of its block holds."""
        if kv_heads != self.dims.kv_heads:
            self.dims = replace(self.dims, kv_heads=kv_heads)

    def reconfigure(self, config: MethodConfig) -> None:
        """Take another config of the same kind."""
        self.config = config

    def observe(self) -> Tensor | None:
        """Note what the block did: called behind a block that ran, with the signals that it names, in a method that defines it.

        What a CacheCompressor returns here goes to `allot`.
        """

    def judge(self) -> Tensor | None:
        """A loss of what a text model returned, a scalar or None, as that of an Objective, in a method of another role that defines it.

        It is called in training, in the first block, behind each forward that has labels, with the signals of an Objective that it names.
        """

    def examine(self) -> Any:
        """What `calibrate` gets of a block: called behind it with the signals that it names, in a method that defines it; None: nothing.

        A TokenReducer's is called where its verb is, before that. Where it is not defined, `calibrate` gets what another verb returned.
        """

    def weigh(self, ids: Tensor) -> Tensor:
        """If `weighs`: how much each token counts as a target of a text model's own loss, (b n), given the ids (b n); at 0 it is none.

        The loss is the sum of weight * cross-entropy over the number of targets; what the weights change in it is a loss of the method.
        """
        raise UnsupportedError(explain("A method that sets `weighs` says how", type(self).__name__, "Define its `weigh`."))

    def teach(self, student: Tensor, teacher: Tensor, mask: Tensor) -> None:
        """Compare the stream's last hidden states with those of the model without the adapter, (b n d) each, mask (b n)."""

    @classmethod
    def check(cls, config: MethodConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        """Refuse a config that does not fit a stream of `layers` blocks; called before anything is changed."""

    @classmethod
    def prompt_ids(cls, config: MethodConfig) -> tuple[int, ...]:
        """Token ids, one behind the other, that a prompt must hold for the method to act; none by default."""
        return ()

    @classmethod
    def leaves_as(cls, config: MethodConfig) -> tuple[str, ...]:
        """Forms of `hf_tokens.export` that take it along with this config."""
        return cls.leaves

    @property
    def unready(self) -> str | None:
        """What is to be done before it can leave, as a remedy; None if nothing."""
        return None

    @classmethod
    def calibrate(cls, config: MethodConfig, records: dict[int, list]) -> MethodConfig:
        """The config with knobs measured on data, given what the verb returned in each block (`Dims.place` -> one entry a batch).

        A CacheCompressor's scores are -inf where a row has no entry. Where the method defines `examine`, it is what that returned.
        """
        raise UnsupportedError(explain("`calibrate` needs a method that measures knobs on data", cls.__name__, "Leave it out."))

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        """Blocks that the method acts on when the config does not name them."""
        return tuple(range(layers))

    def add_loss(self, value: Tensor) -> None:
        """Add an auxiliary loss, a scalar, to the model's own loss of this forward."""
        self.losses.append(value)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The hard value exactly, with the gradient of the soft one."""
    return hard + (soft - soft.detach())
