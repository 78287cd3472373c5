"""The doors: put a surgery into a model, load one, calibrate it, take it out."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .adapter import NAME, PEFT_METHOD, HFTokensConfig
from .anatomy import denoising
from .config import MethodConfig
from .errors import AdapterError, ConfigError, UnsupportedError, did_you_mean, explain
from .layer import BlockSurgery
from .objectives import first_tensor, judge_prediction
from .registry import method_config
from .roles import Method
from .root import Root
from .tuner import check_name, names_of_ours, take_off

TRIAL = "a_trial"  # adapter that only says which tensors an adapter has
PREFIX = "base_model.model."  # how a PeftModel calls what is in its base
Methods = str | dict[str, Any] | MethodConfig | PeftConfig | Iterable[Any]


def adapter_config(methods: Methods, **kwargs: Any) -> HFTokensConfig:
    """The PEFT config of one method or a stack of them."""
    arguments = [field.name for field in dataclasses.fields(HFTokensConfig)]
    if unknown := sorted(kwargs.keys() - set(arguments)):
        rule = "`get_token_model` takes methods and arguments of HFTokensConfig"
        remedy = f"{did_you_mean(unknown, arguments)}Give a knob to its method: a config, or a dict with the key 'method'."
        raise ConfigError(explain(rule, unknown, remedy))
    if not isinstance(methods, HFTokensConfig):
        return HFTokensConfig(methods=methods, **kwargs)
    if kwargs:
        rule = "What belongs to an adapter stands in its HFTokensConfig, if one is passed"
        raise ConfigError(explain(rule, f"one and {sorted(kwargs)} beside it", "Pass them to HFTokensConfig."))
    return methods


def denoiser(pipeline: Any) -> nn.Module | None:
    """The denoiser of a diffusers pipeline; None for a plain model."""
    if isinstance(pipeline, nn.Module):
        return None
    components = getattr(pipeline, "components", None)
    if not isinstance(components, dict):
        raise UnsupportedError(
            explain(
                "A surgery needs a torch module or a diffusers pipeline", type(pipeline).__name__, "Pass the model that holds the blocks."
            )
        )
    found = denoising(components)
    if found is None:
        raise UnsupportedError(explain("A pipeline needs a `transformer` or a `unet`", sorted(components), "Pass the denoiser itself."))
    return found


def get_token_model(model: Any, methods: Methods, adapter_name: str = "default", **kwargs: Any) -> Any:
    """Put methods into a model.

    Args:
        model: A Transformers or Diffusers model, a PeftModel, or a diffusers pipeline.
        methods: A method's name, a config, or a list of them; a LoraConfig may stand among them.
        adapter_name: Name of the adapter.
        kwargs: Further arguments of `HFTokensConfig`, such as `modules_to_save` or `task_type`.

    Returns:
        A PeftModel, or the pipeline that came, with the methods in its denoiser.

    Raises:
        ConfigError: A method is unknown or a knob out of bounds.
        UnsupportedError: The methods do not fit the model. The model is as it was.
    """
    inner = denoiser(model)
    config = adapter_config(methods, **kwargs)
    if inner is not None:
        inject_adapter_in_model(config, inner, adapter_name)
        return model
    if beside_its_like(model, config):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def beside_its_like(model: Any, config: HFTokensConfig) -> bool:
    """Whether a model is a PeftModel of adapters like ours, which takes one more; around another one goes a PeftModel of our own."""
    return isinstance(model, PeftModel) and all(c.peft_type == config.peft_type for c in model.peft_config.values())


def sides(model: Any) -> list[BlockSurgery]:
    """Every surgery in a model or pipeline."""
    module = denoiser(model) or model
    return [m for m in module.modules() if isinstance(m, BlockSurgery)]


def root_of(model: Any) -> Root:
    """The root of the surgery in a model.

    Raises:
        UnsupportedError: There is none.
    """
    found = sides(model)
    if not found:
        raise UnsupportedError(explain("This needs a model with a surgery", type(model).__name__, "Call get_token_model first."))
    return found[0].runtime.root


def conclusions(model: Any) -> dict[str, Tensor]:
    """What token banks said in the end of the last forward that had their tokens, such as the classes of a picture.

    Args:
        model: A PeftModel or pipeline with a surgery.

    Returns:
        By the key of the method, its adapter and place in the stack (`"default.0"`), what its card says it returns; without gradient.
    """
    return dict(root_of(model).conclusions)


def aux_loss(model: Any) -> Tensor:
    """The sum of the methods' losses in the last forward, for training loops that compute their own loss."""
    extra = root_of(model).extra()
    return torch.zeros(()) if extra is None else extra


