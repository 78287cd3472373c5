"""Deep prompts: k learnable tokens in front of the sequence in every block, fresh ones in each.

Paper:   P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks (Liu et al.,
         ACL 2022), arXiv:2110.07602
Needs:   training
Maths:   [_, H_i] = L_i([P_i, H_{i-1}]),  P_i in R^{k x d};  what comes out at P_i is dropped
Differs: the prompts are hidden states in front of each block, as in VPT-deep; the paper stores them as keys and values.
Checked: THUDM/P-tuning-v2@b1520c9a, `PrefixEncoder` by reading: largest difference not a number, as it learns a key and a value of each
         block from N(0, 1), or an MLP of them, and here a hidden state is learnt.

>>> from hf_tokens import DeepPromptConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> model = get_token_model(zoo.build("llama").model, DeepPromptConfig(tokens=5))
>>> model.base_model.model.model.layers[0].hf_tokens.hf_tokens_methods["default"]["0"].prompt.shape
torch.Size([5, 32])
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, TokenBank, option, register


@dataclass(frozen=True)
class DeepPromptConfig(MethodConfig):
    tokens: int = option(8, ge=0, zero=0, help="Prompt tokens in each block (paper: prompt length).")
    init_std: float = option(0.02, ge=0, help="Standard deviation of the normal distribution that the prompts start from.")
    dropout: float = option(0.0, ge=0, lt=1, help="Dropout on the prompts.")


@register("deep-prompt", DeepPromptConfig)
class DeepPrompt(TokenBank):
    site = "block"
    exports = True
    kinds = ("text", "vision", "audio")

    def __init__(self, config: DeepPromptConfig, dims: Dims):
        super().__init__(config, dims)
        self.prompt = nn.Parameter(torch.randn(config.tokens, dims.width) * config.init_std)
        self.dropout = nn.Dropout(config.dropout)

    def tokens(self) -> Tensor:
        return self.dropout(self.prompt)  # k d
