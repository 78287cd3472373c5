"""How much what a denoiser puts out changes from step to step, by how much what it computes first does: polynomials that were fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .classes import class_name


@dataclass(frozen=True)
class FittedChange:
    """What was fitted for a denoiser, and how its authors use it.

    Attributes:
        of: The signal whose relative change is the polynomial's argument.
        polynomial: Its coefficients, that of the highest degree first.
        threshold: Up to which sum of the values steps are much the same.
        first, last: Steps at both ends of a run for which it does not hold.
    """

    of: str
    polynomial: tuple[float, ...]
    threshold: float
    first: int = 1
    last: int = 1


INPUT, TIME = "attention_input", "time_embedding"
COGVIDEOX = {
    "2b": FittedChange(TIME, (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434), 0.1),
    "5b": FittedChange(TIME, (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339), 0.1),
    "1.5": FittedChange(TIME, (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703), 0.2),
    "1.5 of a picture": FittedChange(TIME, (122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322), 0.2),
}
WAN = {  # with the projected embedding, which is what its blocks are given
    30: FittedChange(TIME, (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664), 0.2, first=5, last=0),
    40: FittedChange(TIME, (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), 0.2, first=5, last=0),
}


def of_cogvideox(config: Any) -> FittedChange | None:
    """By the size, and by what is given beside the noise."""
    if config.patch_size_t is not None:
        return COGVIDEOX["1.5" if config.ofs_embed_dim is None else "1.5 of a picture"]
    return {30: COGVIDEOX["2b"], 42: COGVIDEOX["5b"]}.get(config.num_layers)


# class of a denoiser -> what was fitted for it, by its config; None for one of other sizes
CHANGES: dict[str, Callable[[Any], FittedChange | None]] = {
    "FluxTransformer2DModel": lambda config: FittedChange(INPUT, (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861), 0.6),
    "HunyuanVideoTransformer3DModel": lambda config: FittedChange(
        INPUT, (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896), 0.15
    ),
    "LTXVideoTransformer3DModel": lambda config: FittedChange(
        INPUT, (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326), 0.05
    ),
    "MochiTransformer3DModel": lambda config: FittedChange(INPUT, (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719), 0.09),
    "Lumina2Transformer2DModel": lambda config: FittedChange(
        INPUT, (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344), 0.3
    ),
    "CogVideoXTransformer3DModel": of_cogvideox,
    "ConsisIDTransformer3DModel": lambda config: COGVIDEOX["5b"],
    "WanTransformer3DModel": lambda config: WAN.get(config.num_layers) if config.image_dim is None else None,
}


def change_of(model: nn.Module) -> FittedChange | None:
    """What was fitted for a denoiser; None where nothing is known."""
    row = CHANGES.get(class_name(model))
    return None if row is None else row(model.config)
