"""Objectives: when they are called behind the model, and how the loss of one takes the place of the model's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.loss import LossReplacement
from ..engine.model import ModelSurgery
from ..engine.results import ModelCall
from ..errors import UnsupportedError, explain
from ..roles.base import Method
from ..roles.objective import Objective
from .extra_block import ExtraBlock
from .judged import BEFORE, IGNORED, DenoiserCall, Draws, ObjectiveSignals, RandomState, Reader, first_tensor, labels_of, logits_of


def asked_word(method: Method) -> str:
    """By which word a method says what the model is to learn."""
    return method.verb if isinstance(method, Objective) else "judge"


def ask_objective(objective: Method, signals: ObjectiveSignals) -> Tensor | None:
    """The loss of an objective for a call, or of another method that judges it."""
    word = asked_word(objective)
    given = {name: None if name in objective.ignores else getattr(signals, name) for name in objective.words[word]}
    return objective.at_hand(partial(getattr(objective, word), **given))


def objectives_of(model: ModelSurgery) -> list[Objective]:
    """The active objectives; each stands in one block."""
    return [method for method in model.methods() if isinstance(method, Objective) and method.is_first_block]


def asked_now(model: ModelSurgery) -> list[Method]:
    """The objectives that are called for a forward as the model is now, and what else judges it."""
    judges = [m for m in model.methods() if m.is_first_block and (isinstance(m, Objective) or m.words["judge"])]
    return [method for method in judges if method.evaluates or method.training and torch.is_grad_enabled()]


def named_now(model: ModelSurgery) -> set[str]:
    """The signals that these need."""
    names = {name for method in asked_now(model) for name in method.words[asked_word(method)]}
    return names | {"hidden"} if "exits" in names else names


@handles("Objective")
class ObjectiveHandler(Handler):
    """What the engine does for objectives, and for methods of any role that weigh the targets."""

    def hooks(self, method: Objective) -> set[str]:
        return {"extra block"} if "block" in method.asks and method.is_first_block else set()

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        return block.state(ExtraBlock).attach(block)

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note what random numbers come next, and have the states of inner blocks kept, where an objective names what needs that."""
        model, names = call.model, named_now(call.model)
        if "reference" in names or any("reference" in objective.signals for objective in objectives_of(model)):
            call.held[BEFORE] = RandomState.note(model.base)
        if "exits" in names:
            model.streams[-1].call.keep_exits()
        return args, kwargs

    def after_base(self, call: ModelCall, output: Any) -> None:
        """Note the last hidden states, where an objective names them and no head will read them."""
        if "hidden" in named_now(call.model):
            call.read["base"] = output["last_hidden_state"] if isinstance(output, dict) else output[0]

    def after_head(self, call: ModelCall, hidden: Tensor | None, output: Tensor) -> Tensor:
        """Note what the head read, where an objective names it."""
        if hidden is not None and "hidden" in named_now(call.model):
            call.read["head"] = hidden
        return output

    def after_model(self, call: ModelCall, output: Any) -> Any:
        """Call the objectives; those of a denoiser have to wait for their target."""
        model, arguments = call.model, call.context.arguments
        draws = Draws(call.held[BEFORE], RandomState.note(model.base)) if BEFORE in call.held else None
        if model.is_denoiser:
            model.wait(DenoiserCall.note(arguments, output, draws) if objectives_of(model) else None)
            return output
        weighing = [method for method in model.methods() if method.weighs and method.is_first_block]
        objectives = asked_now(model)
        wanted = labels_to_judge(model, arguments, output) if weighing or objectives else None
        if wanted is not None:
            blocks = [block for block in model.blocks() if any("block" in o.asks for o in objectives if o in block.plan.acting)]
            extra = blocks[0].state(ExtraBlock) if blocks else None
            read = dict(call.read)  # `head` reads too
            signals = ObjectiveSignals(model, arguments, output, wanted, first_tensor, read, draws, extra)
            reweigh(signals, weighing)
            if objectives:
                call.replace_loss(judge(signals, objectives))
        return output


def labels_to_judge(model: ModelSurgery, arguments: dict[str, Any], output: Any) -> Tensor | None:
    """The token that each place is to predict, (b n); None where the call is not to be judged."""
    wanted = labels_of(model.base, arguments, model.losses.labels)
    has_labels = any(arguments.get(name) is not None for name in ("labels", "shift_labels"))
    if wanted is None or not has_labels and logits_of(output, wanted.shape) is None:  # the trainer's labels may be another forward's
        return None
    return wanted


def judge(signals: ObjectiveSignals, objectives: list[Method]) -> LossReplacement | None:
    """Call the objectives behind a call of a text model: those that add keep their loss, the one that replaces it is returned. Two that
    want the place of the model's own loss are refused."""
    signals.model.losses.judge()
    wanted, output, replacements = signals.wanted, signals.output, []
    for objective in objectives:
        value = ask_objective(objective, signals)
        if value is None:
            continue
        if not objective.replaces:
            objective.add_loss(value)
            continue
        count = (wanted != IGNORED).sum()
        own = -signals.logps.detach().sum() / count.clamp(min=1)
        rest = isinstance(output, dict) and output.get("aux_loss") is not None
        replacements.append(LossReplacement(value, own, count, objective.unit, rest))
    if len(replacements) > 1:
        raise one_at_a_time([type(objective).__name__ for objective in objectives if objective.replaces])
    return replacements[0] if replacements else None


def reweigh(signals: ObjectiveSignals, methods: list[Method]) -> None:
    """Let methods weigh the targets of a text model's own loss: what that changes in it becomes a loss of theirs."""
    real = signals.wanted != IGNORED
    for method in methods:
        weights = F.pad(method.weigh(signals.ids)[:, 1:], (0, 1), value=1.0)  # a token's target is the one behind it
        counted = real & (weights > 0)
        change = weights * counted / counted.sum().clamp(min=1) - real / real.sum().clamp(min=1)
        if torch.compiler.is_compiling() or bool(change.any()):
            method.add_loss(-(signals.logps * change).sum())


def one_at_a_time(names: list[str]) -> UnsupportedError:
    """The error for several objectives that replace the loss."""
    return UnsupportedError(explain("One objective replaces the model's own loss", names, "Leave one, or switch between adapters."))


def judge_prediction(model: ModelSurgery, target: Tensor, read: Reader) -> Tensor:
    """The objectives' loss of a denoiser's last call, which must have been made; the mean squared error where none replaces it."""
    call = model.waiting
    model.wait(None)
    if call is None:
        rule = "`objective_loss` speaks of the denoiser's last call, once"
        raise UnsupportedError(explain(rule, "none since", "Attach an objective, call the denoiser, then ask."))
    signals = ObjectiveSignals(model, call.arguments, call.output, target, read, {}, call.draws)
    with call.again():
        values = [(objective, ask_objective(objective, signals)) for objective in objectives_of(model)]
    values = [(objective, value) for objective, value in values if value is not None]
    losses = [value for _, value in values]
    if not any(objective.replaces for objective, _ in values):
        losses.append(F.mse_loss(signals.prediction, signals.target))
    return torch.stack(losses).sum()
