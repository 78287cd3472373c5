"""Fourier-VLM: the language model gets each picture as the inverse cosine transform of its lowest frequencies, on a smaller grid.

Paper:   Fourier-VLM: Compressing Vision Tokens in the Frequency Domain for Large Vision-Language Models (Wang et al., 2025),
         arXiv:2508.06038
Needs:   nothing
Maths:   F = D_H X D_W^T for the H x W grid X of a picture, D the orthonormal DCT-II;  its first h x w coefficients stay;
         X' = D_h^T F[:h, :w] D_w sqrt(h w / H W)
Differs: the paper filters the encoder's features in front of the projector and trains the model again; here the projected tokens are
         filtered, so that any model will do without training. The last factor keeps the mean; theirs has none, and its tokens are twice
         as long where half of each side stays. A token stands where the first of those it replaces stood: positions of the text do not
         move. The transform is a product with a small matrix, not an FFT.
Checked: whyisverysmart/Fourier-Compressor@45ab4048, 20 pictures of four shapes, its tokens times the factor: largest difference 2e-14.

>>> from hf_tokens import FourierVLMConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, FourierVLMConfig(keep=0.5))
>>> measure(model, **specimen.inputs).tokens < base.tokens
True
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import low_pass, routed_gather, routed_scatter
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, register


@dataclass(frozen=True)
class FourierVLMConfig(MethodConfig):
    keep: float = option(0.5, gt=0, le=1, zero=1.0, help="Share of each side of a picture that stays (paper: h / H; 0.67 for Qwen2-VL).")


@register("fourier-vlm", FourierVLMConfig)
class FourierVLM(TokenReducer):
    site = "before"
    kinds = ("text",)
    side_by_side = True
    causal = True
    chunks = False
    decodes = False

    @classmethod
    def default_layers(cls, config: FourierVLMConfig, layers: int) -> tuple[int, ...]:
        return (0,)

    def left(self, size: int) -> int:
        """Tokens along a side that stay."""
        return max(1, min(size, round(size * self.config.keep)))

    def assign(self, hidden: Tensor, mask: Tensor, pictures: list[Tensor]) -> TokenMap | None:
        if self.config.keep == 1:
            return None
        m = hidden.shape[1]
        tokens, group = hidden.flatten(0, 1)[None], torch.arange(m, device=hidden.device).repeat(len(hidden))
        for videos in pictures:
            index = videos.flatten(0, 1)  # p h w, of one size
            height, width = index.shape[1:]
            h, w = self.left(height), self.left(width)
            rows, columns = (torch.arange(size, device=index.device) * few // size for size, few in ((height, h), (width, w)))
            corner = [torch.searchsorted(cells, torch.arange(few, device=index.device)) for cells, few in ((rows, h), (columns, w))]
            first = index[:, corner[0]][:, :, corner[1]]  # p h w, of the smaller grid
            low = low_pass(routed_gather(tokens, index.reshape(1, -1)).view(*index.shape, -1), h, w)
            tokens = routed_scatter(tokens, low.view(1, -1, low.shape[3]), first.reshape(1, -1))
            group[index] = first[:, rows][:, :, columns] % m
        found = TokenMap.pool(torch.where(mask, group.view_as(mask), -1))
        return found.holding(found.gather(tokens.view_as(hidden)))
