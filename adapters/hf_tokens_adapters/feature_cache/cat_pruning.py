"""CAT Pruning: once the picture has taken shape, a step computes the tokens whose noise changed most, evenly over regions, and the stalest.

Paper:   CAT Pruning: Cluster-Aware Token Pruning For Text-to-Image Diffusion Models (Cheng et al., 2025), arXiv:2502.00433
Needs:   nothing
Maths:   m_i = |n_t,i - n_t0,i| of the noise n;  clusters: k-means of (row / h, column / w, w_n n_i);  t > t0 computes alpha n tokens:
         a share 1 - beta by m, the best of each cluster first, then the second best, ..., and a share beta by the lowest f,
         f_i := f_i / 2 + [i was chosen];  all others take what each sublayer gave them last
Differs: n_t is that of the step before. beta = 3/4, 20 clusters and w_n follow the authors' code, where the paper as we could read it is
         open; the turns among clusters are ours. Each sample and each half of guidance chooses for itself. Keys and values are those of
         this step, and so is the noise of the other tokens, from what was kept; the paper keeps all three.
Checked: ada-cheng/CAT-Pruning@3b88889e, by reading: largest difference in which changed tokens are chosen: theirs, k-means of another
         library for one picture of 64 x 64, goes by the conditional half alone and takes 0.15, 0.1 and 0.05 n alpha of the three clusters
         that changed most, then 0.05 n alpha of each, from the second on with half as many stale ones, until a quarter is full; the stale
         three quarters may hold the same tokens again, so that fewer than n alpha are computed.

>>> import torch
>>> from hf_tokens import CATPruningConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> specimen = zoo.build("diffusers/SD3Transformer2DModel")
>>> model = get_token_model(specimen.model, CATPruningConfig(alpha=0.3))
>>> costs = [measure(model, **{**specimen.inputs, "timestep": torch.tensor([t, t])}).flops for t in (900, 600, 500, 400)]
>>> costs[2] < costs[0]
True
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hf_tokens_kernels import match
from torch import Tensor

from hf_tokens import FeatureCache, MethodConfig, UnsupportedError, option, rank, register

ROUNDS = 10  # of k-means


@dataclass(frozen=True)
class CATPruningConfig(MethodConfig):
    alpha: float = option(0.3, gt=0, le=1, zero=1.0, help="Share of the tokens that a step computes (alpha).")
    start: float = option(0.28, ge=0, le=1, help="Share of the denoising that is computed whole (t0 / N, 8 of 28 steps).")
    stale: float = option(0.75, ge=0, le=1, help="Share of these tokens that are chosen for not having been chosen (beta).")
    clusters: int = option(20, ge=1, help="Clusters of the picture.")
    content: float = option(0.05, ge=0, help="Weight of the noise against the place of a token in clustering (w_n).")


def cluster(noise: Tensor, grid: tuple[int, int], clusters: int, content: float) -> Tensor:
    """The cluster of every token, (b n): k-means from evenly spaced tokens, noise (b n f)."""
    (height, width), n = grid, noise.shape[1]
    index = torch.arange(n, device=noise.device)
    wide = torch.promote_types(noise.dtype, torch.float32)
    place = torch.stack([index // width / height, index % width / width], dim=-1).to(wide)  # n 2
    x = torch.cat([place.expand(len(noise), n, 2), content * (2 / noise.shape[-1]) ** 0.5 * noise.to(wide)], dim=-1)
    k = min(clusters, n)
    seeds = ((torch.arange(k, device=noise.device) + 0.5) * n / k).long()
    centres = x[:, seeds]
    for _ in range(ROUNDS):
        labels = match(x, centres, metric="euclidean")[1]  # b n
        member = F.one_hot(labels, k).to(x)  # b n k
        size = member.sum(dim=1)[..., None]
        centres = torch.where(size > 0, member.mT @ x / size.clamp(min=1), centres)
    return labels


def turns(magnitude: Tensor, labels: Tensor) -> Tensor:
    """The place of every token in the order of choice, (b n): the best of each cluster, by the clusters' means, then the second best."""
    k = int(labels.max()) + 1
    order = magnitude.argsort(dim=1, descending=True, stable=True)
    member = F.one_hot(labels, k)
    turn = member.gather(1, order[..., None].expand_as(member)).cumsum(dim=1)  # in the order of magnitude
    turn = torch.zeros_like(turn).scatter(1, order[..., None].expand_as(turn), turn).gather(2, labels[..., None])[..., 0]
    mean = (member * magnitude[..., None]).sum(dim=1) / member.sum(dim=1).clamp(min=1)
    return rank(-(turn * k + rank(mean).gather(1, labels)))


@register("cat-pruning", CATPruningConfig)
class CATPruning(FeatureCache):
    def reuse(
        self, hidden: Tensor, noise: Tensor | None, grid: tuple[int, int], step: int, elapsed: float | None, memory: dict
    ) -> Tensor | None:
        if self.config.alpha == 1:
            return None
        if noise is None or elapsed is None:
            rule = "CAT Pruning needs a model with a timestep, whose output lies over the tokens of its blocks"
            raise UnsupportedError(f"{rule}, got {hidden.shape[1]} tokens of another kind. Name another stream, or choose another method.")
        if memory.get("step") != step:
            memory.update(step=step, index=self.choose(noise, grid, elapsed, memory))
        return memory["index"]

    def choose(self, noise: Tensor, grid: tuple[int, int], elapsed: float, memory: dict) -> Tensor | None:
        """The tokens of this step, the same ones for all blocks, (b r); None for all of them."""
        config, (b, n) = self.config, noise.shape[:2]
        if elapsed <= config.start or "reference" not in memory:
            memory.pop("labels", None)
            memory.update(reference=noise, frequency=torch.zeros(b, n, dtype=torch.float64, device=noise.device))
            return None
        if "labels" not in memory:
            memory["labels"] = cluster(noise, grid, config.clusters, config.content)
        turn = turns((noise - memory["reference"]).norm(dim=-1), memory["labels"])
        total = max(1, int(config.alpha * n + 1e-9))
        changed = total - int(config.stale * total + 1e-9)
        chosen = turn < changed
        order = turn.argsort(dim=1)
        seldom = memory["frequency"].masked_fill(chosen, torch.inf).gather(1, order).argsort(dim=1, stable=True)
        index = torch.cat([order[:, :changed], order.gather(1, seldom[:, : total - changed])], dim=1)
        memory["frequency"] = (memory["frequency"] / 2).scatter_add(1, index, torch.ones_like(index, dtype=torch.float64))
        return index
