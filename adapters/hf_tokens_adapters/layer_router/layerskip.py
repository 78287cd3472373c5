"""LayerSkip: train with late blocks dropped and a loss at inner blocks, so that a pass may end early, or drafts for the whole model.

Paper:   LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding (Elhoushi et al., ACL 2024), arXiv:2404.16710
Needs:   training
Maths:   in training a sample skips block l of L with p_l = p_max D(l) S(t), D(l) = 2^(l/(L-1)) - 1;  S = 1, or 2^t - 1, t the share of the
         training that is done;  L = sum_l c_l e_l CE(head(norm(x_l))) / sum_l c_l e_l over the states x_l behind each block, in the place
         of the model's own loss; c_l in {0, 1} is the curriculum's, and 1 for the last block
Differs: defaults are those of torchtune's recipe for fine-tuning (paper, for a pretrained model: p_max 0.1, e_scale 0.2, R 8). Its index i
         is the state in front of block i, so that its last block gets no loss; ours is behind it, as in the paper. `weights="paper"` is the
         paper's e_l; "sum" counts the blocks that have a loss at the time, as the release does. `gradual` is a step ahead of the release.
         A sample's dropped block is spared where the whole batch drops it. Evaluation has the model's own loss. A loop of one's own tells
         the curriculum of its steps by `set_progress(model, share, updates)`. Drafts of the first E blocks are transformers'
         `generate(assistant_early_exit=E)`, which keeps a cache of its own for them; the paper's share one. A short
         training pays for nothing (a pretrained model's had 52 B tokens): SmolLM2-135M with a LoRA, loss on other text behind 10, 20, 25
         and all 30 blocks 20.1, 18.3, 10.2, 3.53, and 11.4, 8.8, 5.9, 3.77 after 60 steps of 128 tokens; of tokens drafted four at a time
         by 10, 15 and 20 blocks 1.5, 2.4 and 4.9 % are accepted before and 4.9, 7.8 and 11 % after, so that decoding gives the same
         tokens at a fifth to a half of the speed without drafts (a busy CPU).
Checked: meta-pytorch/torchtune@bd2a0fc7, rates, weights, curricula and `early_exit_loss` beside ours on the same states in float64: largest
         difference 1.6e-7, as theirs end in float32; which state an index means, and facebookresearch/LayerSkip@f42c6696's drafts, by
         reading.

>>> from hf_tokens import LayerSkipConfig, get_token_model, measure
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llama")
>>> model = get_token_model(base.model, LayerSkipConfig(exit_layer=3)).eval()
>>> measure(model, **base.inputs).tokens // (2 * 16)  # of 4 blocks three run
3
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hf_tokens import ConfigError, LayerRouter, MethodConfig, option, register

# How the rate grows from block to block, by the share of the blocks in front of it.
SCALES = {
    "uniform": lambda share, blocks: 1.0,
    "exp": lambda share, blocks: 2**share - 1,
    "linear": lambda share, blocks: share,
    "log": lambda share, blocks: math.log(share * blocks + 1, blocks + 1),
    "sin": lambda share, blocks: math.sin(0.5 * math.pi * share),
    "sigmoid": lambda share, blocks: 1 / (1 + math.exp(-10 * (share - 0.5))),
}
# What the loss behind each of some blocks weighs, given their numbers from 1, in front of `scale`.
WEIGHTS = {
    "sum": lambda number: number.cumsum(dim=0),
    "linear": lambda number: number,
    "sqrt": torch.sqrt,
    "uniform": torch.ones_like,
    "inverse_sqrt": torch.rsqrt,
    "inverse": torch.reciprocal,
}


@dataclass(frozen=True)
class LayerSkipConfig(MethodConfig):
    dropout: float = option(0.2, ge=0, lt=1, zero=0.0, help="Rate at which a sample skips the last block in training (paper: p_max).")
    dropout_scale: str = option("exp", choices=tuple(SCALES), help="How the rate grows over the blocks (paper: D).")
    dropout_grows: bool = option(False, help="The rate grows over the training too (paper: S), as it is for training from scratch.")
    scale: float = option(1.0, ge=0, zero=0.0, help="Weight of the losses of inner blocks (paper: e_scale); 0 leaves the model's own loss.")
    weights: str = option("sum", choices=(*WEIGHTS, "paper"), help="How the losses' weights grow over the blocks (paper: e).")
    every: int = option(4, ge=1, help="The loss is of one block in so many, and of the last one (paper: R).")
    curriculum: str = option(
        "rotational",
        choices=("rotational", "gradual", "none"),
        help="Blocks with a loss: the next ones with each step, or ever more.",
    )
    exit_layer: int = option(0, ge=0, zero=0, example=2, help="Outside of training a pass ends behind so many blocks (paper: E); 0: all.")


@register("layerskip", LayerSkipConfig)
class LayerSkip(LayerRouter):
    kinds = ("text",)
    causal = True
    needs_head = True
    replaces = True

    @classmethod
    def check(cls, config: LayerSkipConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        behind = range(config.exit_layer or layers, layers)
        if config.exit_layer > layers or not {*behind} <= {*chosen}:
            rule = f"LayerSkipConfig.exit_layer must be at most {layers}, and `layers` name all blocks behind it"
            raise ConfigError(f"{rule}, got {config.exit_layer} and blocks {chosen}. Leave out `layers`, or name more of them.")

    @property
    def decodes(self) -> bool:
        return self.config.exit_layer > 0

    def route(self, hidden: Tensor, progress: float) -> Tensor | None:
        if not self.training:
            ends = 0 < self.config.exit_layer <= self.dims.layer
            return hidden.new_zeros(len(hidden)) if ends else None
        rate = self.rate(progress)
        runs = torch.rand(len(hidden), device=hidden.device) >= rate if rate else None  # b
        return None if runs is None or bool(runs.all()) else runs.to(hidden.dtype)

    def rate(self, progress: float) -> float:
        """How often a sample skips this block."""
        blocks = self.dims.layers - 1
        grown = 2**progress - 1 if self.config.dropout_grows else 1.0
        last = self.dims.layer == blocks
        return self.config.dropout * grown * (1.0 if last else SCALES[self.config.dropout_scale](self.dims.layer / blocks, blocks))

    def judge(self, labels: Tensor, logps: Tensor, exits, head, progress: float, updates: int) -> Tensor | None:
        if not self.config.scale:
            return None
        real = labels != -100
        count, wanted = real.sum().clamp(min=1), labels[real]
        blocks = self.blocks(progress, updates)
        logits = (head(exits(i)[real]) for i in blocks[:-1])  # t v
        each = [cross_entropy(x.to(torch.promote_types(x.dtype, torch.float32)), wanted, reduction="sum") for x in logits]
        each = torch.stack([*each, -logps.sum()]) / count
        return each @ self.weigh_blocks(torch.tensor(blocks, device=each.device, dtype=each.dtype))

    def blocks(self, progress: float, updates: int) -> list[int]:
        """The blocks behind which there is a loss now, the last one among them."""
        n, every, curriculum = self.dims.layers, self.config.every, self.config.curriculum
        shift = updates if curriculum == "rotational" else 0
        named = range(n) if self.config.layers is None else {i % n for i in self.config.layers}
        begun = lambda i: curriculum != "gradual" or 2 * progress >= (n - i) / n
        return [*(i for i in range(n - 1) if (i - shift) % n % every == 0 and i in named and begun(i)), n - 1]

    def weigh_blocks(self, block: Tensor) -> Tensor:
        """What their losses weigh, given their indices (e); together 1."""
        n, scale = self.dims.layers, self.config.scale
        if self.config.weights == "paper":
            weights = scale * block * (block + 1) / 2
            weights[-1] = n - 1 + scale * (n - 1) * (n - 2) / 2
        else:
            weights = WEIGHTS[self.config.weights](block + 1)
            weights[:-1] *= scale
        return weights / weights.sum()
