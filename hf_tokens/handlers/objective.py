"""Objectives: the signals that they get behind the model, and how the loss of one takes the place of the model's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hf_tokens_kernels.lazily import lazy
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states
from transformers.loss.loss_utils import ForCausalLMLoss

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.loss import LossReplacement
from ..engine.model import ModelSurgery
from ..engine.results import ModelCall
from ..errors import UnsupportedError, explain
from ..model import families
from ..roles.base import Method
from ..roles.objective import Objective
from ..tokens.token_map import in_float32
from .extra_block import ExtraBlock

IGNORED = -100  # a label that is no target
Reader = Callable[[Any], Tensor]


@dataclass(frozen=True)
class RandomState:
    """Where the generators of random numbers stood, on every device of a model."""

    cpu: Tensor
    devices: list[int]
    states: list[Tensor]

    @classmethod
    def note(cls, model: nn.Module) -> RandomState:
        return cls(torch.get_rng_state(), *get_device_states(*{p.device: p for p in model.parameters()}.values()))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)

    def equals(self, other: RandomState) -> bool:
        return all(torch.equal(x, y) for x, y in zip((self.cpu, *self.states), (other.cpu, *other.states), strict=True))


BEFORE = "random numbers before the model's call"


@dataclass(frozen=True)
class Draws:
    """The random numbers that a call drew, between two states: its dropout, in which its reference is to be the same."""

    begin: RandomState
    end: RandomState

    @contextlib.contextmanager
    def again(self, model: nn.Module) -> Iterator[None]:
        """Draw the same ones for a moment; refused where others were drawn, because the adapter drew some between the model's own."""
        now = RandomState.note(model)
        self.begin.restore()
        try:
            yield
            drawn = RandomState.note(model)
        finally:
            now.restore()
        if not drawn.equals(self.begin) and not drawn.equals(self.end):
            rule = "An objective's reference drops what the model has dropped, which draws no more random numbers than without its adapter"
            remedy = "Set the dropout of the adapter (`lora_dropout`), or of the model, to 0."
            raise UnsupportedError(explain(rule, "others between them", remedy))


@dataclass(frozen=True)
class DenoiserCall:
    """A denoiser's call that waits for its target: what it got, drew and returned, and the precision that it ran in."""

    arguments: dict[str, Any]
    output: Any
    draws: Draws | None
    device: str
    dtype: torch.dtype | None

    @classmethod
    def note(cls, arguments: dict[str, Any], output: Any, draws: Draws | None) -> DenoiserCall:
        device = first_tensor(output).device.type
        return cls(arguments, output, draws, device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)

    def again(self) -> torch.autocast:
        """The same precision: a reference in another one would differ by its rounding alone."""
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype is not None)


def labels_of(model: nn.Module, arguments: dict[str, Any], labels: Tensor | None) -> Tensor | None:
    """The token that each place is to predict, (b n); None where the call has no labels."""
    if isinstance(arguments.get("shift_labels"), Tensor):
        return arguments["shift_labels"]
    labels = labels if arguments.get("labels") is None else arguments["labels"]
    if not isinstance(labels, Tensor) or labels.dim() != 2:
        return None
    shifts = model.loss_function is ForCausalLMLoss and not getattr(model.config, "is_encoder_decoder", False)
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifts else labels


def logits_of(output: Any, shape: torch.Size) -> Tensor | None:
    """The logits (b n v) in a model's output."""
    tensors = [output.get("logits")] if isinstance(output, dict) else list(output) if isinstance(output, tuple) else [output]
    return next((t for t in tensors if isinstance(t, Tensor) and t.dim() == 3 and t.shape[:2] == shape), None)


