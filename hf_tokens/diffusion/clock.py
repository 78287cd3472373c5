"""How far a denoiser's run is: by the scheduler of the pipeline that calls, else by the timestep in the units of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..model import families, pipelines
from ..model.classes import class_name
from .guidance import calling, owner


@dataclass(frozen=True)
class Tick:
    """A step of a pipeline's scheduler.

    Attributes:
        table: The scheduler's timesteps.
        clock: Which scheduler it is.
        index: The place of this one.
        level: What it is on a schedule of 1000, 1000 at pure noise; None where the scheduler counts in units of its own.
        falls: Whether the noise falls along the table; None where its timesteps are no shares of it, or that is not known.
        begin: The place at which the pipeline's run began; None where the scheduler does not know.
        span: The level there.
        shares: Whether the denoiser is given the share of noise, whatever the scheduler counts in.
    """

    table: Tensor
    clock: int
    index: int
    level: float | None
    falls: bool | None
    begin: int | None = None
    span: float | None = None
    shares: bool = False


def tick() -> Tick | None:
    """The step of the pipeline that is calling; None where none is, or its code does not say it."""
    for frame in calling():
        pipeline = frame.f_locals.get("self")
        given = next((frame.f_locals[name] for name in pipelines.STEPPED if name in frame.f_locals), None)
        if pipeline is None or not isinstance(given, (int, float)) and not (isinstance(given, Tensor) and given.numel() == 1):
            return None
        ticks = [find_tick(vars(pipeline)[name], float(given)) for name in pipelines.CLOCKS if name in vars(pipeline)]
        shares = owner(frame) in pipelines.GIVE_SHARES
        return next((replace(found, shares=shares) for found in ticks if found is not None), None)
    return None


def find_tick(scheduler: Any, timestep: float) -> Tick | None:
    """Where a timestep stands in the table of a scheduler."""
    table = vars(scheduler).get("timesteps")
    if not isinstance(table, Tensor) or not len(table):
        return None
    values = table.detach().cpu().double()
    at = (values == timestep).nonzero()
    if not len(at):
        return None
    begin = (scheduler.begin_index or 0) if "begin_index" in dir(type(scheduler)) else None
    if families.LOGARITHMS.search(class_name(scheduler)):
        sigma = float(scheduler.sigmas[int(at[0, 0])])
        return Tick(table, id(scheduler), int(at[0, 0]), 1000 * sigma / (sigma + scheduler.config.sigma_data), None, begin)
    levels = [level_of(scheduler, value) for value in (timestep, float(values[0]), float(values[-1]), float(values[begin or 0]))]
    known = None not in levels and bool(values.amin() >= 0) and bool(values.amax() <= scheduler.config.num_train_timesteps)
    level, first, last, span = levels if known else [None] * 4
    return Tick(table, id(scheduler), int(at[0, 0]), level, first >= last if known else None, begin, span)


def same_table(one: Tick, clock: int | None, table: Tensor | None) -> bool:
    """Whether a step is of this table of a scheduler, which some pipelines copy as they go."""
    return one.table is table or table is not None and one.clock == clock and torch.equal(one.table, table)


def level_of(scheduler: Any, timestep: float) -> float | None:
    """A timestep of a scheduler on a schedule of 1000, 1000 at pure noise; None where it counts in units of its own."""
    config = scheduler.config
    if not families.SCHEDULERS.search(class_name(scheduler)) or config.get("timestep_type", "discrete") != "discrete":
        return None
    level = 1000 * timestep / config.num_train_timesteps
    return 1000 - level if config.get("invert_sigmas", False) else level


def own_level(name: str, timestep: Tensor, shares: bool = False) -> Tensor | None:
    """A timestep in the units of a class of denoisers, or as a share of the noise, on that schedule; None where there is no such unit."""
    if families.UNKNOWN_TIME.search(name) and not shares:
        return None
    timestep = 1000 * timestep if shares or families.UNIT_TIME.search(name) else timestep
    timestep = 1000 - timestep if families.RISING_TIME.search(name) else timestep
    return timestep.round(decimals=3)  # a share is no whole number of thousandths in single precision


def falling(name: str, timestep: Tensor) -> float:
    """A timestep in the units of a class of denoisers, counted from the end of the noise; of parts at several ones it falls with each."""
    values = timestep.flatten()
    value = float(values[0] if bool((values == values[0]).all()) else values.double().mean())
    if not families.RISING_TIME.search(name):
        return value
    return (1 if families.UNIT_TIME.search(name) else 1000) - value


def agree(levels: Tensor, told: float) -> bool:
    """Whether what a denoiser is given is what the scheduler says, up to rounding: of all its tokens, the noisiest."""
    return abs(float(levels.amax()) - told) <= torch.finfo(torch.bfloat16).eps * 1000
