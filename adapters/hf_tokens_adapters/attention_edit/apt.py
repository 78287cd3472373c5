"""APT: prompt tokens never enter the attention; each token reads them in a step of its own, in few dimensions, beside it.

Paper:   Approximated Prompt Tuning for Vision-Language Pre-trained Models (Wu et al., 2023), arXiv:2306.15706
Needs:   training
Maths:   softmax([Q K^T, Q K_P^T]) [V; V_P] = (1 - l) softmax(Q K^T) V + l softmax(Q K_P^T) V_P is approximated by
         (Attention(X) + w relu(X (P + P D U)^T) P) e^s,  w = max of relu(X (P + P D U)^T) for each token, without a gradient;
         P: k x d,  D: d x r,  U: r x d;  at first P ~ N(0, 0.02^2), D ~ N(0, 1), U and s are 0
Differs: `form="low-rank"` reads s softmax(X D P^T / sqrt(r)) P U with P: k x r and a constant s, a seventh of the parameters at k = 50, and
         starts from the base. METER has 200 prompts, ViLT 50; the release puts none in CLIP's tower.
Checked: DoubtedSteam/APT@d66bbc46, `approximate_prompt` of METER with the same parameters in float64: largest difference 0; ViLT's by
         reading.

>>> from hf_tokens import APTConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("vit")
>>> model = get_token_model(specimen.model, APTConfig(tokens=50, rank=4))
>>> model.get_nb_trainable_parameters()[0] == 4 * (50 * 32 + 2 * 4 * 32 + 1)  # four blocks of width 32
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import AttentionEdit, Dims, MethodConfig, option, register


@dataclass(frozen=True)
class APTConfig(MethodConfig):
    tokens: int = option(50, ge=0, zero=0, help="Prompt tokens of each block (k).")
    rank: int = option(4, ge=1, help="Rank of what turns a prompt into the key that tokens meet (r).")
    form: str = option("release", choices=("release", "low-rank"), was={1: "low-rank"}, help="How prompts are held and read.")
    scale: float = option(1.0, ge=0, zero=0.0, help="Factor on what is read from the prompts (s).")


@register("apt", APTConfig, version=2)
class APT(AttentionEdit):
    exports = True
    packed = True  # each token reads the prompts by itself

    def __init__(self, config: APTConfig, dims: Dims):
        super().__init__(config, dims)
        whole = config.form == "release"
        self.prompts = nn.Parameter(torch.randn(config.tokens, dims.width) * 0.02 if whole else torch.randn(config.tokens, config.rank))
        self.down = nn.Linear(dims.width, config.rank, bias=False)
        self.up = nn.Linear(config.rank, dims.width, bias=False)
        nn.init.zeros_(self.up.weight)
        if whole:
            nn.init.normal_(self.down.weight)
            self.log_scale = nn.Parameter(torch.zeros(1))

    def edit(self, attention_input: Tensor, attention_output: Tensor) -> Tensor | None:
        if self.config.tokens == 0 or self.config.scale == 0:
            return None
        x = attention_input.to(self.prompts.dtype)
        if self.config.form == "low-rank":
            share = (self.down(x) @ self.prompts.mT / self.config.rank**0.5).softmax(dim=-1)
            return attention_output + self.config.scale * self.up(share @ self.prompts).to(attention_output.dtype)
        share = (x @ (self.prompts + self.up(self.down(self.prompts))).mT).relu()  # b m k
        weight = self.config.scale * share.amax(dim=-1, keepdim=True).detach()
        return ((attention_output + weight * (share @ self.prompts)) * self.log_scale.exp()).to(attention_output.dtype)
