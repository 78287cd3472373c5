"""Schedules and losses that follow the steps of a Trainer, by a callback that attaches itself."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.loss import share_of_step
from ..engine.model import ModelSurgery
from ..engine.results import World
from ..errors import UnsupportedError, explain
from ..handlers.objective import asked_now
from ..model.callers import callers

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

FRAMES_TO_TRAINER = 64  # frames between Trainer.training_step and the block whose mode it sets


def calling_trainer() -> Trainer | None:
    """The Trainer whose code is setting the model to training mode, if one is."""
    module = sys.modules.get("transformers.trainer")
    for frame in callers(0 if module is None else FRAMES_TO_TRAINER):
        if frame.f_code.co_filename == module.__file__ and isinstance(frame.f_locals.get("self"), module.Trainer):
            return frame.f_locals["self"]
    return None


def reaches(node: Any, wanted: Any) -> bool:
    """Whether one node of an autograd graph is below another."""
    seen, todo = set(), [node]
    while todo:
        below = todo.pop()
        if below is wanted:
            return True
        if below is not None and below not in seen:
            seen.add(below)
            todo += [node for node, _ in below.next_functions]
    return False


class TrainingWorld(World):
    """The trainer's part in a model; its callback takes itself off at the end of the training."""

    def __init__(self):
        self.compute_loss: Any = None  # what stands in the place of a trainer's method of that name

    def __getstate__(self) -> dict[str, Any]:
        return {"compute_loss": None}

    def training_begins(self, model: ModelSurgery) -> None:
        """Attach the callback to the Trainer that is starting to train the model, once."""
        trainer = calling_trainer()
        if trainer is None or trainer is model.losses.trainer:
            return
        model.losses.follow(trainer)
        warn_of_dropped_targets(trainer, model)
        trainer.add_callback(progress_callback(trainer, self, model))
        self.add_losses(trainer, model)
        model.set_progress(trainer.state.global_step / max(1, trainer.state.max_steps), trainer.state.global_step)

    def add_losses(self, trainer: Trainer, surgery: ModelSurgery) -> None:
        """Add the methods' losses in a trainer that computes its loss without reading the model's own, as TRL's do."""
        if self.compute_loss is not None and vars(trainer).get("compute_loss") is self.compute_loss:
            return
        inner, reads, agreed = trainer.compute_loss, [], []
        surgery.losses.trust(False)

        @functools.wraps(inner)
        def compute_loss(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
            batch = {**inputs, "num_items_in_batch": kwargs.get("num_items_in_batch")}
            surgery.losses.begin(inputs.get("labels"))
            try:
                output = inner(model, inputs, *args, **kwargs)
            finally:
                forwards = surgery.losses.end()
            check_judged(trainer, surgery)
            if not forwards:
                return output
            loss = output[0] if isinstance(output, tuple) else output
            if not reads:
                reads.append(any(forward.node is not None and reaches(loss.grad_fn, forward.node) for forward in forwards))
            if reads[0]:
                return output
            for replacement in (forward.replacement for forward in forwards if forward.replacement is not None):
                part = part_of_step(trainer, surgery.base, batch, "sample")
                loss = replacement.put(loss, divisor_of(trainer, batch), part, check=not agreed)
                agreed.append(True)
            extras = [forward.extra for forward in forwards if forward.extra is not None]
            if extras:
                loss = loss + torch.stack(extras).sum().to(loss.dtype) * part_of_step(trainer, surgery.base, batch)
            return (loss, *output[1:]) if isinstance(output, tuple) else loss

        trainer.compute_loss = self.compute_loss = compute_loss

    def take_back(self, trainer: Trainer) -> None:
        """Give the trainer its own loss function back."""
        if vars(trainer).get("compute_loss") is self.compute_loss:
            del trainer.compute_loss


def check_judged(trainer: Trainer, model: ModelSurgery) -> None:
    """Refuse a trainer whose loss an objective should replace and cannot."""
    names = [type(objective).__name__ for objective in asked_now(model) if objective.replaces]
    if names and not (model.losses.judged and trainer.label_smoother is None):
        rule = f"{', '.join(names)} replaces a loss of the model's next tokens, so the trainer must give it `labels` and not smooth them"
        remedy = "Use transformers.Trainer or TRL's SFTTrainer, or leave the objective to the trainer."
        raise UnsupportedError(explain(rule, f"{type(trainer).__name__} that does not", remedy))


def part_of_step(trainer: Trainer, model: nn.Module, batch: dict, unit: str = "token") -> float | Tensor:
    """What part of an optimizer step a batch is, where the trainer divides its loss no more; 1 where it still does."""
    items = batch["num_items_in_batch"]
    if not scales(trainer, items):
        return 1.0
    if items is None or unit == "sample":
        return 1 / trainer.current_gradient_accumulation_steps
    return share_of_step(model, batch) * (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)


def scales(trainer: Trainer, items: Tensor | int | None) -> bool:
    """Whether a trainer's loss is divided by all of the optimizer step already."""
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    return trainer.model_accepts_loss_kwargs and items is not None or trainer.compute_loss_func is not None


def divisor_of(trainer: Trainer, batch: dict) -> float | Tensor | None:
    """What a trainer divides the sum over the targets by; None for those of the batch."""
    items = batch["num_items_in_batch"]
    if items is None or not scales(trainer, items):
        return None
    return items / (trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1)


def progress_callback(trainer: Trainer, world: TrainingWorld, model: ModelSurgery) -> TrainerCallback:
    """The callback that gives the methods how much of the training is done."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            world.add_losses(trainer, model)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.set_progress(state.global_step / max(1, state.max_steps), state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.set_progress(1.0)
            world.take_back(trainer)

    return Progress()


def warn_of_dropped_targets(trainer: Trainer, model: ModelSurgery) -> None:
    """A Trainer drops the columns that are no arguments of the model, and with them the one that is for the methods."""
    names = sorted({type(method).__name__ for method in model.methods() if "targets" in method.asks})
    if names and trainer.args.remove_unused_columns:
        column = f"hf-tokens: {', '.join(names)} can learn from a column hf_tokens_targets, and this trainer drops it."
        warnings.warn(f"{column} If your data has one, pass `remove_unused_columns=False` to the TrainingArguments.", stacklevel=2)
