"""A stream of blocks and the anatomy of a model: what is where, by name and path."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedError
from .parts import Middle, attentions, middle, mlp_and_norm, path_of
from .signatures import HiddenIndex, context_index, hidden_index

PROMPT = "encoder_hidden_states"  # how a denoiser calls the prompt that it is given
PACKED = "n d"  # samples one behind the other in one row
TOKENS_FIRST = "n b d"
SIDE_BY_SIDE = ("b n c d", "b n (c d)", "c b n d")  # parallel residual streams, of which each token has one of each
# layout -> to (b n d), and back, with the model's own tensor for its shape; parallel residual streams (c) count as one token
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "b n d": (lambda x: x, lambda x, raw: x),
    PACKED: (lambda x: x[None], lambda x, raw: x[0]),
    TOKENS_FIRST: (lambda x: x.transpose(0, 1), lambda x, raw: x.transpose(0, 1)),
    "b n c d": (lambda x: x.flatten(2), lambda x, raw: x.unflatten(2, raw.shape[2:])),
    "b n (c d)": (lambda x: x, lambda x, raw: x),
    "(b t) n d": (lambda x: x, lambda x, raw: x),
    "b c n d": (lambda x: x.flatten(0, 1), lambda x, raw: x.unflatten(0, raw.shape[:2])),
    "c b n d": (
        lambda x: x.permute(1, 2, 0, 3).flatten(2),
        lambda x, raw: x.unflatten(2, (raw.shape[0], raw.shape[3])).permute(2, 0, 1, 3),
    ),
}


def axes(layout: str) -> int:
    """The number of axes of a layout."""
    return len(re.sub(r"\(.*?\)", "x", layout).split())


def rebuilt(output: Any, items: tuple) -> Any:
    """A tuple or a list, one with named fields too, with other items."""
    return type(output)(items) if type(output) in (tuple, list) else type(output)(*items)


def first_of(output: Any) -> Any:
    """What a module returns, or the first of several things."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first(output: Any, first: Any) -> Any:
    """The same with something else in its place."""
    return rebuilt(output, (first, *output[1:])) if isinstance(output, (tuple, list)) else first


@dataclass(frozen=True, eq=False)
class Stream:
    """One sequence of residual blocks; `paths` are relative to the unwrapped model.

    `layout` is how the blocks hold their hidden states: "b n d" nearly everywhere, "n d" where the samples are packed into one row.
    `final_norm` is the norm behind the blocks that takes every token, None where there is none.
    A mixer is "attention", "cross" (a block that attends to another sequence only) or "other" (a state space, a convolution, an MLP).
    `table` is the path of the module that looks up the embeddings of a text stream's tokens; None where there is none of its own."""

    name: str
    kind: str
    blocks: tuple[nn.Module, ...] = field(repr=False)
    paths: tuple[str, ...] = field(repr=False)
    owner: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    layout: str
    mixers: tuple[str, ...] = field(repr=False)
    config: Any = field(repr=False)
    final_norm: nn.Module | None = field(repr=False)
    table: str | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    def attention(self, i: int) -> nn.Module | None:
        """The self-attention of block i: the module that calls the attention function."""
        return next(iter(attentions(self.blocks[i])), None)

    def mlp(self, i: int) -> nn.Module | None:
        return mlp_and_norm(self.blocks[i])[0]

    def mlp_norm(self, i: int) -> nn.Module | None:
        """The norm between the residual stream and the MLP; None in post-norm and in parallel blocks."""
        norm, (first, _, behind) = mlp_and_norm(self.blocks[i])[1], self.middle(i)
        return first if norm is not None and behind is None else None

    def middle(self, i: int) -> Middle:
        """Where the MLP of block i begins, what returns what it adds to the residual, and the norm that reads the sum; None for none."""
        return middle(self.blocks[i])

    def hidden_index(self, i: int = 0) -> HiddenIndex:
        return hidden_index(type(self.blocks[i]))

    def context_index(self, i: int = 0) -> HiddenIndex | None:
        """The same for the second sequence that a joint block carries along (the text of an MM-DiT); None where there is none."""
        return context_index(type(self.blocks[i]))

    def bind(self, i: int, args: tuple, kwargs: dict) -> Tensor:
        """The hidden states among the arguments of a call of block i."""
        return self.hidden_index(i).pick(args, kwargs)

    def bind_context(self, i: int, args: tuple, kwargs: dict) -> Tensor | None:
        """The second sequence among the arguments of a call of block i; None where it carries none along."""
        index = self.context_index(i)
        return None if index is None else index.pick(args, kwargs)

    def read(self, i: int, output: Any) -> Tensor:
        """The hidden states in what block i returned."""
        return output if isinstance(output, Tensor) else output[self.hidden_index(i).returned]

    def write(self, i: int, output: Any, hidden: Tensor) -> Any:
        """What block i returned, with other hidden states in it."""
        if isinstance(output, Tensor):
            return hidden
        at = self.hidden_index(i).returned
        return rebuilt(output, (*output[:at], hidden, *output[at + 1 :]))


@dataclass(frozen=True, eq=False)
class Anatomy:
    model: nn.Module = field(repr=False)
    model_type: str
    streams: tuple[Stream, ...]
    head: str | None
    embeddings: str | None

    def stream(self, name: str) -> Stream:
        for stream in self.streams:
            if stream.name == name:
                return stream
        raise UnsupportedError(f"{self.model_type} has no stream {name!r}. Its streams: {', '.join(s.name for s in self.streams)}.")

    def __str__(self) -> str:
        lines = [f"{type(self.model).__name__} ({self.model_type})", f"  embeddings  {self.embeddings or '-'}"]
        for s in self.streams:
            shape = f"width {s.width}, heads {s.heads}" + (f" (kv {s.kv_heads})" if s.kv_heads != s.heads else "") + f" of {s.head_dim}"
            causal = "causal" if s.causal else "bidirectional"
            mixers = ", ".join(f"{n} {mixer}" for mixer, n in Counter(s.mixers).items())
            lines.append(f"  {s.name}: {len(s)} x {type(s.blocks[0]).__name__} in {s.owner or '(root)'}")
            lines.append(f"    {s.kind}, {causal}, {shape}, {s.layout}; {mixers}")
            lines.append(f"    {s.paths[0]} .. {s.paths[-1]}")
            for label, module in (("attention", s.attention(0)), ("mlp", s.mlp(0)), ("mlp norm", s.mlp_norm(0))):
                if module is not None:
                    lines.append(f"    {label:<10}{path_of(module, s.blocks[0])} ({type(module).__name__})")
            if s.final_norm is not None:
                lines.append(f"    final norm  {path_of(s.final_norm, self.model)} ({type(s.final_norm).__name__})")
        lines.append(f"  head  {self.head or '-'}")
        return "\n".join(lines)
