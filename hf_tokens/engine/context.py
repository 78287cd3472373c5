"""What one call of the model brings to its surgery."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

DenoisingContext = tuple[str, int, int]
State = TypeVar("State")  # what a handler keeps of a block or a stream


class DenoiserSteps(Protocol):
    """Where a denoiser stands in its run, and what it put out at the step before."""

    keeps_output: bool  # whether a method names a signal of what it put out
    joined: str | None  # the pipeline whose attention reads the samples of this call together, and what does so

    def negative(self, arguments: dict[str, Any]) -> Tensor | None:
        """Samples of the negative prompt in a call, (b) bool; None where there is no prompt."""

    def noise(self, n: int) -> Tensor | None:
        """What this context put out at the step before, for each of n tokens."""

    def contrast(self, n: int) -> Tensor | None:
        """What the condition changed in it, for each of n tokens."""

    def guidance(self, n: int) -> Tensor | None:
        """How much that is."""

    def downsampling(self, n: int) -> int:
        """How many times as wide and high each of n tokens is as those of the first stream that asked in this call."""

    def halves(self) -> bool:
        """Whether the batch is two halves of the same samples."""


@dataclass
class Recital:
    """A pass behind a prompt that says a part of it again.

    Attributes:
        key: Of the method that has it said.
        length: Tokens of the prompt, padding included.
        first, end: Which of a row's real tokens are said.
        scores: What the method made of it in each block, (b k n).
    """

    key: str
    length: int
    first: int
    end: int
    scores: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ForwardContext:
    """One call of the model. It is handed down to every pass of the call and gone with it, whether the call returned or raised.

    Attributes:
        arguments: Keyword arguments of the model.
        visual: Tokens of the text that stand for pictures and videos, (b n) bool; None if none does.
        targets: The column of the batch that is for the methods.
        negative: Samples of a negative prompt, (b) bool, where a method adds to the prompt; None where the model is given none.
        denoising: Name and number of the denoising context, such as one half of guidance, and the depth of its run.
        begins: Whether this is the first call of a denoising run.
        step, steps: Index of the denoising step, and their number.
        remaining: Number of steps behind it.
        timestep: As the model was given it.
        time: The timestep of each sample on a schedule of 1000, (b).
        elapsed: Share of the denoising that is done.
        picture: Shape of the denoiser's latents without batch and channels.
        steps_of_denoiser: Where the denoiser stands in its run.
        teaching: Whether the model runs without its surgery, for a method to learn from.
        recital: What of the prompt it says again, for a method to learn from; nothing changes then.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    visual: Tensor | None = None
    targets: Any = None
    negative: Tensor | None = None
    denoising: DenoisingContext | None = None
    begins: bool = False
    step: int | None = None
    steps: int | None = None
    remaining: int | None = None
    timestep: Any = None
    time: Tensor | None = None
    elapsed: float | None = None
    picture: tuple[int, ...] | None = None
    steps_of_denoiser: DenoiserSteps | None = None
    teaching: bool = False
    recital: Recital | None = None

    @property
    def aside(self) -> bool:
        """Whether it is for a method to learn from."""
        return self.teaching or self.recital is not None

    @property
    def pictures_alone(self) -> bool:
        """Whether all that the call brings is a batch of pictures of one size, in which every patch is real."""
        given = {name for name, value in self.arguments.items() if isinstance(value, Tensor) and name != "labels"}
        return given == {"pixel_values"} and self.arguments["pixel_values"].dim() == 4

    @property
    def gives_mask(self) -> bool:
        """Whether the call brings a mask of its own from token to token."""
        return any("mask" in name and isinstance(value, Tensor) and value.dim() == 4 for name, value in self.arguments.items())

    @property
    def gives_places(self) -> bool:
        """Whether the call may say where its tokens are; if it does not, the model counts them, from one end to the other."""
        given = {name for name, value in self.arguments.items() if value is not None}
        return not given or any(name.endswith("position_ids") for name in given)
