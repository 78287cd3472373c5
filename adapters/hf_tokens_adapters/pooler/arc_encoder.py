"""ARC-Encoder: a language model without last layers and causal mask puts out x times fewer vectors, which another one reads as tokens.

Paper:   ARC-Encoder: learning compressed text representations for large language models (Pilchen et al., 2025), arXiv:2510.20535
Needs:   training
Maths:   in the last self-attention that runs, q_g = W_q norm(mean of group g), k_i and v_i of all n tokens i;  n / x groups of neighbours,
         as even as can be;  c_g = W_2 W_1 h_g with h_g what the block makes of g;  behind c_1 ... c_(n/x) stands <Cont> or <Rec>
Differs: the encoder is the model that the adapter sits in, which an adapter names and does not hold: the paper trains all of its weights,
         here a LoRA in the same stack does (the paper's table 5 has both). A group asks from the place of its first token, where the
         authors' code numbers the groups 0, 1, 2. The block of the pooled queries runs the tokens too, whose output no one reads. The
         vectors come in the place of `last_hidden_state`, zeros behind those of a shorter text; `embed_prompt` puts them into a decoder's
         prompt. Labels `hf_tokens_targets` (b) ask for <Rec> where they are 1. Several decoders take an adapter each.
Checked: kyutai-labs/ARC-Encoder@3e04c971, groups and pooled queries of 1 to 40 tokens by 2, 4 and 8:
         largest difference 5.1e-08, for it averages by a matrix in float32; the layer behind them and the projector by reading alone.

>>> import torch
>>> from transformers import LlamaConfig, LlamaModel
>>> from hf_tokens import ARCEncoderConfig, get_token_model
>>> sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, vocab_size=99)
>>> encoder = get_token_model(LlamaModel(LlamaConfig(**sizes)), ARCEncoderConfig(pooling_factor=4, width=48)).eval()
>>> encoder(input_ids=torch.arange(16)[None]).last_hidden_state.shape  # four vectors and <Cont>
torch.Size([1, 5, 48])
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_tokens import ConfigError, Dims, MethodConfig, Pooler, TokenMap, option, register


@dataclass(frozen=True)
class ARCEncoderConfig(MethodConfig):
    pooling_factor: int = option(4, ge=1, zero=1, help="Tokens that become one vector (paper: x, 4 or 8); 1 leaves the model as it is.")
    truncated: int = option(2, ge=0, help="Layers at the end of the encoder that do not run.")
    bottleneck: int = option(2048, ge=1, size=True, help="Width between the two matrices of the projector.")
    width: int | None = option(None, ge=1, help="Width of the decoder's embeddings; None takes the encoder's own.")


def groups(mask: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The group of each real token, -1 for the others, (b n), and how many there are, (b 1): the larger ones in front."""
    count = mask.sum(dim=1, keepdim=True)
    many = (count + factor - 1) // factor
    size = count // many.clamp(min=1)
    larger = count - size * many
    place = mask.cumsum(dim=1) - 1
    behind = larger + (place - larger * (size + 1)) // size.clamp(min=1)
    return torch.where(mask, torch.where(place < larger * (size + 1), place // (size + 1), behind), -1), many


@register("arc-encoder", ARCEncoderConfig)
class ARCEncoder(Pooler):
    site = "output"
    kinds = ("text",)

    def __init__(self, config: ARCEncoderConfig, dims: Dims):
        super().__init__(config, dims)
        width = config.width or dims.width
        self.inner, self.outer = nn.Linear(dims.width, config.bottleneck, bias=False), nn.Linear(config.bottleneck, width, bias=False)
        self.special = nn.Parameter(0.02 * torch.randn(2, width))  # <Cont>, <Rec>

    @property
    def sees_all(self) -> bool:
        return self.config.pooling_factor > 1

    @property
    def exit(self) -> int | None:
        return self.dims.layers - self.config.truncated if self.config.pooling_factor > 1 else None

    @classmethod
    def check(cls, config: ARCEncoderConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.truncated >= layers:
            rule = f"ARCEncoderConfig.truncated must leave one of the {layers} layers"
            raise ConfigError(f"{rule}, got {config.truncated}. Truncate fewer.")

    def ask(self, hidden: Tensor, mask: Tensor, sizes: Tensor, fresh: Tensor, memory: dict) -> tuple[Tensor, Tensor] | None:
        if self.config.pooling_factor == 1:
            return None
        group, many = groups(mask & ~fresh, self.config.pooling_factor)
        memory.rows[self.key] = many
        k, n = int(many.max()), mask.shape[1]
        index = torch.arange(n, device=mask.device).expand_as(group)
        first = torch.full((len(mask), k + 1), n - 1, device=mask.device)
        first = first.scatter_reduce(1, torch.where(group < 0, k, group), index, "amin")[:, :k]  # b k
        return TokenMap(group, first, joins=True).mean(hidden, sizes), first

    def pool(self, answers: Tensor | None, targets: Tensor | None, memory: dict) -> Tensor | None:
        if answers is None:
            return None
        many = memory.rows[self.key]
        if targets is not None and targets.numel() != len(many):
            rule = f"The column hf_tokens_targets must hold a number for each of {len(many)} texts, 1 for <Rec>"
            raise ConfigError(f"{rule}, got {tuple(targets.shape)}. Give it so, or leave it out.")
        place = torch.arange(answers.shape[1] + 1, device=many.device)
        vectors = nn.functional.pad(self.outer(self.inner(answers.to(self.inner.weight.dtype))), (0, 0, 0, 1))  # b k+1 d
        task = torch.zeros_like(many) if targets is None else (targets == 1).long().view(-1, 1).expand_as(many)
        vectors = torch.where((place == many)[..., None], self.special[task], vectors)
        return vectors.masked_fill((place > many)[..., None], 0)
