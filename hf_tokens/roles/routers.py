"""Which tokens run a block, how often a sample does, and which of two models emits a token."""

from __future__ import annotations

import abc
from typing import Any

from torch import Tensor

from .base import Method
from .config import MethodConfig


class TokenRouter(Method):
    """Which tokens run a `block`, or its `mlp`; the rest skip it.

    >>> class Half(TokenRouter):
    ...     def route(self, positions):
    ...         return (positions % 2 == 0).float()
    >>> Half(MethodConfig(), dims).route(torch.arange(4)[None])
    tensor([[1., 0., 1., 0.]])
    """

    role, verb, counts, site, sites = "TokenRouter", "route", "routed", "block", ("block", "mlp")
    saves = "FLOPs of blocks"
    lost = "which tokens run a block, as it decides for each input"

    @abc.abstractmethod
    def route(self, *signals: Any) -> Tensor | tuple[Tensor, Tensor] | None:
        """The gate of each token, (b m): a token at 0 skips the block, otherwise its update is multiplied by the gate.

        At the MLP the tokens are those that the block runs on, `hidden` is what it would compute from, and its output is the update; a
        second tensor (b m d) is added too.
        """


class LayerRouter(Method):
    """How often a sample runs a block.

    >>> class Skip(LayerRouter):
    ...     def route(self, mask, layer):
    ...         return torch.full((len(mask),), float(layer != 2))
    >>> Skip(MethodConfig(), dims).route(torch.ones(2, 5, dtype=torch.bool), layer=2)
    tensor([0., 0.])
    """

    role, verb, counts = "LayerRouter", "route", "run"
    saves = "FLOPs of blocks"
    lost = "which blocks a sample runs, as it decides for each input"

    @abc.abstractmethod
    def route(self, *signals: Any) -> Tensor | None:
        """The gate of each sample, (b): a sample at 0 skips the block, otherwise its update is multiplied by the gate.

        (b r) gives one for each of r runs of the block, each on what the run before returned; a later run has a KV cache of its own. A
        run is spared where the gates of the whole batch are 0.
        """


class ModelRouter(Method):
    """Which of two models emits the next token: it sits in the small one, and `route_to` brings the large one.

    >>> class Unsure(ModelRouter):
    ...     def route(self, logits):
    ...         return logits.softmax(dim=-1).amax(dim=-1) < 0.5
    >>> Unsure(MethodConfig(), dims).route(torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]))
    tensor([[False,  True]])
    """

    role, verb, causal, kinds, moves_tokens, needs_head, packed = "ModelRouter", "route", True, ("text",), False, True, True
    saves = "tokens of the large model"
    lost = "when the large model is asked"

    @abc.abstractmethod
    def route(self, *signals: Any) -> Tensor:
        """Tokens behind which the large model takes over, (b m) bool. It is called behind the model's head."""

    @classmethod
    def default_layers(cls, config: MethodConfig, layers: int) -> tuple[int, ...]:
        return (layers - 1,)
