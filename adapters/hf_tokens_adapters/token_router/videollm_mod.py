"""VideoLLM-MoD: in every other block of a multimodal LLM a learned scorer lets a share of each frame's tokens run; the others skip it.

Paper:   VideoLLM-MoD: Efficient Video-Language Streaming with Mixture-of-Depths Vision Computation (Wu et al., 2024), arXiv:2408.16730
Needs:   training
Maths:   mu_i = w_l x_i + b_l for each vision token i;  x_i + mu_i f_l(x_i) if mu_i is among the r n highest of its frame, else x_i;
         text tokens always run: x + f_l(x);  f_l is the block's update over the text and the chosen vision tokens
Differs: the paper's mu has no bias; here b starts at 1 and w near 0, so that what runs at first changes as in the base model. k is
         rounded up; keep = 1 is the base model. A frame is a run of vision tokens that stand side by side, or `frame_tokens` of it, and
         must come in one pass.
Checked: no public code found (2026-11-29), showlab/videollm-online has no routed blocks; the paper leaves open how the scorer starts and
         how the number of tokens is rounded.

>>> from hf_tokens import VideoLLMMoDConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llava")
>>> model = get_token_model(base.model, VideoLLMMoDConfig(keep=0.25)).eval()
>>> cache = model(**base.inputs, use_cache=True).past_key_values
>>> [layer.length for layer in cache.layers]
[32, 20, 32, 20]
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_tokens import Dims, MethodConfig, TokenRouter, UnsupportedError, option, register


@dataclass(frozen=True)
class VideoLLMMoDConfig(MethodConfig):
    keep: float = option(0.2, ge=0, le=1, zero=1.0, help="Share of each frame's tokens that run a block (paper: r).")
    insert: str = option("interleaved", choices=("interleaved", "all"), help="Blocks with a scorer: every other one, or each.")
    frame_tokens: int | None = option(None, ge=1, help="Tokens of a frame where several stand side by side; None takes them as one.")


def frames(image: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """Number of the frame of each vision token, another one for all the rest, and the vision token's place in its run, (b m) each."""
    m = image.shape[1]
    begins = image & ~torch.nn.functional.pad(image[:, :-1], (1, 0))
    index = torch.arange(m, device=image.device)
    place = index - torch.where(begins, index, 0).cummax(dim=1).values
    if size is not None:
        begins = begins | image & (place % size == 0)
    return torch.where(image, begins.cumsum(dim=1) - 1, m), place


def rank_in(score: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Place of each score in its group, the highest first, of two equal ones the earlier; and the size of that group, (b m)."""
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
    size = torch.zeros_like(group[:, :1]).expand(-1, group.shape[1] + 1).scatter_add(1, group, torch.ones_like(group))
    start = size.cumsum(dim=1) - size
    return order.argsort(dim=1) - start.gather(1, group), size.gather(1, group)


@register("videollm-mod", VideoLLMMoDConfig)
class VideoLLMMoD(TokenRouter):
    kinds = ("text",)
    causal = True

    def __init__(self, config: VideoLLMMoDConfig, dims: Dims):
        super().__init__(config, dims)
        scorer = nn.Linear(dims.width, 1)
        self.weight, self.bias = scorer.weight, scorer.bias
        nn.init.normal_(self.weight, std=1e-3)
        nn.init.ones_(self.bias)  # a token that is chosen runs at full strength at first

    @classmethod
    def default_layers(cls, config: VideoLLMMoDConfig, layers: int) -> tuple[int, ...]:
        return tuple(range(layers)) if config.insert == "all" or layers == 1 else tuple(range(1, layers, 2))

    def route(self, hidden: Tensor, visual: Tensor, mask: Tensor, memory: dict) -> Tensor | None:
        if self.config.keep == 1:
            return None
        image = visual & mask
        group, place = frames(image, self.config.frame_tokens)
        if self.is_first_block:
            self.follow(image, mask, place, memory)
        if not bool(image.any()):
            return None
        mu = linear(hidden, self.weight, self.bias)[..., 0]  # b m
        ahead, size = rank_in(mu, group)
        chosen = ahead < (self.config.keep * size - 1e-9).ceil()
        return torch.where(image, mu * chosen, 1)

    def follow(self, image: Tensor, mask: Tensor, place: Tensor, memory: dict) -> None:
        """Refuse a frame that began in an earlier pass: its highest scores are those of all its tokens."""
        size, key = self.config.frame_tokens, f"{self.key}.open"
        first = mask & (mask.cumsum(dim=1) == 1)
        before = memory.rows.get(key)
        if before is not None and bool((before & (image & first).any(dim=1)).any()):
            rule = "A frame must come in one pass, so that its tokens can be compared"
            raise UnsupportedError(f"{rule}, got one in parts. Cut the prompt between frames, or name `frame_tokens`.")
        ends = image[:, -1] if size is None else image[:, -1] & ((place[:, -1] + 1) % size != 0)
        memory.rows[key] = ends
