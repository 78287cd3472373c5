"""The hooks of a block: forwards that run through ours, and what its parts compute, noted for the methods."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import UnsupportedError, explain
from ..model.layouts import PACKERS
from ..model.signatures import bound_arguments, parameters, positional
from ..model.streams import TOKENS_FIRST, first_of
from ..roles.base import Method
from ..roles.signals import HOOKED, TURNED

if TYPE_CHECKING:
    from .block import BlockSurgery
    from .model import ModelSurgery


class BoundForward:
    """Stands on a module's instance as its forward, `run`, or as another method of it, until it is taken off."""

    name = "forward"

    def __init__(self, module: nn.Module):
        self.module = module
        self._before = vars(module).get(self.name)
        setattr(module, self.name, self.stand_in)

    @property
    def stand_in(self) -> Callable:
        return self.run

    def remove(self) -> None:
        """Give the module its own forward back, also to a hook of Accelerate's that stands around ours since."""
        if self.name == "forward" and vars(self.module).get("_old_forward") == self.stand_in:
            self.module._old_forward = self._before or type(self.module).forward.__get__(self.module)
        if vars(self.module).get(self.name) != self.stand_in:
            return
        if self._before is None:
            delattr(self.module, self.name)
        else:
            setattr(self.module, self.name, self._before)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the module had."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return getattr(type(self.module), self.name)(self.module, *args, **kwargs)


class SignedForward(BoundForward):
    """A bound forward that is called itself and has the signature that there was: a method of ours would not show it."""

    def __init__(self, module: nn.Module):
        super().__init__(module)
        self.__signature__ = inspect.signature(self._before or getattr(type(module), self.name).__get__(module))

    @property
    def stand_in(self) -> Callable:
        return self

    @property
    def __code__(self) -> CodeType:
        """The code of the forward that stood here: `torch.export` names inputs by where that is written."""
        return (self._before or getattr(type(self.module), self.name)).__code__


class LayoutForward(SignedForward):
    """A method of the module that holds the vision tower, which lays out what the tower has returned: how is noted."""

    def __init__(self, model: ModelSurgery, holder: nn.Module, name: str):
        self.model, self.name = model, name
        super().__init__(holder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if not self.model.teaching:
            given, config = self.__signature__.bind(*args, **kwargs).arguments, self.model.base.config
            self.model.seen.lay(lambda tile: PACKERS[self.name](self.inner, given, tile, config))
        return output


class SharedHook:
    """A function of a surgery as a hook. A copy of the module alone (PEFT makes one for `modules_to_save`) keeps the surgery; a model's has
    its own."""

    def __init__(self, owner: Any, function: Callable):
        self.owner, self.function = owner, function

    def __call__(self, *args: Any) -> Any:
        return self.function(self.owner, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> SharedHook:
        return SharedHook(copy.deepcopy(self.owner, memo) if id(self.owner.base) in memo else self.owner, self.function)


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Let hooks work for a while: they are removed behind it."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def lacks(block: BlockSurgery, what: str, or_else: str = "") -> UnsupportedError:
    """The error for a block without something that a method needs, and what else may be chosen."""
    got, remedy = f"{type(block.module).__name__} at {block.path}", f"Choose other layers or another model{or_else}."
    return UnsupportedError(explain(f"This method needs {what} in the block", got, remedy))


def own_attention(block: BlockSurgery) -> nn.Module:
    """The self-attention of a block; refused where it has none."""
    if block.attention is None:
        raise lacks(block, "a self-attention module")
    return block.attention


def way_to(top: nn.Module, inner: nn.Module) -> tuple[tuple[nn.Module, str, nn.Module], ...]:
    """The steps from a module to one inside of it: owner, name and part."""
    path, way = next(path for path, module in top.named_modules() if module is inner), []
    for name in path.split(".") if path else ():
        part = top._modules[name]
        way.append((top, name, part))
        top = part
    return tuple(way)


def own_mlp(block: BlockSurgery) -> nn.Module:
    """The MLP of a block; refused where it has none."""
    mlp = block.surgery.stream.mlp(block.index)
    if mlp is None:
        raise lacks(block, "an MLP of its own")
    return mlp


def check_in_rows(block: BlockSurgery) -> None:
    """Refuse tokens that do not stand in rows."""
    if block.surgery.stream.layout != "b n d":
        raise lacks(block, f"tokens that lie as 'b n d', and not as {block.surgery.stream.layout!r},")


class SignalHooks:
    """What the parts of one block got and returned in its last call, as far as a method names it."""

    def __init__(self, block: BlockSurgery):
        self.block = block
        self.captured: dict[str, Tensor] = {}
        self.wanted: set[str] = set()

    @staticmethod
    def needs(method: Method) -> set[str]:
        """The hooks that the signals of a method need."""
        names = method.asks
        return {HOOKED[name] for name in names if name in HOOKED} | ({"picture"} if "grid" in names else set()) | ({TURNED} & names)

    def refresh(self, methods: list[Method]) -> None:
        """Note which of the signals the methods name."""
        self.wanted = {name for method in methods for name in method.asks if name in HOOKED}

    def attach(self, hook: str) -> list[Any] | None:
        """Hang a hook for signals on the block; None if it is another kind of hook."""
        layout = self.block.surgery.stream.layout
        if hook in HOOKED.values() and layout == TOKENS_FIRST:
            raise lacks(self.block, f"the tokens of a sample one behind the other, and not {layout!r},")
        if hook in ("attention", "mlp"):
            module = own_attention(self.block) if hook == "attention" else own_mlp(self.block)
            return [module.register_forward_hook(partial(self._note, hook), with_kwargs=True)]
        if hook == "attended":
            inside = {id(module) for module in own_attention(self.block).modules()}
            norms = [m for m in self.block.module.modules() if "norm" in type(m).__name__.lower() and id(m) not in inside]
            after = [norm.register_forward_hook(self._note_norm, with_kwargs=True) for norm in norms]
            return [self.block.attention.register_forward_hook(self._note_update), *after]
        if hook == "picture":
            readers = [module for module in self.block.surgery.holders if "pixel_values" in parameters(type(module))]
            return [module.register_forward_pre_hook(self._note_picture, with_kwargs=True) for module in readers]
        return None

    def _note(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if f"{name}_input" in self.wanted or f"{name}_output" in self.wanted:
            self.captured[f"{name}_input"] = args[0] if args else kwargs[positional(type(module))[0]]
            self.captured[f"{name}_output"] = first_of(output)

    def _note_update(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.captured.pop("attended", None)
        self.captured["update"] = first_of(output)

    def _note_norm(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """The first norm behind the attention reads the residual, or what is to be added to it."""
        update, x = self.captured.get("update"), args[0] if args else next(iter(kwargs.values()))
        if update is None or "attended" in self.captured:
            return
        if x is update:
            self.captured["update"] = output
        elif x.numel() == update.numel():
            self.captured["attended"] = x.view_as(update)  # OPT's norms read all rows as one
        else:
            raise lacks(self.block, "one residual, which the norm behind its attention reads,")

    def _note_picture(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = bound_arguments(module, args, kwargs).get("pixel_values")
        self.block.surgery.call.see_picture(tuple(pixels.shape[-2:]) if isinstance(pixels, Tensor) and pixels.dim() == 4 else None)
