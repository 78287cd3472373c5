"""MoE++: beside the MLP of a block stand experts that compute next to nothing, and a router gives each token two of them all.

Paper:   MoE++: Accelerating MoE Methods with Zero-Computation Experts (Jin et al., ICLR 2025), arXiv:2410.07348
Needs:   training
Maths:   y = sum of g_i E_i(x) over the K highest G_i;  g = softmax(G) there, 0 for the zero experts, divided by its sum;
         G^j = V^j tanh(W^j x) + Wg^j G^{j-1};  E is the MLP, 0 (zero), x (copy) or a1 x + a2 v with a = softmax(Wc x) (constant);
         L = beta sum_i eta_i f_i P_i, eta = 1 for the MLP and tau for the others, f_i the share of tokens that take i, P_i their mean
         softmax(G)_i
Differs: the paper trains from scratch; here a trained MLP is upcycled, so that at first the model is the base: V and Wg start at 0 with a
         bias towards the MLP, whose g is divided by what it is then, and copies and constants count by a learned factor that starts at
         0. For that reason experts read x, where the release gives them K x. `gate="paper"` is the paper's text: g = softmax(G) as it
         is, G linear in x. One MLP (or the sparse block of a MoE model as a whole) is the FFN expert. No expert has a capacity: which
         tokens it drops would depend on the batch. L is a mean over the blocks; f and P are those of the tokens of a call, so it is
         another one for two halves of a batch, in two processes too.
Checked: SkyworkAI/MoE-plus-plus@7f439675, `MOELayer` with the same parameters in float64: largest difference 8.9e-16 where it gives
         experts x; with its K x as the default, 3.0 of 5.8.

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
WIDER = 8  # width of the router inside, for each expert


@dataclass(frozen=True)
class MoEPlusPlusConfig(MethodConfig):
    zeros: int = option(1, ge=0, zero=0, help="Experts that discard a token.")
    copies: int = option(1, ge=0, zero=0, help="Experts that hand on their input.")
    constants: int = option(2, ge=0, zero=0, help="Experts that replace a part of their input by a learned vector.")
    top_k: int = option(2, ge=1, help="Experts of each token (paper: K).")
    residual: bool = option(True, help="Add the previous block's routing scores (paper: gating residuals).")
    gate: str = option("release", choices=("release", "paper"), was={1: "paper"}, help="Whose router and gates.")
    tau: float = option(
        0.75, gt=0, le=1, help="Weight of the other experts in the balance loss; a small one keeps more tokens off the MLP."
    )
    beta: float = option(0.01, ge=0, help="Weight of the balance loss.")


@register("moe-plus-plus", MoEPlusPlusConfig, version=2)
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
        wide, std = (WIDER * n, 1.0) if config.gate == "release" else (d, 0.02)
        if config.gate == "release":
            self.enter = nn.Parameter((2 * torch.rand(wide, d) - 1) * d**-0.5)
        self.weight = nn.Parameter(torch.zeros(n, wide))
        if config.residual and not dims.is_first_block:
            self.residual = nn.Parameter(torch.zeros(n, n))
        if speaking:
            self.scale = nn.Parameter(torch.zeros(speaking))
        if config.constants:
            self.vectors = nn.Parameter(torch.randn(config.constants, d) * std)
            self.mix = nn.Parameter(torch.zeros(2 * config.constants, d))

    def route(self, hidden: Tensor, mask: Tensor, memory: dict) -> tuple[Tensor, Tensor | None] | None:
        c = self.config
        speaking = c.copies + c.constants
        if c.zeros + speaking == 0:
            return None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tilt = torch.zeros(*mask.shape, 1 + c.zeros + speaking, dtype=wide, device=hidden.device)  # b m n
        tilt[..., 0] = TILT
        inner = linear(hidden.to(wide), self.enter.to(wide)).tanh() if c.gate == "release" else hidden.to(wide)
        scores = linear(inner, self.weight.to(wide)) + tilt
        before = memory.tokens.get(self.key)
        if c.residual and before is not None:
            scores = scores + linear(before, self.residual.to(wide))
        memory.tokens[self.key] = scores
        taken = self.highest(scores)
        if self.training and torch.is_grad_enabled():
            self.balance(scores.softmax(dim=-1), taken, mask)
        gate = self.gates(scores, taken)
        first = gate[..., 0] / self.gates(tilt, self.highest(tilt))[..., 0]
        return first.to(hidden.dtype), self.others(hidden.to(wide), gate[..., 1 + c.zeros :]).to(hidden.dtype) if speaking else None

    def highest(self, scores: Tensor) -> Tensor:
        """1 for the experts that a token takes, else 0, (b m n)."""
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.config.top_k]
        return torch.zeros_like(scores).scatter(-1, best, 1)

    def gates(self, scores: Tensor, taken: Tensor) -> Tensor:
        """What each of the experts that a token takes counts, (b m n)."""
        if self.config.gate == "paper":
            return scores.softmax(dim=-1) * taken
        speaks = torch.cat(
            [taken[..., :1], torch.zeros_like(taken[..., 1 : 1 + self.config.zeros]), taken[..., 1 + self.config.zeros :]], dim=-1
        )
        return torch.where(speaks > 0, scores, torch.finfo(scores.dtype).min).softmax(dim=-1) * speaks

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
