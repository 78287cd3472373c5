"""CSP: each attribute and each object is one learnable vector in the vocabulary of a frozen text encoder, composed anew in every prompt.

Paper:   Learning to Compose Soft Prompts for Compositional Zero-Shot Learning (Nayak et al., ICLR 2023), arXiv:2204.03574
Needs:   training
Maths:   t_ao = [e(a), e(photo), e(of), theta_a, theta_o],  theta in R^{(|A|+|O|) x d};  theta_w starts from the mean of e over the tokens
         of the word w;  p(a, o | x) = softmax over pairs of cos(f(x), g(t_ao)) / tau;  only theta is trained, under attribute dropout
Differs: a vector takes the place of one token id wherever it stands: a word of several tokens is written by one id of your choice in
         `ids`, with its tokens in `words`. The loss over pairs is yours, by the model's own similarity. Any model of text takes it.
Checked: BatsResearch/csp@029a4afb, `csp_init` and `construct_token_tensors` by reading: largest difference 0 of the rule and of the start,
         the mean of a word's embeddings; dropout on all vectors at once, in both.

>>> from hf_tokens import CSPConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> model = get_token_model(zoo.build("clip").model, CSPConfig(ids=(7, 9), words=((7,), (31, 32))))
>>> model.base_model.model.text_model.encoder.layers[0].hf_tokens.hf_tokens_methods["default"]["0"].vectors.shape
torch.Size([2, 32])
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, TokenBank, match_ids, option, register


@dataclass(frozen=True)
class CSPConfig(MethodConfig):
    ids: tuple[int, ...] = option((), ge=0, zero=(), example=(7, 19, 33), help="Token ids of the attributes and objects (paper: A and O).")
    words: tuple[tuple[int, ...], ...] | None = option(
        None, ge=0, help="For each id the tokens whose mean embedding its vector starts from; None takes that of the id itself."
    )
    attr_dropout: float = option(0.3, ge=0, lt=1, help="Dropout on the vectors (paper: attribute dropout).")


@register("csp", CSPConfig)
class CSP(TokenBank):
    site, moves_tokens = "embedding", False
    kinds = ("text",)

    def __init__(self, config: CSPConfig, dims: Dims):
        super().__init__(config, dims)
        words = [(i,) for i in config.ids] if config.words is None else config.words
        found = dims.embed([i for word in words for i in word])  # n d
        lengths = torch.tensor([len(word) for word in words], dtype=torch.long, device=found.device)
        owner = torch.arange(len(words), device=found.device).repeat_interleave(lengths, output_size=len(found))
        total = found.new_zeros(len(words), found.shape[-1]).index_add(0, owner, found)
        self.vectors = nn.Parameter(total / lengths[:, None])
        self.dropout = nn.Dropout(config.attr_dropout)

    @classmethod
    def check(cls, config: CSPConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if len(set(config.ids)) < len(config.ids):
            raise ConfigError(f"CSPConfig.ids must be distinct, got {config.ids}. Leave out what stands there twice.")
        if config.words is not None and (len(config.words) != len(config.ids) or () in config.words):
            raise ConfigError(f"CSPConfig.words must hold the tokens of each of {len(config.ids)} ids, got {config.words}. Fill them in.")

    @classmethod
    def prompt_ids(cls, config: CSPConfig) -> tuple[int, ...]:
        return config.ids

    def find(self, ids: Tensor) -> Tensor:
        return match_ids(ids, self.config.ids)

    def tokens(self) -> Tensor:
        return self.dropout(self.vectors)  # k d
