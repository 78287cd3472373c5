"""Recoverable compression: keep the visual tokens that stand out, bring back those that the question asks for, merge some of the rest.

Paper:   Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information (Chen et al., AAAI 2025),
         arXiv:2409.01179
Needs:   nothing
Maths:   a = softmax(X x_c / sqrt(d)): the tokens with the highest a stay;  of the others, those with the highest cos(x_i, question);
         of the others, those with the highest a take in their nearest: x_i + sum_{j in N(i)} a_j x_j;  how many each time is the
         number of local outliers among the scores at hand, LOF_k > threshold
Differs: the scores come from the language model's inputs, for it has neither the encoder's class token nor CLIP's text encoder: x_c is
         the mean of the picture and the question the mean of the text behind it. One token of a picture stays at least. N(i) are
         neighbours by cosine of the tokens, not of keys. What no centre takes in counts to the nearest one. The mean prefers what is
         common in a picture: a small thing on a plain ground is dropped first, and lost unless the question's mean is near to it.
Checked: no public code found (2026-11-29), banjiuyufen/RecoverableCompression is named but was not to be had; the paper leaves open the
         threshold of its outlier factor and how many neighbours a centre takes in.

>>> from hf_tokens import RecoverableCompressionConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("llava")
>>> base = measure(specimen.model, **specimen.inputs)
>>> model = get_token_model(specimen.model, RecoverableCompressionConfig(neighbours=3))
>>> measure(model, **specimen.inputs).tokens < base.tokens
True
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hf_tokens_kernels import match
from torch import Tensor

from hf_tokens import MethodConfig, TokenMap, TokenReducer, indices, option, rank, register


@dataclass(frozen=True)
class RecoverableCompressionConfig(MethodConfig):
    neighbours: int = option(10, ge=1, help="Neighbours of a score that its local outlier factor looks at (k).")
    threshold: float = option(1.5, ge=0, zero=0.0, help="Local outlier factor above which a score stands out; 0 keeps every token.")
    merged: int = option(32, ge=0, help="Nearest tokens that each centre of the rest takes in.")


def outliers(values: Tensor, among: Tensor, k: int, threshold: float) -> Tensor:
    """How many of the values (p n) that count have a local outlier factor above the threshold, (p)."""
    n, count = values.shape[1], among.sum(dim=1)[:, None, None]  # p 1 1
    k = min(k, n - 1)
    few, place = (count - 1).clamp(max=k), torch.arange(n, device=values.device)
    value, order = values.masked_fill(~among, torch.inf).sort(dim=1, stable=True)
    value = value.masked_fill(place >= count[..., 0], 0)
    apart = torch.arange(-k, k + 1, device=values.device)
    near = place[:, None] + apart[apart != 0]  # n 2k, in the order of the values the nearest k are among the k on either side
    inside, near = (near >= 0) & (near < count), near.clamp(0, n - 1)
    gap = (value[..., None] - value[:, near]).abs().masked_fill(~inside, torch.inf)
    turn = order[:, near].argsort(dim=-1, stable=True)  # of equally near ones the first
    gap, by_gap = gap.gather(2, turn).sort(dim=-1, stable=True)
    near, gap = near.expand_as(turn).gather(2, turn).gather(2, by_gap)[..., :k], gap[..., :k]
    counts = torch.arange(k, device=values.device) < few  # p 1 k
    radius = gap.gather(2, (few - 1).clamp(min=0).expand(-1, n, -1))[..., 0] if k else torch.zeros_like(value)  # to the last neighbour
    of = lambda x: x.gather(1, near.flatten(1)).view_as(near)
    mean = lambda x: x.masked_fill(~counts, 0).sum(dim=-1) / few[..., 0].clamp(min=1)
    density = 1 / (mean(torch.maximum(of(radius), gap)) + 1e-10)
    return ((place < count[..., 0]) & (mean(of(density)) / density > threshold) & (few[..., 0] > 0)).sum(dim=1)


@register("recoverable-compression", RecoverableCompressionConfig)
class RecoverableCompression(TokenReducer):
    site = "before"
    kinds = ("text",)
    causal = True
    chunks = False
    decodes = False

    @classmethod
    def default_layers(cls, config: RecoverableCompressionConfig, layers: int) -> tuple[int, ...]:
        return (0,)

    def assign(self, hidden: Tensor, mask: Tensor, pictures: list[Tensor], instruction: Tensor) -> TokenMap | None:
        if self.config.threshold == 0:
            return None
        m, flat = hidden.shape[1], hidden.flatten(0, 1).to(torch.promote_types(hidden.dtype, torch.float32))
        words = instruction.sum(dim=1)
        question = (flat.view(hidden.shape) * instruction[..., None]).sum(dim=1) / words.clamp(min=1)[:, None]  # b d
        tokens, group = flat, torch.arange(m, device=hidden.device).repeat(len(hidden))
        for index in pictures:
            place = index.flatten(0, 1).flatten(1)  # p n, each frame a picture
            row = place[:, 0] // m
            content, part = self.compress(flat[place], question[row], words[row] > 0)
            tokens = tokens.index_put((place,), content)
            group[place] = torch.where(part < 0, -1, (place % m).gather(1, part.clamp(min=0)))
        found = TokenMap.pool(torch.where(mask, group.view_as(mask), -1))
        return found.holding(found.gather(tokens.view(hidden.shape)).to(hidden.dtype))

    def compress(self, x: Tensor, question: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (p n d) with the centres' new content, and the token that each is part of, (p n), -1 for none."""
        c = self.config
        stands_out = lambda score, among: outliers(score, among, c.neighbours, c.threshold)[:, None]
        highest = lambda score, among, count: among & (rank(score.masked_fill(~among, -torch.inf)) < count)
        everywhere = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        seen = (x @ x.mean(dim=1, keepdim=True).mT / x.shape[-1] ** 0.5)[..., 0].softmax(dim=1)  # p n
        stays = highest(seen, everywhere, stands_out(seen, everywhere).clamp(min=1))
        alike = F.cosine_similarity(x, question[:, None], dim=-1)
        stays = stays | highest(alike, ~stays & asked[:, None], stands_out(alike, ~stays & asked[:, None]))
        centre = highest(seen, ~stays, stands_out(seen, ~stays))
        index = torch.arange(x.shape[1], device=x.device).expand_as(seen)
        if not bool(centre.any()):
            return x, torch.where(stays, index, -1)
        at = indices(centre)  # p c
        there = centre.gather(1, at)
        core = x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        into = at.gather(1, match(x.detach(), core.detach(), dst_mask=there)[1])
        content = self.taken_in(x, seen, at, core, there, ~stays) if c.merged else x
        return content, torch.where(stays | centre, index, torch.where(centre.any(dim=1, keepdim=True), into, -1))

    def taken_in(self, x: Tensor, seen: Tensor, at: Tensor, core: Tensor, there: Tensor, rest: Tensor) -> Tensor:
        """Pictures (p n d) in which the centres `at` (p c), in content `core`, hold their nearest of the rest (p n) too."""
        p, n, _ = x.shape
        index, given = torch.arange(n, device=x.device).expand(p, n), dict(src_group=at, src_mask=there, dst_mask=rest)
        score, near = match(core.detach(), x.detach(), **given, dst_group=index, k=min(self.config.merged, n))  # p c k
        first = n * torch.arange(p, device=x.device)[:, None]
        share = torch.where(score > -torch.inf, seen.gather(1, near.flatten(1)).view_as(near), 0)
        row = (near + first[..., None]).flatten(0, 1)
        sums = F.embedding_bag(row, x.flatten(0, 1), per_sample_weights=share.flatten(0, 1).to(x.dtype), mode="sum")
        return x.flatten(0, 1).index_add(0, (at + first).flatten(), sums).view_as(x)
