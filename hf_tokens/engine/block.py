"""What hangs on a block: its methods, its bound forward, its hooks, and what PEFT calls of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention.tap import TAPPED_PREFIX
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.blocks import BlockFacts, borrows_keys, layer_index
from ..model.classes import class_name
from ..roles.base import Method
from ..roles.signals import TURNED
from .context import State
from .handler import handler_of
from .hooks import BoundForward, SignalHooks, way_to
from .plan import BlockPlan, PassPlan
from .rotation import BlockRotation
from .run import StreamRun
from .stream import run_in_stream
from .tap import AttentionTap, taps

if TYPE_CHECKING:
    from .surgery import StreamSurgery


class BlockForward(BoundForward):
    """The forward of a block."""

    def __init__(self, block: BlockSurgery):
        self.block = block
        super().__init__(block.module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The block's forward, as the model calls it."""
        return run_in_stream(self.block, args, kwargs)


class BlockSurgery(nn.Module, BaseTunerLayer):
    """The child `hf_tokens` of a block. Base names and classes stay as they are; `detach` leaves nothing behind."""

    adapter_layer_names = ("hf_tokens_methods",)
    other_param_names = ()

    def __init__(self, surgery: StreamSurgery, index: int):
        super().__init__()
        stream = surgery.stream
        module, attention = stream.blocks[index], stream.attention(index)
        self.hf_tokens_methods = nn.ModuleDict()
        self.surgery, self.index = surgery, index
        self._module = (module,)  # a tuple keeps it from becoming a submodule
        self._attention = () if attention is None else (attention,)
        self._way = () if attention is None else way_to(module, attention)
        self.facts = BlockFacts.of(module)
        self.layer_idx = layer_index(module, attention)
        self.shares_keys, self.layer_type = borrows_keys(attention), None if attention is None else vars(attention).get("layer_type")
        self.window = 1 if attention is None else 2 * vars(attention).get(families.HALF_WINDOW, 0) or 1
        self.checkpoints_itself = isinstance(module, GradientCheckpointingLayer)
        self.in_features = self.out_features = stream.width
        self.merged_adapters: list[str] = []
        self._disable_adapters, self._active_adapter = False, []
        self._handles: dict[str, list] = {}
        self._states: dict[type, Any] = {}
        self.signals, self.tap = SignalHooks(self), AttentionTap(self)
        self.blank: tuple = ()  # what the block is known to return beside its hidden states, if that is nothing
        self.plan = BlockPlan()
        self._forward = BlockForward(self)
        surgery.add(self)
        self.refresh()
        self.train(module.training)

    weight = property(lambda self: next(self.parameters(), None))
    bias = None
    r: dict[str, int] = {}  # ranks, by which diffusers counts the LoRAs to name the next one; a surgery has none

    @property
    def module(self) -> nn.Module:
        """The block of the base."""
        return self._module[0]

    @property
    def attention(self) -> nn.Module | None:
        """Its self-attention; None if it has none."""
        return self._attention[0] if self._attention else None

    def check_in_place(self) -> None:
        """Refuse a block in which hooks hang on an attention that is no more in it.

        Raises:
            UnsupportedError: The model has put another one in its place.
        """
        if (self._handles or self.tap.opened) and any(owner._modules.get(name) is not part for owner, name, part in self._way):
            got = f"something else than {type(self.attention).__name__} at {self.path} since"
            remedy = "Unload it and put it in again behind the call that changed the model."
            raise UnsupportedError(explain("A surgery acts in the modules that it was put into", got, remedy))

    @property
    def base(self) -> nn.Module:
        """The model that it belongs to."""
        return self.surgery.model.base

    @property
    def path(self) -> str:
        """Where it is in the model."""
        return self.surgery.stream.paths[self.index]

    def state(self, kind: type[State]) -> State:
        """What a handler keeps of this block, made from the block when it is first needed."""
        if kind not in self._states:
            self._states[kind] = kind(self)
        return self._states[kind]

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the block had, with the weights that the edits make."""
        edits = self.plan.always.of("weights")
        if not edits:
            return self._forward.inner(*args, **kwargs)
        handler = edits[0][0]
        with self.open_while_it_runs(lambda: handler.weights(self)):
            return self._forward.inner(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The same, or what a method puts in its place."""
        for handler, method in self.plan.always.of("call"):
            return handler.call(method, self, args, kwargs)
        return self.inner(*args, **kwargs)

    @contextlib.contextmanager
    def open_while_it_runs(self, context: Callable[[], contextlib.AbstractContextManager]) -> Iterator[None]:
        """Enter a context for a call of the block, and again when the block's own checkpoint runs it in the backward pass."""
        checkpoint = vars(self.module).get("_gradient_checkpointing_func")
        if checkpoint is not None:
            self.module._gradient_checkpointing_func = lambda function, *args: checkpoint(context()(function), *args)
        try:
            with context():
                yield
        finally:
            if checkpoint is not None:
                self.module._gradient_checkpointing_func = checkpoint

    def forget(self) -> None:
        """The block is done: nothing of its call stays."""
        self.signals.captured.clear()
        self.tap.forget()

    def learn_blank(self, blank: tuple) -> None:
        """Note what the block returned beside its hidden states; `Module.__setattr__` is slow for each pass of each block."""
        vars(self)["blank"] = blank

    def pass_plan(self, run: StreamRun) -> PassPlan:
        """The methods that are called in a pass."""
        return self.plan.prompt if run.prefill else self.plan.decode

    def called_inside(self, phase: str) -> tuple:
        """The methods that a hook inside the running block calls, each with its handler; none where the block does not run for a pass."""
        site = self.tap.site
        return () if site is None else self.pass_plan(site.run).of(phase)

    def act(self, methods: Iterable[Method]) -> None:
        """Let these methods act."""
        self.plan = BlockPlan.of(list(methods))
        self.signals.refresh(self.plan.acting)

    def refresh(self) -> None:
        """Note which methods act; called whenever adapters are added, switched or deleted."""
        names = [] if self._disable_adapters else [name for name in self.active_adapters if name in self.hf_tokens_methods]
        self.act(method for name in names for method in self.hf_tokens_methods[name].values())
        self.surgery.refresh()

    def add(self, adapter: str, methods: dict[str, Method]) -> None:
        """Put an adapter's methods into this block, with the hooks that they need."""
        if methods:
            self.hf_tokens_methods[adapter] = nn.ModuleDict(methods)
        self._hook(methods.values())
        self._move_adapter_to_device_of_base_layer(adapter)
        self.train(self.module.training)

    def renew(self) -> None:
        """Have the hooks that the methods need now, and note which of them act: the config of one has changed."""
        self._hook([method for methods in self.hf_tokens_methods.values() for method in methods.values()])
        self.refresh()

    def _hook(self, methods: Iterable[Method]) -> None:
        needs: dict[str, Any] = {}
        for method in methods:
            handler = handler_of(method)
            needs |= dict.fromkeys(self.signals.needs(method)) | dict.fromkeys(handler.hooks(method), handler)
            if taps(method, method.asks):
                needs["tap"] = None
        if self.surgery.shifts:
            needs[TURNED] = None
        for hook in sorted(needs):
            if hook == "tap":
                self.tap.open()
            elif hook not in self._handles:
                handles = self.state(BlockRotation).attach() if hook == TURNED else self.signals.attach(hook)
                self._handles[hook] = needs[hook].attach(hook, self) if handles is None else handles

    def know(self, adapters: Iterable[str]) -> None:
        """Hold these adapters by name, also where they do nothing in this block: PEFT looks at any layer for those to switch to."""
        for adapter in adapters:
            if adapter not in self.hf_tokens_methods:
                self.hf_tokens_methods[adapter] = nn.ModuleDict()

    def detach(self) -> None:
        """Take everything off the block."""
        for handles in self._handles.values():
            for handle in handles:
                handle.remove()
        self.tap.close()
        self._handles.clear()
        self._states.clear()
        self.hf_tokens_methods.clear()
        self.refresh()
        self._forward.remove()
        del self.module.hf_tokens

    @property
    def additive_mask(self) -> bool:
        """Whether the block's backend adds its mask to the scores."""
        if families.BOOL_MASKS.search(class_name(self.module)):
            return False
        config = self.surgery.stream.config
        backend = config._attn_implementation if "_attn_implementation_internal" in vars(config or object) else None
        return (backend or "").removeprefix(TAPPED_PREFIX) not in ("sdpa", "flex_attention")

    @property
    def drops_cache(self) -> bool:
        """Whether the block throws its cache away: it does when it checkpoints itself."""
        return self.checkpoints_itself and self.module.gradient_checkpointing and self.module.training

    @property
    def checkpointed_outside(self) -> bool:
        """Whether the model checkpoints the call of the block, so that it comes again in the backward pass."""
        return not self.checkpoints_itself and any(vars(m).get("gradient_checkpointing") is True for m in self.surgery.holders)

    def needs_gradient(self, arguments: Iterable[Any]) -> bool:
        """Whether a gradient is wanted of the block's own weights, or of its arguments."""
        of_arguments = any(isinstance(value, Tensor) and value.requires_grad for value in arguments)
        return of_arguments or any(p.requires_grad for name, p in self.module.named_parameters() if not name.startswith("hf_tokens."))

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Switch to these adapters; the others keep still and frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """A stacked LoRA merges every tuner layer; ours has nothing to merge."""

    def unmerge(self) -> None:
        """See `merge`."""

    def scale_layer(self, scale: float) -> None:
        """A LoRA's scale for one call is set in every tuner layer; ours has none."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """See `scale_layer`."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Take the weight that diffusers gives an adapter: a surgery's must be 1, none acts by halves; another adapter's is not for us."""
        if adapter in self.hf_tokens_methods and scale != 1:
            rule = "The weight of an adapter that is a token surgery must be 1"
            remedy = "Give weights to the LoRAs; the knobs of a method set its strength."
            raise UnsupportedError(explain(rule, f"{scale} for {adapter!r}", remedy))

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        like = next((p for name, p in self.module.named_parameters() if p.is_floating_point() and "hf_tokens" not in name), None)
        if like is None or like.is_meta or adapter_name not in self.hf_tokens_methods:
            return
        methods = self.hf_tokens_methods[adapter_name]
        if not any(p.is_meta for p in methods.parameters()):
            buffers = dict(methods.named_buffers())
            methods.to(device or like.device, like.dtype)
            for name, value in methods.named_buffers():  # what a method only looks up keeps its precision
                value.data = buffers[name].to(value.device, torch.promote_types(buffers[name].dtype, value.dtype))

    def train(self, mode: bool = True) -> BlockSurgery:
        """Train or evaluate; a Trainer that does so is found here: it gets the schedule's callback, and its logs what the methods do."""
        for world in self.surgery.model.worlds:
            (world.training_begins if mode else world.evaluation_begins)(self.surgery.model)
        return super().train(mode)
