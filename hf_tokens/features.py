"""Sublayers of a denoiser's block that compute some tokens and take the rest from an earlier step."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from hf_tokens_kernels import attention_columns, attention_entropy
from torch import Tensor, nn

from .anatomy import _attentions, _is_cross
from .errors import UnsupportedError, explain
from .roles import FeatureCache
from .signatures import parameters
from .token_map import take

if TYPE_CHECKING:
    from .layer import BlockSurgery

FROM_FEATURES = {"influence": "attention", "doubt": "cross_attention"}
# Attentions that compute each token from itself and a context, and MLPs that compute each from itself alone.
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
MLPS = ("FeedForward",)
PLAIN = {"group_norm": None, "spatial_norm": None, "norm_cross": None, "residual_connection": False, "fused_projections": False}


@dataclass
class Feature:
    """What a sublayer returned, and how many steps ago each token of it was computed."""

    output: Tensor  # b n d
    age: Tensor  # b n


class Sublayer:
    """One attention or MLP under a feature cache; its module's forward runs through here."""

    def __init__(self, sites: FeatureSites, part: str, module: nn.Module):
        self.sites, self.part, self.module = sites, part, module
        self._before = vars(module).get("forward")
        self.ran: Callable = lambda: None  # the pass that it last ran in
        module.forward = self.run

    def detach(self) -> None:
        """Give the module its own forward back."""
        if self._before is None:
            del self.module.forward
        else:
            self.module.forward = self._before

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that the module had."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @torch.compiler.disable  # hooks that come and go within a call are not heard in a compiled one
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, as the block calls it."""
        method = next(iter(self.sites.acting), None)
        if method is None:
            return self.inner(*args, **kwargs)
        given = {**dict(zip(parameters(type(self.module)), args, strict=False)), **kwargs}
        hidden = given.pop("hidden_states")
        if method.training or torch.is_grad_enabled() and hidden.requires_grad:  # what an earlier step computed has no gradient
            self.sites.count(self.part, hidden.shape[0] * hidden.shape[1])
            return self.inner(hidden, **given)
        self._check()
        store = self.sites.store(method)
        held = store.get(self.part)
        index = None
        if held is not None and held.output.shape[:2] == hidden.shape[:2]:
            index = self._ask(method, hidden, held, store)
        if index is None:
            output = self._whole(method, store, hidden, given)
            store[self.part] = Feature(output, torch.zeros(output.shape[:2], dtype=torch.long, device=output.device))
            return output
        self.sites.count(self.part, index.numel())
        output, age = held.output, held.age + 1
        if index.shape[1]:
            if self.part != "mlp" and given.get("encoder_hidden_states") is None:  # the chosen tokens ask, all of them answer
                given["encoder_hidden_states"] = hidden
            fresh = self.inner(take(hidden, index), **given)
            output = output.scatter(1, index[..., None].expand_as(fresh), fresh)
            age = age.scatter(1, index, 0)
        store[self.part] = Feature(output, age)
        return output

    def _check(self) -> None:
        """Refuse what would make an output stand for other tokens than it did."""
        side = self.sites.side
        now, before = side.runtime.current, self.ran
        self.ran = weakref.ref(now)
        self.sites.check_module(self.part, self.module)  # a pipeline may have given it another processor since
        if any(method.moves_tokens for method in side.active()) or len(self.sites.acting) > 1 or not now.books.untouched:
            rule = "A feature cache stands alone: no other one beside it, and no method that changes the number of tokens"
            raise UnsupportedError(explain(rule, [type(m).__name__ for m in side.active()], "Give them different layers or models."))
        if before() is now:
            rule = "A feature cache needs sublayers that run once a step"
            raise UnsupportedError(explain(rule, f"a second call of the {self.part}", "Do not chunk it (`disable_forward_chunking`)."))

    def _ask(self, method: FeatureCache, hidden: Tensor, held: Feature, store: dict) -> Tensor | None:
        runtime, side = self.sites.side.runtime, self.sites.side
        supply = {
            "hidden": hidden,
            "part": self.part,
            "age": held.age + 1,
            "influence": store.get("influence"),
            "doubt": store.get("doubt"),
            "grid": grid(hidden.shape[1], runtime.inputs["picture"]),
            "layer": side.index,
            "layers": len(runtime.stream),
            "step": runtime.inputs["step"],
            "steps": runtime.inputs["steps"],
            "timestep": runtime.inputs["timestep"],
            "memory": store,
        }
        return getattr(method, method.verb)(**{name: supply[name] for name in method.signals})

    def _whole(self, method: FeatureCache, store: dict, hidden: Tensor, given: dict) -> Tensor:
        self.sites.count(self.part, hidden.shape[0] * hidden.shape[1])
        wanted = [name for name, part in FROM_FEATURES.items() if part == self.part and name in method.signals]
        if not wanted:
            return self.inner(hidden, **given)
        heard: dict[str, Tensor] = {}
        handles = [self._source(letter).register_forward_hook(keep(heard, letter)) for letter in "qk"]
        try:
            output = self.inner(hidden, **given)
        finally:
            for handle in handles:
                handle.remove()
        q, k = (split(heard[letter], self.module.heads) for letter in "qk")
        mask = given.get("attention_mask")
        if mask is not None:
            mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
            mask = mask if mask.shape[0] == len(hidden) else mask.view(len(hidden), -1, *mask.shape[2:])
        if wanted[0] == "influence":
            store["influence"] = attention_columns(q, k, scaling=self.module.scale, mask=mask).mean(dim=1)
        else:
            store["doubt"] = attention_entropy(q, k, scaling=self.module.scale, mask=mask, pooled=True)
        return output

    def _source(self, letter: str) -> nn.Module:
        norm = self.module._modules.get(f"norm_{letter}")
        return norm if norm is not None else self.module.get_submodule(f"to_{letter}")


def keep(heard: dict[str, Tensor], letter: str) -> Callable:
    """A hook that keeps a module's output."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        heard[letter] = output

    return hook


