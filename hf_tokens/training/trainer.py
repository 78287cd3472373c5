"""Schedules and losses that follow the steps of a Trainer, by a callback that attaches itself."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..engine.loss import share_of_step
from ..engine.model import ModelSurgery
from ..engine.results import World
from ..errors import UnsupportedError, explain
from ..handlers.objective import asked_now
from ..model.callers import callers
from .logs import TrainingLogs, logging_by

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
    """The trainer's part in a model; what it puts into a trainer goes at the end of a training, or of an evaluation without one."""

    def __init__(self):
        self.logs: TrainingLogs | None = None
        self._undo: list[Callable[[], None]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"logs": None, "_undo": []}

    def training_begins(self, model: ModelSurgery) -> None:
        """Attach the callback to the Trainer that is starting to train the model, once."""
        trainer = calling_trainer()
        if trainer is None or trainer is model.losses.trainer:
            return
        model.losses.follow(trainer)
        warn_of_dropped_targets(trainer, model)
        trainer.add_callback(progress_callback(trainer, self, model))
        self.take_part(trainer, model)
        model.set_progress(trainer.state.global_step / max(1, trainer.state.max_steps), trainer.state.global_step)

    def evaluation_begins(self, model: ModelSurgery) -> None:
        """Take part in a Trainer that evaluates the model and does not train it, until it logs what came of that."""
        trainer = calling_trainer() if self.logs is None else None
        if trainer is not None:
            self.take_part(trainer, model, once=True)

    def take_part(self, trainer: Trainer, model: ModelSurgery, once: bool = False) -> None:
        """Add the methods' losses where a trainer computes its loss without reading the model's own, and say in its logs what they did."""
        self.take_back()
        self.logs = logs = TrainingLogs(model)
        model.listeners.append(logs)
        self._undo.append(partial(model.listeners.remove, logs))
        self._replace(trainer, "compute_loss", adding_losses(trainer, model, logs))
        self._replace(trainer, "log", logging_by(trainer, logs, self.take_back if once else None))

    def _replace(self, trainer: Trainer, name: str, function: Callable) -> None:
        def give_back() -> None:
            if vars(trainer).get(name) is function:
                delattr(trainer, name)

        setattr(trainer, name, function)
        self._undo.append(give_back)

    def take_back(self) -> None:
        """Give a trainer its own functions back."""
        self.logs = None
        while self._undo:
            self._undo.pop()()

    def detach(self) -> None:
        self.take_back()


def adding_losses(trainer: Trainer, surgery: ModelSurgery, logs: TrainingLogs) -> Callable:
    """A trainer's `compute_loss`, with the methods' losses where it does not read the model's own, as TRL's do not."""
    inner, reads, agreed = trainer.compute_loss, [], []
    surgery.losses.trust(False)

    @functools.wraps(inner)
    def compute_loss(model: Any, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        batch = {**inputs, "num_items_in_batch": kwargs.get("num_items_in_batch")}
        surgery.losses.begin(inputs.get("labels"))
        logs.begin()
        try:
            output = inner(model, inputs, *args, **kwargs)
        finally:
            forwards = surgery.losses.end()
        check_judged(trainer, surgery)
        loss = own = output[0] if isinstance(output, tuple) else output
        if not forwards:
            logs.end(batch, loss)
            return output
        if not reads:
            reads.append(any(forward.node is not None and reaches(loss.grad_fn, forward.node) for forward in forwards))
        if reads[0]:
            logs.end(batch)
            return output
        for replacement in (forward.replacement for forward in forwards if forward.replacement is not None):
            part = part_of_step(trainer, surgery.base, batch, "sample")
            loss = replacement.put(loss, divisor_of(trainer, batch), part, check=not agreed)
            agreed.append(True)
        extras = [forward.extra for forward in forwards if forward.extra is not None]
        if extras:
            loss = loss + torch.stack(extras).sum().to(loss.dtype) * part_of_step(trainer, surgery.base, batch)
        logs.end(batch, loss, own)
        return (loss, *output[1:]) if isinstance(output, tuple) else loss

    return compute_loss


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
            world.take_part(trainer, model)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.set_progress(state.global_step / max(1, state.max_steps), state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.set_progress(1.0)
            world.take_back()

    return Progress()


def warn_of_dropped_targets(trainer: Trainer, model: ModelSurgery) -> None:
    """A Trainer drops the columns that are no arguments of the model, and with them the one that is for the methods."""
    names = sorted({type(method).__name__ for method in model.methods() if "targets" in method.asks})
    if names and trainer.args.remove_unused_columns:
        column = f"hf-tokens: {', '.join(names)} can learn from a column hf_tokens_targets, and this trainer drops it."
        warnings.warn(f"{column} If your data has one, pass `remove_unused_columns=False` to the TrainingArguments.", stacklevel=2)
