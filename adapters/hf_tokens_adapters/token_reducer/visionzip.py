"""VisionZip: of a picture an LLM gets the patches that the tower's class token looks at, and a few mixtures of the others.

Paper:   VisionZip: Longer is Better but Not Necessary in Vision Language Models (Yang et al., CVPR 2025), arXiv:2412.04467
Needs:   nothing
Maths:   in the block whose output the projector reads: a = sum over heads of the class token's attention;  the class token and the
         N - 1 patches with the highest a are dominant.  Of the m others every (m // M)-th is a target, M in all;  each of the rest joins
         the target with the most alike key (cosine of the heads' mean);  y_t = x_t + mean of those that joined t
         The LLM gets the class token, the dominant patches in their order, and the targets
Differs: What comes behind a picture keeps its position, where the release counts anew; the tokens of the picture stand as there. A picture
         of no more tokens than N + M stays as it is. Towers without a class token are refused, as are crops of a picture.
Checked: dvlab-research/VisionZip@3151f6df, its tower's forward on 24 random CLIP of 3 to 5 blocks and 49 to 256 patches, then the
         projector: largest difference 6e-15 of what the LLM gets of a picture, in the same order.

>>> from hf_tokens import VisionZipConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, VisionZipConfig(dominant=5, contextual=3))
>>> base.tokens - measure(model, **specimen.inputs).tokens  # two rows, four blocks: 8 of 16 image tokens stay
64
"""

from dataclasses import dataclass
from typing import Any

import torch
from hf_tokens_kernels import match, merge, take_rows
from torch import Tensor

from hf_tokens import ConfigError, Dims, MethodConfig, TokenMap, TokenReducer, UnsupportedError, indices, option, rank, register


@dataclass(frozen=True)
class VisionZipConfig(MethodConfig):
    dominant: int = option(
        191, ge=0, zero=0, example=5, help="Tokens that stay as they are, the class token among them; 0: all (paper: N)."
    )
    contextual: int = option(30, ge=1, example=3, help="Tokens that the others become (paper: M).")


@register("visionzip", VisionZipConfig)
class VisionZip(TokenReducer):
    site = "before"
    kinds = ("vision", "text")
    tower = True
    chunks = False
    decodes = False

    def __init__(self, config: VisionZipConfig, dims: Dims):
        super().__init__(config, dims)
        self.in_tower = dims.kind == "vision"
        self.site = "after" if self.in_tower else "before"
        self.ignores = ("pictures",) if self.in_tower else ("hidden", "keys", "scores", "positions", "fresh", "prefix")

    @classmethod
    def check(cls, config: VisionZipConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        if config.layers is not None or config.stream is not None:
            rule = "VisionZip acts in the tower where the projector reads it, and where the text begins"
            raise ConfigError(f"{rule}, got layers={config.layers} and stream={config.stream!r}. Leave out both.")

    @classmethod
    def default_layers(cls, config: VisionZipConfig, layers: int) -> tuple[int, ...]:
        return (0,)

    def assign(
        self, mask: Tensor, hidden: Tensor | None, keys: Tensor | None, scores: Any, positions: Tensor | None, fresh: Tensor | None,
        prefix: int | None, pictures: list[Tensor] | None,
    ) -> TokenMap | None:  # fmt: skip
        count = self.config.dominant + self.config.contextual
        if self.config.dominant == 0:
            return None
        if not self.in_tower:
            kept = mask.flatten().clone()
            for index in pictures:  # p t h w
                kept[index.flatten(0, 1).flatten(1)[:, count:]] = False
            return TokenMap.select(kept.view_as(mask))
        if not prefix:
            raise UnsupportedError("VisionZip ranks patches by a class token's attention, got a tower without one. Choose another method.")
        own = indices(mask & ~fresh)  # b n, class token first
        if not torch.equal(positions.gather(1, own), torch.arange(own.shape[1], device=own.device).expand_as(own)):
            rule = "VisionZip takes the patches of a picture as they are"
            raise UnsupportedError(f"{rule}, got a tower in which some joined or vanished. Leave out the method that does so.")
        if own.shape[1] - prefix <= count:
            return None
        heed = scores.rows(own[:, :1])[:, :, 0].sum(dim=1).gather(1, own)[:, prefix:]
        zipped = self.zipped(take_rows(hidden, own), take_rows(keys.mean(dim=1), own)[:, prefix:], heed)
        place = own[:, prefix : prefix + count, None].expand_as(zipped)
        return TokenMap.identity(mask.shape[1], len(mask), mask.device).holding(hidden.scatter(1, place, zipped))

    def zipped(self, x: Tensor, features: Tensor, heed: Tensor) -> Tensor:
        """What of each picture the projector is to get, (b N+M d), of its tokens (b 1+n d) with their mean keys and attention."""
        patches, contextual = x[:, -heed.shape[1] :], self.config.contextual
        dominant = rank(heed) < self.config.dominant - 1
        rest = heed.shape[1] - self.config.dominant + 1
        others = indices(~dominant, rest)  # b m
        target = others[:, :: max(1, rest // contextual)][:, :contextual]  # b M
        joins = ~dominant.scatter(1, target, True)
        mate = match(features, take_rows(features, target), src_mask=joins)[1]
        mixed = take_rows(patches, target) + merge(patches, torch.where(joins, mate, -1), contextual)
        return torch.cat([x[:, :1], take_rows(patches, indices(dominant, self.config.dominant - 1)), mixed], dim=1)
