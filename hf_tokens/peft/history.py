"""What happened to an adapter in this process, as its card tells it: what a trainer did, and what was measured."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from transformers.modelcard import extract_hyperparameters_from_trainer

if TYPE_CHECKING:
    from transformers import Trainer

TRAINING_LIBRARIES = ("transformers", "trl", "sentence_transformers")  # whose trainers a card calls by their names
SPEEDS = ("runtime", "per_second", "flos")  # ends of names in a trainer's log that are no results
GENERIC = ("csv", "json", "pandas", "parquet", "text", "generator")  # how `datasets` calls what it read from files


@dataclass(frozen=True)
class Training:
    """What a trainer did.

    Attributes:
        by: The trainer's class, and the library and version that it is of.
        arguments: The training arguments that transformers puts on its cards.
        steps: Steps of the optimizer that are done.
        epoch: Epochs that are done.
        trained_on: The name of the data, where it has one.
        evaluated_on: That of the evaluation's.
        results: What the log says of the training in the end.
        evaluation: What the last evaluation found.
    """

    by: str
    arguments: Mapping[str, Any]
    steps: int
    epoch: float | None
    trained_on: str | None
    evaluated_on: str | None
    results: Mapping[str, float]
    evaluation: Mapping[str, float]

    def told(self) -> Iterator[str]:
        """The lines of a card."""
        if self.steps:
            on = f" on {self.trained_on}" if self.trained_on else ""
            epochs = f" ({self.epoch:g} epochs)" if self.epoch else ""
            yield f"Trained{on} by {self.by}, {self.steps} steps{epochs}.\n"
            yield "| argument | value |\n| --- | --- |"
            yield from (f"| {name} | {value} |" for name, value in self.arguments.items())
            yield ""
        if found := {**self.results, **self.evaluation}:
            yield "| result | value |\n| --- | --- |"
            yield from (f"| {name} | {value:.6g} |" for name, value in found.items())
            yield ""


def reading(trainer: Trainer) -> functools.partial[Training]:
    """What reads a trainer's past off its arguments and its state, which outlive it."""
    kind = next(cls for cls in type(trainer).__mro__ if cls.__module__.partition(".")[0] in TRAINING_LIBRARIES)
    library = kind.__module__.partition(".")[0]
    by = f"`{kind.__name__}` of {library} {version(library)}"
    return functools.partial(training_from, trainer.args, trainer.state, by, name_of(trainer.train_dataset), name_of(trainer.eval_dataset))


def training_from(args: Any, state: Any, by: str, trained_on: str | None, evaluated_on: str | None) -> Training:
    """What the arguments and the state of a trainer say."""
    results: dict[str, float] = {}
    evaluation: dict[str, float] = {}
    for entry in state.log_history:
        numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float)) and not name.endswith(SPEEDS)}
        if found := {name: value for name, value in numbers.items() if name.startswith("eval_")}:
            evaluation = found
        if "train_loss" in numbers:
            results = {"train_loss": numbers["train_loss"]}
    arguments = extract_hyperparameters_from_trainer(SimpleNamespace(args=args))
    return Training(by, arguments, state.global_step, state.epoch, trained_on, evaluated_on, results, evaluation)


def name_of(data: Any) -> str | None:
    """The name of a data set, where it comes from one."""
    library = sys.modules.get("datasets")
    name = data.info.dataset_name if library is not None and isinstance(data, library.Dataset) else None
    return None if name in GENERIC else name


@dataclass(frozen=True)
class MeasuredCost:
    """What `hf_tokens.measure` found.

    Attributes:
        inputs: The shapes of the inputs, in words.
        cost: What a forward cost.
        base: What one of the same inputs cost with the adapter switched off, if that was measured.
    """

    inputs: str
    cost: Mapping[str, int]
    base: Mapping[str, int] | None = None

    def told(self) -> Iterator[str]:
        """The lines of a card."""
        yield f"One forward on {self.inputs}, by `hf_tokens.measure`:\n"
        beside = self.base is not None
        yield f"| | with the adapter |{' base |' if beside else ''}\n| --- | --- |{' --- |' if beside else ''}"
        for name, value in self.cost.items():
            yield f"| {name} | {value:,} |" + (f" {self.base[name]:,} |" if self.base is not None else "")
        yield ""
