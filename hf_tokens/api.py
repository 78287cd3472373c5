"""The doors: put a surgery into a model, load one, calibrate it, take it out."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from .errors import ConfigError, did_you_mean, explain
from .handlers.judged import first_tensor
from .handlers.objective import judge_prediction
from .peft.config import HFTokensConfig
from .roles.config import MethodConfig
from .tools.loading import beside_its_like, stand_before_push
from .tools.surgeries import inject_all, models_in, surgeries_of, surgery_of, take_out

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


def get_token_model(model: Any, methods: Methods, adapter_name: str = "default", **kwargs: Any) -> Any:
    """Put methods into a model.

    Args:
        model: A Transformers or Diffusers model, a PeftModel, or a diffusers pipeline.
        methods: A method's name, a config, or a list of them; a LoraConfig may stand among them.
        adapter_name: Name of the adapter.
        kwargs: Further arguments of `HFTokensConfig`, such as `modules_to_save` or `task_type`.

    Returns:
        A PeftModel, or the pipeline that was passed, with the methods in its denoiser; in each of two, where they share its run.

    Raises:
        ConfigError: A method is unknown or a knob out of bounds.
        UnsupportedError: The methods do not fit the model. The model is as it was.
    """
    models, config = models_in(model), adapter_config(methods, **kwargs)
    if not isinstance(model, nn.Module):
        inject_all(model, {name: copy.deepcopy(config) if len(models) > 1 else config for name in models}, adapter_name)
        stand_before_push(model, adapter_name)
        return model
    if beside_its_like(model, config):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
        return model
    return get_peft_model(model, config, adapter_name=adapter_name)


def conclusions(model: Any) -> dict[str, Tensor]:
    """What token banks concluded in the last forward that had their tokens, such as the classes of a picture.

    Args:
        model: A PeftModel or pipeline with a surgery.

    Returns:
        By the key of the method, its adapter and place in the stack (`"default.0"`), what its card names; without gradient.
    """
    return dict(surgery_of(model).conclusions)


def aux_loss(model: Any) -> Tensor:
    """The sum of the methods' losses in the last forward, for training loops that compute their own loss."""
    extra = surgery_of(model).extra_loss()
    return torch.zeros(()) if extra is None else extra


def objective_loss(model: Any, target: Tensor, read: Callable[[Any], Tensor] = first_tensor) -> Tensor:
    """The loss of a denoiser's last call, by the adapter's objectives: for training loops, in the place of `mse_loss`.

    Args:
        model: A denoiser or a pipeline with an objective in its adapter. It was called on the noised latents just before.
        target: What it is to predict: the noise, the velocity or the flow.
        read: Takes the prediction from the denoiser's output: its first tensor, of which the variance that some have beside it is left out.

    Raises:
        UnsupportedError: The model was not called, has no objective, or its prediction has another shape than the target.
    """
    return judge_prediction(surgery_of(model), target, read)


def set_progress(model: Any, progress: float, updates: int = 0) -> None:
    """Set how much of the training is done for all schedules, in [0, 1], and the optimizer's steps so far; a Trainer does it by itself."""
    surgeries = surgeries_of(model)
    if not isinstance(progress, (int, float)) or not 0 <= progress <= 1:
        raise ConfigError(explain("The progress of a training is in [0, 1]", repr(progress), "Pass steps done / steps to do."))
    if not isinstance(updates, int) or isinstance(updates, bool) or updates < 0:
        raise ConfigError(explain("The optimizer's steps are counted from 0", repr(updates), "Pass the steps done."))
    for surgery in surgeries.values():
        surgery.set_progress(progress, updates)


def unload(model: Any) -> Any:
    """Take every surgery out of a model or pipeline; returns what was there before."""
    if isinstance(model, PeftModel):
        return model.unload()
    models = models_in(model)
    for name in surgeries_of(model):
        take_out(models[name])
    vars(model).pop("push_to_hub", None)  # a pipeline pushes itself again
    return model
