"""Listeners, which subscribe to what a surgery does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..roles.base import Method
    from .block import BlockSurgery
    from .run import StreamRun
    from .surgery import StreamSurgery


class Listener:
    """Called for what happens in a model, as long as it is subscribed by `ModelSurgery.listening`; it does nothing by default."""

    examines = False  # whether the methods are examined, and change nothing

    def computed(self, block: BlockSurgery, part: str | None, tokens: int) -> None:
        """A block, or a part of it, computed so many tokens."""

    def examined(self, block: BlockSurgery, method: Method, finding: Any) -> None:
        """A method was examined in a block, with this result."""

    def closed(self, surgery: StreamSurgery, run: StreamRun) -> None:
        """A pass through a stream is over."""
