"""The losses of a forward: what is added to the model's own, what takes its place, and what part of an optimizer step they are."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from ..errors import UnsupportedError, explain

if TYPE_CHECKING:
    from transformers import Trainer

    from ..roles.base import Method
    from .model import ModelSurgery
    from .results import ModelCall

AGREES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # of two sums of the same losses


@dataclass(frozen=True)
class LossReplacement:
    """A loss that takes the place of the model's own.

    Attributes:
        value: The objective's loss of a batch.
        own: The mean of the same batch's next-token losses, without gradient: what the model's own loss must have been.
        count: Targets of the batch.
        unit: What `value` is a mean over.
        rest: Whether the model adds something to its own loss that has to stay.
    """

    value: Tensor
    own: Tensor
    count: Tensor
    unit: str
    rest: bool

    def put(self, loss: Tensor, items: Tensor | int | None, part: float | Tensor, check: bool) -> Tensor:
        """The loss with this one in it.

        Args:
            loss: The model's or the trainer's own.
            items: What it was divided by, if not by the batch's own targets.
            part: What part of the optimizer step a mean over samples is.
            check: Whether to make sure that the loss is the mean over the targets.

        Raises:
            UnsupportedError: It is another one.
        """
        share = 1.0 if items is None else self.count / items
        own = (self.own * share).to(loss.dtype)
        value = (self.value * (part if self.unit == "sample" else share)).to(loss.dtype)
        if self.rest:
            return value + (loss - own)
        if check and not any(losses_agree(loss, mean.to(loss.dtype)) for mean in (own, self.own)):  # some divide by their own count alone
            rule = "An objective that replaces the loss needs one that is the mean over the targets, without smoothing or weights"
            remedy = "Leave them out, or use an objective that adds to the loss."
            raise UnsupportedError(explain(rule, f"{float(loss.detach()):.6g} where that is {float(own):.6g}", remedy))
        return value


def losses_agree(a: Tensor, b: Tensor) -> bool:
    """Whether two losses are sums of the same numbers."""
    return abs(float(a.detach()) - float(b)) <= AGREES[a.dtype] * max(1.0, abs(float(b)))


@dataclass(frozen=True)
class ForwardLoss:
    """What a forward in a trainer has for the loss: to add, to put in the place of the model's own, and that loss with both in it."""

    extra: Tensor | None
    replacement: LossReplacement | None
    node: Any


class StepLosses:
    """What a trainer and the objectives of a model share in one step.

    Attributes:
        labels: Those that the trainer may keep from the model.
        judged: Whether the objectives were called in this step.
        agreed: Whether the loss was once what it replaces.
        head_agreed: Whether the logits were once what the head makes of the hidden states.
        exits_agreed: Whether the hidden states were once the last block's, behind its norm.
        forwards: What each forward of the step has for the loss; None outside of a trainer's step.
    """

    def __init__(self):
        self._trainer: weakref.ref | None = None
        self.labels: Tensor | None = None
        self.judged = self.agreed = self.head_agreed = self.exits_agreed = False
        self.forwards: list[ForwardLoss] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": None, "labels": None, "forwards": None}

    @property
    def trainer(self) -> Trainer | None:
        """The trainer that trains the model."""
        return None if self._trainer is None else self._trainer()

    def follow(self, trainer: Trainer) -> None:
        """This trainer trains the model."""
        self._trainer = weakref.ref(trainer)

    def trust(self, agreed: bool) -> None:
        """The loss was what it replaces, or the next one is to be checked again."""
        self.agreed = agreed

    def trust_head(self) -> None:
        """The logits were what the head makes of the hidden states."""
        self.head_agreed = True

    def trust_exits(self) -> None:
        """The hidden states were the last block's, behind its norm."""
        self.exits_agreed = True

    def begin(self, labels: Tensor | None) -> None:
        """A step begins."""
        self.forwards, self.labels, self.judged = [], labels, False

    def end(self) -> list[ForwardLoss]:
        """A step ends: what its forwards had for the loss."""
        forwards, self.forwards, self.labels = self.forwards or [], None, None
        return forwards

    def judge(self) -> None:
        """The objectives were called."""
        self.judged = True

    def note(self, extra: Tensor | None, replacement: LossReplacement | None, loss: Tensor | None) -> None:
        """A forward has something for the loss."""
        values = (extra, replacement and replacement.value)
        if self.forwards is not None and any(value.requires_grad for value in values if value is not None):
            self.forwards.append(ForwardLoss(extra, replacement, None if loss is None else loss.grad_fn))


def add_losses(surgery: ModelSurgery, call: ModelCall, output: Any) -> Any:
    """The model's output, with the losses of the methods in its loss; the listeners are told each of them."""
    if surgery.listeners:
        tell_losses(surgery)
    extra, replacement, arguments = surgery.extra_loss(), call.replacement, call.context.arguments
    if extra is None and replacement is None:
        return output
    loss = None
    if isinstance(output, dict) and output.get("loss") is not None:
        loss = output["loss"] = with_losses(surgery, output["loss"], extra, replacement, arguments)
    elif isinstance(output, tuple) and arguments.get("labels") is not None:
        loss = with_losses(surgery, output[0], extra, replacement, arguments)
        output = (loss, *output[1:])
    surgery.losses.note(extra, replacement, loss)
    return output


def tell_losses(surgery: ModelSurgery) -> None:
    """Tell the listeners the loss of each method, in all of its blocks."""
    losses: dict[str, tuple[Method, list[Tensor]]] = {}
    for method in surgery.methods():
        losses.setdefault(method.key, (method, []))[1].extend(loss.detach().float() for loss in method.losses)
    for method, values in losses.values():
        for listener in surgery.listeners if values else ():
            listener.judged(method, torch.stack(values).sum())


def with_losses(surgery: ModelSurgery, own: Tensor, extra: Tensor | None, replacement: LossReplacement | None, arguments: dict) -> Tensor:
    """The model's own loss, with what is added to it and what takes its place."""
    loss, losses = own, surgery.losses
    if replacement is not None:
        part = share_of_step(surgery.base, arguments, replacement.unit, losses.trainer)
        loss = replacement.put(loss, arguments.get("num_items_in_batch"), part, check=not losses.agreed)
        losses.trust(True)
    if extra is not None:
        loss = loss + extra.to(loss.dtype) * share_of_step(surgery.base, arguments)
    for listener in surgery.listeners:
        listener.lost(own.detach().clone(), loss.detach().clone())  # a trainer multiplies its loss in place
    return loss


def share_of_step(model: nn.Module, arguments: dict, unit: str = "token", trainer: Trainer | None = None) -> float | Tensor:
    """What part of an optimizer step this batch is: under accumulation the Trainer passes the number of targets of all its batches.

    A mean over samples counts as one of the step's batches; where no trainer knows how many there are, by its targets like the others.
    """
    if unit == "sample" and not model.training:
        return 1.0
    if unit == "sample" and trainer is not None and arguments.get("num_items_in_batch") is not None:
        processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        return 1 / (trainer.current_gradient_accumulation_steps * processes)  # the trainer multiplies by the processes
    items, labels, shifted = (arguments.get(name) for name in ("num_items_in_batch", "labels", "shift_labels"))
    if shifted is None and isinstance(labels, Tensor):
        shifted = labels[..., 1:] if shifts_labels(model) else labels
    if items is None or not isinstance(shifted, Tensor):
        return 1.0
    return (shifted != -100).sum() / items


def shifts_labels(model: nn.Module) -> bool:
    """Whether the Trainer counts the targets of a model's loss without the first label of each row."""
    kind = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return kind is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)
