"""ProfilingDiT: once the noise has settled, blocks that attend to the background add again what they added a few steps before.

Paper:   Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models (Ma et al., ICCV 2025), arXiv:2504.03140
Needs:   calibration
Maths:   a_i = 1/N sum_j A_ij;  R = |{i in fg: a_i > h}| / |fg|;  B = {blocks with R < tau};  D_i = h_out - h_in of block i in B
         s > s0:  every T_s S / 50 steps all is computed,  else h := h + D_i in B;  T_s = T_max - (T_max - T_min) (s - s0) / (S - s0)
Differs: fg is the side of the noise's first principal component that touches the border less, split where the variance between the two
         is largest; the paper asks SAM 2. h and tau, which it does not give, are the mean of a and the median of R. Until calibrated, B
         is all blocks but the first and the last. T_s is that of the step last computed; the defaults fit the authors' list, 6, 18, 26,
         32, 38, 42, 46 and 48 of 50 steps, nearly: 18, 27, 34, 39, 43, 46 and 48. They have no other number of steps; here the intervals
         grow and shrink with it, as at 20 of them there would be 11 stale ones in a row. Theirs adds D over a run of blocks at once.
Checked: GeekGuru123/ProfilingDiT@a9b21bcc, by reading, the steps computed of its 50: largest difference 4 steps (34 for its 38); its
         function of steps is a list in the code, and the profiling that finds blocks and s0 is not in it.

>>> import torch
>>> from hf_tokens import ProfilingDiTConfig, calibrate, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/SD3Transformer2DModel")
>>> model = get_token_model(specimen.model, ProfilingDiTConfig(intervals="steps"))
>>> steps = [{**specimen.inputs, "timestep": torch.tensor([t, t])} for t in (900, 700, 500, 300, 100)]
>>> len(calibrate(model, steps)["default.0"]["background"])
2
>>> costs = [measure(model, **step).tokens for step in steps]
>>> costs[-1] < costs[0]
True
"""

import dataclasses
import math
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor

from hf_tokens import ConfigError, Dims, FeatureCache, MethodConfig, UnsupportedError, option, register

STEPS = 50  # of the authors' runs


@dataclass(frozen=True)
class ProfilingDiTConfig(MethodConfig):
    background: tuple[int, ...] | None = option(
        None, ge=0, zero=(), help="Those of its blocks that are reused (B), as calibration finds them."
    )
    start: float = option(0.12, ge=0, le=1, help="Share of the denoising that is computed whole (s0 / S), as calibration finds it.")
    max_interval: int = option(12, ge=1, help="Steps from one computation to the next at the start (T_max).")
    min_interval: int = option(2, ge=1, help="Steps from one computation to the next at the end (T_min).")
    intervals: str = option(
        "of 50", choices=("of 50", "steps"), was={1: "steps"}, help="of 50: the intervals are shares of a run, as of one of 50 steps."
    )
    high: float = option(1.0, ge=0, help="Attention that a token must exceed to count as high (h), in means of all tokens.")
    threshold: float | None = option(None, ge=0, le=1, help="Blocks with less of the foreground are background (tau). None: the median.")
    stable: float = option(0.5, ge=0, le=1, help="The noise has settled once it changes this little, in units of its largest change.")

    def __post_init__(self):
        super().__post_init__()
        if self.min_interval > self.max_interval:
            rule = "ProfilingDiTConfig.min_interval must be at most max_interval"
            raise ConfigError(f"{rule}, got {self.min_interval} and {self.max_interval}. Lower it.")


