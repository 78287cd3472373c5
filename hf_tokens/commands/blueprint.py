"""A model's structure from its config alone: every parameter is on the meta device, no weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError, RepositoryNotFoundError
from torch import nn

from ..errors import UnsupportedError, explain
from ..model.anatomy import anatomy
from ..model.streams import Anatomy


def check_source(model: str) -> None:
    """Refuse what is neither a folder nor could be the name of a Hub repository."""
    if not Path(model).is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        raise UnsupportedError(explain("A model is a folder or a Hub id like owner/name", repr(model), "No such folder: check the path."))


def read_json(model: str, file: str, *, optional: bool = True) -> dict[str, Any] | None:
    """A JSON file of a folder or of a Hub repository; None where it has no such file, or an optional one cannot be asked for."""
    path = Path(model) / file
    if not Path(model).is_dir():
        try:
            path = Path(hf_hub_download(model, file))
        except RemoteEntryNotFoundError:
            return None
        except LocalEntryNotFoundError:  # without the Hub, one that it may not have is not in the cache either
            if not optional:
                raise
            return None
        except RepositoryNotFoundError:
            remedy = "Check the name, or log in with `hf auth login` if it is private."
            raise UnsupportedError(explain("A model to inspect must be on the Hub or in a folder", repr(model), remedy)) from None
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(explain(f"{file} must be JSON", f"{path}, which says: {error}", "Download or save it again.")) from None
    if not isinstance(data, dict):
        raise UnsupportedError(explain(f"{file} must hold a JSON object", f"{path} with a {type(data).__name__}", "Save it again."))
    return data


def transformers_blueprint(model: str, subfolder: str) -> nn.Module:
    """A model of Transformers by its config."""
    config = transformers.AutoConfig.from_pretrained(model, subfolder=subfolder)
    names = [name for name in config.architectures or () if name in dir(transformers)]
    with torch.device("meta"):
        return getattr(transformers, names[0])(config) if names else transformers.AutoModel.from_config(config)


def diffusers_blueprint(config: dict[str, Any]) -> nn.Module:
    """A model of Diffusers by its config."""
    name = config["_class_name"]
    try:
        import diffusers
    except ModuleNotFoundError:
        raise UnsupportedError(explain("A Diffusers model needs diffusers", name, 'Run `pip install "hf-tokens[diffusers]"`.')) from None
    if name not in dir(diffusers) or not issubclass(getattr(diffusers, name), nn.Module):
        rule = "`_class_name` in config.json must be a model of the installed diffusers"
        raise UnsupportedError(explain(rule, repr(name), "Name the folder of a model, or update diffusers."))
    with torch.device("meta"):
        return getattr(diffusers, name).from_config(config)


def part_blueprint(model: str, subfolder: str = "") -> nn.Module | None:
    """The model in one folder, or None where its config is not a model's (a scheduler, a tokenizer)."""
    config = read_json(model, f"{subfolder}/config.json".lstrip("/"), optional=bool(subfolder))
    if config is None:
        return None
    return diffusers_blueprint(config) if "_class_name" in config else transformers_blueprint(model, subfolder)


def blueprints(model: str) -> Iterator[tuple[str, nn.Module]]:
    """(part, model) of a model, or of every model of a Diffusers pipeline; refused without a config.json or a model_index.json."""
    check_source(model)
    index = read_json(model, "model_index.json")
    parts = [""] if index is None else [name for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None]
    built = [(part, blueprint) for part in parts if (blueprint := part_blueprint(model, part)) is not None]
    if not built:
        rule = "A model to inspect is a folder or Hub id with a config.json or a model_index.json"
        raise UnsupportedError(explain(rule, repr(model), "Check the path or the name."))
    yield from built


def anatomies(model: str) -> list[tuple[str, nn.Module, Anatomy | None]]:
    """Each part of a model with its anatomy; None for a part without a stream of blocks, which a model by itself must have."""
    found = []
    for part, blueprint in blueprints(model):
        try:
            found.append((part, blueprint, anatomy(blueprint)))
        except UnsupportedError:
            if not part:
                raise
            found.append((part, blueprint, None))
    return found


OF_A_STREAM = ("name", "kind", "paths", "owner", "width", "heads", "kv_heads", "head_dim", "causal", "layout", "mixers", "table")


def anatomy_as_plain(part: str, model: nn.Module, base: Anatomy | None) -> dict[str, Any]:
    """What is known of a part of a model, as JSON holds it."""
    streams = [] if base is None else [{name: vars(stream)[name] for name in OF_A_STREAM} for stream in base.streams]
    known = {} if base is None else {"model_type": base.model_type, "head": base.head, "embeddings": base.embeddings}
    return {"part": part, "class": type(model).__name__, **known, "streams": streams}