def objective_loss(model: Any, target: Tensor, read: Callable[[Any], Tensor] = first_tensor) -> Tensor:
    """The loss of a denoiser's last call, in the words of the adapter's objectives: for training loops, in the place of `mse_loss`.

    Args:
        model: A denoiser or a pipeline with an objective in its adapter. It was called on the noised latents just before.
        target: What it is to predict: the noise, the velocity or the flow.
        read: Takes the prediction from the denoiser's output: its first tensor, of which the variance that some have beside it is left out.

    Raises:
        UnsupportedError: The model was not called, has no objective, or its prediction has another shape than the target.
    """
    return judge_prediction(root_of(model), target, read)


def set_progress(model: Any, progress: float) -> None:
    """Tell schedules how much of the training is done, in [0, 1]; a Trainer does it by itself."""
    root = root_of(model)
    if not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise ConfigError(explain("The progress of a training is in [0, 1]", repr(progress), "Pass steps done / steps to do."))
    root.set_progress(progress)


def unload(model: Any) -> Any:
    """Take every surgery out of a model or pipeline; returns what was there before."""
    if isinstance(model, PeftModel):
        return model.unload()
    inner = denoiser(model) or model
    root, configs = root_of(model), vars(inner).get("peft_config", {})
    ours = names_of_ours(configs)
    take_off(inner, ours)
    for side in sides(model):
        side.detach()
    root.detach()
    for name in ours:
        del configs[name]
    if not configs:  # another library's adapters keep theirs
        vars(inner).pop("peft_config", None)
        vars(inner).pop("_hf_peft_config_loaded", None)
    return model


@torch.no_grad()
def calibrate(model: Any, batches: Iterable[dict[str, Any]], adapter_name: str = "default") -> dict[str, Any]:
    """Measure on data the knobs that a method wants measured, and write them into its config.

    Args:
        model: A model or pipeline with a surgery.
        batches: Keyword arguments of its call, one dict a batch; of a denoiser alone, one dict a step.
        adapter_name: The adapter to calibrate.

    Returns:
        The JSON form of every method that changed.

    Raises:
        UnsupportedError: There is no batch, or the adapter is not active.
    """
    root, changed = root_of(model), {}
    batches = list(batches)
    if not batches:
        raise UnsupportedError(explain("`calibrate` needs at least one batch", "none", "Pass the inputs of the model."))
    active = sorted({name for side in sides(model) for name in side.active_adapters})
    if adapter_name not in active:
        rule = f"`calibrate` measures an adapter that acts, one of {active}"
        raise UnsupportedError(explain(rule, repr(adapter_name), "Switch to it with `set_adapter`."))
    inner = denoiser(model) or model
    more = {} if root.denoising is not None and root.denoising.hook is not None else {"use_cache": True}
    training = [module for module in inner.modules() if module.training]  # a PeftModel and its base need not agree
    inner.eval()
    for runtime in root.runtimes:
        runtime.records = {}
    try:
        for batch in batches:
            model(**{**batch, **more})
        for key, records in group_records(root, adapter_name).items():
            method = next(m for m in root.methods() if m.key == key)
            changed[key] = type(method).calibrate(method.config, records)
    finally:
        for runtime in root.runtimes:
            runtime.records = None
        for module in training:
            module.training = True
    for key, config in changed.items():
        rewrite(model, key, config)
    return {key: config.to_dict() for key, config in changed.items()}


