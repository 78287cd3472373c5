"""CPT: the embeddings of few-shot examples in the prompt are trained, each kept in a small ball around where it started.

Paper:   Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods (Blau et al., 2024), arXiv:2410.17222
Needs:   training
Maths:   X = [e(c_1) + delta_1] .. [e(c_k) + delta_k] [query];  after each step delta_j := delta_j * eps_j / max(eps_j, |delta_j|), eps_j of
         the input or the format tokens, times sqrt(d / 2048), delta_j = 0 at label tokens;  loss = mean over the label tokens of the
         examples and of the query of w * CE, w = 1 at the query and gamma^i at the i-th example before it
Differs: the context stands in the prompt itself, where it is in-context learning, and is found there by `ids`; its labels are the
         caller's, -100 but at label tokens. The projection is written back at the next forward of training, as in PEFT, whose numbers
         these are: with the same context, outputs, loss and updates agree with `peft.CPTConfig`.
Checked: no public code found (2026-11-29); tsachiblau/CPT holds a description alone. The authors' CPTConfig in PEFT gives the same
         outputs, loss and updates: tests/methods/test_cpt.py runs it.

>>> from hf_tokens import CPTConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> config = CPTConfig(ids=(31, 32, 33, 34), types=(1, 2, 3, 4))
>>> model = get_token_model(zoo.build("llama").model, config)
>>> model.base_model.model.model.layers[0].hf_tokens.hf_tokens_methods["default"]["0"].delta.shape
torch.Size([4, 32])
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, TokenBank, match_sequence, option, register, straight_through

INPUT, LABEL = 2, 0  # of a type, modulo 4; the others are those of the format


@dataclass(frozen=True)
class CPTConfig(MethodConfig):
    ids: tuple[int, ...] = option((), ge=0, zero=(), example=(7, 19, 33, 7), help="Token ids of the context in front of each query.")
    types: tuple[int, ...] = option(
        (), ge=1, help="Type of each: 4 i + 1 format of an input, + 2 input, + 3 format of a label, + 4 label of example i; () is all 1."
    )
    projection_epsilon: float = option(0.1, gt=0, help="Radius of the ball of an input token at width 2048 (paper: epsilon).")
    projection_format_epsilon: float = option(0.1, gt=0, help="Radius of the ball of a format token.")
    loss_decay_factor: float = option(1.0, gt=0, le=1, help="How much less each earlier example counts in the loss (paper: gamma).")


@register("cpt", CPTConfig)
class CPT(TokenBank):
    site, moves_tokens = "embedding", False
    kinds = ("text",)
    causal = True
    weighs = True

    def __init__(self, config: CPTConfig, dims: Dims):
        super().__init__(config, dims)
        self.delta = nn.Parameter(torch.zeros_like(dims.embed(config.ids)))  # k d

    @classmethod
    def check(cls, config: CPTConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if len(config.types) not in (0, len(config.ids)):
            raise ConfigError(f"CPTConfig.types must have one value for each of {len(config.ids)} ids, got {len(config.types)}. Give all.")

    @classmethod
    def prompt_ids(cls, config: CPTConfig) -> tuple[int, ...]:
        return config.ids

    def find(self, ids: Tensor) -> Tensor:
        return match_sequence(ids, self.config.ids)

    def tokens(self) -> Tensor:
        types = torch.tensor(self.config.types or [1] * len(self.config.ids), device=self.delta.device)[:, None] % 4  # k 1
        radius = torch.where(types == INPUT, self.config.projection_epsilon, self.config.projection_format_epsilon)
        radius = radius.to(self.delta) * math.sqrt(self.delta.shape[1] / 2048)
        with torch.no_grad():
            inside = self.delta * (radius / self.delta.norm(dim=1, keepdim=True).maximum(radius))
            if self.training:
                self.delta.copy_(inside)
        return self.dims.embed(self.config.ids) + straight_through(inside, self.delta) * (types != LABEL)

    def weigh(self, ids: Tensor) -> Tensor:
        types, gamma = self.config.types, self.config.loss_decay_factor
        examples = sorted({kind for kind in types if kind % 4 == LABEL}, reverse=True)
        weights = [gamma ** (1 + examples.index(kind)) if kind in examples else 0.0 for kind in types or [1] * len(self.config.ids)]
        return torch.tensor([*weights, 1.0], device=ids.device)[self.find(ids)]  # what is not found is of the query
