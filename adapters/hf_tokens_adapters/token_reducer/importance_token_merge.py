"""Importance-based token merging: attention runs on fewer tokens, and those that the prompt changes most are the last to be merged.

Paper:   Importance-Based Token Merging for Efficient Image and Video Generation (Wu et al., ICCV 2025), arXiv:2411.16720
Needs:   nothing
Maths:   s_i = mean |eps_cond - eps_uncond| of token i;  P = the p (1 - r) n tokens of highest s;  D = n / 4 of P at random;
         e_i = max_{j in D} cos(x_i, x_j) of what enters the block;  of the tokens outside D, those outside P join their most alike in
         D, and so do those of P with the highest e_i, r n in all;  y = f(mean of each group), and each token gets its group's y
         At the first steps, and without guidance, D is one token of each 2 x 2 cell, and all are alike important (ToMe for Stable
         Diffusion); at the first steps a group's value is that of its token in D.
Differs: s comes from the step before, as theirs. The draw is the same in each sample. A U-Net is merged at each resolution, theirs at the
         highest: name a stream to choose. The defaults are those for Stable Diffusion; for PixArt they are spread=1.0, by="place", prune=4,
         cross_attention=True and layers 7 to 20 of 28. `rule="abstract"` is what the paper says without the code.
Checked: cvlab-stonybrook/importance-token-merge@1fdf5e29, merged and copied back with the same draw, 30 grids each by content, by cells
         and by place: largest difference 7e-16, but where a share of tokens is whole and their product falls just short of it.

>>> import torch
>>> from hf_tokens import ImportanceTokenMergeConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/FluxTransformer2DModel")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, ImportanceTokenMergeConfig(ratio=0.5))
>>> measure(model, **specimen.inputs).flops < base.flops
True
"""

from dataclasses import dataclass, replace

import torch
from hf_tokens_kernels import match, take_rows
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, option, rank, register


@dataclass(frozen=True)
class ImportanceTokenMergeConfig(MethodConfig):
    ratio: float = option(0.5, ge=0, lt=1, zero=0.0, help="Share of the tokens that is merged away (r).")
    spread: float = option(1.4, gt=0, help="How many times the tokens that stay the important ones are (p).")
    targets: float = option(0.25, gt=0, le=1, help="Share of the tokens that the others are merged into (D).")
    by: str = option("content", choices=("content", "place"), help="Whether tokens join the most alike or the nearest.")
    prune: int = option(2, ge=0, was={1: 0}, help="First steps at which tokens get what their target got, which stays as it was.")
    cross_attention: bool = option(False, help="Whether the cross-attention runs on merged tokens too.")
    mlp: bool = option(False, help="Whether the MLP runs on merged tokens too.")
    pool: float = option(0.75, gt=0, le=1, help="With the abstract's rule: share of the tokens that is important (P).")
    rule: str = option(
        "release", choices=("release", "abstract"), was={1: "abstract"},
        help="abstract: P is a `pool`, s a norm, x what enters the attention, and D from anywhere where all are alike.",
    )  # fmt: skip
    seed: int = option(0, ge=0, help="Seed of the draw of D, which is another one in each block and at each step.")


