"""Sublayers of a denoiser's block that compute some tokens and take the rest from an earlier step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from hf_tokens_kernels import attention_columns, attention_entropy
from torch import Tensor, nn

from .anatomy import _attentions, _is_cross
from .errors import UnsupportedError, explain
from .roles import FeatureCache
from .token_map import take

if TYPE_CHECKING:
    from .layer import BlockSurgery

FROM_FEATURES = {"influence": "attention", "doubt": "cross_attention"}


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
        self.heads: dict[str, Tensor] = {}
        self.handles: list = []
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

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, as the block calls it."""
        method = next(iter(self.sites.acting), None)
        if method is None:
            return self.inner(*args, **kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        store = self.sites.store(method)
        held = store.get(self.part)
        index = None
        if held is not None and held.output.shape[:2] == hidden.shape[:2]:
            index = self._ask(method, hidden, held, store)
        if index is None:
            output = self._whole(method, store, hidden, rest, kwargs)
            store[self.part] = Feature(output, torch.zeros(output.shape[:2], dtype=torch.long, device=output.device))
            return output
        self.sites.count(self.part, index.numel())
        output, age = held.output, held.age + 1
        if index.shape[1]:
            if self.part == "attention":  # the chosen tokens ask, all of them answer
                kwargs = {**kwargs, "encoder_hidden_states": hidden}
            fresh = self.inner(take(hidden, index), *rest, **kwargs)
            output = output.scatter(1, index[..., None].expand_as(fresh), fresh)
            age = age.scatter(1, index, 0)
        store[self.part] = Feature(output, age)
        return output

    def _ask(self, method: FeatureCache, hidden: Tensor, held: Feature, store: dict) -> Tensor | None:
        runtime, side = self.sites.side.runtime, self.sites.side
        supply = {
            "hidden": hidden,
            "part": self.part,
            "age": held.age + 1,
            "influence": store.get("influence"),
            "doubt": store.get("doubt"),
            "layer": side.index,
            "layers": len(runtime.stream),
            "step": runtime.inputs["step"],
            "steps": runtime.inputs["steps"],
            "timestep": runtime.inputs["timestep"],
            "memory": store,
        }
        return getattr(method, method.verb)(**{name: supply[name] for name in method.signals})

    def _whole(self, method: FeatureCache, store: dict, hidden: Tensor, rest: tuple, kwargs: dict) -> Tensor:
        self.sites.count(self.part, hidden.shape[0] * hidden.shape[1])
        wanted = [name for name, part in FROM_FEATURES.items() if part == self.part and name in method.signals]
        if not wanted:
            return self.inner(hidden, *rest, **kwargs)
        heard: dict[str, Tensor] = {}
        handles = [self._source(letter).register_forward_hook(keep(heard, letter)) for letter in "qk"]
        try:
            output = self.inner(hidden, *rest, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        q, k = (split(heard[letter], self.module.heads) for letter in "qk")
        measure = attention_columns if wanted[0] == "influence" else attention_entropy
        mask = kwargs.get("attention_mask")
        if mask is not None:
            mask = mask[:, None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
            mask = mask if mask.shape[0] == len(hidden) else mask.view(len(hidden), -1, *mask.shape[2:])
        store[wanted[0]] = measure(q, k, scaling=self.module.scale, mask=mask).mean(dim=1)
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
        self.sublayers = [Sublayer(self, part, module) for part, module in parts.items() if module is not None]

    def detach(self) -> None:
        """Let the sublayers go."""
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
