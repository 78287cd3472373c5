"""Schedules that follow the steps of a Trainer, by a callback that attaches itself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

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


def callback(root: Root) -> TrainerCallback:
    """The callback that tells the methods how much of the training is done."""
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            root.set_progress(state.global_step / max(1, state.max_steps))

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            root.set_progress(1.0)

    return Progress()


def follow_trainer(root: Root) -> None:
    """Attach the callback to the Trainer that is starting to train the model, once."""
    trainer = calling_trainer()
    if trainer is None or trainer is root.trainer:
        return
    root.trainer = trainer
    trainer.add_callback(callback(root))
    root.set_progress(trainer.state.global_step / max(1, trainer.state.max_steps))
