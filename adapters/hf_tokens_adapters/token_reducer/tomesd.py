"""ToMe for Stable Diffusion: attention runs on fewer tokens, merged into one of each cell of the picture, and each gets what its group got.

Paper:   Token Merging for Fast Stable Diffusion (Bolya and Hoffman, CVPR Workshop 2023), arXiv:2303.17604
Needs:   nothing
Maths:   D = one token of each s_y x s_x cell, drawn at random;  e_i = max_{j in D} cos(x_i, x_j) of what enters the block;
         the r n tokens outside D with the highest e_i join their most alike in D;  y = f(mean of each group), and each gets its group's y
Differs: The draw is that of a seed, a step and a block, so that both halves or calls of guidance share it; theirs goes on from the global
         generator, and takes the first token of each cell where the batch is odd. How coarse a block's tokens are is counted from the
         finest that it acts on and not from the latents, so a DiT, whose tokens are patches, is merged too. Tokens that lie in a line have
         cells of s_x s_y.
Checked: dbolya/tomesd@27a14a37, merged and copied back with the same draw, 112 grids of 4 to 289 tokens, and a U-Net over 3 steps without
         the draw, by its own and by both resolutions: largest difference 1.3e-15.

>>> import torch
>>> from hf_tokens import ToMeSDConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/UNet2DConditionModel")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, ToMeSDConfig(ratio=0.5))
>>> measure(model, **specimen.inputs).flops < base.flops
True
"""

from dataclasses import dataclass

import torch
from hf_tokens_kernels import match, take_rows
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, register


@dataclass(frozen=True)
class ToMeSDConfig(MethodConfig):
    ratio: float = option(0.5, ge=0, lt=1, zero=0.0, help="Share of the tokens that is merged away (r), at most all but one of each cell.")
    max_downsample: int = option(1, ge=1, help="Blocks whose tokens are up to this many times as wide and high as the finest are merged.")
    sx: int = option(2, ge=1, help="Width of a cell.")
    sy: int = option(2, ge=1, help="Height of a cell.")
    use_rand: bool = option(True, help="Whether the token of a cell is drawn; else it is the first.")
    cross_attention: bool = option(False, help="Whether the cross-attention runs on merged tokens too.")
    mlp: bool = option(False, help="Whether the MLP runs on merged tokens too.")
    seed: int = option(0, ge=0, help="Seed of the draw, which is another one in each block and at each step.")


@register("tomesd", ToMeSDConfig)
class ToMeSD(TokenReducer):
    site = "sublayer"
    kinds = ("denoiser",)

    @property
    def parts(self) -> tuple[str, ...]:
        config = self.config
        return ("attention", *["cross_attention"] * config.cross_attention, *["mlp"] * config.mlp)

    def draw(self, cells: int, step: int) -> Tensor:
        """Which token of each cell the others join, counted along its rows, (c)."""
        config = self.config
        if not config.use_rand:
            return torch.zeros(cells, dtype=torch.long)
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1009 + self.dims.place)
        return torch.randint(config.sx * config.sy, (cells,), generator=generator)

    def assign(
        self, entered: Tensor, mask: Tensor, fresh: Tensor, grid: tuple[int, int] | None, downsampling: int, step: int
    ) -> TokenMap | None:
        config, mine, m = self.config, mask & ~fresh, mask.shape[1]
        n = int(mine.sum(dim=1).min())
        gone = int(config.ratio * n)
        if gone == 0 or downsampling > config.max_downsample:
            return None
        target = self.targets(mine, (1, m) if grid is None else grid, step)
        count = int(target.sum(dim=1).min())
        if count in (0, n):
            return None
        dst = target.long().argsort(dim=1, descending=True, stable=True)[:, :count]
        x = entered.detach()
        alike, partner = match(x, take_rows(x, dst), metric="cosine")  # b m
        last = torch.zeros_like(mine).scatter(1, dst, True) | ~mine
        src = alike.masked_fill(last, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, : min(gone, n - count)]
        return TokenMap.merge(m, src, dst.gather(1, partner.gather(1, src)))

    def targets(self, mine: Tensor, grid: tuple[int, int], step: int) -> Tensor:
        """The drawn token of each cell that is whole, (b m) bool."""
        (height, width), sx, sy = grid, self.config.sx, self.config.sy
        sx, sy = (sx * sy, 1) if height == 1 else (1, sx * sy) if width == 1 else (sx, sy)
        rows, columns = height // sy, width // sx
        place = (mine.cumsum(dim=1) - 1).clamp(min=0)
        row, column = place // width, place % width
        whole = mine & (row < rows * sy) & (column < columns * sx)
        if not rows * columns:
            return whole
        drawn = self.draw(rows * columns, step).to(mine.device)
        cell = (row // sy * columns + column // sx).clamp(max=rows * columns - 1)
        return whole & (row % sy * sx + column % sx == drawn[cell])