def set_method(model: Any, config: MethodConfig, adapter_name: str = "default") -> None:
    """Give a method that is in a model another config; its parameters stay.

    Args:
        model: A PeftModel with a surgery.
        config: The new config; the first method of this kind in the adapter takes it.
        adapter_name: The adapter.

    Raises:
        UnsupportedError: The adapter has no such method, or the config acts on other blocks or needs other parameters.
    """
    root_of(model)
    config = method_config(config)
    found = [method for method in instances(model, adapter_name) if type(method.config) is type(config)]
    if not found:
        raise UnsupportedError(
            explain(f"Adapter {adapter_name!r} must have the method {config.method!r}", "one without it", "Add it with get_token_model.")
        )
    old, key = found[0].config, found[0].key
    if (config.layers, config.stream) != (old.layers, old.stream):
        raise UnsupportedError(explain("A method stays in its blocks", f"layers={config.layers}", "Take the surgery out and start again."))
    mine = [method for method in found if method.key == key]
    for method in mine:
        method.check(config, method.dims.kind, method.dims.layers, tuple(m.dims.layer for m in mine))
        with torch.random.fork_rng(devices=[]):
            asked = shapes(type(method)(config, method.dims))
        if missing := dict(sorted(asked.items() - shapes(method).items())):
            came = f"a config that needs {missing} in block {method.dims.layer}"
            raise UnsupportedError(explain("A method keeps its parameters", came, "Take the surgery out and start again."))
    rewrite(model, key, config)


