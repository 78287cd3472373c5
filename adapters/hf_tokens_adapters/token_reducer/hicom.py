"""HICom: the instruction compresses a video twice, into one token for each group of neighbours and into k tokens for all of it.

Paper:   Hybrid-Level Instruction Injection for Video Token Compression in Multi-modal Large Language Models (Liu et al., CVPR 2025),
         arXiv:2503.16036
Needs:   training
Maths:   g = mean of the instruction;  inject(q) = LN(q (1 + s) + b), [s, b] = MLP(g);  for each group G of kt x k x k tokens
         o = softmax(inject(q_G) G^T / sqrt(d)) G, q the video made smaller by trilinear interpolation, and o + MLP(o) takes its place;
         for the K learnt queries Q  O = inject(Q) + MHA(inject(Q), X + P, X + P), P the sum of sines and cosines of frame, row and
         column, and O + MLP(O) stand behind
Differs: acts on the language model's inputs, behind the projector; the instruction is the text behind the last visual token, not CLIP's
         embedding of it; the readouts add to what they read and start at zero, so that untrained groups are nearly means. Groups at an
         edge are smaller, theirs overlap. Global tokens stand in the last places that the groups leave free: at most as many as there
         are, and no position of the text moves. The queries start at random: theirs at zero, where all of them stay alike. The attention
         has no biases. `rule="abstract"` has means of groups for q, and no P.
Checked: lntzm/HICom@df67ea1c, its two compressors with one set of weights, on four videos whose sides kernels divide, both
         injections: largest difference 4e-15 of local tokens and 3e-7 of global ones, whose softmax and P are float32 in theirs.

>>> from hf_tokens import HIComConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, HIComConfig(tokens=2))
>>> measure(model, **specimen.inputs).tokens < base.tokens
True
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from hf_tokens_kernels import merge, pool_softmax, unmerge
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from hf_tokens import ConfigError, Dims, MethodConfig, TokenMap, TokenReducer, option, register


@dataclass(frozen=True)
class HIComConfig(MethodConfig):
    spatial: int = option(2, ge=1, zero=1, help="Side of a group in tokens (paper: spatial kernel).")
    temporal: int = option(4, ge=1, zero=1, help="Frames of a group in a video (paper: temporal kernel).")
    tokens: int = option(32, ge=0, zero=0, help="Learnable tokens that read all of a picture or video (paper: K).")
    heads: int = option(8, ge=1, help="Heads of the attention of these.")
    injection: str = option("coarse", choices=("coarse", "direct"), help="The instruction scales and shifts the queries, or is the query.")
    rule: str = option(
        "release", choices=("release", "abstract"), was={1: "abstract"}, help="abstract: groups ask by their mean, and there is no P."
    )


def mlp(width: int, out: int, *, silent: bool = False) -> nn.Sequential:
    """Two layers; a silent one says zero until it is trained."""
    layers = nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))
    for parameter in layers[2].parameters() if silent else ():
        nn.init.zeros_(parameter)
    return layers


def cells(size: int, kernel: int, device: torch.device) -> Tensor:
    """Cell of each of so many places: as few as kernels cover, as even as can be, (size)."""
    return torch.arange(size, device=device) * math.ceil(size / kernel) // size


def sines(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The sum of the sines and cosines of each place along each side of a grid, (places d)."""
    place = dict(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    width = torch.arange(like.shape[-1], **place)
    waves = []
    for size in shape:
        angle = torch.arange(size, **place)[:, None] / 10000 ** (width.div(2, rounding_mode="floor") * 2 / len(width))
        waves.append(torch.where(width % 2 == 0, angle.sin(), angle.cos()))
    return (waves[0][:, None, None] + waves[1][:, None] + waves[2]).flatten(0, 2).to(like)


@register("hicom", HIComConfig, version=2)
class HICom(TokenReducer):
    site = "before"
    kinds = ("text",)
    causal = True
    chunks = decodes = False

    def __init__(self, config: HIComConfig, dims: Dims):
        super().__init__(config, dims)
        d = dims.width
        if d % config.heads:
            raise ConfigError(f"HIComConfig.heads must divide the width of the stream, {d}, got {config.heads}. Choose another number.")
        self.local_guide, self.local_norm, self.local_readout = mlp(d, 2 * d), nn.LayerNorm(d, eps=1e-6), mlp(d, d, silent=True)
        self.global_guide, self.global_norm, self.global_readout = mlp(d, 2 * d), nn.LayerNorm(d, eps=1e-6), mlp(d, d, silent=True)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.queries = nn.Parameter(0.02 * torch.randn(config.tokens, d))

    @classmethod
    def default_layers(cls, config: HIComConfig, layers: int) -> tuple[int, ...]:
        return (0,)

    def assign(self, hidden: Tensor, mask: Tensor, pictures: list[Tensor], instruction: Tensor) -> TokenMap | None:
        c = self.config
        if (c.spatial, c.temporal, c.tokens) == (1, 1, 0):
            return None
        m, flat = hidden.shape[1], hidden.flatten(0, 1).to(self.queries.dtype)
        words = instruction.sum(dim=1, keepdim=True).clamp(min=1)
        guide = (flat.view(hidden.shape) * instruction[..., None]).sum(dim=1) / words  # b d
        tokens, group = flat, torch.arange(m, device=hidden.device).repeat(len(hidden))
        for index in pictures:  # p t h w
            place, x = index.flatten(1), flat[index.flatten(1)]
            (t, h, w), asked = index.shape[1:], guide[place[:, 0] // m]
            ct, ch, cw = (
                cells(size, kernel, flat.device) for size, kernel in ((t, c.temporal if t > 1 else 1), (h, c.spatial), (w, c.spatial))
            )
            cell = ((ct[:, None, None] * (ch[-1] + 1) + ch[:, None]) * (cw[-1] + 1) + cw).flatten()  # t h w
            count = int(cell[-1]) + 1
            first = torch.full((count,), len(cell), device=flat.device).scatter_reduce(
                0, cell, torch.arange(len(cell), device=flat.device), "amin"
            )
            if (c.spatial, c.temporal) != (1, 1):
                tokens = tokens.index_put(
                    (place[:, first],), self.local(x, index.shape[1:], cell, [int(c[-1]) + 1 for c in (ct, ch, cw)], asked)
                )
            free = torch.ones_like(cell, dtype=torch.bool).index_fill(0, first, False).nonzero()[:, 0]
            free = free[max(0, len(free) - c.tokens) :]
            tokens = tokens.index_put((place[:, free],), self.everywhere(x, index.shape[1:], asked, len(free)))
            leader = first[cell].index_put((free,), free)
            group[place] = place[:, leader] % m
        found = TokenMap.pool(torch.where(mask, group.view_as(mask), -1))
        return found.holding(found.gather(tokens.view(hidden.shape)).to(hidden.dtype))

    def inject(self, level: str, query: Tensor, guide: Tensor) -> Tensor:
        """Queries (p q d) that know the instruction (p d)."""
        scale, shift = self.get_submodule(f"{level}_guide")(guide)[:, None].chunk(2, dim=-1)
        if self.config.injection == "direct":
            return scale.expand_as(query)
        return self.get_submodule(f"{level}_norm")(query * (1 + scale) + shift)

    def local(self, x: Tensor, shape: tuple[int, ...], cell: Tensor, small: list[int], guide: Tensor) -> Tensor:
        """One token for each cell of a smaller grid, x (p n d) to (p cells d)."""
        cell, count = cell.expand(len(x), -1), math.prod(small)  # p n
        smaller = lambda: interpolate(x.mT.unflatten(2, shape), size=small, mode="trilinear").flatten(2).mT
        query = self.inject("local", merge(x, cell, count) if self.config.rule == "abstract" else smaller(), guide)
        score = (unmerge(query, cell) * x).sum(dim=-1) / x.shape[-1] ** 0.5  # p n
        got = pool_softmax(x, score, cell, count)
        return got + self.local_readout(got)

    def everywhere(self, x: Tensor, shape: tuple[int, ...], guide: Tensor, count: int) -> Tensor:
        """The first learnable tokens, behind reading all of x (p n d), (p count d)."""
        query = self.inject("global", self.queries[:count].expand(len(x), -1, -1), guide)
        x = x if self.config.rule == "abstract" else x + sines(shape, x)
        split = lambda y: rearrange(y, "p n (h e) -> p h n e", h=self.config.heads)
        got = scaled_dot_product_attention(split(self.wq(query)), split(self.wk(x)), split(self.wv(x)))
        got = query + self.wo(rearrange(got, "p h n e -> p n (h e)"))
        return got + self.global_readout(got)
