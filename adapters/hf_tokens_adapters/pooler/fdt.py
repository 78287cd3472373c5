"""FDT: what leaves a tower is a sparse sum of discrete tokens, which both towers of a dual encoder choose from one codebook.

Paper:   Revisiting Multimodal Representation in Contrastive Learning: From Patch and Token Embeddings to Finite Discrete Tokens
         (Chen et al., CVPR 2023), arXiv:2303.14865
Needs:   training
Maths:   r_i = max_j <g(x_j), c_i> / sqrt(d) over patches or words j;  w = sparsemax(r / t);  f = sum_i w_i c_i;  d: features of a code
         g(x) = W_2 LN(gelu(W_1 LN(x) + b_1)) + b_2;  t falls from 1000 to 0.01 by the same factor each step
Differs: the base model is pretrained: f goes back through one linear layer into the width of the tower, for the head that the model has.
         Special tokens of the vision tower are left out. With one stream the codebook is its own. In the authors' code a padded word
         scores 0, so that a text's codes depend on its padding; here it scores nothing. Their config for CC3M has a factor of 1, which
         leaves t at 1000.
Checked: yuxiaochen1103/FDT@ccf69830, query map, scores and sparse sum in float64, temperatures of 1000 to 0.01:
         largest difference 1.8e-13; a padded batch differs as said.

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
    temperature: float = option(
        0.01, gt=0, was={1: 1.0}, example=1.0, help="Factor under the scores, the lower the fewer tokens are active."
    )
    start: float | None = option(1000.0, gt=0, was={1: None}, help="What it falls from while the model is trained; None leaves it alone.")
    mapping: str = option("mlp", choices=("mlp", "linear"), was={1: "linear"}, help="How tokens are mapped to where codes are (g).")
    strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share of the sum in what the head reads.")

    def at(self, progress: float) -> float:
        """The temperature when so much of the training is done."""
        return self.temperature if self.start is None else self.start * (self.temperature / self.start) ** progress


def sparsemax(z: Tensor) -> Tensor:
    """The nearest point of the simplex, (b c)."""
    z = z - z.amax(dim=-1, keepdim=True)  # the same point, and a 1 is not lost beside large scores
    order = z.sort(dim=-1, descending=True).values
    total, count = order.cumsum(dim=-1), torch.arange(1, z.shape[-1] + 1, device=z.device)
    support = (1 + count * order > total).sum(dim=-1, keepdim=True)
    return (z - (total.gather(-1, support - 1) - 1) / support).clamp(min=0)


@register("fdt", FDTConfig, version=2)
class FDT(Pooler):
    exports = True

    def __init__(self, config: FDTConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.place == 0:
            self.codebook = nn.Parameter(torch.randn(config.codes, config.dim) * (1 if self.is_mlp else config.dim**-0.5))
        self.inner = nn.Linear(dims.width, config.dim, bias=self.is_mlp)
        if self.is_mlp:
            behind = nn.GELU(), nn.LayerNorm(config.dim), nn.Linear(config.dim, config.dim)
            self.inner = nn.Sequential(nn.LayerNorm(dims.width), self.inner, *behind)
        self.outer = nn.Linear(config.dim, dims.width, bias=False)

    @property
    def is_mlp(self) -> bool:
        return self.config.mapping == "mlp"

    @property
    def strength(self) -> float:
        return self.config.strength

    def pool(self, hidden: Tensor, mask: Tensor, positions: Tensor, prefix: int, progress: float) -> Tensor:
        counted = mask & (positions >= prefix)  # b n
        codebook = self.model_first.codebook
        fits = self.inner(hidden.to(codebook.dtype)) @ codebook.mT  # b n c
        best = fits.masked_fill(~counted[..., None], torch.finfo(fits.dtype).min).amax(dim=1)
        best = best * self.config.dim**-0.5 if self.is_mlp else best
        return self.outer(sparsemax(best / self.config.at(progress)) @ codebook).to(hidden.dtype)
