"""APT: prompt tokens never enter the attention; each token reads them in a step of its own, in few dimensions, beside it.

Paper:   Approximated Prompt Tuning for Vision-Language Pre-trained Models (Wu et al., 2023), arXiv:2306.15706
Maths:   softmax([Q K^T, Q K_P^T]) [V; V_P] = (1 - l) softmax(Q K^T) V + l softmax(Q K_P^T) V_P is approximated by
         Attention(X) + s softmax(X D P^T / sqrt(r)) P U,  D: d x r,  P: k x r,  U: r x d
Differs: the share l of the prompts, another one for each token and head, is the constant s; one head, of r dimensions, stands for all
         heads; U starts at zero, so that an untrained adapter changes nothing. Number and rank of the prompts are ours.

>>> from hf_tokens import APTConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> model = get_token_model(specimen.model, APTConfig(tokens=50, rank=4))
>>> model.get_nb_trainable_parameters()[0] == 4 * 4 * (50 + 32 + 32)  # four blocks of width 32
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import AttentionEdit, Dims, MethodConfig, option, register


@dataclass(frozen=True)
class APTConfig(MethodConfig):
    tokens: int = option(50, ge=0, zero=0, help="Prompt tokens of each block (k).")
    rank: int = option(4, ge=1, help="Dimensions in which tokens and prompts meet (r).")
    scale: float = option(1.0, ge=0, zero=0.0, help="Factor on what is read from the prompts (s).")


@register("apt", APTConfig)
class APT(AttentionEdit):
    exports = True
    packed = True  # each token reads the prompts by itself

    def __init__(self, config: APTConfig, dims: Dims):
        super().__init__(config, dims)
        self.prompts = nn.Parameter(torch.randn(config.tokens, config.rank))
        self.down = nn.Linear(dims.width, config.rank, bias=False)
        self.up = nn.Linear(config.rank, dims.width, bias=False)
        nn.init.zeros_(self.up.weight)

    def edit(self, attention_input: Tensor, attention_output: Tensor) -> Tensor | None:
        if self.config.tokens == 0 or self.config.scale == 0:
            return None
        asked = self.down(attention_input.to(self.prompts.dtype))  # b m r
        share = (asked @ self.prompts.mT / self.config.rank**0.5).softmax(dim=-1)
        return attention_output + self.config.scale * self.up(share @ self.prompts).to(attention_output.dtype)
