"""Token scorers: they are called behind the head of a token classifier, while somebody listens."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..engine.handler import Handler, handles
from ..engine.model import ModelSurgery
from ..engine.results import ModelCall
from ..roles.token_scorer import TokenScorer


def scorers_of(model: ModelSurgery) -> list[TokenScorer]:
    """The scorers that act in a model."""
    return [method for method in model.methods() if isinstance(method, TokenScorer)]


@handles("TokenScorer")
class TokenScorerHandler(Handler):
    def after_head(self, call: ModelCall, hidden: Tensor | None, output: Tensor) -> Tensor:
        listeners = [listener for listener in call.model.listeners if listener.scores]
        for method in scorers_of(call.model) if listeners else ():
            supply = {"hidden": hidden, "logits": output}
            scores = method.at_hand(partial(method.score, **{name: supply[name] for name in method.signals}))
            for listener in listeners:
                listener.scored(method, scores)
        return output