def shapes(method: Method) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a method saves."""
    return {name: tuple(value.shape) for name, value in method.state_dict().items()}


def instances(model: Any, adapter_name: str) -> list[Method]:
    """Every method of an adapter, in every block."""
    held = [side.hf_tokens_methods for side in sides(model)]
    return [method for methods in held if adapter_name in methods for method in methods[adapter_name].values()]


def rewrite(model: Any, key: str, config: MethodConfig) -> None:
    """Write a method's config into all its instances and into the adapter's config."""
    adapter_name, slot = key.rsplit(".", 1)
    mine = [method for method in instances(model, adapter_name) if method.key == key]
    before = mine[0].config
    try:
        give(model, mine, config)
    except UnsupportedError:
        give(model, mine, before)
        raise
    stack = (denoiser(model) or model).peft_config[adapter_name].methods
    stack[[i for i, m in enumerate(stack) if m["method"] != "peft"][int(slot)]] = config.to_dict()


def give(model: Any, methods: list[Method], config: MethodConfig) -> None:
    """Let methods have another config, and the blocks the hooks that it needs."""
    for method in methods:
        method.config = config
    for side in sides(model):
        side.renew()


def group_records(root: Root, adapter_name: str) -> dict[str, dict[int, list]]:
    """Records by method of an adapter: key -> place of the block -> values."""
    out: dict[str, dict[int, list]] = {}
    for runtime in root.runtimes:
        for layer, values in runtime.records.items():
            places = {method.key: method.dims.place for method in runtime.sides[layer].active()}
            for key, value in values:
                if key.rpartition(".")[0] == adapter_name:
                    out.setdefault(key, {}).setdefault(places[key], []).append(value)
    return out


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
        patterns = ["adapter_config.json", "adapter_model.safetensors"]
        try:
            folder = Path(snapshot_download(str(repo), revision=revision, token=token, allow_patterns=patterns))
        except HFValidationError:
            rule = "An adapter is a folder or a Hub id like owner/name"
            raise AdapterError(explain(rule, repr(str(repo)), "There is no such folder: check the path.")) from None
    check_files(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if model is None:
        model = base_model(config, token=token, **kwargs)
    inner = denoiser(model)
    beside = inner is None and beside_its_like(model, config)
    if beside:
        check_name(adapter_name, model.peft_config)
    if beside or not sides(model):
        check_tensors(model if inner is None else inner, config, folder)
    if inner is not None:
        return load_into(model, inner, folder, config, adapter_name)
    if beside:
        model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        model.set_adapter(adapter_name)
        return model
    return PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config)


def check_files(folder: Path) -> None:
    """Refuse an adapter whose files are missing or damaged, before anything is changed."""
    weights = folder / "adapter_model.safetensors"
    for path in (folder / "adapter_config.json", weights):
        if not path.is_file():
            raise AdapterError(explain(f"An adapter has a file {path.name}", f"a folder {folder} without it", "Save the adapter again."))
    try:
        data = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        rule = "adapter_config.json must be a whole JSON file"
        raise AdapterError(explain(rule, f"one that says: {error}", "Download or save it again.")) from error
    kind = data.get("peft_type") if isinstance(data, dict) else None
    if kind != NAME:
        raise AdapterError(explain(f"hf_tokens.load needs an adapter of type {NAME}", repr(kind), "Use peft for other adapters."))
    try:
        with safe_open(str(weights), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                file.get_slice(key).get_shape()
    except SafetensorError as error:
        raise AdapterError(
            explain(f"{weights.name} must be a whole safetensors file", f"one that says: {error}", "Download or save it again.")
        ) from error


def check_tensors(model: nn.Module, config: HFTokensConfig, folder: Path) -> None:
    """Refuse an adapter whose file lacks tensors that its methods need, or holds others: a trial tells, and the model is as it was."""
    tried = copy.deepcopy(config)
    for method in tried.methods:  # nothing begins here, and some beginnings of a LoRA change the base
        if method["method"] == PEFT_METHOD:
            method["config"] = {key: value for key, value in method["config"].items() if not key.startswith("init_")}
    beside = beside_its_like(model, config)
    trial = model if beside else get_peft_model(model, tried, adapter_name=TRIAL)
    if beside:
        model.add_adapter(TRIAL, tried)
    state = get_peft_model_state_dict(trial, adapter_name=TRIAL, save_embedding_layers=False)
    needed = {key: list(value.shape) for key, value in state.items()}
    if beside:
        model.delete_adapter(TRIAL)
    else:
        trial.unload()
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        there = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (a safetensors file is no dict)
    wrong = [f"{key} {there.get(key, 'missing')}" for key, shape in needed.items() if there.get(key) != shape]
    if wrong:
        rule = f"adapter_model.safetensors holds the {len(needed)} tensors of the methods in adapter_config.json"
        raise AdapterError(explain(rule, f"{len(wrong)} missing or of another shape, the first {wrong[0]}", "Save the adapter again."))


AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def base_model(config: HFTokensConfig, **kwargs: Any) -> nn.Module:
    """The base model that an adapter names."""
    mapping = config.auto_mapping or {}
    if config.base_model_name_or_path is None or "base_model_class" not in mapping and config.task_type is None:
        raise AdapterError(explain("An adapter names its base model and class", config.base_model_name_or_path, "Pass `model=`."))
    if "base_model_class" not in mapping:
        cls = AUTO_CLASSES[getattr(config.task_type, "value", config.task_type)]
        mapping = {"parent_library": "transformers", "base_model_class": cls}
    library = importlib.import_module(mapping["parent_library"])
    return getattr(library, mapping["base_model_class"]).from_pretrained(config.base_model_name_or_path, revision=config.revision, **kwargs)


def load_into(pipeline: Any, inner: nn.Module, folder: Path, config: HFTokensConfig, adapter_name: str) -> Any:
    """Inject a saved adapter into a pipeline's denoiser."""
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = {key.removeprefix(PREFIX): value for key, value in load_peft_weights(str(folder)).items()}
    inject_adapter_in_model(config, inner, adapter_name)
    set_peft_model_state_dict(inner, weights, adapter_name)
    return pipeline


def recall(model: nn.Module, adapter_name: str) -> None:
    """Give a model the config of an adapter in it again: when diffusers unloads its LoRAs, it throws away the configs of all adapters."""
    configs = vars(model).setdefault("peft_config", {})
    if adapter_name in configs:
        return
    stack = {int(method.key.rpartition(".")[2]): method.config for method in instances(model, adapter_name)}
    if not stack:
        known = sorted({name for side in sides(model) for name in side.hf_tokens_methods})
        raise UnsupportedError(explain(f"The adapter must be one of {known}", repr(adapter_name), "Pass `adapter_name`."))
    configs[adapter_name] = HFTokensConfig(methods=[stack[slot] for slot in sorted(stack)])


def save_adapter(model: Any, folder: str | Path, adapter_name: str = "default") -> None:
    """Save the adapter of a PeftModel or of a pipeline's denoiser."""
    root_of(model)
    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])
        return
    from safetensors.torch import save_file

    inner = denoiser(model) or model
    recall(inner, adapter_name)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(inner, adapter_name=adapter_name)
    save_file({PREFIX + key: value.contiguous().cpu() for key, value in state.items()}, str(folder / "adapter_model.safetensors"))
    inner.peft_config[adapter_name].save_pretrained(str(folder))