def log_probabilities(output: Any, wanted: Tensor) -> Tensor:
    """Log-probability of each target, 0 where there is none, (b n)."""
    known = output.get("log_probs") if isinstance(output, dict) else None  # of a head that makes no logits, as TRL's
    if isinstance(known, Tensor):
        return F.pad(known, (0, wanted.shape[1] - known.shape[1]))
    logits = logits_of(output, wanted.shape)
    if logits is None:
        rule = f"An objective needs logits for each of {wanted.shape[1]} labels"
        raise UnsupportedError(explain(rule, f"{type(output).__name__} without", "Call the model with `return_dict=True` and all logits."))
    flat = in_float32(logits.flatten(0, 1))
    return -F.cross_entropy(flat, wanted.to(logits.device).flatten(), reduction="none", ignore_index=IGNORED).view(wanted.shape)


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a denoiser's output."""
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


@dataclass
class ObjectiveSignals:
    """What the objectives may know of one call; each signal is made when it is first read."""

    model: ModelSurgery
    arguments: dict[str, Any]
    output: Any
    wanted: Tensor
    read: Reader
    states: dict[str, Tensor]
    draws: Draws | None = None
    extra: ExtraBlock | None = None

    @property
    def block(self) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
        return self.extra.run

    @lazy
    def labels(self) -> Tensor:
        return self.wanted

    @lazy
    def logps(self) -> Tensor:
        return log_probabilities(self.output, self.wanted)

    @lazy
    def target(self) -> Tensor:
        return in_float32(self.wanted)

    @lazy
    def prediction(self) -> Tensor:
        return self._like_target(self.output)

    @lazy
    def reference(self) -> Tensor:
        """Runs the model without the adapter."""
        with contextlib.nullcontext() if self.draws is None else self.draws.again(self.model.base):
            output, _ = self.model.without((), self.arguments)
        return self._like_target(output) if self.wanted.is_floating_point() else log_probabilities(output, self.wanted)

    def _like_target(self, output: Any) -> Tensor:
        prediction, want = self.read(output), self.wanted
        if prediction.dim() == want.dim() > 3 and prediction.shape[1] == 2 * want.shape[1]:
            prediction = prediction.chunk(2, dim=1)[0]  # a variance that some denoisers predict beside it
        if prediction.shape != want.shape:
            rule, got = "What a denoiser predicts and what it is to predict have one shape", (tuple(prediction.shape), tuple(want.shape))
            raise UnsupportedError(explain(rule, f"{got[0]} and {got[1]}", "Pass `read`, which takes it from the output."))
        return prediction.to(self.target.dtype)

    @property
    def _decoder(self) -> str:
        return "decoder_" if getattr(self.model.base.config, "is_encoder_decoder", False) else ""

    @lazy
    def ids(self) -> Tensor:
        ids = self.arguments.get(f"{self._decoder}input_ids")
        if isinstance(ids, Tensor):
            return ids
        if not self._decoder:
            rule = "This objective reads the tokens of the text"
            raise UnsupportedError(explain(rule, "`inputs_embeds` without `input_ids`", "Pass the ids."))
        start = torch.full_like(self.wanted[:, :1], self.model.base.config.decoder_start_token_id)
        return torch.cat([start, self.wanted[:, :-1]], dim=1)  # so the model shifts its labels itself

    @lazy
    def positions(self) -> Tensor:
        n, device = self.wanted.shape[1], self.wanted.device
        places, mask = self.arguments.get("position_ids"), self.arguments.get(f"{self._decoder}attention_mask")
        place = torch.arange(n, device=device)
        begins = torch.zeros_like(self.wanted, dtype=torch.bool)
        if isinstance(places, Tensor) and places.dim() == 2 and places.shape[1] == n and not self._decoder:
            begins[:, 1:] = places[:, 1:] != places[:, :-1] + 1
        if isinstance(mask, Tensor) and mask.shape == self.wanted.shape:
            begins[:, 1:] |= mask[:, 1:].bool() & ~mask[:, :-1].bool()
        return place - torch.where(begins, place, 0).cummax(dim=1).values

    @lazy
    def hidden(self) -> Tensor:
        hidden = self.states.get("head", self.states.get("base"))
        width = self.model.streams[-1].stream.width
        if hidden is None or hidden.shape != (*self.wanted.shape, width):
            rule = f"This objective needs a head that reads the blocks' {width} features of every token"
            raise UnsupportedError(explain(rule, "none" if hidden is None else tuple(hidden.shape), "Choose another model."))
        return hidden

    @lazy
    def head(self) -> Callable[[Tensor], Tensor]:
        model = self.model.base
        module, config = model.get_submodule(self.model.head), model.config.get_text_config()
        factors = [getattr(config, name, None) for name in families.LOGIT_FACTORS]
        divisor, cap = (getattr(config, name, None) or 1.0 for name in (families.LOGIT_DIVISOR, families.LOGIT_CAP))

        def head(states: Tensor) -> Tensor:
            logits = module(states)
            for factor in factors:
                logits = logits if factor is None else logits * factor
            logits = logits if divisor == 1 else logits / divisor
            return logits if cap == 1 else cap * torch.tanh(logits / cap)

        logits = logits_of(self.output, self.wanted.shape)
        if logits is not None and not self.model.losses.head_agreed:
            self._check_head(head, logits[:1, -1])
            self.model.losses.trust_head()
        return head

    @torch.no_grad()
    def _check_head(self, head: Callable[[Tensor], Tensor], logits: Tensor) -> None:
        computed = head(self.hidden[:1, -1])
        if computed.shape != logits.shape or not torch.allclose(computed.float(), logits.float(), rtol=0.05, atol=0.05):
            rule = "This objective needs logits that are what the head returns, scaled or capped as the config says"
            raise UnsupportedError(explain(rule, f"others, from {type(self.model.base).__name__}", "Choose another model."))

    @property
    def progress(self) -> float:
        return self.model.progress


