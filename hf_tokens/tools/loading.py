"""An adapter from a folder or the Hub, and back."""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import is_diffusers_available

from ..errors import AdapterError, UnsupportedError, explain
from ..model.pipelines import SECOND, SURGICAL
from ..peft.config import HFTokensConfig
from ..peft.doors import CONFIG, WEIGHTS, without
from ..peft.files import MISREAD, header
from ..peft.publishing import known_base, known_of, put_card
from ..peft.reading import whole
from ..peft.saving import PEFT_PREFIX
from ..peft.tuner import check_name
from .surgeries import blocks_in, inject_all, instances, models_in, surgeries_of

if TYPE_CHECKING:
    from ..peft.card import Known

DENOISERS = (*SURGICAL, *SECOND)
FILES = [str(Path(folder, name)) for folder in ("", *DENOISERS) for name in (CONFIG, WEIGHTS)]  # of an adapter
OF_A_BASE = ("config.json", "model_index.json")  # files by which a model or a pipeline is known, which an adapter has not


def beside_its_like(model: Any, config: HFTokensConfig) -> bool:
    """Whether a model is a PeftModel of adapters like ours, which takes one more; around another one goes a PeftModel of our own."""
    return isinstance(model, PeftModel) and all(c.peft_type == config.peft_type for c in model.peft_config.values())


# -- loading ---------------------------------------------------------------------------------------------------------
def load(
    repo: str | Path,
    model: Any | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **kwargs: Any,
) -> Any:
    """Load an adapter from a folder or the Hub, and its base model unless one is given.

    Args:
        repo: Folder or Hub id of the adapter.
        model: The base model or pipeline; None loads the one that the adapter names.
        revision: Branch, tag or commit of the adapter.
        token: Hub token.
        adapter_name: Name of the adapter in the model.
        is_trainable: Whether its parameters will be trained.
        kwargs: Arguments of the base model's `from_pretrained`.

    Raises:
        AdapterError: A file is missing, damaged, or made for another base. A model that was passed is as it was.
    """
    folder = Path(repo)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(repo), revision=revision, token=token, allow_patterns=[*FILES, *OF_A_BASE]))
        except HFValidationError:
            rule = "An adapter is a folder or a Hub id like owner/name"
            raise AdapterError(explain(rule, repr(str(repo)), "There is no such folder: check the path.")) from None
    models = {"": None} if model is None else models_in(model)
    parts = parts_of(folder, repo, list(models))
    configs = {name: HFTokensConfig.from_pretrained(str(part)) for name, part in parts.items()}
    config = next(iter(configs.values()))
    if model is None:
        model = base_model(config, token=token, **kwargs)
    beside = beside_its_like(model, config)
    if beside:
        check_name(adapter_name, model.peft_config)
    with whole(f"The methods in {CONFIG} must go into {type(model).__name__}", "Save the adapter again.", MISREAD):
        if not isinstance(model, nn.Module):
            inject_all(model, configs, adapter_name, lambda name: fill(models[name], parts[name], adapter_name))
            stand_before_push(model, adapter_name)
            return model
        if beside:
            model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
            model.set_adapter(adapter_name)
            return model
        return PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config)


def parts_of(folder: Path, repo: str | Path, names: list[str]) -> dict[str, Path]:
    """The folder of each model's adapter, with the files in it checked: for several models, folders of their names in one folder."""
    if len(names) == 1:
        check_files(folder, repo)
        return {names[0]: folder}
    if (folder / CONFIG).is_file() and not any((folder / name).is_dir() for name in names):
        rule = f"The adapter of a pipeline with {' and '.join(names)} has a folder for each"
        remedy = f"Load it into the denoiser that it was made for, such as `hf_tokens.load({str(repo)!r}, pipe.{names[0]})`."
        raise AdapterError(explain(rule, f"{repo}, the adapter of one model", remedy))
    for name in names:
        check_files(folder / name, Path(repo, name))
    return {name: folder / name for name in names}


