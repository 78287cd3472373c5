"""The doors of PEFT and transformers: which files they read and write, and what their code that is under way says of them."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import get_peft_model_state_dict
from torch import Tensor

from ..errors import AdapterError, UnsupportedError, explain
from ..model.callers import callers

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")  # arguments that say where a file is
OF_PEFT, OF_MODELS, OF_ADAPTERS = "peft.peft_model", "transformers.modeling_utils", "transformers.integrations.peft"
OF_TRAINER, OF_PUSHES = "transformers.trainer", "transformers.utils.hub"
SAVED = {OF_PEFT: "output_state_dict", OF_MODELS: "state_dict"}  # what a `save_pretrained` calls the tensors of a file
FRAMES_TO_SAVER = 8  # frames between a model's `save_pretrained` and our search for it
FRAMES_TO_PUSH = 24  # frames between a trainer's `save_model` or a push, and the card
FRAMES_TO_LOADER = 20  # frames between a `load_adapter` and our search for it
COPIERS = tuple(
    f"trl.trainer.{kind}_trainer" for kind in ("dpo", "grpo", "kto", "rloo")
)  # for a reference they copy parameters, no buffers
COPIED = "default_config"  # what they call the config of the adapter that they copy, and give to the copy
RENAMINGS = "peft_weight_conversions"  # what transformers' `load_adapter` calls its list


def file_beside(repo: str, subfolder: str | None = None, kinds: tuple[str, ...] = (WEIGHTS, PICKLE), **where: Any) -> Path | None:
    """The first of these files beside a config in a folder or on the Hub; None where there is none."""
    if Path(repo).is_dir():
        return next((path for kind in kinds if (path := Path(repo, subfolder or "", kind)).exists()), None)
    for kind in kinds:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repo, kind, subfolder=subfolder, **{key: where[key] for key in OF_THE_HUB if key in where}))
    return None


def under_way(module: str, names: tuple[str, ...], most: int) -> Iterator[FrameType]:
    """Calls of a module's functions that are under way, the nearest first."""
    file = vars(sys.modules[module])["__file__"] if module in sys.modules else None
    yield from (frame for frame in callers(most if file else 0) if frame.f_code.co_name in names and frame.f_code.co_filename == file)


# -- saving ----------------------------------------------------------------------------------------------------------
def tensors_being_saved() -> Mapping[str, Tensor] | None:
    """The tensors of the file that PEFT or transformers is writing, one before our config and one behind it; None where neither is."""
    found = (frame.f_locals[local] for module, local in SAVED.items() for frame in under_way(module, ("save_pretrained",), FRAMES_TO_SAVER))
    return next(found, None)


def native_saver() -> FrameType | None:
    """The call of a Transformers model's own `save_pretrained` that is under way, if one is."""
    return next(under_way(OF_MODELS, ("save_pretrained",), FRAMES_TO_SAVER), None)


def calling_saver() -> FrameType | None:
    """The call of a PeftModel's `save_pretrained` that is under way, if one is."""
    return next(under_way(OF_PEFT, ("save_pretrained",), FRAMES_TO_SAVER), None)


class PeftSave(NamedTuple):
    """What PEFT is about to write of an adapter: to a folder its tensors, and then its config."""

    folder: Path
    tensors: Mapping[str, Tensor]
    values: dict[str, Any]
    auto_mapping: dict[str, str] | None


def about_to_save(saver: FrameType, adapter_name: str) -> PeftSave | None:
    """What a call of `save_pretrained` is about to write of an adapter; None where that is nothing, or something else."""
    names = saver.f_locals  # where other processes hold parts of the tensors, all of them ask for these
    model, folder, given = names["self"], Path(names["save_directory"]), names["kwargs"].get("state_dict")
    tensors = get_peft_model_state_dict(model, given, adapter_name, False, names["save_embedding_layers"])
    if not names["is_main_process"] or names["path_initial_model_for_weight_conversion"] is not None:
        return None
    config, base = model.peft_config[adapter_name], model.get_base_model()
    values: dict[str, Any] = {"inference_mode": True}
    if config.base_model_name_or_path is None:
        values["base_model_name_or_path"] = vars(base).get("name_or_path") or None
    mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__} if config.task_type is None else None
    return PeftSave(folder if adapter_name == "default" else folder / adapter_name, tensors, values, mapping)


