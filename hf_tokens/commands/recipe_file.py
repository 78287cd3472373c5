"""The file of a recipe, YAML: a model, methods, and for a training its data and TrainingArguments; checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import TrainingArguments

from ..errors import ConfigError, did_you_mean, explain, first_line
from ..peft.config import PEFT_METHOD, plain_form
from ..roles.config import MethodConfig, check_value, option
from ..roles.registry import method_config, method_info

SUFFIXES = (".yaml", ".yml")
NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")  # such as 1e-3, which YAML 1.1 takes for a word
SPEC = re.compile(r"(?P<name>[\w-]+)(:(?P<knobs>.+))?", re.DOTALL)
BETWEEN_KNOBS = re.compile(r",(?=\s*\w+\s*=)")


class RecipeLoader(yaml.SafeLoader):
    """Plain YAML in which 1e-3 is a number and a key that stands twice is refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := sorted({str(key) for key in keys if isinstance(key, str) and keys.count(key) > 1}):
            raise yaml.MarkedYAMLError(problem=f"{', '.join(twice)} twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, [*"-+.0123456789"])


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a language model is trained on."""

    train: tuple[str, ...] | str = option(
        "", free=True, help="A text file, a JSON, JSON lines or CSV file, several of a kind, or a dataset's folder or name on the Hub."
    )
    eval: tuple[str, ...] | str | None = option(None, free=True, help="The same of what the model is evaluated on; none by default.")
    column: str = option("text", free=True, help="The column of the texts, where the data has columns.")
    config: str | None = option(None, free=True, help="The configuration of a dataset of the Hub.")
    split: str = option("train", free=True, help="The split of a dataset of the Hub that is trained on.")
    eval_split: str = option("validation", free=True, help="The split of it that is evaluated on, where `eval` names one.")
    length: int = option(512, ge=2, help="Tokens of a piece of text.")


@dataclass(frozen=True)
class Recipe:
    """A recipe whose every key was checked.

    Attributes:
        model: Folder or Hub id.
        methods: Method configs, and what stands for one of PEFT's among them, as `get_token_model` takes them.
        texts: What to train on; None for a recipe that trains nothing.
        arguments: Those of transformers' TrainingArguments.
    """

    model: str
    methods: list[MethodConfig | dict[str, Any]]
    texts: DataConfig | None
    arguments: dict[str, Any]


KEYS = ("model", "methods", "data", "training")


def is_recipe(source: str) -> bool:
    """Whether a source names the file of a recipe, and no model."""
    return Path(source).suffix in SUFFIXES


def check_keys(what: str, given: Iterable[object], known: Sequence[str]) -> None:
    """Refuse keys that are none of these."""
    if unknown := [key for key in given if key not in known]:
        shown = ", ".join(map(repr, unknown))
        remedy = f"{did_you_mean(unknown, known)}Leave it out, or fix the name."
        listed = ", ".join(known) if len(known) <= 12 else "those that its documentation names"
        raise ConfigError(explain(f"{what} takes the keys {listed}", shown, remedy))


def as_mapping(what: str, value: object) -> Mapping[str, Any]:
    """A mapping of names; nothing is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(explain(f"{what} is a mapping of keys and values", repr(value), f"Write `{what}:` and indented keys below it."))
    return value


def check_fields(what: str, cls: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of a dataclass, lists as tuples, each of its type and in its bounds."""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    check_keys(what, given, [*fields])
    hints = typing.get_type_hints(cls)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    for name, value in values.items():
        check_value(f"{what}.{name}", {"help": name, **fields[name].metadata}, hints[name], value)
    return values


def check_peft(config: object) -> None:
    """Refuse a key that a config of PEFT's has not."""
    given = as_mapping("config", config)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING.get(given.get("peft_type"))
    if cls is not None:  # another type is refused by the stack
        check_keys(cls.__name__, given, [field.name for field in dataclasses.fields(cls)])


def read_method(spec: object) -> MethodConfig | dict[str, Any]:
    """One method of a recipe; a knob that it has not is refused.

    Raises:
        ConfigError: It is no method, or has not such a knob.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("method"), str):
        return method_config(spec)
    if spec["method"] == PEFT_METHOD:
        check_keys("A 'peft' method", spec, ("method", "config"))
        check_peft(spec.get("config"))
        return plain_form(spec)
    config = method_info(spec["method"], spec.get("version")).config
    check_keys(config.__name__, (key for key in spec if key not in ("method", "version")), [field.name for field, _ in config.knobs()])
    return method_config(spec)


def read_methods(specs: object) -> list[MethodConfig | dict[str, Any]]:
    """The methods of a recipe: one, or a list."""
    if specs is None or specs == []:
        raise ConfigError(explain("A recipe names its methods", repr(specs), "Add `methods:` with one at least, such as `- snapkv`."))
    return [read_method(spec) for spec in (specs if isinstance(specs, list) else [specs])]


def read_training(given: Mapping[str, Any]) -> dict[str, Any]:
    """What TrainingArguments are made of; every key and its type are checked, and what they do not take together by themselves."""
    checked = check_fields("training", TrainingArguments, given)
    here = torch.accelerator.is_available()
    usual = {"label_names": ["labels"], "use_cpu": not here, "dataloader_pin_memory": here}  # a PeftModel does not tell its labels
    values = {**usual, **{name: [*value] if isinstance(value, tuple) else value for name, value in checked.items()}}
    try:
        TrainingArguments(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(explain("`training` is what TrainingArguments take together", first_line(error), "Change these.")) from error
    return values


def parse(text: str, name: str) -> Mapping[str, Any]:
    """The keys of a recipe's text."""
    try:
        found = yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(explain("A recipe is YAML", f"{name}, which says: {said}", "Fix that line.")) from None
    if not isinstance(found, dict):
        remedy = "Write `model:`, `methods:` and for a training `data:` and `training:`."
        raise ConfigError(explain("A recipe is a mapping of keys and values", f"{name} with a {type(found).__name__}", remedy))
    return found


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file, checked from end to end; no model and no data is loaded.

    Raises:
        ConfigError: A key, a type or a bound is not right, or the file is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(explain("A recipe is a YAML file", repr(str(path)), "There is no such file: check the path."))
    given = parse(path.read_text(encoding="utf-8"), str(path))
    check_keys("A recipe", given, KEYS)
    model = given.get("model")
    if not isinstance(model, str) or not model:
        raise ConfigError(explain("A recipe names its model", repr(model), "Add `model:` with a folder or a Hub id."))
    data = None
    if "data" in given:
        data = DataConfig(**check_fields("data", DataConfig, as_mapping("data", given["data"])))
        if not data.train:
            raise ConfigError(explain("`data` names what to train on", repr(data.train), "Add `train:` below it, such as a text file."))
    return Recipe(model, read_methods(given.get("methods")), data, read_training(as_mapping("training", given.get("training"))))


def value_of(text: str) -> Any:
    """A value as it is written on a command line: YAML in one line.

    Raises:
        ConfigError: It is no YAML.
    """
    try:
        value = yaml.load(text, RecipeLoader)
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ConfigError(explain("A value is a number, a word, or a list in brackets", f"{text!r}, {said}", "Fix it.")) from None
    return tuple(value) if isinstance(value, list) else value


def method_of_words(words: str) -> MethodConfig:
    """A method as it is written on a command line, such as `snapkv` or `snapkv:budget=0.25,layers=[0,1]`.

    Raises:
        ConfigError: It is written otherwise, or a knob is unknown or out of its bounds.
    """
    written = SPEC.fullmatch(words)
    pairs = [pair.partition("=") for pair in BETWEEN_KNOBS.split(written["knobs"] or "")] if written else []
    if written is None or any(not equals for _, equals, _ in pairs if written["knobs"]):
        remedy = "Write `snapkv` or `snapkv:budget=0.25,window=32`."
        raise ConfigError(explain("A method is its name, and behind a colon its knobs", repr(words), remedy))
    knobs = {name.strip(): value_of(value) for name, equals, value in pairs if equals}
    return read_method({"method": written["name"], **knobs})
