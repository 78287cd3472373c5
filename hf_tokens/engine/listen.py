"""Listeners: who wants to know what a surgery does subscribes here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..roles.base import Method
    from .block import BlockSurgery
    from .run import StreamRun
    from .surgery import StreamSurgery


class Listener:
    """Told of what happens in a model, as long as it is subscribed by `ModelSurgery.listening`; it does nothing by default."""

    examines = False  # whether the methods are to say what they find, and change nothing by it

    def computed(self, block: BlockSurgery, part: str | None, tokens: int) -> None:
        """A block, or a part of it, computed so many tokens."""

    def examined(self, block: BlockSurgery, method: Method, found: Any) -> None:
        """A method said what it found in a block."""

    def closed(self, surgery: StreamSurgery, run: StreamRun) -> None:
        """A pass through a stream is over."""
