"""Pipelines of diffusers: which of their components denoise, and of whose prompt the parts of their denoiser's calls are."""

from __future__ import annotations

import re
import sys
from typing import Any

from ..errors import UnsupportedError, explain
from .signatures import parameters

# -- which components denoise ------------------------------------------------------------------------------------------
SURGICAL = ("transformer", "unet")  # the names of components in which a surgery is
SECOND = ("transformer_2", "unconditional_transformer")  # names of a second denoiser, whatever is wrapped around it
TIMESTEPS = {"timestep", "timesteps", "timestep_ratio", "t"}  # what a denoiser takes, whatever a pipeline calls it
BESIDE_DENOISER = re.compile(r"ControlNet|Adapter")  # these take a timestep, and put out what a denoiser reads


def denoising(pipeline: str, components: dict[str, Any]) -> Any:
    """The denoiser among the components of a pipeline; None if there is none.

    Raises:
        UnsupportedError: There are several: a surgery in one of them would be half of one.
    """
    found = [name for name, component in components.items() if denoises(name, component)]
    if len(found) > 1:
        rule = "A surgery in a pipeline is in all that denoises, one `transformer` or `unet`"
        remedy = f"Pass each by itself, `{'`, `'.join(f'pipe.{name}' for name in found)}`: each gets an adapter of its own, edits too."
        raise UnsupportedError(explain(rule, f"a {pipeline} with {' and '.join(found)}", remedy))
    return next((components[name] for name in SURGICAL if components.get(name) is not None), None)


def denoises(name: str, component: Any) -> bool:
    """Whether a component of a pipeline denoises: by its name, or as a model that takes a timestep."""
    if component is None or name in (*SURGICAL, *SECOND):
        return component is not None
    model = isinstance(component, sys.modules["diffusers"].ModelMixin) and not BESIDE_DENOISER.search(type(component).__name__)
    return model and not TIMESTEPS.isdisjoint(parameters(type(component)))
