"""Token prepending: a causal model reads the end of a prompt before its start, by one token that carries the last one's state forward.

Paper:   Token Prepending: A Training-Free Approach for Eliciting Better Sentence Embeddings from LLMs (Fu et al., ACL 2025),
         arXiv:2412.11556
Needs:   nothing
Maths:   h^0 = [h_1 .. h_{i-1}, pst, h_i .. h_n];  h^l = LLM^l(f(h^{l-1})) with f: h_i := h_n for start <= l <= end;
         the sentence's embedding is h_n^exit
Differs: pst is a vector of the adapter, not a row of the vocabulary. `places="shared"` lets it stand at the place of the token behind
         it, which does not move on: for models whose places are not in their keys; it moves SmolLM2's embedding of a sentence by 24 % of
         its length, where pst itself moves it by 23 %. Blocks behind `exit` do not run, so the model's last hidden state is its final norm
         of h^exit; h^exit itself is `hidden_states[exit]`, and the embedding is its last real token. The release counts layers from 0,
         and its end is the first that gets nothing: its 1 and 7 are 2 and 7 here.
Checked: fuyuchenIfyw/token_prepending@cc41b586, its `LlamaModel.forward` in float64, prompts of 6 to 31 tokens, padded ones among them:
         largest difference 0; its defaults by reading config.yaml.

>>> from hf_tokens import TokenPrependingConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llama")
>>> model = get_token_model(specimen.model, TokenPrependingConfig(position=2, start=2, end=3, exit=3))
>>> model(**specimen.inputs, output_hidden_states=True).hidden_states[3][:, -1].shape
torch.Size([2, 32])
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tokens import Dims, MethodConfig, TokenBank, option, register

INITS = {
    "gaussian": torch.randn,
    "uniform": torch.rand,
    "zeros": torch.zeros,
    "ones": torch.ones,
}


@dataclass(frozen=True)
class TokenPrependingConfig(MethodConfig):
    tokens: int = option(1, ge=0, le=1, zero=0, help="Whether <PST> is inserted.")
    position: int = option(1, ge=0, help="Tokens of each prompt in front of <PST>: those of the template before the text (paper: i* - 1).")
    start: int = option(2, ge=2, help="First layer, counted from 1, whose input gets the last token's state at <PST>.")
    end: int = option(7, ge=1, was={1: 8}, help="Last layer that gets it (paper: k); below `start`, none does.")
    exit: int = option(27, ge=1, le=1000, zero=1000, help="Last layer that runs (paper: M).")
    places: str = option(
        "own", was={2: "shared"}, choices=("own", "shared"), help="Whether <PST> moves the tokens behind it on by one place."
    )
    init: str = option("gaussian", choices=tuple(INITS), help="What the frozen vector of <PST> is drawn from.")


@register("token-prepending", TokenPrependingConfig, version=3)
class TokenPrepending(TokenBank):
    site = "input"
    kinds = ("text",)
    side_by_side = True
    packed = False
    causal = True
    caches = False

    def __init__(self, config: TokenPrependingConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.is_first_block:
            self.register_buffer("pst", INITS[config.init](config.tokens, dims.width))

    @classmethod
    def default_layers(cls, config: TokenPrependingConfig, layers: int) -> tuple[int, ...]:
        return (0, *range(config.start - 1, min(config.end, layers)))

    @property
    def shifts(self) -> bool:
        return self.config.places == "own" and self.config.tokens > 0

    @property
    def exit(self) -> int:
        return self.config.exit

    def place(self, start: Tensor, end: Tensor) -> Tensor:
        return torch.minimum(start + self.config.position, end)

    def shift(self, positions: Tensor, own_tokens: Tensor) -> Tensor:
        first = self.config.position
        return torch.where(
            own_tokens, positions < first, positions >= first
        ).long()  # in front of the end of a shorter prompt, it moves itself

    def tokens(self, hidden: Tensor, mask: Tensor) -> Tensor | None:
        if self.is_first_block or not self.config.tokens:
            return self.stream_first.pst  # k d
        last = mask.shape[1] - 1 - mask.flip(1).long().argmax(dim=1)  # b
        return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]  # b 1 d
