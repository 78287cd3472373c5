"""TransPrune: image tokens that the layers hardly turn or grow, and that the instruction hardly attends to, leave a multimodal LLM halfway.

Paper:   TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model (Li et al., CVPR 2026), arXiv:2507.20630
Needs:   nothing
Maths:   TTV(F) = softmax_j(1 - cos(F(x_j), x_j)) |F(x_j)| / |x_j| over the tokens j of the row, F without residual;
         IGA = mean over instruction tokens and heads of the block's attention;  behind each layer p of P the `keep` n_0 tokens of highest
         alpha TTV' + (1 - alpha) IGA' stay of n_0 image tokens, TTV' = sum_{l in A, l <= p} (TTV(attention_l) + TTV(MLP_l)) and IGA
         divided by their sums over the image tokens
Differs: IGA comes from the queries and keys of layer p, theirs from layer p + 1. Its layers 7 to 12 of 32 are scaled to the depth at
         hand. A stage leaves one image token at least. The instruction is the text behind the last image token; text of later turns
         guides nothing. `rule="abstract"` is what the paper's equations say without the code. On a small LLaVA of SmolLM2 and DINOv2, at
         half of the tokens, that answers 75 % of the questions, the release's rule 7 %, and tokens drawn by lot 78 %: try it before use.
Checked: liaolea/TransPrune@c9e8284f, its scores and its drop over 100 random prompts, queries and keys of one layer for
         both: largest difference 7e-16 of the history, the same tokens in all 300 stages; it may drop all image tokens of a stage.

>>> from hf_tokens import TransPruneConfig, get_token_model
>>> from hf_tokens.testing import zoo
>>> base = zoo.build("llava")
>>> model = get_token_model(base.model, TransPruneConfig(accumulate=(1, 2), prune=(2,), keep=(0.25,)))
>>> cache = model(**base.inputs, use_cache=True).past_key_values
>>> [layer.length for layer in cache.layers]
[32, 32, 20, 20]
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hf_tokens_kernels import attention_columns
from torch import Tensor

from hf_tokens import ConfigError, MethodConfig, TokenMap, TokenReducer, option, rank, register

DEPTH, ACCUMULATE, PRUNE = 32, (7, 8, 9, 10, 11, 12), (7, 9, 12)  # the paper's model and layers


@dataclass(frozen=True)
class TransPruneConfig(MethodConfig):
    alpha: float = option(0.5, ge=0, le=1, help="Weight of the transitions against the attention of the instruction.")
    accumulate: tuple[int, ...] | None = option(None, ge=1, help="Layers whose transitions count (A), from 1; None scales 7..12 of 32.")
    prune: tuple[int, ...] | None = option(None, ge=1, help="Layers behind which tokens leave (P), from 1; None scales 7, 9, 12 of 32.")
    keep: tuple[float, ...] = option(
        (0.875, 0.625, 0.125), ge=0, le=1, zero=(1.0,), was={1: (0.5, 0.5, 0.5)}, help="Share of all image tokens left by each stage."
    )
    rule: str = option(
        "release", choices=("release", "abstract"), was={1: "abstract"},
        help="abstract: |cos|, over the image alone and not divided by the sums; keep is a share of those that are left.",
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        stages = len(PRUNE if self.prune is None else self.prune)
        if len(self.keep) not in (1, stages):
            rule = f"TransPruneConfig.keep must have one value, or one for each of {stages} layers in `prune`"
            raise ConfigError(f"{rule}, got {len(self.keep)}. Give as many, or one for all.")

    def accumulates(self, layers: int) -> set[int]:
        """A in a stream of so many blocks."""
        return scaled(ACCUMULATE, layers) if self.accumulate is None else set(self.accumulate)

    def keeps(self, layers: int) -> dict[int, float]:
        """What stays behind each layer of P."""
        prune = [scale(layer, layers) for layer in PRUNE] if self.prune is None else list(self.prune)
        keep = self.keep * len(prune) if len(self.keep) == 1 else self.keep
        joined = prod if self.rule == "abstract" else min  # of stages that fall on the same layer
        return {layer: joined(share for other, share in zip(prune, keep, strict=True) if other == layer) for layer in prune}


def scale(layer: int, layers: int) -> int:
    """The paper's layer in a model of another depth."""
    return max(1, round(layer * layers / DEPTH))