def calling_maker() -> Any:
    """The PeftModel that is being made, if one is."""
    frame = next(under_way(OF_PEFT, ("__init__",), FRAMES_TO_SAVER), None)
    return None if frame is None else frame.f_locals["self"]


class Push(NamedTuple):
    """A push of a model that is under way: where to, and the card that it will upload."""

    repo: str
    card: ModelCard
    tags: tuple[str, ...]
    token: str | bool | None


def calling_push() -> Push | None:
    """The push of a model that saves it first, if one is under way."""
    frame = next(under_way(OF_PUSHES, ("push_to_hub",), FRAMES_TO_PUSH), None)
    if frame is None:
        return None
    names = frame.f_locals
    return Push(names["repo_id"], names["model_card"], tuple(names["tags"] or ()), names["token"])


def saving_trainer() -> Any:
    """The trainer that saves or pushes a model, if one does."""
    frame = next(under_way(OF_TRAINER, ("save_model", "create_model_card"), FRAMES_TO_PUSH), None)
    return None if frame is None else frame.f_locals["self"]


def is_drafting() -> bool:
    """Whether a trainer has just written a draft of the card."""
    return any(True for _ in under_way(OF_TRAINER, ("create_model_card",), FRAMES_TO_SAVER))


def saves_checkpoint() -> bool:
    """Whether a trainer saves a checkpoint."""
    return any(True for _ in under_way(OF_TRAINER, ("_save_checkpoint",), FRAMES_TO_PUSH))


# -- loading ---------------------------------------------------------------------------------------------------------
def is_loading() -> bool:
    """Whether PEFT is loading an adapter."""
    return any(True for _ in under_way(OF_PEFT, ("from_pretrained", "load_adapter"), FRAMES_TO_LOADER))


def is_copied(config: object) -> bool:
    """Whether a trainer puts in an adapter of this config to copy another one's parameters into it."""
    inits = (frame for module in COPIERS for frame in under_way(module, ("__init__",), FRAMES_TO_LOADER))
    return any(frame.f_locals.get(COPIED) is config for frame in inits)


def without(repo: object, name: str = WEIGHTS) -> AdapterError:
    """What is said of an adapter that lacks a file."""
    return AdapterError(explain(f"An adapter has a file {name}", f"{repo} without it", "Save or download the adapter again."))


def calling_loader() -> FrameType | None:
    """The call of transformers' `load_adapter` that is under way, if one is."""
    return next(under_way(OF_ADAPTERS, ("load_adapter",), FRAMES_TO_LOADER), None)


def given_to(loader: FrameType) -> Path | Mapping[str, Tensor] | None:
    """What a call of transformers' `load_adapter` puts into the model: tensors, or the file of them that it finds."""
    names = loader.f_locals
    if names["adapter_state_dict"] is not None:
        return names["adapter_state_dict"]
    repo, how = str(names["peft_model_id"]), names["load_config"]
    kinds = (PICKLE, WEIGHTS) if how.use_safetensors is False else (WEIGHTS, PICKLE)
    return file_beside(repo, kinds=kinds[:1] if Path(repo).is_dir() else kinds, **how.download_kwargs)  # in a folder it takes no other


def tell_loader(loader: FrameType, adapter_name: str, saved_names: dict[str, str]) -> None:
    """Have transformers put the adapter's name into the keys of nested methods, too: by itself it does so for one type of adapter.

    Args:
        loader: The call of `load_adapter`.
        adapter_name: Name of the adapter in the model.
        saved_names: Names of the tensors of nested methods in the model, with the names that these have in a file.

    Raises:
        UnsupportedError: Some names in a file would not find their tensors.
    """
    from transformers.core_model_loading import WeightRenaming

    holders = sorted({name.rpartition(f".{adapter_name}")[0].rpartition(".")[2] for name in saved_names})
    renamings = [WeightRenaming(rf"(\.{re.escape(holder)})(?![^.])", rf"\1.{adapter_name}") for holder in holders]
    for name, saved in saved_names.items():
        found = saved
        for renaming in renamings:
            found, _ = renaming.rename_source_key(found)
        if found != name:
            rule = "transformers' `load_adapter` finds each tensor of a stack by the name of its holder"
            raise UnsupportedError(explain(rule, f"{name}, for which it would take {saved} as {found}", "Use `hf_tokens.load` or PEFT."))
    loader.f_locals[RENAMINGS].extend(renamings)
