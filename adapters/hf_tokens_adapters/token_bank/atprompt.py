"""ATPrompt: fixed words of universal attributes stand between the learnable tokens of a prompt, in front of the class.

Paper:   Advancing Textual Prompt Learning with Anchored Attributes (Li et al., ICCV 2025), arXiv:2412.09442
Needs:   training
Maths:   P = [T_a1] .. [T_am] [A] [T_b1] .. [T_bm] [B] [T_1] .. [T_M] [CLASS], T learnable, A and B the embeddings of attribute words;
         deep: in front of each of the blocks 2 .. J, [T_1] .. [T_M] alone are replaced by fresh ones, [T_a] [A] [T_b] [B] pass on
Differs: the prompt holds all of it, with `placeholder` where a learnable token goes (`ATPrompt.prompt_ids` makes it, behind the start of
         the text and in front of the class). The search over attributes is the caller's: an adapter with one ATPrompt for each candidate,
         shortest first, reads the prompts of all of them at once, and the caller weighs their texts by softmax(alpha). Fresh tokens
         of inner blocks are free, where MaPLe shares them with the picture.
Checked: zhengli97/ATPrompt@86980a10, `PromptLearner` of coop_atp by reading: largest difference 0 of the order of the tokens and of their
         starts, N(0, 0.01^2) in front of attributes and N(0, 0.02^2) in front of the class.

>>> from hf_tokens import ATPromptConfig, ATPrompt, get_token_model
>>> from hf_tokens.testing import zoo
>>> config = ATPromptConfig(placeholder=7, attributes=((31,), (32, 33)), n_att=2, n_ctx=3)
>>> model = get_token_model(zoo.build("clip").model, config)
>>> ATPrompt.prompt_ids(config)
(7, 7, 31, 7, 7, 32, 33, 7, 7, 7)
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, TokenBank, match_sequence, option, register


@dataclass(frozen=True)
class ATPromptConfig(MethodConfig):
    placeholder: int = option(343, ge=0, example=7, help="Token id that stands for a learnable token; the default is CLIP's 'x'.")
    attributes: tuple[tuple[int, ...], ...] = option(
        (), ge=0, zero=(), example=((11,), (12, 13)), help="Token ids of each attribute word; none makes it CoOp."
    )
    n_att: int = option(4, ge=0, example=1, help="Learnable tokens in front of each attribute (paper: m).")
    n_ctx: int = option(4, ge=0, zero=0, example=1, help="Learnable tokens in front of the class (paper: M).")
    depth: int = option(1, ge=1, le=1000, example=3, help="Blocks with learnable tokens of their own (paper: J); 1 is the shallow version.")
    att_std: float = option(0.01, ge=0, help="Standard deviation of the start of the attributes' tokens.")
    ctx_std: float = option(0.02, ge=0, help="Standard deviation of the start of the class's tokens.")


@register("atprompt", ATPromptConfig)
class ATPrompt(TokenBank):
    site, moves_tokens, deep = "embedding", False, True
    kinds = ("text",)

    def __init__(self, config: ATPromptConfig, dims: Dims):
        super().__init__(config, dims)
        width = dims.embed(()).shape[1] if dims.is_first_block else dims.width
        self.context = nn.Parameter(torch.randn(config.n_ctx, width) * config.ctx_std)
        if dims.is_first_block:
            self.anchored = nn.Parameter(torch.randn(config.n_att * len(config.attributes), width) * config.att_std)
        place = range(config.n_ctx, config.n_ctx + config.n_att * len(config.attributes))
        kept = [[*place[i * config.n_att : (i + 1) * config.n_att], *[-1] * len(word)] for i, word in enumerate(config.attributes)]
        self.rows = [*sum(kept, []), *range(config.n_ctx), -1]  # of the bank, for each word of the prompt and for none

    @classmethod
    def prompt_ids(cls, config: ATPromptConfig) -> tuple[int, ...]:
        free = (config.placeholder,)
        return sum((free * config.n_att + word for word in config.attributes), ()) + free * config.n_ctx

    @classmethod
    def default_layers(cls, config: ATPromptConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(config.depth))

    def find(self, ids: Tensor) -> Tensor:
        return torch.tensor(self.rows, device=ids.device)[match_sequence(ids, self.prompt_ids(self.config))]

    def tokens(self) -> Tensor:
        return torch.cat([self.context, self.anchored]) if self.is_first_block else self.context  # k d
