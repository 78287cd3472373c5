"""What methods did in training, by name, in the logs of a Trainer: their losses, what they kept, routed or ran, and their gates."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_pt_utils import find_batch_size

from ..engine.block import BlockSurgery
from ..engine.model import ModelSurgery
from ..engine.surgery import Listener
from ..roles.base import Method

if TYPE_CHECKING:
    from transformers import Trainer

LOSS = "loss"  # what a Trainer's logs call it; of an evaluation behind a prefix
Sums = dict[tuple[str, str], list[Tensor | float]]  # (a method's key, what is counted) -> a sum and of how much it is


class TrainingLogs(Listener):
    """Sums of what the methods of a model did since the last log, in training and in evaluation apart."""

    def __init__(self, surgery: ModelSurgery):
        self.surgery = surgery
        self._sums: dict[bool, Sums] = {True: {}, False: {}}
        self._losses: dict[bool, list[Tensor | float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}
        self._last: tuple[Tensor, Tensor] | None = None

    def _add(self, key: tuple[str, str], value: Tensor | float, of: float) -> None:
        sums = self._sums[self.surgery.base.training].setdefault(key, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + value, sums[1] + of

    def acted(self, block: BlockSurgery, method: Method, left: Tensor | int, of: int) -> None:
        self._add((method.key, method.counts), left, of)

    def judged(self, method: Method, loss: Tensor) -> None:
        self._add((method.key, LOSS), loss, 1)

    def lost(self, own: Tensor, whole: Tensor) -> None:
        self._last = own, whole

    def begin(self) -> None:
        """A step begins."""
        self._last = None

    def end(self, inputs: dict[str, Any], loss: Tensor | None = None, own: Tensor | None = None) -> None:
        """A step ends.

        Args:
            inputs: Its batch.
            loss: Of the step; None if it is of the model's.
            own: What it was without the methods, where a trainer does not read the model's; None if that is to be found out.
        """
        pair = self._last if own is None else (own.detach(), loss.detach())
        if pair is not None and (own is not None or loss is None or torch.equal(pair[1], loss.detach())):
            training = self.surgery.base.training
            rows = 1 if training else find_batch_size(inputs)  # as the Trainer sums up the losses of an evaluation
            self._losses[training] = [total + rows * value for total, value in zip(self._losses[training], pair, strict=True)]

    def take(self, trainer: Trainer, training: bool) -> tuple[dict[str, float], float | None]:
        """The numbers by their names, and the share of the model's own loss in the whole, if it is not all of it; they begin anew."""
        methods = {method.key: method for method in self.surgery.methods()}
        known = sorted({(key, what) for key, method in methods.items() for what in (method.counts, LOSS) if what})
        sums = [self._sums[training].get(key, [0.0, 0.0]) for key in known] + [self._losses[training]]
        self._sums[training], self._losses[training] = {}, [0.0, 0.0]
        values = torch.tensor([[float(value), float(of)] for value, of in sums], dtype=torch.float64)
        if trainer.accelerator.num_processes > 1:
            values = trainer.accelerator.reduce(values.to(trainer.accelerator.device, torch.float32), "sum").cpu()
        *rest, (own, whole) = values.tolist()
        names = short_names(methods)
        shares = {f"{names[key]}/{what}": value / of for (key, what), (value, of) in zip(known, rest, strict=True) if of}
        return shares | self._gates(names), own / whole if whole and own != whole else None

    def _gates(self, names: dict[str, str]) -> dict[str, float]:
        """The mean over the blocks of each parameter that is one number."""
        found: dict[str, list[Tensor]] = {}
        for method in self.surgery.methods():
            for name, parameter in method.named_parameters():
                if parameter.numel() == 1:
                    found.setdefault(f"{names[method.key]}/{name}", []).append(parameter.detach().float().flatten())
        return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def short_names(methods: dict[str, Method]) -> dict[str, str]:
    """What each method is called, by its key; with its place where a method of that name stands in two."""
    names = {key: method.config.method for key, method in methods.items()}
    several = {name for name in names.values() if [*names.values()].count(name) > 1}
    return {key: f"{name}.{key}" if name in several else name for key, name in names.items()}


def prefix_of(logs: dict[str, float]) -> str | None:
    """What stands in front of the names of these logs: nothing in training, `eval_` in an evaluation; None if they are neither."""
    losses = [name for name in logs if name == LOSS or name.endswith(f"_{LOSS}") and name != f"train_{LOSS}"]
    return min(losses, key=len).removesuffix(LOSS) if losses else None


def logging_by(trainer: Trainer, logs: TrainingLogs, behind: Callable[[], None] | None) -> Callable:
    """A trainer's `log`, which adds what the methods did; `behind` is called once it has."""
    inner = trainer.log

    @functools.wraps(inner)
    def log(given: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        prefix = prefix_of(given)
        if prefix is not None:
            more, share = logs.take(trainer, training=not prefix)
            whole = given.get(f"{prefix}{LOSS}")
            if share is not None and whole is not None:
                given[f"{prefix}model_{LOSS}"] = whole * share
            given.update({f"{prefix}{name}": value for name, value in more.items()})
            if behind is not None:
                behind()
        return inner(given, *args, **kwargs)

    return log
