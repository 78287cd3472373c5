"""FDT: what leaves a tower is a sparse sum of discrete tokens, which both towers of a dual encoder choose from one codebook.

Paper:   Revisiting Multimodal Representation in Contrastive Learning: From Patch and Token Embeddings to Finite Discrete Tokens
         (Chen et al., CVPR 2023), arXiv:2303.14865
Maths:   r_i = max_j <g(x_j), c_i> over patches or words j;  w = sparsemax(r / t);  f = sum_i w_i c_i
Differs: the base model is pretrained: f goes back through one linear layer into the width of the tower, for the head that the model has,
         and g is one linear layer. The temperature does not fall by itself. Special tokens of the vision tower are left out. With one
         stream the codebook is its own.

>>> from hf_tokens import FDTConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("clip")
>>> model = get_token_model(specimen.model, FDTConfig(codes=64, dim=16))
>>> sum(p.numel() for n, p in model.named_parameters() if n.endswith("codebook"))  # one for both towers
1024
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, Pooler, option, register


@dataclass(frozen=True)
class FDTConfig(MethodConfig):
    codes: int = option(16384, ge=1, size=True, help="Finite discrete tokens in the codebook (paper: C).")
    dim: int = option(512, ge=1, size=True, help="Dimensions of each.")
    temperature: float = option(1.0, gt=0, help="Factor under the scores, the lower the fewer tokens are active.")
    strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share of the sum in what the head reads.")


def sparsemax(z: Tensor) -> Tensor:
    """The nearest point of the simplex, (b c)."""
    order = z.sort(dim=-1, descending=True).values
    total, count = order.cumsum(dim=-1), torch.arange(1, z.shape[-1] + 1, device=z.device)
    support = (1 + count * order > total).sum(dim=-1, keepdim=True)
    return (z - (total.gather(-1, support - 1) - 1) / support).clamp(min=0)


@register("fdt", FDTConfig)
class FDT(Pooler):
    exports = True

    def __init__(self, config: FDTConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.place == 0:
            self.codebook = nn.Parameter(torch.randn(config.codes, config.dim) * config.dim**-0.5)
        self.inner = nn.Linear(dims.width, config.dim, bias=False)
        self.outer = nn.Linear(config.dim, dims.width, bias=False)

    @property
    def strength(self) -> float:
        return self.config.strength

    def pool(self, hidden: Tensor, mask: Tensor, positions: Tensor, prefix: int) -> Tensor:
        counted = mask & (positions >= prefix)  # b n
        codebook = self.model_first.codebook
        fits = self.inner(hidden.to(codebook.dtype)) @ codebook.mT  # b n c
        best = fits.masked_fill(~counted[..., None], torch.finfo(fits.dtype).min).amax(dim=1)
        return self.outer(sparsemax(best / self.config.temperature) @ codebook).to(hidden.dtype)
