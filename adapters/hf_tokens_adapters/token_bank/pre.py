"""PRE: the learnable context of a prompt goes through a small encoder with a skip connection before the text encoder reads it.

Paper:   PRE: Vision-Language Prompt Learning with Reparameterization Encoder (Pham et al., 2023), arXiv:2309.07760
Needs:   training
Maths:   t_i = [V'_1] .. [V'_M] [CLASS_i],  V' = E(V) + V,  V in R^{M x d};  E is a bidirectional LSTM over the M vectors, of d/2 hidden
         units each way, or an MLP d -> bottleneck -> d on each;  V starts from the embeddings of "a photo of a"; V and E are trained
Differs: the context is written in the prompt, as words (`ids`, one behind the other) whose embeddings V' takes the place of: positions
         and classes stand where they stand in that text, and a prompt without the words is left alone. The paper's third encoder, a
         transformer, is not there. Any model of text takes it.
Checked: minhanh151/PRE@08be7019, `PromptEncoder` LSTM1 with the same weights in float64: largest difference 0; its MLP ends in a LayerNorm
         and may drop out, by reading.

>>> from hf_tokens import PREConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> model = get_token_model(zoo.build("clip").model, PREConfig(ids=(31, 32, 33, 31)))
>>> bank = model.base_model.model.text_model.encoder.layers[0].hf_tokens.hf_tokens_methods["default"]["0"]
>>> bank.context.shape, bank.tokens().shape
(torch.Size([4, 32]), torch.Size([4, 32]))
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import Dims, MethodConfig, TokenBank, match_sequence, option, register


@dataclass(frozen=True)
class PREConfig(MethodConfig):
    ids: tuple[int, ...] = option(
        (), ge=0, zero=(), example=(7, 19, 33, 7), help="Token ids of the context in the prompt (paper: M of them)."
    )
    init_std: float | None = option(None, ge=0, help="Standard deviation of V's random start; None starts from the embeddings of `ids`.")
    encoder: str = option("bilstm", choices=("bilstm", "mlp"), help="The prompt encoder (paper: E).")
    encoder_layers: int = option(1, ge=1, le=8, help="Layers of the LSTM.")
    encoder_dropout: float = option(0.05, ge=0, lt=1, help="Dropout between the layers of the LSTM.")
    bottleneck: int = option(64, ge=1, help="Hidden units of the MLP.")
    residual: bool = option(True, help="Whether V is added to what the encoder makes of it.")


@register("pre", PREConfig)
class PRE(TokenBank):
    site, moves_tokens = "embedding", False
    kinds = ("text",)

    def __init__(self, config: PREConfig, dims: Dims):
        super().__init__(config, dims)
        start = dims.embed(config.ids)
        start = start if config.init_std is None else torch.randn_like(start) * config.init_std
        self.context = nn.Parameter(start)  # m d
        d, deep = start.shape[1], config.encoder_layers
        if config.encoder == "mlp":
            self.encoder = nn.Sequential(nn.Linear(d, config.bottleneck), nn.ReLU(), nn.Linear(config.bottleneck, d))
        else:
            self.encoder = nn.LSTM(d, d // 2, deep, bidirectional=True, dropout=config.encoder_dropout if deep > 1 else 0.0)

    @classmethod
    def prompt_ids(cls, config: PREConfig) -> tuple[int, ...]:
        return config.ids

    def find(self, ids: Tensor) -> Tensor:
        return match_sequence(ids, self.config.ids)

    def tokens(self) -> Tensor | None:
        if not len(self.context):
            return None
        encoded = self.encoder(self.context)
        encoded = encoded if self.config.encoder == "mlp" else encoded[0]  # m d
        return encoded + self.context if self.config.residual else encoded
