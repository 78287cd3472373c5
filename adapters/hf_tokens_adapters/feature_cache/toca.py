"""ToCa: between full steps of a denoiser, compute only the tokens that matter most and take the rest from the step before.

Paper:   Accelerating Diffusion Transformers with Token-wise Feature Caching (Zou et al., ICLR 2025), arXiv:2410.05317
Needs:   nothing
Maths:   S(x_i) = l_1 |sum_j a_ji| + l_2 |1 - sum_j c_ij log c_ij| + l_3 n_i / N, |.| divided by its norm over the tokens, of c the mean
         of both halves under guidance;  the best of each k x k cell is raised by l_4 of its score
         every N-th step computes all;  else each sublayer computes its floor(r n) best tokens, C(x_i) := F(x_i), and returns C
         r = (1 - R) l_type (1 + l_l - 2 l_l l/L) (1 + l_t - 2 l_t t/T),  kept in [0, 1], t counted from the noise
Differs: the attention is the heads' mean, of the last full step. Theirs stretches and shrinks the cycle over the run: of 20 steps 7 are
         computed whole, as here, but other ones, and of DiT's 50 there are 20, here 17. Without cross-attention its settings are those
         for DiT in 50 steps, with it those for PixArt. `rule="abstract"` is what the paper's equations say without the code.
Checked: Shenyi-Z/ToCa@e84096ff, number and choice of tokens for 60 random maps and ages of each kind: largest difference 0 tokens, for
         DiT and for PixArt; which steps are full differs, see above.

>>> import torch
>>> from hf_tokens import ToCaConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/DiTTransformer2DModel")
>>> model = get_token_model(specimen.model, ToCaConfig(cycle=4, ratio=0.9))
>>> with torch.no_grad():
...     steps = [model(**{**specimen.inputs, "timestep": torch.tensor([t, t])}).sample for t in (900, 600, 300, 0)]
>>> steps[-1].shape == specimen.inputs["hidden_states"].shape
True
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tokens import ConfigError, FeatureCache, MethodConfig, UnsupportedError, option, rank, register

PARTS = ("attention", "cross_attention", "mlp")
# The authors' settings for blocks with cross-attention (PixArt) and without (DiT).
CROSSED = {"ratio": 0.7, "bonus": 0.4, "cell": 4, "types": (0.0, 0.6, 1.6), "depth": 0.6, "time": 0.9}
PLAIN = {"ratio": 0.93, "bonus": 0.6, "cell": 2, "types": (0.0, 0.0, 2.5), "depth": -0.2, "time": -2.0}


@dataclass(frozen=True)
class ToCaConfig(MethodConfig):
    cycle: int = option(3, ge=1, help="Every how many steps all is computed (paper: N; for DiT in 250 steps 4).")
    ratio: float | None = option(None, ge=0, le=1, zero=0.0, was={1: 0.7}, help="Share that is reused (R). None: 0.7, of DiT 0.93.")
    influence: float | None = option(None, ge=0, help="Weight of what others read from a token (l_1). None: 1 without cross-attention.")
    control: float | None = option(None, ge=0, help="Weight of the entropy of its cross-attention (l_2). None: 1 where there is any.")
    frequency: float = option(0.25, ge=0, help="Weight of how long it has been reused (l_3).")
    bonus: float | None = option(None, ge=0, was={1: 0.4}, help="Bonus of the best token of each cell (l_4). None: 0.4, of DiT 0.6.")
    cell: int | None = option(None, ge=1, was={1: 2}, help="Side of a cell of the grid (k). None: 4, of DiT 2.")
    normalise: bool = option(True, was={1: False}, help="Whether influence and control are divided by their norm over the tokens.")
    types: tuple[float, ...] | None = option(
        None,
        ge=0,
        was={1: (1.0, 1.0, 1.0)},
        help="Factors for attention, cross-attention and MLP (l_type). None: 0, 0.6, 1.6; of DiT 0, 0, 2.5.",
    )
    depth: float | None = option(
        None, ge=-2, le=2, was={1: 0.0}, help="How much less the later blocks compute (l_l). None: 0.6, of DiT -0.2."
    )
    time: float | None = option(None, ge=-2, le=2, was={1: 0.0}, help="How much less the later steps compute (l_t). None: 0.9, of DiT -2.")
    steps: int | None = option(None, ge=1, help="Denoising steps, for l_t where the pipeline does not tell.")
    rule: str = option(
        "release", choices=("release", "abstract"), was={1: "abstract"},
        help="abstract: factors of the share that is reused, the bonus a constant, no mean of the halves.",
    )  # fmt: skip


@register("toca", ToCaConfig, version=2)
class ToCa(FeatureCache):
    ignores = property(lambda self: ("shared_doubt",) if self.config.rule == "abstract" else ("doubt",))

    @classmethod
    def check(cls, config: ToCaConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.types is not None and len(config.types) != len(PARTS):
            rule = f"ToCaConfig.types must have one value for each of {', '.join(PARTS)}"
            raise ConfigError(f"{rule}, got {len(config.types)}. Give {len(PARTS)}.")

    def knob(self, name: str, crossed: bool) -> Any:
        """A knob as it is given, or as the authors set it for such blocks."""
        given = getattr(self.config, name)
        return (CROSSED if crossed else PLAIN)[name] if given is None else given

    def share(self, part: str, step: int, steps: int | None, elapsed: float | None, crossed: bool) -> float:
        """The share of tokens that this sublayer computes at this step."""
        dims, steps = self.dims, steps or self.config.steps
        abstract, time, depth = self.config.rule == "abstract", self.knob("time", crossed), self.knob("depth", crossed)
        if not abstract and self.config.steps is not None:
            elapsed = step / self.config.steps
        if time and (steps if abstract else elapsed) is None:
            rule = "ToCaConfig.time needs the number of denoising steps"
            raise UnsupportedError(f"{rule}, got a pipeline that does not tell. Set ToCaConfig.steps.")
        along = dims.layer / (dims.layers - 1) if dims.layers > 1 else 0.5
        share, factor = self.knob("ratio", crossed), self.knob("types", crossed)[PARTS.index(part)]
        if abstract:
            passed = min(1.0, step / (steps - 1)) if steps and steps > 1 else 0.5
            return 1 - min(1.0, max(0.0, share * factor * (1 + depth * (2 * along - 1)) * (1 + time * (2 * passed - 1))))
        later = 1 + time * (1 - 2 * min(1.0, elapsed)) if time else 1.0
        return min(1.0, max(0.0, (1 - share) * factor * (1 + depth * (1 - 2 * along)) * later))

    def reuse(
        self, hidden: Tensor, part: str, step: int, steps: int | None, elapsed: float | None, age: Tensor, influence: Tensor,
        doubt: Tensor | None, shared_doubt: Tensor | None, grid: tuple[int, int],
    ) -> Tensor | None:  # fmt: skip
        if step % self.config.cycle == 0 or self.config.ratio == 0:
            return None
        doubt = doubt if self.config.rule == "abstract" else shared_doubt if shared_doubt is None else 1 + shared_doubt
        n, share = hidden.shape[1], self.share(part, step, steps, elapsed, doubt is not None)
        computed = n - math.floor((1 - share) * n + 1e-9) if self.config.rule == "abstract" else math.floor(share * n + 1e-9)
        order = self.score(age, influence, doubt, grid).argsort(dim=1, descending=True, stable=True)  # b n
        return order[:, :computed]

    def score(self, age: Tensor, influence: Tensor, doubt: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """How much each token wants to be computed, (b n)."""
        config, crossed = self.config, doubt is not None
        weights = [float(not crossed), float(crossed)]
        weights = [w if given is None else given for w, given in zip(weights, (config.influence, config.control), strict=True)]
        total = config.frequency * (age - 1) / config.cycle
        for weight, signal in zip(weights, (influence, doubt), strict=True):
            if weight and signal is not None:
                total = total + weight * (signal / signal.norm(dim=1, keepdim=True) if config.normalise else signal)
        raised = total if config.rule == "release" else 1.0
        return total + self.knob("bonus", crossed) * raised * self.best_of_cells(total, grid, self.knob("cell", crossed))

    def best_of_cells(self, total: Tensor, grid: tuple[int, int], k: int) -> Tensor:
        """Whether each token is the first of the highest in its cell of side k, (b n) bool."""
        height, width = grid
        index = torch.arange(height * width, device=total.device)
        cell = (index // width // k * math.ceil(width / k) + index % width // k).expand_as(total)
        order = rank(total)
        first = torch.full_like(order, order.shape[1]).scatter_reduce(1, cell, order, reduce="amin")
        return first.gather(1, cell) == order
