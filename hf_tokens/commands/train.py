"""What `hf-tokens train` does: a language model with methods in it, on texts of the user's, by transformers' Trainer."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments

from ..errors import ConfigError, UnsupportedError, explain, first_line
from ..peft.doors import WEIGHTS
from .apply import rows_of
from .material import pieces
from .recipe_file import DataConfig, Recipe
from .sources import Source, base_of, plans, text_of_file, tokenizer_of, with_methods


def texts_of_column(rows: Iterable[dict[str, Any]], column: str, name: str) -> list[str]:
    """The texts of a column."""
    found = []
    for row in rows:
        if not isinstance(row, dict) or column not in row:
            has = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(explain(f"Each row has the column {column!r}", f"{name} with {has}", "Name another one as `data.column`."))
        if not isinstance(row[column], str):
            got = f"{type(row[column]).__name__} in {name}"
            raise ConfigError(explain(f"The column {column!r} holds texts", got, "Name another one as `data.column`."))
        found.append(row[column])
    return found


def rows_of_json(text: str) -> list[Any]:
    """The rows of a JSON file: a list of objects, or an object a line."""
    text = text.strip()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]


# suffix of a file with columns -> its rows; any other file is one text
ROWS_OF_SUFFIX: dict[str, Callable[[str], Iterable[Any]]] = {
    ".json": rows_of_json,
    ".jsonl": rows_of_json,
    ".csv": lambda text: csv.DictReader(text.splitlines(keepends=True)),
}


def texts_of_file(path: Path, column: str) -> list[str]:
    """The texts of one file."""
    text, rows = text_of_file(path), ROWS_OF_SUFFIX.get(path.suffix)
    if rows is None:
        return [text]
    try:
        return texts_of_column(rows(text), column, str(path))
    except (csv.Error, json.JSONDecodeError) as error:
        rule = f"A file that ends in {path.suffix} is one"
        raise ConfigError(explain(rule, f"{path}: {first_line(error)}", "Repair it, or give it the ending .txt.")) from None


def is_file(name: str) -> bool:
    """Whether a name is meant for a file: one is there, or it ends like one or lies too deep for a dataset's name."""
    path = Path(name)
    return path.is_file() or path.suffix in (*ROWS_OF_SUFFIX, ".txt", ".md") or len(path.parts) > 2 and not path.is_dir()


def texts_of_dataset(name: str, config: str | None, split: str, column: str) -> list[str]:
    """The texts of a dataset in a folder or on the Hub."""
    try:
        import datasets
    except ModuleNotFoundError:
        remedy = 'Run `pip install "hf-tokens[train]"`, or name a file.'
        raise UnsupportedError(explain("A dataset is read by the library datasets", repr(name), remedy)) from None
    try:
        found = datasets.load_dataset(name, config, split=split)
    except (ValueError, OSError) as error:
        got = f"{name!r}, split {split!r}: {first_line(error)}"
        raise ConfigError(explain("A dataset is a file, a folder or a name on the Hub, with the split", got, "Check these.")) from error
    return texts_of_column(found.select_columns([column]) if column in found.column_names else found, column, name)


def check_data(data: DataConfig) -> None:
    """Refuse files that are not there."""
    for names in (data.train, data.eval):
        several = names if isinstance(names, tuple) else (names,) if names else ()
        for name in several:
            if is_file(name) and not Path(name).is_file():
                raise ConfigError(explain("`data` names files that are there", repr(name), "There is no such file: check the path."))


def texts_of(names: tuple[str, ...] | str, data: DataConfig, split: str) -> list[str]:
    """The texts of files or of a dataset."""
    several = names if isinstance(names, tuple) else (names,)
    read = lambda name: texts_of_file(Path(name), data.column) if is_file(name) else texts_of_dataset(name, data.config, split, data.column)
    return [text for name in several for text in read(name)]


def examples(texts: list[str], tokenizer: Any, length: int, what: str) -> list[dict[str, torch.Tensor]]:
    """Texts as pieces of equal length to learn from; refused where there is not enough for one."""
    found = pieces(texts, tokenizer, length)
    if not found:
        total = sum(len(tokenizer(text)["input_ids"]) for text in texts)
        rule = f"`data.{what}` has one piece of {length} tokens at least"
        raise ConfigError(explain(rule, f"{total} tokens", "Set a shorter `data.length`."))
    return [{"input_ids": piece, "labels": piece} for piece in found]


def check_trained(base: Any) -> None:
    """Refuse a model that does not tell the next token."""
    if not isinstance(base, PreTrainedModel) or base.config.is_encoder_decoder or base.get_output_embeddings() is None:
        rule = "`hf-tokens train` trains a decoder-only language model with its head"
        remedy = "Train others in Python: Trainer and diffusers' loops take a model with methods in it as it is."
        raise UnsupportedError(explain(rule, type(base).__name__, remedy))


def check_recipe(recipe: Recipe) -> list[dict[str, Any]]:
    """Where the methods of a recipe go; everything that can be wrong with it is found here, before a weight or a text is read.

    Raises:
        ConfigError: It trains nothing, or names a file that is not there.
        UnsupportedError: The methods do not fit the model.
    """
    if recipe.texts is None:
        remedy = "Add `data:` with `train:` below it, or run `hf-tokens apply`."
        raise ConfigError(explain("A recipe that trains names its data", "none", remedy))
    check_data(recipe.texts)
    planned = plans(Source(recipe.model, recipe.methods))
    for one in planned:
        check_trained(one.model)
    return rows_of(planned)


def check_processes(joined: int) -> None:
    """Refuse processes that a launcher started and that do not train together: each would train, and save, for itself."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != joined:
        rule = "Processes that a launcher starts train together"
        raise UnsupportedError(explain(rule, f"{started} of them and {joined} that joined", "On CPUs set `use_cpu: true` in `training`."))


def train_recipe(recipe: Recipe) -> dict[str, Any] | None:
    """Train the methods of a recipe, and save their adapter in the folder of the TrainingArguments.

    Returns:
        Losses, steps, and where the adapter is; None in a process beside the first.
    """
    check_recipe(recipe)
    data, source = recipe.texts, Source(recipe.model, recipe.methods)
    tokenizer = tokenizer_of(source)
    train = examples(texts_of(data.train, data, data.split), tokenizer, data.length, "train")
    evaluated = examples(texts_of(data.eval, data, data.eval_split), tokenizer, data.length, "eval") if data.eval else None
    arguments = TrainingArguments(**recipe.arguments)
    check_processes(arguments.world_size)
    model = with_methods(source, base_of(recipe.model)).train()
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=evaluated)
    before = base_loss(trainer, model)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    after = trainer.evaluate()["eval_loss"] if evaluated else None
    trainer.save_model()
    if arguments.push_to_hub:
        trainer.push_to_hub()
    if not trainer.is_world_process_zero():
        return None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = (Path(arguments.output_dir) / WEIGHTS).stat().st_size
    counts = {"pieces": len(train), "trainable": trainable, "bytes": size, "steps": trainer.state.global_step}
    told = {"losses": losses, "eval_loss_of_base": before, "eval_loss": after}
    return {"adapter": arguments.output_dir, **counts, "processes": arguments.world_size, **told}


def base_loss(trainer: Trainer, model: Any) -> float | None:
    """The loss of the base on what is evaluated on; None without that."""
    if trainer.eval_dataset is None:
        return None
    with model.disable_adapter():
        return trainer.evaluate(metric_key_prefix="base")["base_loss"]
