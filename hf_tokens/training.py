"""Schedules that follow the steps of a Trainer, by a callback that attaches itself."""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import UnsupportedError, explain

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from .objectives import Swap
    from .root import Root

DEPTH = 64  # frames between Trainer.training_step and the block whose mode it sets


def calling_trainer() -> Trainer | None:
    """The Trainer whose code is setting the model to training mode, if one is."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    frame = sys._getframe(1)
    for _ in range(DEPTH):
        frame = frame.f_back
        if frame is None:
            return None
        if frame.f_code.co_filename == module.__file__ and isinstance(frame.f_locals.get("self"), module.Trainer):
            return frame.f_locals["self"]
    return None


def reaches(node: Any, wanted: Any) -> bool:
    """Whether one node of an autograd graph is below another."""
    seen, todo = set(), [node]
    while todo:
        here = todo.pop()
        if here is wanted:
            return True
        if here is not None and here not in seen:
            seen.add(here)
            todo += [below for below, _ in here.next_functions]
    return False


@dataclass(frozen=True)
class Forward:
    """What a forward in a trainer has for the loss: to add, to put in the place of the model's own, and that loss with both in it."""

    extra: Tensor | None
    swap: Swap | None
    node: Any


def lend_losses(trainer: Trainer, root: Root) -> None:
    """Let a trainer that computes its loss without reading the model's own, as TRL's do, have the methods' losses too."""
    if root.lent is not None and vars(trainer).get("compute_loss") is root.lent:
        return
    inner, reads, agreed = trainer.compute_loss, [], []
    root.agreed = False

    @functools.wraps(inner)
    def compute_loss(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        given = {**inputs, "num_items_in_batch": kwargs.get("num_items_in_batch")}
        root.heard, root.labels, root.judged = [], inputs.get("labels"), False
        try:
            output = inner(model, inputs, *args, **kwargs)
            heard = root.heard
        finally:
            root.heard = root.labels = None
        check_judged(trainer, root)
        if not heard:
            return output
        loss = output[0] if isinstance(output, tuple) else output
        if not reads:
            reads.append(any(one.node is not None and reaches(loss.grad_fn, one.node) for one in heard))
        if reads[0]:
            return output
        for one in heard:
            if one.swap is not None:
                items = divisor(trainer, given)
                loss = one.swap.put(loss, items, part(trainer, root.model, given, "sample"), check=not agreed)
                agreed.append(True)
        extras = [one.extra for one in heard if one.extra is not None]
        if extras:
            loss = loss + torch.stack(extras).sum().to(loss.dtype) * part(trainer, root.model, given)
        return (loss, *output[1:]) if isinstance(output, tuple) else loss

    trainer.compute_loss = root.lent = compute_loss


def check_judged(trainer: Trainer, root: Root) -> None:
    """Refuse a trainer whose loss an objective should replace and cannot."""
    names = [type(objective).__name__ for objective in root.asked() if objective.replaces]
    if names and not (root.judged and trainer.label_smoother is None):
        rule = f"{', '.join(names)} replaces a loss of the model's next tokens, so the trainer must give it `labels` and not smooth them"
        remedy = "Use transformers.Trainer or TRL's SFTTrainer, or leave the objective to the trainer."
        raise UnsupportedError(explain(rule, f"{type(trainer).__name__} that does not", remedy))


def part(trainer: Trainer, model: nn.Module, given: dict, unit: str = "token") -> float | Tensor:
    """What part of an optimiser step a batch is, where the trainer divides its loss no more; 1 where it still does."""
    items = given["num_items_in_batch"]
    if not scales(trainer, items):
        return 1.0
    if items is None or unit == "sample":
        return 1 / trainer.current_gradient_accumulation_steps
    return share(model, given) * (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)


def scales(trainer: Trainer, items: Tensor | int | None) -> bool:
    """Whether a trainer's loss is divided by all of the optimizer step already."""
    said = trainer.loss_is_scaled_for_ga
    return (trainer.model_accepts_loss_kwargs and items is not None or trainer.compute_loss_func is not None) if said is None else said


def divisor(trainer: Trainer, given: dict) -> float | Tensor | None:
    """What a trainer divides the sum over the targets by; None for those of the batch."""
    items = given["num_items_in_batch"]
    if items is None or not scales(trainer, items):
        return None
    return items / (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)


def share(model: nn.Module, given: dict, unit: str = "token", trainer: Trainer | None = None) -> float | Tensor:
    """What part of an optimiser step this batch is: under accumulation the Trainer passes the number of targets of all its batches.

    A mean over samples counts as one of the step's batches; where no trainer tells how many there are, by its targets like the others.
    """
    if unit == "sample" and not model.training:
        return 1.0
    if unit == "sample" and trainer is not None and given.get("num_items_in_batch") is not None:
        processes = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
        return 1 / (trainer.current_gradient_accumulation_steps * processes)  # the trainer multiplies by the processes
    items, labels, shifted = (given.get(name) for name in ("num_items_in_batch", "labels", "shift_labels"))
    if shifted is None and isinstance(labels, Tensor):
        shifted = labels[..., 1:] if shifts_labels(model) else labels
    if items is None or not isinstance(shifted, Tensor):
        return 1.0
    return (shifted != -100).sum() / items


def shifts_labels(model: nn.Module) -> bool:
    """Whether the Trainer counts the targets of a model's loss without the first label of each row."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    kind = LOSS_MAPPING.get(getattr(model, "loss_type", None))
    return kind is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)


def callback(trainer: Trainer, root: Root) -> TrainerCallback:
    """The callback that tells the methods how much of the training is done."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            lend_losses(trainer, root)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            root.set_progress(state.global_step / max(1, state.max_steps))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            root.set_progress(1.0)
            if vars(trainer).get("compute_loss") is root.lent:
                del trainer.compute_loss

    return Progress()


def warn_of_dropped_targets(trainer: Trainer, root: Root) -> None:
    """A Trainer drops the columns that are no arguments of the model, and with them the one that is for the methods."""
    names = sorted({type(method).__name__ for method in root.methods() if "targets" in method.asks})
    if names and trainer.args.remove_unused_columns:
        column = f"hf-tokens: {', '.join(names)} can learn from a column hf_tokens_targets, and this trainer drops it."
        warnings.warn(f"{column} If your data has one, pass `remove_unused_columns=False` to the TrainingArguments.", stacklevel=2)


def follow_trainer(root: Root) -> None:
    """Attach the callback to the Trainer that is starting to train the model, once."""
    trainer = calling_trainer()
    if trainer is None or trainer is root.trainer:
        return
    root.trainer = trainer
    warn_of_dropped_targets(trainer, root)
    trainer.add_callback(callback(trainer, root))
    lend_losses(trainer, root)
    root.set_progress(trainer.state.global_step / max(1, trainer.state.max_steps))
