"""CrossLMM: few visual tokens stay in the language model, and in some of its blocks they and the text read all of them.

Paper:   CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms (Yan et al., 2025), arXiv:2505.17020
Needs:   training
Maths:   behind the self-attention of a block, with V all visual tokens as they came in,
         x_visual += tanh(g_v) CrossAttention_v(x_visual, V),  x_text += tanh(g_t) CrossAttention_t(x_text, V)
Differs: how the tokens become few is the reducer's task that stands beside it in the stack, such as fourier-vlm; the queries are what the
         self-attention reads, and V is not normed again; gates start at zero, so that an untrained adapter changes nothing. A token
         sees pictures that began before it. Every fourth block is the paper's; the number of heads is ours.
Checked: no public code found (2026-11-29), shilinyan99/CrossLMM has the paper alone, whose K = 4 is `every`; the number of heads and the
         norms of V are open.

>>> from hf_tokens import CrossLMMConfig, FourierVLMConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, [FourierVLMConfig(keep=0.5), CrossLMMConfig(heads=4)])
>>> measure(model, **specimen.inputs).tokens < base.tokens
True
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hf_tokens import AttentionEdit, ConfigError, Dims, MethodConfig, option, register

AT_A_TIME = 1024  # tokens that read together


@dataclass(frozen=True)
class CrossLMMConfig(MethodConfig):
    every: int = option(4, ge=1, help="Every how many blocks has the two cross-attentions.")
    heads: int = option(8, ge=1, help="Heads of each cross-attention.")
    strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Factor on what they add.")


class Reader(nn.Module):
    """One gated cross-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, pictures: Tensor, since: Tensor, positions: Tensor) -> Tensor:
        """What x (b m d) at positions (b m) reads of the pictures (b v d), each of which can be seen since a position, (b v)."""
        split = lambda y: rearrange(y, "b n (h e) -> b h n e", h=self.heads)
        q, k, v = split(self.wq(x)), split(self.wk(pictures)), split(self.wv(pictures))
        read = []
        for part, place in zip(q.split(AT_A_TIME, dim=2), positions.split(AT_A_TIME, dim=1), strict=True):
            seen = (since[:, None] <= place[..., None])[:, None]  # b 1 c v
            some = seen.any(dim=-1, keepdim=True)
            read.append(scaled_dot_product_attention(part, k, v, attn_mask=seen | ~some).masked_fill(~some, 0))
        return self.gate.tanh() * self.wo(rearrange(torch.cat(read, dim=2), "b h n e -> b n (h e)"))


@register("crosslmm", CrossLMMConfig)
class CrossLMM(AttentionEdit):
    kinds = ("text",)
    causal = True

    def __init__(self, config: CrossLMMConfig, dims: Dims):
        super().__init__(config, dims)
        if dims.width % config.heads:
            rule = f"CrossLMMConfig.heads must divide the width of the stream, {dims.width}"
            raise ConfigError(f"{rule}, got {config.heads}. Choose another number.")
        self.visual, self.text = Reader(dims.width, config.heads), Reader(dims.width, config.heads)

    @classmethod
    def default_layers(cls, config: CrossLMMConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(0, layers, config.every))

    def edit(self, attention_input: Tensor, attention_output: Tensor, visual: Tensor, positions: Tensor, pictured: tuple) -> Tensor | None:
        pictures, there, since = pictured
        if self.config.strength == 0 or pictures.shape[1] == 0:
            return None
        since = since.masked_fill(~there, torch.iinfo(since.dtype).max)  # never
        x, pictures = attention_input.to(self.text.gate.dtype), pictures.to(self.text.gate.dtype)
        read = torch.where(visual[..., None], *(reader(x, pictures, since, positions) for reader in (self.visual, self.text)))
        return attention_output + self.config.strength * read.to(attention_output.dtype)
