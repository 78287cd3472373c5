"""ProSpect: a concept is one learned prompt for each stage of the denoising, and the timestep says which one the frozen model reads.

Paper:   ProSpect: Prompt Spectrum for Attribute-Aware Personalization of Diffusion Models (Zhang et al., TOG 2023), arXiv:2305.16225
Needs:   training
Maths:   P* = {p_1 .. p_S}, one for each group of T / S steps, p_1 the noisiest;  argmin_{p_i} E |eps - eps_theta(z_t, t, p_i)|^2
         over the steps t of stage i;  layout is decided in the first stages, content in the middle, material and style in the last
Differs: the tokens are the authors' where `word` names their placeholder and the pipeline is passed, of Stable Diffusion 1, 2 or XL:
         `get_token_model(pipe, ProSpectConfig(word="*"))`. The text encoder then reads the prompt again in each call of the UNet, in
         training too, of a negative prompt that holds the word as well. Without a word they stand behind the encoded prompt, with which no
         words mix and which pooled embeddings do not know. The authors' code makes the S embeddings of one word by an attention block that
         it trains in their place, here they are free. `acts` says in which stages the concept speaks; the authors write plain words into
         the others, where here the table's row for the word is read.
Checked: zyxElsa/ProSpect@31314f18, a UNet's outputs with its embeddings of 3 stages in 3 prompts at 7 timesteps: largest difference 0; the
         stage of each of 1000 timesteps, counted from their last: 0 stages; how the embeddings are made by reading, see above.

>>> from hf_tokens import ProSpectConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/SD3Transformer2DModel")
>>> model = get_token_model(specimen.model, ProSpectConfig(stages=10))
>>> model.get_nb_trainable_parameters()[0] == 10 * 32  # ten stages of one token
True
>>> model(**specimen.inputs).sample.shape
torch.Size([2, 4, 8, 8])
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, TokenBank, option, register


@dataclass(frozen=True)
class ProSpectConfig(MethodConfig):
    stages: int = option(10, ge=1, le=1000, help="Stages of the denoising, each with a prompt of its own; 1 is textual inversion (S).")
    tokens: int = option(1, ge=0, zero=0, help="Tokens of each stage's prompt.")
    word: str | None = option(
        None, free=True, help="Word of the prompt that they stand for, read by the text encoder; None puts them behind it."
    )
    acts: tuple[int, ...] | None = option(None, ge=0, help="Stages in which they stand in the prompt, 0 the noisiest; None is all.")
    negative: bool = option(False, help="Whether the negative prompt of classifier-free guidance gets them too; a word has its place.")
    init_std: float = option(0.02, ge=0, help="Standard deviation of the normal distribution that they start from.")


@register("prospect", ProSpectConfig)
class ProSpect(TokenBank):
    site, moves_tokens = "prompt", False
    kinds = ("denoiser",)

    def __init__(self, config: ProSpectConfig, dims: Dims):
        super().__init__(config, dims)
        self.bank = nn.Parameter(torch.randn(config.stages, config.tokens, dims.prompt) * config.init_std)  # s k d

    @classmethod
    def check(cls, config: ProSpectConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if any(stage >= config.stages for stage in config.acts or ()):
            raise ConfigError(f"ProSpectConfig.acts must name stages below {config.stages}, got {config.acts}. Count them from 0.")
        if config.word is not None and config.negative:
            raise ConfigError("ProSpectConfig.negative is for tokens behind the prompt, got a word. Write it into the negative prompt.")

    @classmethod
    def word(cls, config: ProSpectConfig) -> str | None:
        return config.word

    def stage(self, time: Tensor) -> Tensor:
        """The stage of each sample, (b)."""
        done = (time * self.config.stages / 1000).floor().long()  # stages that are still to come
        return (self.config.stages - 1 - done).clamp(0, self.config.stages - 1)

    def takes(self, time: Tensor, negative: Tensor) -> Tensor:
        rows = torch.ones_like(negative) if self.config.negative else ~negative
        if self.config.acts is None:
            return rows
        return rows & torch.isin(self.stage(time), torch.tensor(self.config.acts, dtype=torch.long, device=rows.device))

    def tokens(self, time: Tensor) -> Tensor:
        return self.bank[self.stage(time)]  # b k d
