"""What objectives are told of a call of the model: each signal is made when it is first read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hf_tokens_kernels.lazily import lazy
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.loss.loss_utils import ForCausalLMLoss

from ..engine.model import ModelSurgery
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.signatures import decoder_ids
from ..tokens.token_map import in_float32
from .extra_block import ExtraBlock

IGNORED = -100  # a label that is no target
Reader = Callable[[Any], Tensor]


@dataclass(frozen=True)
class RandomState:
    """Where the generators of random numbers stood, on every device of a model."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def note(cls, model: nn.Module) -> RandomState:
        return cls(torch.get_rng_state(), *get_device_states(*{p.device: p for p in model.parameters()}.values()))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)

    def equals(self, other: RandomState) -> bool:
        return all(torch.equal(x, y) for x, y in zip((self.cpu, *self.states), (other.cpu, *other.states), strict=True))


BEFORE = "random numbers before the model's call"


@dataclass(frozen=True)
class Draws:
    """The random numbers that a call drew, between two states: its dropout, in which its reference is to be the same."""

    begin: RandomState
    end: RandomState

    @contextlib.contextmanager
    def again(self, model: nn.Module) -> Iterator[None]:
        """Draw the same ones for a moment; refused where others were drawn, because the adapter drew some between the model's own."""
        now = RandomState.note(model)
        self.begin.restore()
        try:
            yield
            drawn = RandomState.note(model)
        finally:
            now.restore()
        if not drawn.equals(self.begin) and not drawn.equals(self.end):
            rule = "An objective's reference drops what the model has dropped, which draws no more random numbers than without its adapter"
            remedy = "Set the dropout of the adapter (`lora_dropout`), or of the model, to 0."
            raise UnsupportedError(explain(rule, "others between them", remedy))