def scaled(chosen: tuple[int, ...], layers: int) -> set[int]:
    return {scale(layer, layers) for layer in chosen}


def transition(before: Tensor, after: Tensor, among: Tensor, rule: str) -> Tensor:
    """TTV of one module, its softmax over the tokens `among`, (b m d) to (b m)."""
    wide = torch.promote_types(before.dtype, torch.float32)
    before, after = before.to(wide), after.to(wide)
    size, grown = before.norm(dim=-1), after.norm(dim=-1)
    nonzero = (size > 0) & (grown > 0)
    cosine = ((before * after).sum(dim=-1) / (size * grown).where(nonzero, 1)).masked_fill(~nonzero, 0)
    turn = 1 - (cosine.abs() if rule == "abstract" else cosine)
    weight = turn.masked_fill(~among, -torch.inf).softmax(dim=1).nan_to_num(0)  # a row without an image gives nan
    return weight * grown.masked_fill(size == 0, 0) / size.where(size > 0, 1)


def asked(instruction: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of the instruction as indices (b r), and what each of them counts."""
    total = instruction.sum(dim=1, keepdim=True)  # b 1
    index = instruction.long().argsort(dim=1, descending=True, stable=True)[:, : max(1, int(total.max()))]
    return index, instruction.gather(1, index) / total.clamp(min=1)


def share(x: Tensor, image: Tensor) -> Tensor:
    """The share of each image token in the sum of them, (b m)."""
    x = x.masked_fill(~image, 0)
    return x / (x.sum(dim=1, keepdim=True) + 1e-8)


@register("transprune", TransPruneConfig, version=2)
class TransPrune(TokenReducer):
    site = "after"
    kinds = ("text",)
    causal = True
    chunks = False
    decodes = False
    ignores = property(lambda self: ("scores",) if self.config.rule == "abstract" else ("queries", "keys"))

    @classmethod
    def check(cls, config: TransPruneConfig, kind: str, layers: int, chosen: tuple[int, ...]) -> None:
        deepest = max([*config.accumulates(layers), *config.keeps(layers)], default=0)
        if deepest > layers:
            rule = f"TransPruneConfig.accumulate and .prune must lie in [1, {layers}], as the stream is deep"
            raise ConfigError(f"{rule}, got {deepest}. Name layers that exist.")

    @classmethod
    def default_layers(cls, config: TransPruneConfig, layers: int) -> tuple[int, ...]:
        return tuple(sorted(layer - 1 for layer in {*config.accumulates(layers), *config.keeps(layers)} if layer <= layers))

    def assign(
        self, attention_input: Tensor, attention_output: Tensor, mlp_input: Tensor, mlp_output: Tensor, queries: Tensor, keys: Tensor,
        scores: Any, visual: Tensor, instruction: Tensor, mask: Tensor, memory: dict,
    ) -> TokenMap | None:  # fmt: skip
        layer, image, abstract = self.dims.layer + 1, visual & mask, self.config.rule == "abstract"
        history = memory.tokens.get(self.key, torch.zeros_like(visual, dtype=torch.float32))  # b m
        if layer in self.config.accumulates(self.dims.layers):
            for module in ((attention_input, attention_output), (mlp_input, mlp_output)):
                history = history + transition(*module, image if abstract else mask, self.config.rule)
        memory.tokens[self.key] = history
        left = image.sum(dim=1, keepdim=True)  # b 1
        begun = left if abstract else memory.rows.setdefault(self.key, left)
        keep = self.config.keeps(self.dims.layers).get(layer, 1.0)
        if keep == 1:
            return None
        index, weights = asked(instruction)
        if abstract:
            scaling, weights = queries.shape[-1] ** -0.5, weights.to(queries.dtype)
            heed = attention_columns(queries, keys, scaling=scaling, queries=index, weights=weights, key_mask=image, heads="mean")
        else:
            history, heed = share(history, image), share(scores.columns(weights, heads="mean", queries=index), image)
        score = self.config.alpha * history + (1 - self.config.alpha) * heed
        order = rank(score.masked_fill(~image, -torch.inf))
        stays = ((keep * left - 1e-9).ceil() if abstract else (keep * begun + 1e-9).floor()).clamp(min=1)  # b 1
        return TokenMap.select(mask & (~image | (order < stays)))
