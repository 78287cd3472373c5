"""Routers: which tokens run a block or its MLP, how often a sample runs a block, and which of two models emits a token."""

from __future__ import annotations

import functools
from typing import Any

import torch
from hf_tokens_kernels import routed_gather, routed_scatter
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.handler import Handler, handles
from ..engine.hooks import BoundForward, own_mlp
from ..engine.results import ModelCall, in_backward
from ..engine.run import Site
from ..engine.supply import ask
from ..errors import UnsupportedError, explain
from ..model import families
from ..model.classes import class_name
from ..model.signatures import bound_arguments
from ..roles.routers import LayerRouter, ModelRouter, TokenRouter


@handles("TokenRouter")
class TokenRouterHandler(Handler):
    def phases(self, method: TokenRouter) -> tuple[str, ...]:
        return ("gate",) if method.site == "block" else ("mlp",)

    def hooks(self, method: TokenRouter) -> set[str]:
        return {"routed_mlp"} if method.site == "mlp" else set()

    def attach(self, hook: str, block: BlockSurgery) -> list[Any]:
        return [RoutedMlp(block, own_mlp(block))]

    def gate(self, method: TokenRouter, site: Site) -> list[Tensor] | None:
        gate = ask(method, site)
        if gate is not None:
            tell_run(method, site, gate)
        return None if gate is None else [gate]


@handles("LayerRouter")
class LayerRouterHandler(Handler):
    def phases(self, method: LayerRouter) -> tuple[str, ...]:
        return ("gate",)

    def gate(self, method: LayerRouter, site: Site) -> list[Tensor] | None:
        gate = ask(method, site)  # (b), or (b r) for several runs
        if gate is None:
            return None
        tell_run(method, site, gate)
        return [of_run[:, None].expand_as(site.run.ledger.rows) for of_run in gate.reshape(len(gate), -1).unbind(1)]


@handles("ModelRouter")
class ModelRouterHandler(Handler):
    """What the engine does for model routers: they are called once the head has returned."""

    def after_head(self, call: ModelCall, hidden: Tensor | None, output: Tensor) -> Tensor:
        call.model.put_verdict(None)
        routers = [method for method in call.model.methods() if isinstance(method, ModelRouter)]
        if not routers or not isinstance(hidden, Tensor) or not isinstance(output, Tensor) or output.dim() != 3:
            return output
        hidden, logits = hidden.detach(), output.detach()
        supply = {
            "hidden": lambda: hidden,
            "logits": lambda: logits,
            "predicted": lambda: call.model.base.get_input_embeddings()(logits.argmax(dim=-1)).detach(),
            "targets": lambda: call.context.targets,
        }
        signals = {router: {name: supply[name]() for name in router.signals} for router in routers}
        verdicts = [router.at_hand(functools.partial(router.route, **signals[router])) for router in routers]
        call.model.put_verdict(torch.stack(verdicts).any(dim=0))
        return output


def tell_run(method: TokenRouter | LayerRouter, site: Site, gate: Tensor) -> None:
    """Tell the listeners how many of the tokens, or of the samples' runs, a gate lets through."""
    if site.surgery.heard:
        site.surgery.acted(site.block, method, (gate != 0).sum(), gate.numel())


class RoutedMlp(BoundForward):
    """An MLP that computes the tokens that its routers choose; the others get what the routers add, or nothing."""

    def __init__(self, block: BlockSurgery, module: nn.Module):
        mixes = any(max(m.kernel_size) > 1 for m in module.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d)))
        layout = block.surgery.stream.layout
        if mixes or families.MIXING_MLPS.search(class_name(module)) or layout != "b n d":
            rule = "A router of an MLP needs one that computes each token from itself alone, and tokens that lie as 'b n d'"
            got = f"{type(module).__name__} at {block.path}, with {layout!r}"
            raise UnsupportedError(explain(rule, got, "Choose other layers or another model."))
        self.block = block
        super().__init__(module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, as the block calls it."""
        routers = [method for _, method in self.block.called_inside("mlp")]
        if not routers:
            return self.inner(*args, **kwargs)
        x, *others = bound_arguments(self.module, args, kwargs).values()
        local = self.block.tap.site.local
        if any(isinstance(other, Tensor) for other in others) or x.shape[:2] != (local.batch, local.m):
            rule = "A router of an MLP needs one that is called once a block, with all its tokens and nothing else"
            got = f"{type(self.module).__name__} called with {[tuple(t.shape) for t in (x, *others) if isinstance(t, Tensor)]}"
            raise UnsupportedError(explain(rule, got, "Do not chunk it (`disable_forward_chunking`), or choose another model."))
        gate, extra = self._ask(routers, x)
        return self._compute(x, gate, extra, local.flags(local.filled, True))

    def _ask(self, routers: list[TokenRouter], x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of each token (b m d) that the block runs on: the gate (b m), and what is added (b m d)."""
        site, routes = self.block.tap.site, []
        with site.run.memory.among(site.maps, site.tokens):
            inside = site.inside(x)
            for router in routers:
                route = ask(router, inside)
                if route is not None:
                    routes.append(route if isinstance(route, tuple) else (route, None))
                    tell_run(router, site, routes[-1][0])
            self._refuse_reentrant(site.tokens, site.run.memory.tokens)
        extras = [extra for _, extra in routes if extra is not None]
        gates = [x.new_ones(x.shape[:2]), *(gate for gate, _ in routes)]
        return functools.reduce(torch.mul, gates), sum(extras) if extras else None

    @staticmethod
    def _refuse_reentrant(before: dict[str, Tensor], now: dict[str, Tensor]) -> None:
        """What a block gets from the one before has no graph, if its checkpoint runs it without one at first."""
        cut = [name for name, value in before.items() if now[name].requires_grad and not value.requires_grad]
        if cut and in_backward():
            rule = "Routers that hear from one another in training need checkpoints that keep the graph between blocks"
            raise UnsupportedError(explain(rule, "reentrant checkpointing", "Use non-reentrant checkpointing."))

    def _compute(self, x: Tensor, gate: Tensor, extra: Tensor | None, filled: Tensor) -> Tensor:
        """What the MLP returns for the tokens with a gate, times that, and zeros for the others; and what is added."""
        runs = (gate != 0) & filled
        chosen = int(runs.sum())
        self.block.surgery.count(self.block, chosen, "mlp")
        if chosen == runs.numel():
            y = self._plain(self.inner(x))
            y = gate[..., None].to(y.dtype) * y
            return y if extra is None else y + extra.to(y.dtype)
        if chosen == 0:
            return torch.zeros_like(x) if extra is None else extra.to(x.dtype)
        index = runs.view(1, -1).nonzero()[None, :, 1]  # of all rows behind each other
        y = self._plain(self.inner(routed_gather(x.flatten(0, 1)[None], index)))
        rest = y.new_zeros(*x.shape[:2], y.shape[2]) if extra is None else extra.to(y.dtype)
        return routed_scatter(rest.flatten(0, 1)[None], y, index, gate.reshape(1, -1).gather(1, index), residual=True).view_as(rest)

    def _plain(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        rule = "A router of an MLP needs one that returns its tokens and nothing else"
        raise UnsupportedError(explain(rule, type(self.module).__name__, "Choose other layers or another model."))