def split(x: Tensor, heads: int) -> Tensor:
    """(b n (h e)) or (b h n e) to (b h n e)."""
    return x if x.dim() == 4 else x.unflatten(-1, (heads, -1)).transpose(1, 2)


@cache
def grid(n: int, picture: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of n tokens that share the picture's shape as nearly as n allows."""
    if picture is None:
        return 1, n
    ratio = picture[1] / picture[0]
    width = min((w for w in range(1, n + 1) if n % w == 0), key=lambda w: abs(math.log(w * w / n / ratio)))
    return n // width, width


class FeatureSites:
    """The sublayers of one block that a FeatureCache may hold."""

    def __init__(self, side: BlockSurgery):
        self.side = side
        self.sublayers: list[Sublayer] = []
        self.acting: list[FeatureCache] = []

    def attach(self) -> None:
        """Take over the block's attentions and its MLP.

        Raises:
            UnsupportedError: The block mixes two sequences in one attention, or is not a diffusers block.
        """
        stream, index = self.side.runtime.stream, self.side.index
        block = stream.blocks[index]
        if stream.context_index(index) is not None or "diffusers" not in type(block).__module__:
            raise UnsupportedError(
                explain(
                    "A feature cache needs blocks of one sequence in a diffusers model",
                    type(block).__name__,
                    "Choose another stream or model.",
                )
            )
        own = stream.attention(index)
        cross = [module for path, module in _attentions(block) if module is not own and _is_cross(path, module)]
        parts = {"attention": own, "cross_attention": cross[0] if cross else None, "mlp": stream.mlp(index)}
        parts = {part: module for part, module in parts.items() if module is not None}
        for part, module in parts.items():
            self.check_module(part, module)
        self.sublayers = [Sublayer(self, part, module) for part, module in parts.items()]

    def check_module(self, part: str, module: nn.Module) -> None:
        """Refuse a sublayer whose tokens cannot be computed one without the other."""
        kind = vars(module).get("processor") if part != "mlp" else module
        plain = all(vars(module).get(name, module._modules.get(name)) == value for name, value in PLAIN.items()) or part == "mlp"
        if type(kind).__name__ not in (MLPS if part == "mlp" else PROCESSORS) or not plain:
            rule = f"A feature cache needs blocks that can compute some tokens alone, with {', '.join((*PROCESSORS, *MLPS))} in them"
            raise UnsupportedError(explain(rule, f"{type(module).__name__} with {type(kind).__name__}", "Choose another model."))

    def detach(self) -> None:
        """Let the sublayers go, and what was kept of them."""
        self.side.runtime.contexts.clear()
        for sublayer in self.sublayers:
            sublayer.detach()
        self.sublayers = []

    def refresh(self, acting: list[FeatureCache]) -> None:
        """Note which feature caches act now."""
        self.acting = acting

    def store(self, method: FeatureCache) -> dict:
        """What was kept for this block and this denoising context."""
        runtime = self.side.runtime
        context = runtime.contexts.setdefault(runtime.inputs["context"], {})
        return context.setdefault((method.key, self.side.index), {})

    def count(self, part: str, tokens: int) -> None:
        """Note the tokens that a sublayer computed."""
        counts = self.side.runtime.counts
        if counts is not None:
            key = (self.side.index, part)
            counts[key] = counts.get(key, 0) + tokens