def check_files(folder: Path, repo: str | Path) -> None:
    """Refuse an adapter whose files are missing or damaged, before anything is changed."""
    files = {name: (folder / name).is_file() for name in (CONFIG, WEIGHTS, *OF_A_BASE)}
    missing = next((name for name in (CONFIG, WEIGHTS) if not files[name]), None)
    if missing == CONFIG and (found := [name for name in DENOISERS if (folder / name / CONFIG).is_file()]):
        rule, got = "An adapter with a folder for each denoiser goes into a pipeline that has them", f"{repo} with {' and '.join(found)}"
        raise AdapterError(explain(rule, got, "Pass that pipeline as `model=`, or load one of the folders into its denoiser."))
    if missing == CONFIG and any(files[name] for name in OF_A_BASE):
        remedy = "Load it by its own `from_pretrained`, and call `hf_tokens.get_token_model` or pass it as `model=` beside an adapter."
        raise AdapterError(explain("hf_tokens.load needs an adapter", f"{repo}, which is a base model", remedy))
    if missing is not None:
        raise without(repo, missing)
    HFTokensConfig.from_json_file(str(folder / CONFIG))
    header(folder / WEIGHTS)


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def kinds_of_base(library: str) -> tuple[type, ...]:
    """The classes of a library whose subclasses an adapter may name as its base's; none of a stranger's library."""
    root = library.partition(".")[0]
    if root == "transformers":
        return PreTrainedModel, _BaseAutoModelClass
    if root == "diffusers" and is_diffusers_available():
        from diffusers import ModelMixin

        return (ModelMixin,)
    return ()


def class_of_base(library: Any, name: Any) -> type:
    """The class that an adapter names: that of a model of Transformers or Diffusers; nothing else is imported."""
    kinds = kinds_of_base(str(library))
    try:
        cls = getattr(importlib.import_module(library), name) if kinds else None
    except (ImportError, AttributeError, TypeError):
        cls = None
    if not isinstance(cls, type) or not issubclass(cls, kinds):
        rule = "An adapter names a class of models of transformers or diffusers"
        raise AdapterError(explain(rule, repr(f"{library}.{name}")[:120], "Load the base yourself, and pass `model=`."))
    return cls


def base_model(config: HFTokensConfig, **kwargs: Any) -> nn.Module:
    """The base model that an adapter names."""
    mapping, name = config.auto_mapping or {}, config.base_model_name_or_path
    if name is None or "base_model_class" not in mapping and config.task_type is None:
        raise AdapterError(explain("An adapter names its base model and class", name, "Pass `model=`."))
    if "base_model_class" in mapping:
        cls = class_of_base(mapping.get("parent_library"), mapping["base_model_class"])
    else:
        cls = class_of_base("transformers", AUTO_CLASSES[getattr(config.task_type, "value", config.task_type)])
    return cls.from_pretrained(name, revision=config.revision, **kwargs)


