"""Where an adapter gets its card: at each save, push and checkpoint, whoever does it; a file that somebody has edited stays as it is."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.model import ModelSurgery
from ..engine.results import World
from .doors import Push, calling_push, calling_saver, is_drafting, saves_checkpoint, saving_trainer

if TYPE_CHECKING:
    from transformers import Trainer

    from .card import Base, Known
    from .config import HFTokensConfig
    from .history import MeasuredCost, Training

OF_LICENCE = ("license", "license_name", "license_link")
NOT_TOLD = (EntryNotFoundError, HfHubHTTPError, HFValidationError, OfflineModeIsEnabled)  # what the Hub says of what it does not tell


class CardWorld(World):
    """What a card tells of a model's past: who trained it, and what was measured."""

    def __init__(self):
        self._trainer: weakref.ref | None = None
        self._past: Callable[[], Training] | None = None
        self._costs: dict[tuple[str, bool], Mapping[str, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_trainer": None, "_past": None, "_costs": {}}

    def training_begins(self, model: ModelSurgery) -> None:
        trainer = model.losses.trainer
        if trainer is not None:
            self.follow(trainer)

    def follow(self, trainer: Trainer) -> None:
        """A trainer trains the model, evaluates or pushes it: its card is ours from now on."""
        from .history import reading

        if self._trainer is None or self._trainer() is not trainer or self._past is None or self._past.args[1] is not trainer.state:
            self._trainer, self._past = weakref.ref(trainer), reading(trainer)
            take_card(trainer)

    def note(self, inputs: str, is_on: bool, cost: Mapping[str, int]) -> None:
        """A forward of the model was measured, with the adapter or without it."""
        self._costs.pop((inputs, is_on), None)
        self._costs[inputs, is_on] = cost

    @property
    def trained(self) -> Training | None:
        """What a trainer did."""
        return None if self._past is None else self._past()

    @property
    def measured(self) -> MeasuredCost | None:
        """What was measured last."""
        from .history import MeasuredCost

        inputs = next((inputs for inputs, is_on in reversed(self._costs) if is_on), None)
        return None if inputs is None else MeasuredCost(inputs, self._costs[inputs, True], self._costs.get((inputs, False)))


def surgery_in(model: nn.Module) -> ModelSurgery | None:
    """The surgery in a model; None where there is none."""
    return next((module.surgery.model for module in model.modules() if isinstance(module, BlockSurgery)), None)


def world_of(surgery: ModelSurgery) -> CardWorld:
    """The part of a surgery that a card is made from."""
    return next(world for world in surgery.worlds if isinstance(world, CardWorld))


def note_cost(surgery: ModelSurgery, inputs: Mapping[str, Any], cost: Mapping[str, int]) -> None:
    """Keep what a forward cost for the card."""
    shapes = ", ".join(f"`{name}` {list(value.shape)}" for name, value in inputs.items() if isinstance(value, Tensor))
    world_of(surgery).note(shapes, next(surgery.methods(), None) is not None, cost)


# -- what is known of a model ----------------------------------------------------------------------------------------
def is_public(name: str | None) -> bool:
    """Whether a base has an id on the Hub, and is no folder here."""
    if name is None or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def licence_of(name: str | None, asks: bool, token: str | bool | None = None) -> dict[str, str]:
    """What the card of a base says of its licence: the one in its folder, or on the Hub.

    Args:
        name: The base.
        asks: Whether the Hub may be asked; else only what was downloaded is read.
        token: For the Hub.
    """
    from .card import README, read_header

    if name is None:
        return {}
    try:
        where = name if Path(name).is_dir() else Path(hf_hub_download(name, README, token=token, local_files_only=not asks)).parent
    except NOT_TOLD:
        return {}
    told = read_header(text_of(Path(where, README)) or "")
    return {key: told[0][key] for key in OF_LICENCE if isinstance(told[0].get(key), str)} if told is not None else {}


def task_of(kind: str) -> str | None:
    """What a model of a class does, in the Hub's words, if transformers knows one thing."""
    from transformers.modelcard import TASK_MAPPING

    names = lambda mapping: [name for value in mapping.values() for name in (value if isinstance(value, (tuple, list)) else (value,))]
    found = [task for task, mapping in TASK_MAPPING.items() if kind in names(mapping)]
    return found[0] if len(found) == 1 else None


def known_base(model: Any, configs: Mapping[str, HFTokensConfig], asks: bool = False, token: str | bool | None = None) -> Base:
    """What is known of the base of an adapter: a model, or a pipeline of diffusers."""
    from .card import Base

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    is_pipeline = not isinstance(base, nn.Module)
    told = base.name_or_path if is_pipeline else vars(base).get("name_or_path")  # as PEFT reads it
    name = told or next((config.base_model_name_or_path for config in configs.values()), None) or None
    kind, library = type(base).__name__, type(base).__module__.partition(".")[0]
    return Base(name, is_public(name), kind, library, is_pipeline, licence_of(name, asks, token), None if is_pipeline else task_of(kind))


def ours_in(model: nn.Module) -> dict[str, HFTokensConfig]:
    """The configs of our adapters in a model."""
    from .config import HFTokensConfig

    configs = model.peft_config if isinstance(model, PeftModel) else vars(model).get("peft_config", {})
    return {name: config for name, config in configs.items() if isinstance(config, HFTokensConfig)}


def known_of(model: nn.Module, names: list[str] | None = None, repo: str | None = None, **asking: Any) -> Known:
    """All that a card says of the adapters in a model.

    Args:
        model: The model.
        names: The adapters that it is about; all of them by default.
        repo: Their id on the Hub, where it is known.
        asking: Whether the Hub may be asked for the licence, and a token for it.
    """
    from .card import Known

    configs = {name: config for name, config in ours_in(model).items() if names is None or name in names}
    world = world_of(surgery_in(model))
    count = sum(p.numel() for key, p in model.named_parameters() if any(f".{name}." in key for name in configs))
    folders = {"" if name == "default" else name: configs[name] for name in sorted(configs, key=lambda name: name != "default")}
    return Known(folders, known_base(model, configs, **asking), count, repo, world.trained, world.measured)


# -- where it is put -------------------------------------------------------------------------------------------------
def text_of(path: Path) -> str | None:
    """What stands in a file; None where there is none."""
    return path.read_text(encoding="utf-8-sig") if path.is_file() else None


def put_card(folder: Path, known: Known, is_draft: bool = False) -> None:
    """Write the card and the script into a folder, each where nobody has written one.

    Args:
        folder: The folder.
        known: What they say.
        is_draft: Whether the card that is there was written by a trainer just now: what its header says is taken over.
    """
    from .card import README, SCRIPT, draft_of, is_blank, is_ours, make_card, make_script

    card, script = text_of(folder / README), text_of(folder / SCRIPT)
    folder.mkdir(parents=True, exist_ok=True)
    if card is None or is_ours(card):
        make_card(known).save(folder / README)
    elif is_draft or is_blank(card):
        make_card(replace(known, draft=draft_of(card))).save(folder / README)
    if script is None or is_ours(script, SCRIPT):
        (folder / SCRIPT).write_text(make_script(known), encoding="utf-8")


def fill_push(push: Push, known: Known) -> None:
    """Have a push upload our card in the place of an empty template, and of our own from before."""
    from .card import draft_of, is_blank, is_ours, make_card

    content = without_tags(push.card, push.tags) if push.tags and not is_ours(push.card.content) else push.card.content
    draft = {"tags": list(push.tags)} if is_ours(content) else draft_of(push.card.content) if is_blank(content) else None
    if draft is not None:
        push.card.content = make_card(replace(known, draft=draft)).content


def without_tags(card: ModelCard, tags: tuple[str, ...]) -> str:
    """A card without tags that a push has put on it."""
    bare = ModelCard(card.content)
    bare.data.tags = [tag for tag in bare.data.tags or () if tag not in tags]
    return bare.content


def publish(model: nn.Module, folder: Path) -> None:
    """Write the card of the adapters that are being saved into a folder, and have it uploaded where they are being pushed."""
    saver, push, trainer = calling_saver(), calling_push(), saving_trainer()
    repo, asks, token = (None, False, None) if push is None else (push.repo, True, push.token)
    if trainer is not None:
        world_of(surgery_in(model)).follow(trainer)
        if trainer.args.push_to_hub or trainer.hub_model_id is not None:
            repo, asks, token = trainer.hub_model_id, True, trainer.args.hub_token
    known = known_of(model, None if saver is None else saver.f_locals["selected_adapters"], repo, asks=asks, token=token)
    put_card(folder, known, is_drafting())
    if trainer is not None and trainer.args.push_to_hub and saves_checkpoint():
        put_card(Path(trainer.args.output_dir), known)
    if push is not None and push.card is not None:
        fill_push(push, known)


class CardDoor:
    """What a PeftModel with our adapters in it calls for its card, `model.create_or_update_model_card(folder)`."""

    def __init__(self, model: PeftModel):
        self.model = model

    def __call__(self, output_dir: str) -> None:
        if surgery_in(self.model) is None or not ours_in(self.model):
            type(self.model).create_or_update_model_card(self.model, output_dir)
        else:
            publish(self.model, Path(output_dir))


def take_card(trainer: Trainer) -> None:
    """Have the draft that a trainer writes of the model become our card; what stood there before stays, if it is somebody's."""
    if "create_model_card" in vars(trainer):
        return
    inner = trainer.create_model_card

    @functools.wraps(inner)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        from .card import README, is_blank, is_ours

        path = Path(trainer.args.output_dir, README)
        before = path.read_bytes() if path.is_file() else None
        inner(*args, **kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        if not trainer.is_world_process_zero() or surgery_in(model) is None:
            return
        text = None if before is None else before.decode("utf-8-sig")
        if text is not None and not is_ours(text) and not is_blank(text):
            path.write_bytes(before)
        elif not is_ours(text_of(path)):
            asking = {"asks": trainer.hub_model_id is not None, "token": trainer.args.hub_token}
            put_card(path.parent, known_of(model, None, trainer.hub_model_id, **asking), True)

    trainer.create_model_card = create_model_card
