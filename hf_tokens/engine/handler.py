"""What the engine does for a role: a handler serves all methods of its role, and decides in which phases each takes part, and how."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..roles.base import Method
from ..roles.signals import TAPPED

if TYPE_CHECKING:
    from ..attention.call import AttentionCall
    from ..kv.layer import TokenCacheLayer
    from .block import BlockSurgery
    from .model import ModelSurgery
    from .results import ModelCall
    from .run import BlockTokens, Site

Gates = list[Tensor]
# The phases in the order in which `stream.py` and `model.py` walk them, those of a model's call first and last.
PHASES = {
    "before_model": "the model is called; its arguments may change",
    "arrive": "the first block of a stream is called, whatever acts in it",
    "around": "what stands around the whole call of a block",
    "before": "the stream's tokens change in front of the block",
    "gate": "which tokens run the block, how often, and how much that counts",
    "insert": "tokens that are there for this block only",
    "last": "the same for the last block that runs, whichever it is",
    "call": "what stands for the block's own forward",
    "weights": "what stands in for the base's weights while it runs",
    "outside": "the same outside of the blocks, while the model runs",
    "attention": "what the self-attention returns is edited",
    "between": "the tokens between attention and MLP",
    "mlp": "which tokens the MLP computes",
    "sublayer": "the tokens in front of a sublayer",
    "remove": "the tokens of this block only go, and their owner gets what they read",
    "listen": "the scores of the block's attention are noted",
    "after": "the stream's tokens, or the entries of its cache, change behind the block",
    "end": "what a method kept over several blocks ends",
    "leave": "the tokens leave the last block",
    "close": "the pass is over",
    "after_head": "the model's head has read the last hidden states",
    "after_model": "the model has returned",
}


class Handler:
    """What the engine does for one role; every phase does nothing by default."""

    needs_cache = False  # whether its methods have nothing to do where there is no cache
    keeps_steps = False  # whether they keep something of all samples from one denoising step to the next
    reads_cache = False  # whether their signals are of a block's cache, which must then be that of one run of the block

    def phases(self, method: Method) -> tuple[str, ...]:
        """The phases of a block in which a method takes part."""
        return ()

    def hooks(self, method: Method) -> set[str]:
        """The hooks that a method needs on its block, beside those for its signals."""
        return set()

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        """Hang such a hook on a block; returns what takes it off, by `remove()`."""
        raise NotImplementedError(hook)

    def quiet(self, method: Method) -> bool:
        """Whether a method has nothing to do in front of a block or in it, in the pass of a generated token, whose cache is `settled`."""
        return False

    def settled(self, method: Method, layer: TokenCacheLayer) -> bool:
        """Whether the cache of a block holds all that a quiet method gives it."""
        return True

    def fronts(self, method: Method) -> bool:
        """Whether all that a method does in a block is to put tokens in front of a prompt, which see none of it."""
        return False

    def notes_later(self, method: Method) -> bool:
        """Whether a method that does not decode is called behind the blocks of generated tokens all the same."""
        return False

    def needs_scores(self, method: Method) -> bool:
        """Whether a method may need the keys of an attention call, which then cannot read its cache by itself."""
        return bool({*TAPPED, "affinity"} & method.asks)

    def arrive(self, method: Method, block: BlockSurgery, args: tuple, kwargs: dict) -> None: ...
    def before(self, method: Method, site: Site) -> None: ...
    def gate(self, method: Method, site: Site) -> Gates | None: ...
    def insert(self, method: Method, site: Site) -> BlockTokens | None: ...

    def remove(self, method: Method, site: Site, summary: Tensor) -> bool:
        """Take what tokens that only read have gathered, (b k d); returns whether nothing else of them is used."""
        return True

    def takes_sublayer(self, method: Method, sublayer: Any) -> bool:
        """Whether a method acts on a sublayer."""
        return False

    def call(self, method: Method, block: BlockSurgery, args: tuple, kwargs: dict) -> Any: ...
    def sublayer(self, method: Method, sublayer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Any: ...
    def attend(self, method: Method, site: Site, call: AttentionCall) -> list[Callable[[], AttentionCall]]: ...
    def listen(self, method: Method, site: Site) -> None: ...
    def after(self, method: Method, site: Site) -> None: ...
    def end(self, method: Method, site: Site) -> None: ...
    def close(self, method: Method, site: Site) -> None: ...
    def after_base(self, call: ModelCall, output: Any) -> None: ...

    def leave(self, method: Method, site: Site, whole: Tensor, replaying: bool) -> Tensor:
        return whole

    def weights(self, block: BlockSurgery) -> AbstractContextManager:
        """What stands in for the base's weights while the block runs."""
        return nullcontext()

    def outside(self, block: BlockSurgery, run: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the model with what stands in for the base's weights outside of the blocks."""

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs

    def stands_around(self, model: ModelSurgery) -> bool:
        """Whether `around` is to stand around the calls of the blocks."""
        return False

    def around(self, block: BlockSurgery, run: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a block, by `run(block, args, kwargs)`."""

    def after_head(self, call: ModelCall, hidden: Tensor | None, output: Tensor) -> Tensor:
        return output

    def after_model(self, call: ModelCall, output: Any) -> Any:
        return output


HANDLERS: dict[str, Handler] = {}  # by role, in the order in which `handlers/` registers them


def handles(role: str) -> Callable[[type[Handler]], type[Handler]]:
    """Class decorator: this handler serves the methods of a role."""

    def add(cls: type[Handler]) -> type[Handler]:
        HANDLERS[role] = cls()
        return cls

    return add


def handler_of(method: Method) -> Handler:
    """The handler of a method's role."""
    return HANDLERS[method.role]
