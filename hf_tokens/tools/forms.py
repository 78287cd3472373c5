"""The forms in which a surgery leaves hf-tokens: what each holds, and how it is written."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UnsupportedError, explain
from ..handlers.embedding import looked_up
from ..model.parts import OWN
from ..peft.config import PEFT_METHOD, HFTokensConfig
from ..peft.doors import WEIGHTS
from ..peft.nested import bake
from ..peft.saving import PEFT_PREFIX, placing
from .leaving import StackPart, configs_in, leaving
from .source import repository
from .surgeries import blocks_in, evaluated, models_in, surgery_of, take_out

WEIGHTS_OF_A_MODEL = re.compile(r"(model|pytorch_model|diffusion_pytorch_model)([.-].*)?\.(safetensors|bin)(\.index\.json)?")
PROMPT_EMBEDS = "prompt_embeds.safetensors"

Stacks = dict[str, list[StackPart]]  # what acts in each model of a pipeline, by its name


# -- checkpoint --------------------------------------------------------------------------------------------------------
def write_checkpoint(model: Any, folder: Path, stacks: Stacks, without: Collection[str], ids: Tensor | None = None) -> None:
    """Write a model or a pipeline as it answers, as its own library saves it."""
    if not callable(getattr(model, "save_pretrained", None)):
        rule = "A checkpoint is written by `save_pretrained` of Transformers or Diffusers"
        raise UnsupportedError(explain(rule, type(model).__name__, "Unload the model, and save its weights yourself."))
    models = models_in(model)
    for name, inner in models.items():
        check_baked(inner, stacks.get(name, []))
    plain = {name: baked(inner, stacks[name], without) if name in stacks else inner for name, inner in models.items()}
    whole = plain[""] if isinstance(model, nn.Module) else copy.copy(model)
    if whole is not plain.get(""):
        for name, inner in plain.items():
            setattr(whole, name, inner)
    with placing(folder) as written:
        whole.save_pretrained(str(written))
        new = {path.relative_to(written) for path in written.rglob("*") if path.is_file()}
    for place in {path.parent for path in new}:  # weights of another checkpoint, which a loader might take for these
        for path in (folder / place).iterdir():
            if WEIGHTS_OF_A_MODEL.fullmatch(path.name) and path.relative_to(folder) not in new:
                path.unlink()


def check_baked(model: nn.Module, stack: list[StackPart]) -> None:
    """Refuse to bake what is not made yet, and adapters of another kind."""
    others = sorted({config.peft_type.value for config in configs_in(model).values() if not isinstance(config, HFTokensConfig)})
    if others:
        rule, remedy = "A checkpoint is made of a model without other adapters", "Merge it or take it out first, or put it into the stack."
        raise UnsupportedError(explain(rule, f"{' and '.join(others)} beside the stack", remedy))
    for part in stack:
        remedies = [method.unready for _, method in part.methods]
        if remedies and None not in remedies:
            rule = "A method leaves once it is ready"
            raise UnsupportedError(explain(rule, f"{part.name!r}, which changes nothing yet", remedies[0]))


def baked(model: nn.Module, stack: list[StackPart], without: Collection[str]) -> nn.Module:
    """A copy of a model with these parts written into its weights, and no adapter."""
    plain, left = copy.deepcopy(model), {method.key for part in stack if part.name in without for _, method in part.methods}
    surgery_of(plain).act([(block, [m for m in block.plan.acting if m.key not in left]) for block in blocks_in(plain)])
    bake(plain, {part.adapter for part in stack}, nested=PEFT_METHOD not in without)
    if isinstance(plain, PeftModel):
        return plain.unload()
    take_out(plain)
    return plain


# -- lora --------------------------------------------------------------------------------------------------------------
def write_loras(model: Any, folder: Path, stacks: Stacks, without: Collection[str], ids: Tensor | None = None) -> None:
    """Write the PEFT methods of a stack as adapters of their own, a folder each where there are several."""
    models, files = models_in(model), {}
    for name, stack in stacks.items():
        parts = leaving(stack, "lora", without)
        if not parts:
            rule = "What leaves as 'lora' is a PEFT method of the stack"
            raise UnsupportedError(explain(rule, f"a stack of {[part.name for part in stack]}", "Choose another form."))
        states = states_of(models[name], parts)
        for place, (part, state) in enumerate(zip(parts, states, strict=True)):
            base = type(surgery_of(models[name]).base)
            kind = {"base_model_class": base.__name__, "parent_library": base.__module__}
            files[Path(name if len(models) > 1 else "", str(place) if len(parts) > 1 else "")] = own_config(models[name], part), state, kind
    with placing(folder) as written:
        for place, (config, state, kind) in files.items():
            (written / place).mkdir(parents=True, exist_ok=True)
            save_file(state, str(written / place / WEIGHTS), metadata={"format": "pt"})
            config.save_pretrained(str(written / place), auto_mapping_dict=None if config.task_type else kind)


def states_of(model: nn.Module, parts: list[StackPart]) -> list[dict[str, Tensor]]:
    """The tensors of each PEFT method, by their names in a file."""
    states: list[dict[str, Tensor]] = [{} for _ in parts]
    for adapter in dict.fromkeys(part.adapter for part in parts):
        mine = [(part.config, state) for part, state in zip(parts, states, strict=True) if part.adapter == adapter]
        for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).items():
            if f".{OWN}." in key:
                continue
            name = key.removeprefix(PEFT_PREFIX)
            takers = [state for config, state in mine if len(mine) == 1 or targets(config, name)]
            for state in takers or [state for _, state in mine]:
                state[PEFT_PREFIX + name] = tensor.detach().cpu().contiguous().clone()
    return states


def targets(config: PeftConfig, name: str) -> bool:
    """Whether a PEFT method acts in one of the modules in which a tensor lies."""
    parts = name.split(".")
    wide = config.target_modules == "all-linear"
    return wide or any(check_target_module_exists(config, ".".join(parts[:i])) for i in range(1, len(parts)))


def own_config(model: nn.Module, part: StackPart) -> PeftConfig:
    """The config of a PEFT method as that of an adapter."""
    outer, config = configs_in(model)[part.adapter], part.config
    if outer.modules_to_save and not vars(config).get("modules_to_save"):
        rule = "What a stack saves as a whole goes with a PEFT method that can do so"
        raise UnsupportedError(explain(rule, f"{outer.modules_to_save} beside {config.peft_type.value}", "Export a checkpoint."))
    config.base_model_name_or_path = outer.base_model_name_or_path or vars(surgery_of(model).base).get("name_or_path")
    config.revision, config.inference_mode = outer.revision, True
    return config


# -- prompt-embeds -----------------------------------------------------------------------------------------------------
def write_prompt(model: Any, folder: Path, stacks: Stacks, without: Collection[str], ids: Tensor | None = None) -> None:
    """Write the embeddings of a prompt with the tokens of the banks that stand in it."""
    (stack,) = stacks.values()
    parts = leaving(stack, "prompt-embeds", without)
    words = {part.name: type(m).prompt_ids(m.config) for part in parts for _, m in part.methods[:1] if type(m).prompt_ids(m.config)}
    blocks = {id(block): block for part in parts if part.name in words for block, _ in part.methods}
    if len(blocks) != 1 or ids is None and len(words) != 1:
        rule = "What leaves as 'prompt-embeds' is one learned prompt, or a whole prompt with several in it"
        remedy = "Pass `input_ids`, the whole prompt." if len(blocks) == 1 else "Choose another form."
        raise UnsupportedError(explain(rule, f"{len(words)} of them in {len(blocks)} streams: {sorted(words)}", remedy))
    (block,) = blocks.values()
    device = block.base.get_submodule(block.surgery.stream.table).weight.device
    ids = torch.tensor([*words.values()][0] if ids is None else ids.reshape(-1).tolist(), device=device)
    with evaluated(model):
        embeds = looked_up(block, ids[None], [method for part in parts for _, method in part.methods])[0]
    tensors = {"prompt_embeds": embeds.cpu().contiguous(), "input_ids": ids.cpu()}
    with placing(folder) as written:
        save_file(tensors, str(written / PROMPT_EMBEDS), metadata={"format": "pt", "methods": ", ".join(sorted(words))})


# -- custom-generate ---------------------------------------------------------------------------------------------------
def write_code(model: Any, folder: Path, stacks: Stacks, without: Collection[str], ids: Tensor | None = None) -> None:
    """Write the code of a cache compressor as a repository that `generate` runs."""
    (stack,) = stacks.values()
    parts = leaving(stack, "custom-generate", without)
    if len(parts) != 1 or len({block.surgery for block, _ in parts[0].methods}) != 1:
        rule = "What leaves as 'custom-generate' is one cache compressor in one stream"
        raise UnsupportedError(explain(rule, [part.name for part in stack], "Choose another form, or leave the others behind."))
    texts = repository(parts[0].methods[0][1])
    with placing(folder) as written:
        for name, text in texts.items():
            (written / name).parent.mkdir(parents=True, exist_ok=True)
            (written / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class ExportForm:
    """One form of export.

    Attributes:
        rule: What it holds, the beginning of an error.
        write: Writes it: a model, the folder, the stacks, the names that stay behind and the ids of a prompt.
        one_model: Whether it is of one model, and not of a pipeline with two denoisers.
        of_a_part: Whether it is a part of a stack by itself, so that nothing is lost that was to be there.
    """

    rule: str
    write: Callable[[Any, Path, Stacks, Collection[str], Tensor | None], None]
    one_model: bool = False
    of_a_part: bool = False


EXPORT_FORMS = {
    "checkpoint": ExportForm("What leaves as 'checkpoint' is in the weights of the model", write_checkpoint),
    "lora": ExportForm("What leaves as 'lora' is a PEFT method of the stack", write_loras, of_a_part=True),
    "prompt-embeds": ExportForm("What leaves as 'prompt-embeds' is in the embeddings of a prompt", write_prompt, one_model=True),
    "custom-generate": ExportForm("What leaves as 'custom-generate' drops entries of the cache by a score", write_code, one_model=True),
}
