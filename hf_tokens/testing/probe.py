"""A probe of the engine: one token in, a share of the tokens out, at the middle block of every stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_tokens.roles.base import Dims
from hf_tokens.roles.config import MethodConfig, option
from hf_tokens.roles.registry import register
from hf_tokens.roles.token_bank import TokenBank
from hf_tokens.roles.token_reducer import TokenReducer
from hf_tokens.tokens.token_map import TokenMap


@dataclass(frozen=True)
class ProbeInsertConfig(MethodConfig):
    tokens: int = option(1, ge=0, zero=0, help="Tokens inserted in front of the sequence.")


@register("probe-insert", ProbeInsertConfig)
class ProbeInsert(TokenBank):
    """Learnable tokens that enter at the middle block and stay until the exit."""

    site = "input"

    def __init__(self, config: ProbeInsertConfig, dims: Dims):
        super().__init__(config, dims)
        self.bank = nn.Parameter(torch.randn(config.tokens, dims.width) * 0.02)

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (layers // 2,)

    def tokens(self) -> Tensor | None:
        return self.bank if len(self.bank) else None


@dataclass(frozen=True)
class ProbeDropConfig(MethodConfig):
    share: float = option(0.5, ge=0, lt=1, zero=0.0, help="Share of the tokens that vanish, evenly spread.")


@register("probe-drop", ProbeDropConfig)
class ProbeDrop(TokenReducer):
    """Drops tokens by their position alone, so that a padded, chunked or cached run drops the same ones."""

    site, packed = "before", True

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (layers // 2,)

    def assign(self, positions: Tensor, fresh: Tensor) -> TokenMap | None:
        """Keep token p if the count of kept ones steps up at p."""
        rate = 1 - self.config.share
        if rate == 1:
            return None
        kept = ((positions + 1) * rate).floor() > (positions * rate).floor()
        return TokenMap.select(kept & (positions >= 0) | fresh)


def probe_config(strength: float) -> list[Any]:
    """A stack that at strength 0 changes nothing, and at s inserts a token and drops the share s of the tokens at the middle block.

    Args:
        strength: The share s, in [0, 1).
    """
    return [ProbeInsertConfig(tokens=1 if strength else 0), ProbeDropConfig(share=strength)]