def foreground(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """The side of the first principal component of noise (b n f) that touches the border less, (b n) bool."""
    (height, width), n = grid, noise.shape[1]
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    x = x - x.mean(dim=1, keepdim=True)
    along = (x @ torch.linalg.eigh(x.mT @ x).eigenvectors[:, :, -1:])[..., 0]  # b n
    value, order = along.sort(dim=1, stable=True)
    below = torch.arange(1, n, device=x.device)
    apart = value.cumsum(dim=1)[:, :-1].square() / (below * (n - below))  # variance between the sides, times n; the sum of all is 0
    rank = order.argsort(dim=1)
    side = rank > apart.argmax(dim=1, keepdim=True) if n > 1 else rank > 0
    row, column = torch.arange(n, device=x.device) // width, torch.arange(n, device=x.device) % width
    border = (row == 0) | (row == height - 1) | (column == 0) | (column == width - 1)
    touching = 2 * (side & border).sum(dim=1, keepdim=True) - border.sum()
    larger = 2 * side.sum(dim=1, keepdim=True) - n
    smaller = torch.where(larger == 0, ~side[:, :1], larger < 0)  # which sides are called so is up to the eigenvector's sign
    return torch.where(torch.where(touching == 0, smaller, touching < 0), side, ~side)


@register("profilingdit", ProfilingDiTConfig, version=2)
class ProfilingDiT(FeatureCache):
    site = "block"

    def __init__(self, config: ProfilingDiTConfig, dims: Dims):
        super().__init__(config, dims)
        outside = [block for block in config.background or () if block >= dims.places]
        if outside:
            rule = f"ProfilingDiTConfig.background must lie in [0, {dims.places - 1}], its blocks over all streams"
            raise ConfigError(f"{rule}, got {outside}. Calibrate it on this model.")

    @property
    def reused(self) -> bool:
        """Whether this block is of the background."""
        known, dims = self.config.background, self.dims
        return 0 < dims.place < dims.places - 1 if known is None else dims.place in known

    def reuse(self, hidden: Tensor, step: int, steps: int | None, elapsed: float | None, memory: dict) -> Tensor | None:
        if not self.reused:
            return None
        if elapsed is None:
            rule = "ProfilingDiT needs to know how far the denoising is"
            raise UnsupportedError(f"{rule}, got a model without a timestep. Tell the steps by `cache_context`.")
        if memory.get("step") != step:
            memory.update(step=step, computes=self.due(step, elapsed, *memory.get("last", (0, 0.0)), steps))
            if memory["computes"]:
                memory["last"] = step, elapsed
        return None if memory["computes"] else torch.zeros(len(hidden), 0, dtype=torch.long, device=hidden.device)

    def due(self, step: int, elapsed: float, last: int, at: float, steps: int | None) -> bool:
        """Whether all is computed at this step, given the step that was last and how far the denoising was then."""
        config = self.config
        if elapsed <= config.start:
            return True
        passed = min(1.0, max(0.0, (at - config.start) / (1 - config.start)))
        interval = config.max_interval - (config.max_interval - config.min_interval) * passed
        if config.intervals == "of 50":
            interval *= (steps or step / elapsed) / STEPS if elapsed else 1
        return step - last >= math.floor(interval + 1e-9)

    def examine(
        self, influence: Tensor, noise: Tensor | None, grid: tuple[int, int], step: int, elapsed: float | None, memory: dict
    ) -> tuple[float, float | None, float] | None:
        if noise is None:
            return None
        if memory.get("heard") != step:
            before = memory.get("noise", noise)
            change = float((noise - before).abs().mean() / before.abs().mean())
            memory.update(heard=step, noise=noise, change=change, foreground=foreground(noise, grid))
        inside = memory["foreground"]
        high = influence > self.config.high * influence.mean(dim=1, keepdim=True)
        focus = (high & inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)
        return float(focus.mean()), elapsed, memory["change"]

    @classmethod
    def calibrate(cls, config: ProfilingDiTConfig, records: dict[int, list]) -> ProfilingDiTConfig:
        focus = {block: mean(entry[0] for entry in entries) for block, entries in records.items()}
        bar = median(focus.values()) if config.threshold is None else config.threshold
        told = [(elapsed, change) for _, elapsed, change in records[min(records)] if elapsed is not None]
        settled = config.stable * max((change for _, change in told), default=0.0)
        start = min((elapsed for elapsed, change in told if 0 < change <= settled), default=config.start)
        return dataclasses.replace(config, background=tuple(sorted(b for b in focus if focus[b] < bar)), start=start)