@dataclass(frozen=True)
class DenoiserCall:
    """A denoiser's call that waits for its target: what it got, drew and returned, and the precision that it ran in."""

    arguments: dict[str, Any]
    output: Any
    draws: Draws | None
    device: str
    dtype: torch.dtype | None

    @classmethod
    def note(cls, arguments: dict[str, Any], output: Any, draws: Draws | None) -> DenoiserCall:
        device = first_tensor(output).device.type
        return cls(arguments, output, draws, device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def again(self) -> torch.autocast:
        """The same precision: a reference in another one would differ by its rounding alone."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None)


def labels_of(model: nn.Module, arguments: dict[str, Any], labels: Tensor | None) -> Tensor | None:
    """The token that each place is to predict, (b n); None where the call has no labels."""
    if isinstance(arguments.get("shift_labels"), Tensor):
        return arguments["shift_labels"]
    labels = labels if arguments.get("labels") is None else arguments["labels"]
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    shifts = model.loss_function is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifts else labels


def logits_of(output: Any, shape: torch.Size) -> Tensor | None:
    """The logits (b n v) in a model's output."""
    tensors = [output.get("logits")] if isinstance(output, dict) else list(output) if isinstance(output, tuple) else [output]
    return next((t for t in tensors if isinstance(t, Tensor) and t.dim() == 3 and t.shape[:2] == shape), None)


def log_probabilities(output: Any, wanted: Tensor) -> Tensor:
    """Log-probability of each target, 0 where there is none, (b n)."""
    known = output.get("log_probs") if isinstance(output, dict) else None  # of a head that makes no logits, as TRL's
    if isinstance(known, Tensor):
        return F.pad(known, (0, wanted.shape[1] - known.shape[1]))
    logits = logits_of(output, wanted.shape)
    if logits is None:
        rule = f"An objective needs logits for each of {wanted.shape[1]} labels"
        raise UnsupportedError(explain(rule, f"{type(output).__name__} without", "Call the model with `return_dict=True` and all logits."))
    flat = in_float32(logits.flatten(0, 1))
    return -F.cross_entropy(flat, wanted.to(logits.device).flatten(), reduction="none", ignore_index=IGNORED).view(wanted.shape)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a denoiser's output."""
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


@dataclass
class ObjectiveSignals:
    """What the objectives may know of one call; each signal is made when it is first read."""

    model: ModelSurgery
    arguments: dict[str, Any]
    output: Any
    wanted: Tensor
    read: Reader
    states: dict[str, Tensor]
    draws: Draws | None = None
    extra: ExtraBlock | None = None

    @property
    def block(self) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
        return self.extra.run

    @lazy
    def labels(self) -> Tensor:
        return self.wanted

    @lazy
    def logps(self) -> Tensor:
        return log_probabilities(self.output, self.wanted)

    @lazy
    def target(self) -> Tensor:
        return in_float32(self.wanted)

    @lazy
    def prediction(self) -> Tensor:
        return self._like_target(self.output)

    @lazy
    def reference(self) -> Tensor:
        """Runs the model without the adapter."""
        with contextlib.nullcontext() if self.draws is None else self.draws.again(self.model.base):
            output, _ = self.model.without((), self.arguments)
        return self._like_target(output) if self.wanted.is_floating_point() else log_probabilities(output, self.wanted)

    def _like_target(self, output: Any) -> Tensor:
        prediction, want = self.read(output), self.wanted
        if prediction.dim() == want.dim() > 3 and prediction.shape[1] == 2 * want.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # a variance that some denoisers predict beside it
        if prediction.shape != want.shape:
            rule, got = "What a denoiser predicts and what it is to predict have one shape", (tuple(prediction.shape), tuple(want.shape))
            raise UnsupportedError(explain(rule, f"{got[0]} and {got[1]}", "Pass `read`, which takes it from the output."))
        return prediction.to(self.target.dtype)

    @property
    def _decoder(self) -> str:
        return "decoder_" if getattr(self.model.base.config, "is_encoder_decoder", False) else ""

    @lazy
    def ids(self) -> Tensor:
        ids = self.arguments.get(f"{self._decoder}input_ids")
        if isinstance(ids, Tensor):
            return ids
        embedded = f"{self._decoder}inputs_embeds"
        if not self._decoder or self.arguments.get(embedded) is not None:
            rule = "This objective reads the tokens of the text"
            raise UnsupportedError(explain(rule, f"`{embedded}` without `{self._decoder}input_ids`", "Pass the ids."))
        return decoder_ids(self.model.base, self.wanted, IGNORED)

    @lazy
    def positions(self) -> Tensor:
        n, device = self.wanted.shape[1], self.wanted.device
        places, mask = self.arguments.get("position_ids"), self.arguments.get(f"{self._decoder}attention_mask")
        place = torch.arange(n, device=device)
        begins = torch.zeros_like(self.wanted, dtype=torch.bool)
        if isinstance(places, Tensor) and places.dim() == 2 and places.shape[1] == n and not self._decoder:
            begins[:, 1:] = places[:, 1:] != places[:, :-1] + 1
        if isinstance(mask, Tensor) and mask.shape == self.wanted.shape:
            begins[:, 1:] |= mask[:, 1:].bool() & ~mask[:, :-1].bool()
        return place - torch.where(begins, place, 0).cummax(dim=1).values

    @lazy
    def hidden(self) -> Tensor:
        hidden = self.states.get("head", self.states.get("base"))
        width = self.model.streams[-1].stream.width
        if hidden is None or hidden.shape != (*self.wanted.shape, width):
            rule = f"This objective needs a head that reads the blocks' {width} features of every token"
            raise UnsupportedError(explain(rule, "none" if hidden is None else tuple(hidden.shape), "Choose another model."))
        return hidden

    @lazy
    def exits(self) -> Callable[[int], Tensor]:
        stream = self.model.streams[-1]
        states, norm = stream.call.exits, stream.stream.final_norm

        def exits(index: int) -> Tensor:
            state = states[max(i for i in states if i <= index)]  # a block that the model leaves out leaves it as it was
            return state if norm is None else norm(state)

        if not self.model.losses.exits_agreed:
            self._check_exits(exits(max(states)) if 0 in states else None)
            self.model.losses.trust_exits()
        return exits

    @torch.no_grad()
    def _check_exits(self, last: Tensor | None) -> None:
        hidden, same = self.hidden, partial(torch.allclose, rtol=0.05, atol=0.05)
        if last is None or last.shape != hidden.shape or not same(last[:1, -1].float(), hidden[:1, -1].float()):
            rule = "This objective needs a head that reads what the blocks return, behind one norm and no more"
            raise UnsupportedError(explain(rule, f"something else in {type(self.model.base).__name__}", "Choose another model."))

    @lazy
    def head(self) -> Callable[[Tensor], Tensor]:
        model = self.model.base
        module, config = model.get_submodule(self.model.head), model.config.get_text_config()
        factors = [getattr(config, name, None) for name in families.LOGIT_FACTORS]
        divisor, cap = (getattr(config, name, None) or 1.0 for name in (families.LOGIT_DIVISOR, families.LOGIT_CAP))

        def head(states: Tensor) -> Tensor:
            logits = module(states)
            for factor in factors:
                logits = logits if factor is None else logits * factor
            logits = logits if divisor == 1 else logits / divisor
            return logits if cap == 1 else cap * torch.tanh(logits / cap)

        logits = logits_of(self.output, self.wanted.shape)
        if logits is not None and not self.model.losses.head_agreed:
            self._check_head(head, logits[:1, -1])
            self.model.losses.trust_head()
        return head

    @torch.no_grad()
    def _check_head(self, head: Callable[[Tensor], Tensor], logits: Tensor) -> None:
        computed = head(self.hidden[:1, -1])
        if computed.shape != logits.shape or not torch.allclose(computed.float(), logits.float(), rtol=0.05, atol=0.05):
            rule = "This objective needs logits that are what the head returns, scaled or capped as the config says"
            raise UnsupportedError(explain(rule, f"others, from {type(self.model.base).__name__}", "Choose another model."))

    @property
    def progress(self) -> float:
        return self.model.progress

    @property
    def updates(self) -> int:
        return self.model.updates
