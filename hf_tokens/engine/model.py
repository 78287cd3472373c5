"""The surgery of a model: what is read off its inputs before the blocks run, and what its output and its loss gain behind them."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.generation.continuous_batching import PagedAttentionCache

from ..errors import UnsupportedError, explain
from ..kv.adopt import find_cache
from ..model.layouts import in_tokens
from ..model.pictures import ENCODED, SeenPictures, layouts, patch_grids, visual_tokens
from ..model.signatures import CACHES, bound_arguments
from ..roles.base import Method
from ..roles.signals import SPANS
from ..tokens.token_map import in_float32
from .block import BlockSurgery
from .context import ForwardContext
from .generation import refuse_export, refuse_pages, stand_before
from .handler import HANDLERS, Handler
from .hooks import LayoutForward, SharedHook, SignedForward
from .loss import StepLosses, add_losses
from .results import ModelCall, World
from .surgery import Listener, StreamSurgery

TEACHER = "last hidden states of the model without the adapter"
TARGETS = "hf_tokens_targets"  # a batch's column that is for the methods, and no argument of the model


class ModelForward(SignedForward):
    """The forward of the model, a call of its own where nothing called it: `model.forward(...)`. What raises leaves nothing behind."""

    def __init__(self, model: ModelSurgery):
        self.model = model
        super().__init__(model.base)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the model had, with the weights that edits make outside of its blocks."""
        run = super().inner
        for handler, block in self.model.outside:
            run = partial(handler.outside, block, run)
        return run(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        heard = self.model.hears()
        try:
            if heard:
                return self.inner(*args, **kwargs)
            args, kwargs = self.model.before(args, kwargs)
            return self.model.after(self.inner(*args, **kwargs))
        except BaseException:
            self.model.abandon()
            raise


class ModelSurgery:
    """One per model, shared by its streams.

    Attributes:
        base: The model.
        head: Path of its head.
        is_denoiser: Whether it is a denoiser, whose loss is not its own.
        progress: How much of the training is done.
        updates: Steps of the optimizer that are done.
        losses: What a trainer and the objectives share.
        conclusions: What banks last concluded from their tokens.
        verdict: Tokens of the last call behind which a large model takes over, (b m).
    """

    def __init__(self, base: nn.Module, head: str | None, tower: nn.Module | None = None, worlds: tuple[World, ...] = (), denoiser=False):
        self.base, self.head, self.worlds, self.is_denoiser = base, head, worlds, denoiser
        self.streams: list[StreamSurgery] = []
        self.listeners: list[Listener] = []
        self.around: tuple[Handler, ...] = ()
        self.outside: tuple[tuple[Handler, BlockSurgery], ...] = ()
        self.call: ModelCall | None = None
        self.losses, self.progress, self.updates = StepLosses(), 1.0, 0
        self.conclusions: dict[str, Tensor] = {}
        self.verdict: Tensor | None = None
        self.waiting: Any = None  # a denoiser's call, until its objective is called
        self.seen = SeenPictures()  # the calls of the vision tower
        self._callers: set[int] = set()  # threads that called the model, and may still be in it
        self._trainable = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
        self._handles = [base.register_forward_pre_hook(self.before_call, with_kwargs=True)]
        self._handles.append(base.register_forward_hook(self.after_call, with_kwargs=True))
        if head is not None:
            self._handles.append(base.get_submodule(head).register_forward_hook(SharedHook(self, ModelSurgery.after_head)))
            below = vars(base)["_modules"].get(getattr(base, "base_model_prefix", ""))
            self._handles += [] if below is None else [below.register_forward_hook(self.after_base)]
        if tower is not None:
            self._handles.append(tower.register_forward_hook(self.see, with_kwargs=True))
        self._bound = [ModelForward(self), *(LayoutForward(self, *of) for of in layouts(base, tower))]
        if isinstance(base, GenerationMixin):
            self._bound += stand_before(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "call": None, "verdict": None, "waiting": None, "_callers": set(), "conclusions": {}, "listeners": []}

    def methods(self) -> Iterator[Method]:
        """Every active method."""
        for surgery in self.streams:
            yield from surgery.methods()

    def blocks(self) -> Iterator[BlockSurgery]:
        """Every block."""
        for surgery in self.streams:
            yield from surgery.blocks.values()

    def refresh(self) -> None:
        """Note which handlers stand around the calls of the blocks, and which blocks hold what is edited outside of them."""
        self.around = tuple(handler for handler in HANDLERS.values() if handler.stands_around(self))
        self.outside = tuple((handler, block) for block in self.blocks() for handler, _ in block.plan.always.of("outside")[:1])

    def take_in(self, world: World) -> None:
        """Let another world take part in the calls."""
        self.worlds = (*self.worlds, world)

    def set_progress(self, progress: float, updates: int = 0) -> None:
        """Note how much of the training is done, and in how many steps."""
        self.progress, self.updates = progress, updates

    def put_verdict(self, verdict: Tensor | None) -> None:
        """Note behind which tokens a large model takes over, (b m)."""
        self.verdict = verdict

    def wait(self, call: Any) -> None:
        """Note a denoiser's call, until its objective is called."""
        self.waiting = call

    @contextlib.contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Call a listener for what happens, for a while."""
        try:
            self.listeners.append(listener)
            yield
        finally:
            if listener in self.listeners:  # who undid all that was begun has taken it away
                self.listeners.remove(listener)

    def detach(self) -> None:
        """Take the hooks off the model; its parameters are trainable again where they were (some kernels differ by that)."""
        for name, parameter in self.base.named_parameters():
            if name in self._trainable:
                parameter.requires_grad_(self._trainable[name])
        for handle in self._handles:
            handle.remove()
        for bound in self._bound:
            bound.remove()
        for world in self.worlds:
            world.detach()

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the model had."""
        return self._bound[0].inner(*args, **kwargs)

    @property
    def teaching(self) -> bool:
        """Whether the model runs without its surgery, for a method to learn from."""
        return self.call is not None and self.call.context.teaching

    def hears(self) -> bool:
        """Whether the forward that begins is part of a call that is known of.

        Raises:
            UnsupportedError: Another thread is in a call.
        """
        under_way = self.call is not None
        if torch.compiler.is_compiling() or under_way and any(one is self.base for one in called(threading.get_ident())):
            return under_way
        self._refuse_threads()
        return False

    def before_call(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The model is called, not by its forward alone: TRL puts another forward in the place of ours, which calls what is below."""
        if not torch.compiler.is_compiling():
            self._refuse_threads()
        return self.before(args, kwargs)

    def after_call(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """It has returned."""
        return None if (changed := self.after(output)) is output else changed

    def before(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Read the inputs; in training, run the model without the adapter first if a method learns from it."""
        targets = kwargs.get(TARGETS)
        kwargs = {name: value for name, value in kwargs.items() if name != TARGETS}
        if self.teaching:
            return args, kwargs
        if self.call is not None:
            self.abandon()  # the last one never came to its end
        if any(isinstance(kwargs.get(name), PagedAttentionCache) for name in CACHES):
            refuse_pages(self)  # an adapter may be switched on behind its beginning
        for method in self.methods():
            method.losses.clear()
        if not kwargs.get(ENCODED):
            self.seen.clear()  # what the tower was called for before is not of this call
        try:
            return self._begin(args, kwargs, targets)
        except BaseException:
            self.abandon()
            raise

    def _begin(self, args: tuple, kwargs: dict, targets: Any) -> tuple[tuple, dict]:
        """Begin a call of the model; returns the arguments that it gets."""
        if torch.compiler.is_exporting():
            refuse_export(self)
        fields: dict[str, Any] = {}
        for world in self.worlds:
            fields |= world.before_model(self, args, kwargs)
        arguments = bound_arguments(self.base, args, kwargs)
        context = ForwardContext(arguments=arguments, visual=visual_tokens(self.base, arguments), targets=targets, **fields)
        self.call, self.waiting = ModelCall(self, context), None
        taught = [s for s in self.streams if self.base.training and torch.is_grad_enabled() and any(m.teaches for m in s.methods())]
        for surgery in self.streams:
            surgery.begin(context, keeps_final=surgery in taught)
        if taught and find_cache((*args, *kwargs.values())) is None:
            self.call.held[TEACHER] = self.without(args, kwargs, taught)[1]
        for handler in HANDLERS.values():
            args, kwargs = handler.before_model(self.call, args, kwargs)
        return args, kwargs

    def see(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Note the pictures that the vision tower has encoded."""
        grids = None if self.teaching else patch_grids(module, args, kwargs)
        if grids is not None:
            self.seen.note(in_tokens(self.base.config, grids), output)

    def _refuse_threads(self) -> None:
        """What is known of a pass belongs to the model, so that one thread at a time may be in it."""
        this = threading.get_ident()
        self._callers.add(this)
        known = self._callers - {this}
        others = {thread for thread in known if any(one is self.base or one is self._bound[0] for one in called(thread))}
        self._callers -= known - others
        if others and any(True for _ in self.methods()):
            self._callers.discard(this)
            rule = "A model with an adapter takes one call at a time"
            remedy = "Take turns with a lock, or give each thread a `copy.deepcopy` of the model."
            raise UnsupportedError(explain(rule, "a call while another thread's runs", remedy))

    def without(self, args: tuple, kwargs: dict, finals: list[StreamSurgery] | None = None) -> tuple[Any, dict[StreamSurgery, Any]]:
        """The output of the model without the adapter, and the last hidden states of some of its streams."""
        with torch.no_grad(), self.without_adapters(), self.apart(ForwardContext(teaching=True), finals):
            output = self.base(*args, **kwargs)  # labels too: TRL's forward needs them
            return output, {surgery: surgery.call.final for surgery in finals or ()}

    @contextlib.contextmanager
    def apart(self, context: ForwardContext, finals: list[StreamSurgery] | None = None) -> Iterator[None]:
        """A call of its own within the one that is under way, which goes on behind it."""
        before, calls = self.call, [surgery.call for surgery in self.streams]
        self.call = ModelCall(self, context)
        try:
            for surgery in self.streams:
                surgery.begin(context, keeps_final=surgery in (finals or ()))
            yield
        finally:
            self.call = before
            for surgery, call in zip(self.streams, calls, strict=True):
                surgery.resume(call)

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model without our adapters for a moment, and without the LoRAs in them."""
        before = [(block, block.plan.acting) for block in self.blocks()]
        names = {name for block, _ in before for name in block.hf_tokens_methods}
        inner = [m for m in self.base.modules() if isinstance(m, BaseTunerLayer) and m._get_available_adapters() & names]
        inner = [m for m in inner if not m.disable_adapters and not m.merged]
        self.act((block, ()) for block, _ in before)
        for layer in inner:
            layer._disable_adapters = True  # `enable_adapters` would freeze them as well
        try:
            yield
        finally:
            for layer in inner:
                layer._disable_adapters = False
            self.act(before)

    def act(self, methods: Iterable[tuple[BlockSurgery, Iterable[Method]]]) -> None:
        """Let these methods act, given for each block."""
        for block, acting in methods:
            block.act(acting)
        for surgery in self.streams:
            surgery.refresh()

    def after_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        """The model below the head has returned."""
        if self.call is not None and not self.call.context.aside:
            for handler in HANDLERS.values():
                handler.after_base(self.call, output)

    def after_head(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """The head has returned."""
        if self.call is None or self.call.context.aside:
            return None
        before = output
        for handler in HANDLERS.values():
            output = handler.after_head(self.call, args[0] if args else None, output)
        return None if output is before else output

    def after(self, output: Any) -> Any:
        """Add the methods' losses to the model's own."""
        if self.teaching or self.call is None:
            return output
        call = self.call
        try:
            for handler in HANDLERS.values():
                output = handler.after_model(call, output)
            for world in self.worlds:
                world.after_model(output)
            self._compare(call)
            output = add_losses(self, call, output)
        except BaseException:
            self.abandon()
            raise
        self.end()
        return output

    def end(self) -> None:
        """The call is over: nothing of it stays."""
        self.call = None
        self.seen.clear()
        for surgery in self.streams:
            surgery.begin(ForwardContext())

    def abandon(self) -> None:
        """The call has raised: what was noted of it does not hold either."""
        if self.teaching:
            return  # the call around it is abandoned
        self.end()
        self.verdict = self.waiting = None
        for block in self.blocks():
            block.forget()
        for world in self.worlds:
            world.abandon()
        for method in self.methods():
            method.losses.clear()

    def _compare(self, call: ModelCall) -> None:
        """Let the methods learn from the model without the adapter."""
        for surgery, teacher in call.held.get(TEACHER, {}).items():
            if surgery.call.final is None or teacher is None:
                continue
            hidden, real = surgery.call.final
            mask = real if real is not None else torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            for method in surgery.methods():
                if method.teaches and method.is_first_block:
                    method.at_hand(partial(method.teach, hidden, teacher[0], mask))

    def extra_loss(self) -> Tensor | None:
        """The sum of the active methods' losses; None if they have none."""
        losses = [in_float32(loss) for method in self.methods() for loss in (*method.losses, *self._untouched(method))]
        return torch.stack(losses).sum() if losses else None

    def _untouched(self, method: Method) -> list[Tensor]:
        """A loss of 0 for each parameter of a method on pictures, in training on text alone: a gradient of 0, for there may be no other."""
        visual = None if self.call is None else self.call.context.visual
        if visual is None or not SPANS & method.asks or not (self.base.training and torch.is_grad_enabled()) or bool(visual.any()):
            return []
        return [parameter.flatten()[:0].sum() for parameter in method.parameters() if parameter.requires_grad]


def called(thread: int) -> Iterator[Any]:
    """What a thread is inside of: modules that were called, and forwards of ours."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code in (nn.Module._call_impl.__code__, ModelForward.__call__.__code__):
            yield frame.f_locals.get("self")
        frame = frame.f_back