def fill(model: nn.Module, folder: Path, adapter_name: str) -> None:
    """Give an adapter in a pipeline's denoiser its saved tensors."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = {key.removeprefix(PEFT_PREFIX): value for key, value in load_peft_weights(str(folder)).items()}
    set_peft_model_state_dict(model, weights, adapter_name)


def recall(model: nn.Module, adapter_name: str) -> None:
    """Give a model the config of an adapter in it again: when diffusers unloads its LoRAs, it throws away the configs of all adapters."""
    configs = vars(model).setdefault("peft_config", {})
    if adapter_name in configs:
        return
    stack = {int(method.key.rpartition(".")[2]): method.config for method in instances(model, adapter_name)}
    if not stack:
        known = sorted({name for block in blocks_in(model) for name in block.hf_tokens_methods})
        raise UnsupportedError(explain(f"The adapter must be one of {known}", repr(adapter_name), "Pass `adapter_name`."))
    configs[adapter_name] = HFTokensConfig(methods=[stack[slot] for slot in sorted(stack)])


def card(model: Any, adapter_name: str = "default") -> ModelCard:
    """The card of an adapter, as a save or push writes it: what it does, how it is loaded, its knobs, how it was made.

    Args:
        model: A PeftModel, a model or a pipeline with a surgery.
        adapter_name: Name of the adapter.

    Returns:
        A `huggingface_hub.ModelCard`. A trainer's results and what `hf_tokens.measure` found of this model stand in it, as text and as
        `model-index`. Of the base it says what the base does itself: a licence that nobody named is left out.

    Raises:
        UnsupportedError: The model has no surgery, or no adapter of that name.
    """
    from ..peft.card import make_card

    return make_card(known(model, adapter_name))


def known(model: Any, adapter_name: str, repo: str | None = None, **asking: Any) -> Known:
    """What the card of a model's or pipeline's adapter says."""
    surgeries_of(model)
    models = models_in(model)
    for inner in models.values():
        if not isinstance(inner, PeftModel):
            recall(inner, adapter_name)
    parts = {name: known_of(inner, [adapter_name], repo, **asking) for name, inner in models.items()}
    adapters = {name if len(models) > 1 else "": next(iter(part.adapters.values())) for name, part in parts.items()}
    first = next(iter(parts.values()))
    count = sum(part.parameters for part in parts.values())
    return replace(first, adapters=adapters, base=known_base(model, adapters, **asking), parameters=count)


def save_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Save the adapter of a PeftModel or of a pipeline's denoiser, with its card; those of two into folders of their names in this one."""
    surgeries_of(model)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])
    else:
        write_adapter(model, Path(folder), adapter_name)


def write_adapter(model: Any, folder: Path, adapter_name: str, repo: str | None = None, **asking: Any) -> None:
    """Write the files of an adapter that is in no PeftModel, with its card; `repo` and `asking` are for that."""
    models = models_in(model)
    for inner in models.values():
        recall(inner, adapter_name)
    parts = [Path(folder, name if len(models) > 1 else "") for name in models]
    for part in parts[1:]:  # what a killed save leaves is no mixture of two adapters
        (part / CONFIG).unlink(missing_ok=True)
    for inner, part in zip(models.values(), parts, strict=True):
        save_into(part, inner, adapter_name)
    put_card(folder, known(model, adapter_name, repo, **asking))


def save_into(folder: Path, model: nn.Module, adapter_name: str) -> None:
    """Write the files of an adapter in a model."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    tensors = {PEFT_PREFIX + key: value.contiguous().cpu() for key, value in state.items()}
    config = model.peft_config[adapter_name]
    config.announce(tensors, folder)
    save_file(tensors, str(folder / WEIGHTS))
    config.save_with(tensors, folder)


# -- pushing ---------------------------------------------------------------------------------------------------------
class PipelinePush:
    """`pipe.push_to_hub` while an adapter is in a pipeline: what is pushed is the adapter, as `PeftModel.push_to_hub` does it."""

    def __init__(self, pipeline: Any, adapter_name: str):
        self.pipeline, self.adapter_name = pipeline, adapter_name

    def __call__(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Push the adapter and its card.

        Args:
            repo_id: Repository on the Hub, which is made if there is none.
            commit_message: Of the commit.
            private: Whether a repository that is made is private.
            token: Hub token.
            create_pr: Whether to open a pull request.
        """
        api = HfApi(token=token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(EntryNotFoundError):  # what somebody has written there stays
                card = Path(hf_hub_download(repo, "README.md", token=token))
                Path(folder, card.name).write_bytes(card.read_bytes())
            write_adapter(self.pipeline, Path(folder), self.adapter_name, repo, asks=True, token=token)
            message = commit_message or "Upload adapter"
            return api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, create_pr=create_pr)


def stand_before_push(pipeline: Any, adapter_name: str) -> None:
    """Have a pipeline push the adapter that has come into it."""
    vars(pipeline)["push_to_hub"] = PipelinePush(pipeline, adapter_name)