@register("importance-token-merge", ImportanceTokenMergeConfig, version=2)
class ImportanceTokenMerge(TokenReducer):
    site = "sublayer"
    kinds = ("denoiser",)

    @property
    def parts(self) -> tuple[str, ...]:
        config = self.config
        return ("attention", *["cross_attention"] * config.cross_attention, *["mlp"] * config.mlp)

    @property
    def ignores(self) -> tuple[str, ...]:
        return ("entered", "contrast", "grid") if self.config.rule == "abstract" else ("hidden", "guidance")

    def draw(self, n: int, step: int) -> Tensor:
        """The order in which tokens are drawn, a permutation (n)."""
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 1009 + self.dims.place)
        return torch.randperm(n, generator=generator)

    def assign(
        self, hidden: Tensor | None, entered: Tensor | None, guidance: Tensor | None, contrast: Tensor | None, mask: Tensor, fresh: Tensor,
        grid: tuple[int, int] | None, step: int,
    ) -> TokenMap | None:  # fmt: skip
        config, (b, m), abstract = self.config, mask.shape, self.config.rule == "abstract"
        mine, x = mask & ~fresh, hidden if abstract else entered
        n, grid = int(mine.sum(dim=1).min()), (1, m) if grid is None else grid
        if n < 2 or int(config.ratio * n + 1e-9) == 0:
            return None
        importance = guidance if abstract else None if contrast is None else contrast.abs().mean(dim=-1)
        turn = self.draw(m, step).to(x.device).argsort().expand(b, m)  # b m
        if not abstract and (importance is None or step < config.prune and config.by == "content"):
            dst, inside = of_cells(mine, turn, grid), mine
        else:
            dst, inside = self.of_important(importance, mine, turn, n)
        by_place = config.by == "place" and not abstract
        x = torch.stack(places(mine, grid), dim=-1).to(x.dtype) if by_place else x.detach()
        alike, partner = match(x, take_rows(x, dst), metric="euclidean" if by_place else "cosine")  # b m
        last = torch.zeros_like(mine).scatter(1, dst, True) | ~mine
        outside = torch.where(inside, 0, 4 + (grid[0] ** 2 + grid[1] ** 2 if by_place else 0))  # what is not important goes first
        eager = (alike + outside).masked_fill(last, -torch.inf)
        order = turn.argsort(dim=1) if by_place else torch.arange(m, device=x.device).expand(b, m)  # of those that are as near
        src = order.gather(1, eager.gather(1, order).argsort(dim=1, descending=True, stable=True))
        src = src[:, : min(int(config.ratio * n + 1e-9), n - dst.shape[1])]
        tokens = TokenMap.merge(m, src, dst.gather(1, partner.gather(1, src)))
        return replace(tokens, joins=False) if step < config.prune else tokens

    def of_important(self, importance: Tensor | None, mine: Tensor, turn: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Those of the important tokens that are drawn first, as indices (b t), and which tokens are important (b m)."""
        config, stay = self.config, n - int(self.config.ratio * n + 1e-9)
        targets = max(1, min(int(config.targets * n), stay))
        size = config.pool * n if config.rule == "abstract" else min(n, config.spread * stay)
        pool = max(int(size + 1e-9), stay if config.rule == "abstract" else targets)  # the abstract's must be filled up by what is left
        inside = mine if importance is None else rank(importance.masked_fill(~mine, -torch.inf)) < pool
        return turn.masked_fill(~(inside & mine), turn.shape[1]).argsort(dim=1)[:, :targets], inside


def places(mine: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column of each token of the picture, (b m) each."""
    place = (mine.cumsum(dim=1) - 1).clamp(min=0)
    return place // grid[1], place % grid[1]


def of_cells(mine: Tensor, turn: Tensor, grid: tuple[int, int]) -> Tensor:
    """The token of each whole 2 x 2 cell that is drawn first, as indices (b t); of a line each fourth."""
    high, wide = (2, 2) if min(grid) > 1 else (1, 4) if grid[0] == 1 else (4, 1)
    row, column = places(mine, grid)
    rows, columns = max(1, grid[0] // high), max(1, grid[1] // wide)
    whole = mine & (row // high < rows) & (column // wide < columns)
    cell = torch.where(whole, row // high * columns + column // wide, rows * columns)
    first = torch.full_like(turn[:, :1].expand(-1, rows * columns + 1), turn.shape[1]).scatter_reduce(1, cell, turn, reduce="amin")
    drawn = whole & (first.gather(1, cell) == turn)
    return drawn.long().argsort(dim=1, descending=True, stable=True)[:, : int(drawn.sum(dim=1).min())]
