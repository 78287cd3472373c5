"""MoE++: beside the MLP of a block stand experts that compute next to nothing, and a router gives each token two of them all.

Paper:   MoE++: Accelerating MoE Methods with Zero-Computation Experts (Jin et al., ICLR 2025), arXiv:2410.07348
Maths:   y = sum of g_i E_i(x) over the K highest G_i, g = softmax(G), G^j = W^j x + Wg^j G^{j-1};  E is the MLP, 0 (zero), x (copy) or
         a1 x + a2 v with a = softmax(Wc x) (constant);  L = beta sum_i eta_i f_i P_i, eta = 1 for the MLP and tau for the others,
         f_i the share of tokens that take i, P_i their mean g_i
Differs: the paper trains from scratch; here a trained MLP is upcycled, so that at first the model is the base: W and Wg start at 0 with a
         bias towards the MLP, whose g is divided by what it is then, and copies and constants count by a learned factor that starts at
         0. One MLP (or the sparse block of a MoE model as a whole) is the FFN expert. No expert has a capacity: which tokens it drops
         would depend on the batch. L is a mean over the blocks; f and P are those of the tokens of a call, so it is another one for two
         halves of a batch, in two processes too.

>>> from hf_tokens import MoEPlusPlusConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> before = base.run()[0]
>>> base.model = get_token_model(base.model, MoEPlusPlusConfig())
>>> bool((base.run()[0] == before).all())
True
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hf_tokens import Dims, MethodConfig, TokenRouter, option, register

TILT = 1.0  # how far the MLP is ahead of the others at first


@dataclass(frozen=True)
class MoEPlusPlusConfig(MethodConfig):
    zeros: int = option(1, ge=0, zero=0, help="Experts that discard a token.")
    copies: int = option(1, ge=0, zero=0, help="Experts that hand on their input.")
    constants: int = option(2, ge=0, zero=0, help="Experts that replace a part of their input by a learned vector.")
    top_k: int = option(2, ge=1, help="Experts of each token (paper: K).")
    residual: bool = option(True, help="Add the previous block's routing scores (paper: gating residuals).")
    tau: float = option(
        0.75, gt=0, le=1, help="Weight of the other experts in the balance loss; a small one keeps more tokens off the MLP."
    )
    beta: float = option(0.01, ge=0, help="Weight of the balance loss.")


@register("moe-plus-plus", MoEPlusPlusConfig)
class MoEPlusPlus(TokenRouter):
    site = "mlp"
    moves_tokens = False
    packed = True

    def __init__(self, config: MoEPlusPlusConfig, dims: Dims):
        super().__init__(config, dims)
        d, speaking = dims.width, config.copies + config.constants
        n = 1 + config.zeros + speaking
        if n == 1:
            return
        self.weight = nn.Parameter(torch.zeros(n, d))
        if config.residual and not dims.is_first_block:
            self.residual = nn.Parameter(torch.zeros(n, n))
        if speaking:
            self.scale = nn.Parameter(torch.zeros(speaking))
        if config.constants:
            self.vectors = nn.Parameter(torch.randn(config.constants, d) * 0.02)
            self.mix = nn.Parameter(torch.zeros(2 * config.constants, d))

    def route(self, hidden: Tensor, mask: Tensor, memory: dict) -> tuple[Tensor, Tensor | None] | None:
        c = self.config
        speaking = c.copies + c.constants
        if c.zeros + speaking == 0:
            return None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tilt = torch.zeros(*mask.shape, 1 + c.zeros + speaking, dtype=wide, device=hidden.device)  # b m n
        tilt[..., 0] = TILT
        scores = linear(hidden.to(wide), self.weight.to(wide)) + tilt
        before = memory.tokens.get(self.key)
        if c.residual and before is not None:
            scores = scores + linear(before, self.residual.to(wide))
        memory.tokens[self.key] = scores
        chance = scores.softmax(dim=-1)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., : c.top_k]
        taken = torch.zeros_like(chance).scatter(-1, best, 1)
        if self.training and torch.is_grad_enabled():
            self.balance(chance, taken, mask)
        gate = chance * taken
        first = gate[..., 0] / tilt.softmax(dim=-1)[..., 0]
        return first.to(hidden.dtype), self.others(hidden.to(wide), gate[..., 1 + c.zeros :]).to(hidden.dtype) if speaking else None

    def others(self, x: Tensor, gate: Tensor) -> Tensor:
        """What copies and constants give, (b m d)."""
        c = self.config
        gate = gate * self.scale.to(x)
        share = gate[..., : c.copies].sum(dim=-1)
        if not c.constants:
            return share[..., None] * x
        constant = gate[..., c.copies :]
        alpha = linear(x, self.mix.to(x)).unflatten(-1, (c.constants, 2)).softmax(dim=-1)  # b m c 2
        share = share + (constant * alpha[..., 0]).sum(dim=-1)
        return share[..., None] * x + (constant * alpha[..., 1]) @ self.vectors.to(x)

    def balance(self, chance: Tensor, taken: Tensor, mask: Tensor) -> None:
        """The loss of this block."""
        real = mask[..., None].to(chance)
        f, p = ((t * real).sum(dim=(0, 1)) / real.sum().clamp(min=1) for t in (taken, chance))
        eta = torch.full_like(p, self.config.tau)
        eta[0] = 1
        routed = self.dims.layers if self.config.layers is None else len({i % self.dims.layers for i in self.config.layers})
        self.add_loss(self.config.beta * (eta * f * p).sum() / routed)
