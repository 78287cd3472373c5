"""What a command works on: a model or an adapter from a folder or the Hub, methods put into it, and what reads text or pictures for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import hf_tokens

from ..errors import ConfigError, UnsupportedError, explain, first_line
from ..model.anatomy import anatomy
from ..peft.config import HFTokensConfig
from ..peft.doors import CONFIG
from ..peft.placement import Placement, plan
from .blueprint import blueprints, check_source, read_json
from .recipe_file import is_recipe, method_of_words, read_recipe

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Source:
    """A model's name, and the methods that are to go into it; none for one that has an adapter already."""

    model: str
    methods: list[Any]
    adapter: str | None = None


def read_source(source: str, words: Sequence[str] = ()) -> Source:
    """What a command names: the file of a recipe, an adapter, or a model; and methods as they are written on a command line.

    Raises:
        ConfigError: A method is not right.
        UnsupportedError: Neither a file, a folder, nor what could be a name on the Hub.
    """
    more = [method_of_words(word) for word in words]
    if is_recipe(source):
        recipe = read_recipe(source)
        return Source(recipe.model, [*recipe.methods, *more])
    check_source(source)
    config = read_json(source, CONFIG)
    if config is None:
        return Source(source, more)
    if more:
        rule, remedy = "Methods go into a base model", "Name the base, or leave the methods out."
        raise UnsupportedError(explain(rule, f"{source}, an adapter, and {', '.join(words)}", remedy))
    return Source(str(config.get("base_model_name_or_path")), [], adapter=source)


def need_methods(source: Source) -> None:
    """Refuse a source in which there is nothing to look at beside the base."""
    if not source.methods and source.adapter is None:
        remedy = "Name methods behind it, such as `snapkv:budget=0.25`, or give a recipe or an adapter."
        raise ConfigError(explain("This compares a model with methods in it to itself", f"{source.model} alone", remedy))


@dataclass(frozen=True)
class Planned:
    """Where methods go in one part of a model.

    Attributes:
        part: Of a pipeline; empty for a model by itself.
        model: The part, without weights.
        placements: The methods in its streams.
    """

    part: str
    model: nn.Module
    placements: list[Placement]


def plans(source: Source) -> list[Planned]:
    """Where methods go in each part of a model that takes them, by its config alone.

    Raises:
        UnsupportedError: No part takes them: what is said of the last.
    """
    found, refused = [], None
    for part, model in blueprints(source.model):
        try:
            found.append(Planned(part, model, plan(anatomy(model), HFTokensConfig(methods=source.methods))))
        except UnsupportedError as error:  # another part of a pipeline may be the one
            refused = error
    if not found:
        raise refused
    return found


def best_device(asked: str | None = None) -> str:
    """The device that was asked for, or an accelerator where there is one.

    Raises:
        ConfigError: It is not there.
    """
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        got = f"{asked!r}: {first_line(error)}"
        raise ConfigError(explain("A device is one that is here", got, "`hf-tokens doctor` names those.")) from None
    return asked


def base_of(name: str) -> Any:
    """The model or pipeline of a folder or Hub id, in its class and as it was saved."""
    check_source(name)
    if not sys.stderr.isatty():  # a bar is for who looks on
        transformers.utils.logging.disable_progress_bar()
    if read_json(name, "model_index.json") is not None:
        import diffusers

        if not sys.stderr.isatty():
            diffusers.utils.logging.disable_progress_bar()
        return diffusers.DiffusionPipeline.from_pretrained(name)
    config = read_json(name, "config.json", optional=False)
    if config is None:
        rule = "A model is a folder or Hub id with a config.json or a model_index.json"
        raise UnsupportedError(explain(rule, repr(name), "Check the path or the name."))
    if "_class_name" in config:
        import diffusers

        return getattr(diffusers, config["_class_name"]).from_pretrained(name)
    known = [cls for cls in config.get("architectures") or () if cls in dir(transformers)]
    return (getattr(transformers, known[0]) if known else transformers.AutoModel).from_pretrained(name)


def with_methods(source: Source, base: Any) -> Any:
    """A base with the methods or the adapter of a source in it, in eval mode."""
    model = hf_tokens.get_token_model(base, source.methods) if source.adapter is None else hf_tokens.load(source.adapter, base)
    return model.eval() if isinstance(model, nn.Module) else model


def reader_of(name: str, device: str, doing: str) -> transformers.PreTrainedModel:
    """The base of a name, on a device and in eval mode: a model of Transformers.

    Raises:
        UnsupportedError: It is a model or a pipeline of Diffusers.
    """
    base = base_of(name)
    if not isinstance(base, transformers.PreTrainedModel):
        remedy = "Call it in Python, with `hf_tokens.measure` around each of its steps."
        raise UnsupportedError(explain(f"{doing!r} reads a text or pictures with a model of Transformers", type(base).__name__, remedy))
    return base.to(device).eval()


def tokenizer_of(source: Source) -> Any:
    """The tokenizer of a source's model.

    Raises:
        UnsupportedError: It has none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(source.model)
    except (OSError, ValueError) as error:
        got = f"{source.model}: {first_line(error)}"
        raise UnsupportedError(explain("A text is read by the model's tokenizer", got, "Save one beside it.")) from error


def text_of_file(path: str | Path) -> str:
    """The text of a file, or what comes in where `-` stands for it."""
    if str(path) == "-":
        return sys.stdin.read()
    if not Path(path).is_file():
        raise ConfigError(explain("A text is a file, or `-` for what comes in", repr(str(path)), "There is no such file: check the path."))
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(explain("A text is a file in UTF-8", f"{path}: {error}", "Save it in UTF-8.")) from None


def picture_of_file(path: str | Path) -> Any:
    """A picture of a file, in three colours."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise UnsupportedError(explain("A picture is read by Pillow", str(path), "Run `pip install pillow`.")) from None
    if not Path(path).is_file():
        raise ConfigError(explain("A picture is a file", repr(str(path)), "There is no such file: check the path."))
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except UnidentifiedImageError:
        remedy = f"Use one of {', '.join(PICTURE_SUFFIXES)}."
        raise ConfigError(explain("A picture is a file that Pillow reads", str(path), remedy)) from None
