"""TeaCache: a step before whose first block little has changed since all blocks last ran adds again what they added then.

Paper:   Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model (Liu et al., CVPR 2025), arXiv:2411.19108
Needs:   nothing
Maths:   x_t = mean |m_t - m_{t-1}| / mean |m_{t-1}|,  m the first block's modulated input, or the embedding of the timestep;
         a := a + p(x_t);  a < threshold:  h := h + R,  else the blocks run,  R := h_out - h_in,  a := 0;  means over all samples
Differs: p, threshold and the whole steps are the authors' where they fitted p for the model (Flux, HunyuanVideo, LTX, Mochi, Lumina 2,
         CogVideoX, ConsisID, Wan 2.1 from text, by the projected embedding), and p(x) = x, 0.1, 1 and 1 elsewhere. Their p may be
         negative, or not 0 at 0, as it stands. Two calls of guidance decide each for itself, as theirs for Wan; a batch of both decides
         together, as theirs. The last step is known in a pipeline or by the context, and else as the others. What lies between two
         streams of blocks runs at each step. No picture inherits the sum of one that was stopped.
Checked: ali-vilab/TeaCache@7c10efc4, its forwards of Flux (without single blocks) and of CogVideoX beside ours, tiny models in double
         precision, 12 steps, 8 thresholds, 18 runs: largest difference 0, the same steps reused; the others' coefficients by reading.

>>> import torch
>>> from hf_tokens import TeaCacheConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/SD3Transformer2DModel")
>>> model = get_token_model(specimen.model, TeaCacheConfig(threshold=9.0))
>>> steps = [measure(model, **{**specimen.inputs, "timestep": torch.tensor([t, t])}).tokens for t in (900, 890)]
>>> steps[1] < steps[0]
True
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tokens import FeatureCache, MethodConfig, option, register


@dataclass(frozen=True)
class TeaCacheConfig(MethodConfig):
    threshold: float | None = option(
        None, ge=0, zero=0.0, example=1e6, help="Sum of changes below which steps are reused. None: as fitted for the model, or 0.1."
    )
    polynomial: tuple[float, ...] | None = option(
        None, ge=-1e9, le=1e9, help="Coefficients of p, that of the highest degree first. None: as fitted for the model, or p(x) = x."
    )
    first: int | None = option(None, ge=1, help="First steps that are computed. None: as fitted for the model, or 1.")
    last: int | None = option(None, ge=0, help="Last steps that are computed. None: as fitted for the model, or 1.")


@register("teacache", TeaCacheConfig)
class TeaCache(FeatureCache):
    site = "stack"

    @property
    def ignores(self) -> tuple[str, ...]:
        of_time = self.dims.change is not None and self.dims.change.of == "time_embedding"
        return ("attention_input",) if of_time else ("time_embedding",)

    def knob(self, name: str, default: Any) -> Any:
        """As the config says, or else as fitted for the model."""
        value, fitted = getattr(self.config, name), self.dims.change
        if value is not None:
            return value
        return default if fitted is None else getattr(fitted, name)

    def reuse(
        self, hidden: Tensor, attention_input: Tensor | None, time_embedding: Tensor | None, step: int, remaining: int | None, memory: dict
    ) -> Tensor | None:
        threshold, first, last = self.knob("threshold", 0.1), self.knob("first", 1), self.knob("last", 1)
        now, before = attention_input if time_embedding is None else time_embedding, memory.get("now")
        memory["now"], total = now, memory.get("total", 0.0)
        memory["total"] = 0.0
        if before is None or step < first or threshold == 0 or remaining is not None and remaining < last:
            return None
        change, value = float((now - before).abs().mean() / before.abs().mean()), 0.0
        for coefficient in self.knob("polynomial", (1.0, 0.0)):
            value = value * change + coefficient
        if not total + value < threshold:
            return None
        memory["total"] = total + value
        return torch.zeros(len(hidden), 0, dtype=torch.long, device=hidden.device)