def ask_objective(objective: Objective, signals: ObjectiveSignals) -> Tensor | None:
    """The loss of an objective for a call."""
    given = {name: None if name in objective.ignores else getattr(signals, name) for name in objective.signals}
    return objective.at_hand(partial(objective.loss, **given))


def objectives_of(model: ModelSurgery) -> list[Objective]:
    """The active objectives; each stands in one block."""
    return [method for method in model.methods() if isinstance(method, Objective) and method.is_first_block]


def asked_now(model: ModelSurgery) -> list[Objective]:
    """The objectives that are called for a forward as the model is now."""
    return [o for o in objectives_of(model) if o.evaluates or o.training and torch.is_grad_enabled()]


@handles("Objective")
class ObjectiveHandler(Handler):
    """What the engine does for objectives, and for methods of any role that weigh the targets."""

    def hooks(self, method: Objective) -> set[str]:
        return {"extra block"} if "block" in method.asks and method.is_first_block else set()

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        return block.state(ExtraBlock).attach(block)

    def before_model(self, call: ModelCall, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Note what random numbers come next, where an objective compares with the model without the adapter."""
        if any("reference" in objective.signals for objective in objectives_of(call.model)):
            call.held[BEFORE] = RandomState.note(call.model.base)
        return args, kwargs

    def after_base(self, call: ModelCall, output: Any) -> None:
        """Note the last hidden states, where an objective names them and no head will read them."""
        if any("hidden" in objective.signals for objective in asked_now(call.model)):
            call.read["base"] = output["last_hidden_state"] if isinstance(output, dict) else output[0]

    def after_head(self, call: ModelCall, hidden: Tensor | None, output: Tensor) -> Tensor:
        """Note what the head read, where an objective names it."""
        if hidden is not None and any("hidden" in objective.signals for objective in asked_now(call.model)):
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
            signals = ObjectiveSignals(model, arguments, output, wanted, first_tensor, call.read, draws, extra)
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


def judge(signals: ObjectiveSignals, objectives: list[Objective]) -> LossReplacement | None:
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
