"""NeTI: a small network tells each block, at each denoising step, the concept's vector, in the place of one vector for all of them.

Paper:   A Neural Space-Time Representation for Text-to-Image Personalization (Alaluf et al., SIGGRAPH Asia 2023), arXiv:2305.15391
Needs:   training
Maths:   f(t, l) = [sin W(t, l), cos W(t, l)] / |.|,  W ~ N(0, diag(sigma_t^2, sigma_l^2));  h = MLP(A f), rows of A the f of anchors;
         (u, v) = h_{<= truncation} W_out;  c = s u / |(u, v)|;  the block reads c + alpha |c| v / |v|
         with a word, the block's text encoder reads s u / |(u, v)| for it; its last state h of the word is h + alpha |h| v / |v| for values
Differs: the concept is the authors' where `word` names its placeholder and the pipeline is passed, of Stable Diffusion 1, 2 or XL:
         `get_token_model(pipe, NeTIConfig(word="<cat>"))`. The text encoder then reads the prompt again for all blocks in each call of the
         UNet, in training too, of a negative prompt that holds the word as well; s is the length of the word's row in its table, which is
         theirs if the row is a copy, but for a factor such as 1.01, of that of a word for the coarse class. XL's two encoders read parts
         of one vector, and what they pool is that of the table's row. Without a word c stands behind the encoded prompt, with which no
         words mix, and v goes into keys and values; s is the mean norm of the prompt's tokens; a joint transformer's block drops what it
         made of c. Dropout is drawn for each sample and block.
Checked: NeuralTextualInversion/NeTI@28edf306, with one set of weights: a UNet's outputs with its text encoder, prompts and attention, for 3
         prompts at 3 timesteps: largest difference 7e-16; its mapper, 20 draws of steps and blocks: 2e-15.

>>> from hf_tokens import NeTIConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/UNet2DConditionModel")
>>> model = get_token_model(specimen.model, NeTIConfig())
>>> mapper = next(module for module in model.modules() if "mapper" in dict(module.named_children())).mapper
>>> mapper[0].weight.shape, mapper[-1].weight.shape  # ten times sixteen anchors; two vectors of the prompt's width
(torch.Size([160, 2048]), torch.Size([64, 128]))
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, TokenBank, option, register


@dataclass(frozen=True)
class NeTIConfig(MethodConfig):
    tokens: int = option(1, ge=0, zero=0, help="Vectors of the concept in each block's prompt, each with outputs of its own.")
    word: str | None = option(
        None, free=True, help="Word of the prompt that they stand for, read by the text encoder; None puts them behind it."
    )
    hidden: int = option(128, ge=1, size=True, help="Units of the two hidden layers.")
    frequencies: int = option(1024, ge=1, size=True, help="Random frequencies of the positional encoding (rows of W).")
    sigma_t: float = option(0.03, gt=0, help="Their standard deviation over the timestep, 0 to 1000.")
    sigma_l: float = option(2.0, gt=0, help="The same over the block, counted from 0.")
    time_anchors: int = option(10, ge=1, le=1000, help="Timesteps that make up the rows of A with each of the blocks.")
    nested_dropout: float = option(
        0.5, ge=0, le=1, help="Probability that a sample in training drops the hidden units behind a random one."
    )
    truncation: int | None = option(None, ge=1, help="Hidden units that count outside of training, the most important first; None is all.")
    alpha: float = option(0.2, ge=0, help="Size of the bypass against that of the concept.")
    norm: float | None = option(
        None, gt=0, help="Length of the concept's vector (s); None takes that of the word's embedding, or the mean of the prompt's tokens."
    )
    lengths: str = option(
        "joint", choices=("joint", "apart"), was={1: "apart"}, help="Whether s is the length of (u, v) together, or of u alone."
    )
    negative: bool = option(False, help="Whether the negative prompt of classifier-free guidance gets them too; a word has its place.")


@register("neti", NeTIConfig, version=2)
class NeTI(TokenBank):
    site, moves_tokens, deep = "prompt", False, True
    kinds = ("denoiser",)

    def __init__(self, config: NeTIConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.place or config.tokens == 0:
            return
        self.register_buffer("frequency", torch.randn(config.frequencies, 2) * torch.tensor([config.sigma_t, config.sigma_l]))
        times = torch.arange(config.time_anchors) * (1000 // config.time_anchors)
        anchors = torch.cartesian_prod(times, torch.arange(dims.places)).float()  # a 2
        wide, h = len(anchors), config.hidden
        layers = [nn.Linear(wide, h), nn.LayerNorm(h), nn.LeakyReLU(), nn.Linear(h, h), nn.LayerNorm(h), nn.LeakyReLU()]
        self.mapper = nn.Sequential(nn.Linear(2 * config.frequencies, wide), *layers, nn.Linear(h, 2 * config.tokens * dims.prompt))
        with torch.no_grad():
            self.mapper[0].weight.copy_(self.encode(anchors))

    @classmethod
    def check(cls, config: NeTIConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.word is not None and config.negative:
            raise ConfigError("NeTIConfig.negative is for tokens behind the prompt, got a word. Write it into the negative prompt.")

    @classmethod
    def word(cls, config: NeTIConfig) -> str | None:
        return config.word

    def encode(self, places: Tensor) -> Tensor:
        """The positional encoding of timesteps and blocks, (b 2) to (b 2 f)."""
        wide = torch.promote_types(self.frequency.dtype, torch.float32)  # half precision does not tell 999 from 1000
        angle = places.to(wide) @ self.frequency.to(wide).mT
        dtype = self.mapper[2].weight.dtype  # a norm's: a linear layer may be stored in another one than it computes in
        return F.normalize(torch.cat([angle.sin(), angle.cos()], dim=-1), dim=-1).to(dtype)

    def units(self, hidden: Tensor) -> Tensor:
        """The hidden units (b h) without those that are dropped or truncated: the first ones come to matter most."""
        b, h = hidden.shape
        left = torch.full((b,), h if self.training or self.config.truncation is None else self.config.truncation, device=hidden.device)
        if self.training:
            drops = torch.rand(b, device=hidden.device) < self.config.nested_dropout
            left = torch.where(drops, torch.randint(h, (b,), device=hidden.device), left)
        return hidden * (torch.arange(h, device=hidden.device) < left[:, None])

    def takes(self, negative: Tensor) -> Tensor | None:
        return torch.ones_like(negative) if self.config.negative else None

    def tokens(self, time: Tensor, hidden: Tensor, mask: Tensor) -> Tensor | tuple[Tensor, Tensor] | None:
        if self.config.tokens == 0:
            return None
        mapper, shared = self.model_first.mapper, self.model_first
        given = shared.encode(torch.stack([time, torch.full_like(time, self.dims.place)], dim=1))
        concept, bypass = mapper[-1](self.units(mapper[:-1](given))).view(len(time), 2, self.config.tokens, -1).unbind(1)  # b k d
        length = (hidden.norm(dim=-1) * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        length = length[:, None, None] if self.config.norm is None else self.config.norm
        share = F.normalize(torch.cat([concept, bypass], dim=-1), dim=-1)[..., : concept.shape[-1]].norm(dim=-1, keepdim=True)
        length = length * (share if self.config.lengths == "joint" else 1)
        concept, bypass = F.normalize(concept, dim=-1), self.config.alpha * F.normalize(bypass, dim=-1)
        return length * (concept + bypass) if self.config.word is None else (length * concept, bypass)
