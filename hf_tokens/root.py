"""The hooks on the whole model: what its inputs say before the blocks run, and what the loss gains behind them."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from .anatomy import image_tokens
from .call import find_cache
from .conditioning import Arguments, Layouts, gather, groups, in_prompt, join, part, refuse_parts, some, tell
from .denoising import TOLD, Denoising
from .errors import UnsupportedError, explain
from .objectives import Call, Swap, bound, judge, reweigh
from .pictures import PIXELS, Grid, Shapes, grids, shapes
from .pooling import behind_model
from .roles import Method, ModelRouter, Objective
from .surgery import Runtime
from .training import Forward, share

TARGETS = "hf_tokens_targets"  # a batch's column that is for the methods, and no argument of the model


class HeadHook:
    """Calls `Root.behind_head`. A copy of the head alone (PEFT makes one for `modules_to_save`) keeps the root; a model's has its own."""

    def __init__(self, root: Root):
        self.root = root

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        return self.root.behind_head(output, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeadHook:
        return HeadHook(copy.deepcopy(self.root, memo) if id(self.root.model) in memo else self.root)


class Root:
    """One per model, shared by its streams."""

    def __init__(self, model: nn.Module, head: str | None, tower: nn.Module | None = None):
        self.model = model
        self.runtimes: list[Runtime] = []
        self._trainer: weakref.ref | None = None
        self.teaching = False
        self.verdict: Tensor | None = None  # tokens of the last call behind which a large model is to speak, (b m)
        self.heard: list[Forward] | None = None  # in a trainer: what each of its forwards has for the loss
        self.labels: Tensor | None = None  # in a trainer: those that it may keep from the model
        self.judged = self.agreed = False  # whether a replacing objective was asked, and whether the loss was once what it replaces
        self.last: Call | None = None  # a denoiser's call, until its objective has spoken
        self.layouts = Layouts(self)  # of the prompt, at each block
        self.given: Arguments | None = None  # a denoiser's call as it came, where banks add to its prompt
        self.parts: list[tuple[Tensor, Any]] = []  # samples of it and what the model put out for them
        self.head, self.notes = head, {}  # what the head read, or the model below the head returned
        self.conclusions: dict[str, Tensor] = {}  # what banks last said of their tokens
        self.callers: set[int] = set()  # threads that called the model, and may still be in it
        self.lent: Any = None  # the loss function that a trainer has from us
        self.trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.behind, with_kwargs=True),
        ]
        if head is not None:
            self.handles.append(model.get_submodule(head).register_forward_hook(HeadHook(self)))
            below = vars(model)["_modules"].get(getattr(model, "base_model_prefix", ""))
            self.handles += [] if below is None else [below.register_forward_hook(self.behind_base)]
        self.seen: list[Shapes] = []  # pictures that the vision tower was called with, until the model has run on them
        if tower is not None:
            self.handles.append(tower.register_forward_pre_hook(self.see, with_kwargs=True))
        self.denoising = Denoising(model) if "diffusers" in sys.modules else None

    @property
    def trainer(self) -> Any:
        return None if self._trainer is None else self._trainer()

    @trainer.setter
    def trainer(self, trainer: Any) -> None:
        self._trainer = weakref.ref(trainer)

    def __getstate__(self) -> dict[str, Any]:
        passing = {"_trainer": None, "heard": None, "lent": None, "labels": None, "last": None, "verdict": None, "given": None}
        return {**vars(self), **passing, "callers": set(), "notes": {}, "conclusions": {}, "parts": []}

    def methods(self) -> Iterator[Method]:
        """Every active method."""
        for runtime in self.runtimes:
            yield from runtime.methods()

    def objectives(self) -> Iterator[Objective]:
        """Every active objective."""
        for runtime in self.runtimes:
            for side in runtime.sides.values():
                yield from side.objectives

    def asked(self) -> list[Objective]:
        """The objectives that speak of a forward as the model is now."""
        return [o for o in self.objectives() if o.evaluates or o.training and torch.is_grad_enabled()]

    def set_progress(self, progress: float) -> None:
        """Tell every stream how much of the training is done."""
        for runtime in self.runtimes:
            runtime.progress = progress

    def detach(self) -> None:
        """Take the hooks off the model; its parameters are trainable again where they were (some kernels differ by that)."""
        for name, parameter in self.model.named_parameters():
            if name in self.trainable:
                parameter.requires_grad_(self.trainable[name])
        for handle in self.handles:
            handle.remove()
        if self.denoising is not None:
            self.denoising.detach()

    # -- before the model --------------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Read the inputs; in training, ask the model without the adapter first if a method wants to learn from it."""
        if not torch.compiler.is_compiling():
            self._refuse_threads(module)
        targets = kwargs.get(TARGETS)
        kwargs = {name: value for name, value in kwargs.items() if name != TARGETS}
        self.given, self.parts, self.layouts.now = None, [], None
        if self.teaching:
            return args, kwargs
        for method in self.methods():
            method.losses.clear()
        self.last = None
        if any(kwargs.get(name) is not None for name in PIXELS):
            self.seen.clear()  # this call will run the tower itself
        spans = self._visual(args, kwargs)
        step = None if self.denoising is None else self.denoising.step(args, kwargs)
        if self.denoising is not None:
            self.denoising.listens = any(TOLD & m.asks for m in self.methods())
        for runtime in self.runtimes:
            runtime.current, runtime.reads, runtime.final, runtime.leaving = None, None, None, None
            runtime.before_that, runtime.looked_up = runtime.looked_up, None
            runtime.inputs = {"visual": spans, "given": kwargs, "targets": targets, **(step or {})}
            if self.denoising is not None and self.denoising.begins:
                runtime.contexts.clear()
        pupils = [r for r in self.runtimes if module.training and torch.is_grad_enabled() and any(m.teaches for m in r.methods())]
        for runtime in pupils:
            runtime.keeps_final = True
        if pupils:
            self._teach(args, kwargs, pupils)
        return self._tell(module, args, kwargs)

    def _tell(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Let banks add to a denoiser's prompt; samples that take other tokens than the last ones do run here."""
        banks = in_prompt(self)
        if not banks:
            return args, kwargs
        call = bound(module, args, kwargs)
        negative = self.denoising.negative(call)
        for runtime in self.runtimes:
            runtime.inputs["negative"] = negative
        gifts = gather(banks, call)
        if not gifts:
            return args, kwargs
        self.given, several = call, groups(gifts)
        if len(several) == 1:
            told, self.layouts.now = tell(call, gifts)
            return (), told
        refuse_parts(self)
        inputs = [runtime.inputs for runtime in self.runtimes]
        for rows in several:
            mine, taken = part(call, gifts, rows)
            told, self.layouts.now = tell(mine, taken) if taken else (mine, None)
            for runtime, whole in zip(self.runtimes, inputs, strict=True):
                runtime.current = None
                runtime.inputs = {name: some(name, value, rows, len(negative)) for name, value in whole.items()}
            self.parts.append((rows, None if rows is several[-1] else module.forward(**told)))
        return (), told

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note the pictures that the vision tower is called with."""
        found = shapes(module, args, kwargs)
        self.seen += [] if found is None else [found]

    def grids(self, visual: Tensor, given: dict[str, Any]) -> list[Grid]:
        """Frames, height and width in tokens of each picture among the visual tokens, (b n) bool."""
        return grids(self.seen, self.model.config, given, visual)

    def _refuse_threads(self, module: nn.Module) -> None:
        """What is known of a pass belongs to the model, so that one thread at a time may be in it."""
        me = threading.get_ident()
        self.callers.add(me)
        known = self.callers - {me}
        others = {thread for thread in known if is_in(thread, module)}
        self.callers -= known - others
        if others and any(True for _ in self.methods()):
            self.callers.discard(me)
            remedy = "Take turns with a lock, or give each thread a `copy.deepcopy` of the model."
            raise UnsupportedError(
                explain("A model with an adapter takes one call at a time", "a call while another thread's runs", remedy)
            )

    def _visual(self, args: tuple, kwargs: dict) -> Tensor | None:
        tokens, ids = image_tokens(self.model), kwargs.get("input_ids", args[0] if args else None)
        if not tokens or not isinstance(ids, Tensor) or ids.is_floating_point():
            return None
        spans = torch.isin(ids, torch.tensor(tokens, device=ids.device))
        return spans if bool(spans.any()) else None

    def without(self, args: tuple, kwargs: dict) -> Any:
        """The output of the model without the adapter."""
        with torch.no_grad(), self.without_adapters():
            self.teaching = True
            try:
                return self.model(*args, **kwargs)  # labels too: TRL's forward needs them
            finally:
                self.teaching = False

    def _teach(self, args: tuple, kwargs: dict, pupils: list[Runtime]) -> None:
        if find_cache((*args, *kwargs.values())) is not None:
            return
        self.without(args, kwargs)
        for runtime in pupils:
            runtime.taught = runtime.final

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The model without our adapters for a moment, and without the LoRAs in them."""
        held = [(side, side.active()) for runtime in self.runtimes for side in runtime.sides.values()]
        names = {name for side, _ in held for name in side.hf_tokens_methods}
        inner = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer) and m._get_available_adapters() & names]
        inner = [m for m in inner if not m.disable_adapters and not m.merged]
        for side, _ in held:
            side.act([])
        for layer in inner:
            layer._disable_adapters = True  # `enable_adapters` would freeze them as well
        try:
            yield
        finally:
            for layer in inner:
                layer._disable_adapters = False
            for side, acting in held:
                side.act(acting)

    # -- behind the model --------------------------------------------------------------------------------------------

    def behind_base(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Note the last hidden states, where an objective asks for them and no head will read them."""
        if not self.teaching and any("hidden" in objective.signals for objective in self.asked()):
            self.notes["base"] = output["last_hidden_state"] if isinstance(output, dict) else output[0]

    def behind_head(self, output: Tensor, *given: Tensor) -> Tensor | None:
        """Note what the head read, where an objective asks for it; let model routers speak; add what query tokens read to the output."""
        if not self.teaching and any("hidden" in objective.signals for objective in self.asked()):
            self.notes["head"] = given[0]
        if given and not self.teaching:
            self.verdict = self._verdict(given[0].detach(), output.detach())
        reads = [runtime.reads for runtime in self.runtimes if runtime.reads is not None]
        if not reads or self.teaching:
            return None
        for runtime in self.runtimes:
            runtime.reads = None
        if output.shape != reads[0].shape:
            rule = f"What query tokens read adds to a head with one output {tuple(reads[0].shape)} a sample"
            raise UnsupportedError(explain(rule, tuple(output.shape), "Load the model with a classification head."))
        return output + sum(reads).to(output.dtype)

    def _verdict(self, hidden: Tensor, logits: Tensor) -> Tensor | None:
        """Behind which tokens a large model is to speak, given what the head read (b m d) and said (b m v); None without a router."""
        routers = [method for method in self.methods() if isinstance(method, ModelRouter)]
        if not routers or logits.dim() != 3:
            return None
        supply = {
            "hidden": lambda: hidden,
            "logits": lambda: logits,
            "predicted": lambda: self.model.get_input_embeddings()(logits.argmax(dim=-1)).detach(),
            "targets": lambda: self.runtimes[-1].inputs.get("targets"),
        }
        return torch.stack([router.route(**{name: supply[name]() for name in router.signals}) for router in routers]).any(dim=0)

    def behind(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Add the methods' losses to the model's own."""
        if self.teaching:
            return None
        came = output
        if self.parts:
            output = join([*self.parts[:-1], (self.parts[-1][0], output)])
        args, kwargs = (args, kwargs) if self.given is None else ((), self.given)
        self.given, self.parts = None, []
        if self.denoising is not None:
            self.denoising.end(output)
        self.seen.clear()
        for runtime in self.runtimes:
            runtime.inputs.pop("given", None)
            self._compare(runtime)
            output = behind_model(runtime, output)
        swap = self._judge(bound(module, args, kwargs), output)
        extra = self.extra()
        if extra is None and swap is None:
            return None if output is came else output
        loss = None
        if isinstance(output, dict) and output.get("loss") is not None:
            loss = output["loss"] = self._add(output["loss"], extra, swap, kwargs)
        elif isinstance(output, tuple) and kwargs.get("labels") is not None:
            loss = self._add(output[0], extra, swap, kwargs)
            output = (loss, *output[1:])
        if self.heard is not None and any(value.requires_grad for value in (extra, swap and swap.ours) if value is not None):
            self.heard.append(Forward(extra, swap, None if loss is None else loss.grad_fn))
        return None if output is came else output

    def _judge(self, given: dict[str, Any], output: Any) -> Swap | None:
        """Ask the objectives; those of a denoiser have to wait for their target."""
        asked = self.asked()
        try:
            if self.denoising is not None and self.denoising.hook is not None:
                self.last = Call.note(given, output) if any(True for _ in self.objectives()) else None
                return None
            weighing = [method for method in self.methods() if method.weighs and method.leads]
            if weighing:
                reweigh(self, weighing, given, output)
            return judge(self, asked, given, output) if asked else None
        finally:
            self.notes.clear()

    @staticmethod
    def _compare(runtime: Runtime) -> None:
        """Let the methods learn from the model without the adapter."""
        if runtime.keeps_final and runtime.final is not None and runtime.taught is not None:
            real = runtime.final_real
            mask = real if real is not None else torch.ones(runtime.final.shape[:2], dtype=torch.bool, device=runtime.final.device)
            for method in runtime.methods():
                if method.teaches and method.leads:
                    method.teach(runtime.final, runtime.taught, mask)
        runtime.keeps_final, runtime.taught, runtime.final = False, None, None

    def extra(self) -> Tensor | None:
        """The sum of the active methods' losses; None if they have none."""
        losses = [loss.to(torch.promote_types(loss.dtype, torch.float32)) for method in self.methods() for loss in method.losses]
        return torch.stack(losses).sum() if losses else None

    def _add(self, loss: Tensor, extra: Tensor | None, swap: Swap | None, kwargs: dict) -> Tensor:
        if swap is not None:
            items = kwargs.get("num_items_in_batch")
            loss = swap.put(loss, items, share(self.model, kwargs, swap.unit, self.trainer), check=not self.agreed)
            self.agreed = True
        return loss if extra is None else loss + extra.to(loss.dtype) * share(self.model, kwargs)


def is_in(thread: int, module: nn.Module) -> bool:
    """Whether a thread is inside a call of a module."""
    frame = sys._current_frames().get(thread)
    while frame is not None and not (frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module):
        frame = frame.f_back
    return frame is not None
