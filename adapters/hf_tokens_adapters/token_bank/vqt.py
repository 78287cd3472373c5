"""Visual query tuning: tokens that only ask gather what each block of a frozen model knows, and a linear head reads their summaries.

Paper:   Visual Query Tuning: Towards Effective Usage of Intermediate Representations for Parameter and Memory Efficient Transfer Learning
         (Tu et al., CVPR 2023), arXiv:2212.03220
Needs:   training
Maths:   [Z_m, Z'_m] = MLP(V softmax(K^T [Q, Q'] / sqrt(d))),  Q' = W_q P_m,  P_m in R^{d x T};  K, V and Q are those of Z_{m-1} alone,
         so that the stream Z stays the base model's;  logits = W_1 cls_M + sum_m W_2m z_m, z_m = Z'_m laid end to end, or its mean, of
         length 1;  lasso * ||W_2||_{2,1} in the loss
Differs: W_1 is the model's own head behind its final norm, frozen unless it is in `modules_to_save`; W_2 starts at zero, so that training
         starts at the base model; the selection by group lasso ranks the features of the query tokens only. A query token passes the norms
         and the skip connections of its block as any token does. P starts from uniform(-v, v), v = sqrt(3 / d), which is theirs where a
         patch has d values; theirs gives cls_M the length 1 too, which no head of a model was trained for.
Checked: andytu28/VQT@9bca87e3, what its head reads of the summaries, joined, averaged and weighted, 20 draws: largest difference 0;
         the blocks by reading.

>>> from hf_tokens import VQTConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> model = get_token_model(zoo.build("vit").model, VQTConfig(tokens=5))
>>> bank = model.base_model.model.vit.layers[0].hf_tokens.hf_tokens_methods["default"]["0"]
>>> bank.prompt.shape, bank.weight.shape
(torch.Size([5, 32]), torch.Size([2, 160]))
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, TokenBank, option, register


@dataclass(frozen=True)
class VQTConfig(MethodConfig):
    tokens: int = option(1, ge=0, zero=0, help="Query tokens in each block (paper: T).")
    dropout: float = option(0.0, ge=0, lt=1, help="Dropout on the query tokens (0.1 in the authors' scripts).")
    normalise: bool = option(True, was={1: False}, help="Whether what the head reads of a block has the length 1.")
    combine: str = option("concat", choices=("concat", "mean", "weighted"), help="What the head reads of a block's T summaries.")
    lasso: float = option(0.0, ge=0, help="Weight of the group lasso on the head's features (paper: lambda).")
    fraction: float = option(1.0, gt=0, le=1, help="Share of the features that `VQT.select` keeps (paper: F).")


@register("vqt", VQTConfig, version=2)
class VQT(TokenBank):
    exports = True
    site, packed = "query", False
    kinds = ("vision",)
    causal = False
    needs_head = True

    def __init__(self, config: VQTConfig, dims: Dims):
        super().__init__(config, dims)
        bound = math.sqrt(3 / dims.width)
        self.prompt = nn.Parameter(torch.empty(config.tokens, dims.width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(config.dropout)
        summaries = config.tokens if config.combine == "concat" else min(config.tokens, 1)
        self.weight = nn.Parameter(torch.zeros(dims.outputs, summaries * dims.width))  # o f
        self.register_buffer("kept", torch.ones(summaries * dims.width, dtype=torch.bool))
        if config.combine == "weighted":
            self.mix = nn.Parameter(torch.full((config.tokens,), 1 / max(config.tokens, 1)))

    def tokens(self) -> Tensor:
        return self.dropout(self.prompt)  # t d

    def read(self, summary: Tensor) -> Tensor:
        summary = summary.to(self.weight.dtype)
        if self.config.combine == "concat":
            features = summary.flatten(1)  # b t*d
        else:
            mix = self.mix if self.config.combine == "weighted" else summary.new_full((summary.shape[1],), 1 / summary.shape[1])
            features = torch.einsum("btd,t->bd", summary, mix)
        features = F.normalize(features, dim=1) if self.config.normalise else features
        if self.training and self.config.lasso:
            self.add_loss(self.config.lasso * self.norms().sum())
        return F.linear(features, self.weight * self.kept)

    def norms(self) -> Tensor:
        """The norm of the weights of each feature, one group of the lasso, (f)."""
        return (self.weight * self.kept).norm(dim=0)

    @staticmethod
    @torch.no_grad()
    def select(model: nn.Module) -> None:
        """Keep the fraction of all features, of all blocks together, whose weights are largest; the rest are zero from now on.

        The paper's second stage: call it between a training with `lasso` and one without.
        """
        banks = [module for module in model.modules() if isinstance(module, VQT)]
        for leader in {bank.stream_first: None for bank in banks}:
            own = [bank for bank in banks if bank.stream_first is leader]
            norms = torch.cat([bank.norms() for bank in own])
            best = norms.argsort(descending=True, stable=True)[: math.ceil(leader.config.fraction * len(norms))]
            kept = torch.zeros_like(norms, dtype=torch.bool).index_fill(0, best, True)
            for bank, part in zip(own, kept.split([len(bank.kept) for bank in own]), strict=True):
                bank.kept.copy_(part)
