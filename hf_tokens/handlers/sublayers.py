"""The sublayers of a denoiser's block: forwards that run through ours, on merged tokens, or on those that a feature cache chooses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.block import BlockSurgery
from ..engine.hooks import BoundForward
from ..engine.run import Site
from ..engine.supply import ask
from ..engine.trial import run_or_refuse
from ..errors import UnsupportedError, explain
from ..model.arguments import realign, token_form
from ..model.parts import cross_attentions
from ..model.pipelines import storing_processors
from ..model.signatures import bound_arguments, parameters
from ..model.streams import first_of, with_first
from ..roles.token_reducer import TokenReducer
from ..tokens.ledger import TokenLedger
from ..tokens.token_map import TokenMap

# Attentions that compute each token from itself and a context, and MLPs that compute each from itself alone.
PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "IPAdapterAttnProcessor", "IPAdapterAttnProcessor2_0")
ON_PICTURE = "ip_adapter_masks"  # what a cross-attention is given for each place of the picture, and lays over its tokens by their number
JOINT = ("JointAttnProcessor2_0",)  # the same beside a second sequence, whose tokens have queries and keys too
TOKENWISE_MLPS = ("FeedForward",)
WHOLE = "Choose another model, or a method that reuses whole blocks."
OF_CONTEXT = re.compile(r"^(encoder|key)|mask")  # what a cross-attention is given of the sequence that it reads
PLAIN_ATTENTION = {"group_norm": None, "spatial_norm": None, "norm_cross": None, "residual_connection": False, "fused_projections": False}


def refuse_stored(methods: list[str], blocks: Iterable[nn.Module]) -> None:
    """Refuse blocks whose attention a pipeline keeps and reads as if all tokens were computed in each call."""
    if processors := storing_processors(blocks):
        rule = "Where tokens of a block join, vanish or are reused, no pipeline reads its attention"
        raise UnsupportedError(explain(rule, [*methods, *processors], "Choose other layers or another pipeline, or disable the adapter."))


class Sublayer(BoundForward):
    """One attention or MLP of a block."""

    def __init__(self, block: BlockSurgery, part: str, module: nn.Module):
        super().__init__(module)
        self.block, self.part = block, part

    @torch.compiler.disable  # hooks that come and go within a call do not run in a compiled one
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward, as the block calls it."""
        for handler, method in self.block.plan.always.of("sublayer"):
            if handler.takes_sublayer(method, self):
                arguments = bound_arguments(self.module, args, kwargs)
                return handler.sublayer(method, self, arguments.pop("hidden_states"), arguments)
        return self.inner(*args, **kwargs)

    def count(self, tokens: int) -> None:
        """Note the tokens that it computed."""
        self.block.surgery.count(self.block, tokens, self.part)


class Sublayers:
    """The sublayers of a block, as far as methods act on them."""

    def __init__(self, block: BlockSurgery):
        self.block = block
        self.known: dict[str, Sublayer] = {}
        self.unfit: dict[str, str] = {}  # sublayers that cannot run on merged tokens, and their classes

    def parts(self) -> dict[str, nn.Module]:
        """The block's self-attention, cross-attention and MLP, as far as it has them."""
        stream, index = self.block.surgery.stream, self.block.index
        own = stream.attention(index)
        cross = [module for _, module in cross_attentions(stream.blocks[index])]
        parts = {"attention": own, "cross_attention": cross[0] if cross else None, "mlp": stream.mlp(index)}
        return {part: module for part, module in parts.items() if module is not None}

    @property
    def joint(self) -> bool:
        """Whether the block carries a second sequence along."""
        return self.block.surgery.stream.context_index(self.block.index) is not None

    def attach(self, site: str) -> list[Sublayer]:
        """Take over what a method of this site needs: `block` and `sublayer` of a feature cache, `merge` of a reducer. What is no block of
        diffusers is refused, and one whose tokens cannot be computed one without the other."""
        module, parts = self.block.module, self.parts()
        if "diffusers" not in type(module).__module__:
            rule = "What is kept or merged in a sublayer needs the blocks of a diffusers model"
            raise UnsupportedError(explain(rule, type(module).__name__, "Choose another stream or model."))
        if site == "block":
            parts = {part: module for part, module in parts.items() if part == "attention"}
        elif site == "merge":
            self.unfit = {part: type(module).__name__ for part, module in parts.items() if not merges(part, module)}
            parts = {part: module for part, module in parts.items() if part not in self.unfit}
            if "attention" not in parts or self.block.surgery.stream.causal:
                rule = "Tokens are merged in front of an attention that gets them as `hidden_states`, and where each token sees all"
                raise UnsupportedError(explain(rule, type(module).__name__, "Choose another stream or model."))
        elif not {"attention", "mlp"} <= parts.keys():
            rule = "A feature cache of sublayers needs blocks with an attention and an MLP of their own"
            raise UnsupportedError(explain(rule, type(module).__name__, WHOLE))
        else:
            for part, sublayer in parts.items():
                self.check_module(part, sublayer)
        new = {part: Sublayer(self.block, part, module) for part, module in parts.items() if part not in self.known}
        self.known |= new
        return [*new.values()]

    def check_module(self, part: str, module: nn.Module) -> None:
        """Refuse a sublayer whose tokens cannot be computed one without the other."""
        kind = vars(module).get("processor", module._modules.get("processor")) if part != "mlp" else module
        known = TOKENWISE_MLPS if part == "mlp" else JOINT if self.joint else PROCESSORS
        settings = {name: vars(module).get(name, module._modules.get(name)) for name in PLAIN_ATTENTION}
        if type(kind).__name__ not in known or part != "mlp" and settings != PLAIN_ATTENTION:
            names = ", ".join((*PROCESSORS, *JOINT, *TOKENWISE_MLPS))
            rule = f"A feature cache needs blocks that can compute some tokens alone, with {names} in them"
            raise UnsupportedError(explain(rule, f"{type(module).__name__} with {type(kind).__name__}", WHOLE))

    def assign(self, reducer: TokenReducer, site: Site, hidden: Tensor) -> TokenMap | None:
        """The map of a block's tokens, made once a call: in front of the first sublayer that runs on merged tokens."""
        if id(reducer) not in site.within:
            if unfit := sorted(self.unfit[part] for part in reducer.parts if part in self.unfit):
                rule = f"Sublayers that run on merged tokens get them as `hidden_states`, and an MLP among them is one of {TOKENWISE_MLPS}"
                raise UnsupportedError(explain(rule, unfit, "Leave this sublayer out, or choose another model."))
            with torch.no_grad():
                tokens = ask(reducer, site.inside(hidden, routed=None))
            if tokens is not None and tokens.filled is not None:
                rule = "Tokens that are merged in front of a sublayer must leave as many in each sample"
                raise UnsupportedError(explain(rule, "rows of different lengths", "Run one sample at a time."))
            site.within[id(reducer)] = tokens
        return site.within[id(reducer)]


def refuse_on_picture(part: str, arguments: dict[str, Any]) -> None:
    """Refuse masks over the picture for an attention that gets some of its tokens."""
    if part == "cross_attention" and arguments.get(ON_PICTURE) is not None:
        rule = "A cross-attention that runs on some of the tokens has no mask over the picture"
        raise UnsupportedError(explain(rule, f"`{ON_PICTURE}`", "Leave it out, or disable the adapter."))


def merges(part: str, module: nn.Module) -> bool:
    """Whether a sublayer can run on merged tokens: an MLP must compute each one alone."""
    return "hidden_states" in parameters(type(module)) and (part != "mlp" or type(module).__name__ in TOKENWISE_MLPS)


def run_merged(reducer: TokenReducer, sublayer: Sublayer, hidden: Tensor, arguments: dict[str, Any]) -> Any:
    """Run a sublayer on merged tokens, and give each token what its slot got."""
    site, block = sublayer.block.tap.site, sublayer.block
    front = hidden.shape[1] - site.local.m if hidden.dim() == 3 else -1  # where a second sequence is in the same tensor
    if front not in (0, site.local.context) or len(hidden) != site.local.batch:
        rule = "Tokens are merged in front of a sublayer that gets those of its block, as (batch, tokens, features)"
        wanted = f"{site.local.batch} x {site.local.m} tokens"
        got = f"{tuple(hidden.shape)} at {type(sublayer.module).__name__} where the block has {wanted}"
        raise UnsupportedError(explain(rule, got, "Choose other layers or another model."))
    behind, front = (front, 0) if site.local.behind else (0, front)
    own = hidden[:, front : hidden.shape[1] - behind]
    tokens = block.state(Sublayers).assign(reducer, site, own)
    if tokens is None:
        sublayer.count(hidden.shape[0] * hidden.shape[1])
        return sublayer.inner(hidden, **arguments)
    mapped = tokens.apply(own, site.local.sizes)
    mapped = torch.cat([hidden[:, :front], mapped, hidden[:, front + tokens.n :]], dim=1) if front or behind else mapped
    whole = tokens.beside(front, behind)
    sublayer.count(mapped.shape[0] * mapped.shape[1])
    if block.surgery.heard:
        block.surgery.acted(block, reducer, len(hidden) * tokens.m, len(hidden) * tokens.n)
    output = run_short(sublayer, mapped, whole, hidden, arguments)
    return with_first(output, whole.slots.unmerge(first_of(output)))


def run_short(sublayer: Sublayer, mapped: Tensor, tokens: TokenMap, hidden: Tensor, arguments: dict[str, Any]) -> Any:
    """A sublayer on merged tokens, its masks and tables cut to fit."""
    refuse_on_picture(sublayer.part, arguments)
    itself = [name for name, value in arguments.items() if value is hidden]  # some name their own tokens as the context
    context = None if sublayer.part != "attention" else arguments.get("encoder_hidden_states")
    length = 0 if context is None or "encoder_hidden_states" in itself else context.shape[1]
    foreign = {name: value for name, value in arguments.items() if sublayer.part != "attention" and OF_CONTEXT.search(name)}
    own = {name: value for name, value in arguments.items() if name not in (*foreign, *itself)}
    if all(value is None or type(value) in (bool, float, str) for value in own.values()):  # nothing to cut
        return run_checked(sublayer, mapped, arguments | dict.fromkeys(itself, mapped), hidden, arguments)
    open_ledger = partial(TokenLedger.open, start=0, causal=False, context=length, behind=sublayer.block.tap.site.local.behind)
    ledger = open_ledger(hidden).move(tokens)
    if not any(all_share(name, value, ledger) for name, value in own.items()) or ledger.uniform():
        cut = {name: realign(ledger, name, value, None) for name, value in own.items()}
        return run_checked(sublayer, mapped, foreign | cut | dict.fromkeys(itself, mapped), hidden, arguments)
    outputs = []
    for i in range(len(hidden)):  # a table that all samples share can be cut for one of them at a time
        ledger_of_one, x = open_ledger(hidden[i : i + 1]).move(tokens.row(i)), mapped[i : i + 1]
        cut = {name: realign(ledger_of_one, name, of_sample(name, value, i, ledger), None) for name, value in own.items()}
        beside = {name: of_sample(name, value, i, ledger) for name, value in foreign.items()}
        outputs.append(run_checked(sublayer, x, beside | cut | dict.fromkeys(itself, x), hidden, arguments))
    return tuple(map(torch.cat, zip(*outputs, strict=True))) if isinstance(outputs[0], tuple) else torch.cat(outputs)


def run_checked(sublayer: Sublayer, mapped: Tensor, cut: dict[str, Any], hidden: Tensor, arguments: dict[str, Any]) -> Any:
    """A sublayer on another number of tokens than the model gave, which were `hidden` with these `arguments`."""
    rule = "The sublayers of a block must run on another number of tokens than the model gave"
    words = (rule, type(sublayer.module).__name__, "Choose other layers or another model.")
    run = partial(sublayer.inner, mapped, **cut)
    output = run_or_refuse(run, sublayer.module, ((hidden,), arguments), ((mapped,), cut), words)
    first = first_of(output)
    if first.shape[:2] != mapped.shape[:2]:
        rule = "A sublayer must return as many tokens as it got"
        raise UnsupportedError(explain(rule, f"{tuple(mapped.shape)} in and {tuple(first.shape)} out", "Choose other layers."))
    return output


def all_share(name: str, value: Any, ledger: TokenLedger) -> bool:
    """Whether an argument holds a table over the tokens that all samples share."""
    if isinstance(value, (tuple, list)):
        return any(all_share(name, item, ledger) for item in value)
    if isinstance(value, dict):
        return any(all_share(key, item, ledger) for key, item in value.items())
    return isinstance(value, Tensor) and "mask" not in name and (token_form(ledger, name, value) or "b")[0] == "n"


def of_sample(name: str, value: Any, i: int, ledger: TokenLedger) -> Any:
    """Sample i of an argument."""
    if isinstance(value, (tuple, list)):
        return type(value)(of_sample(name, item, i, ledger) for item in value)
    if isinstance(value, dict):
        return {key: of_sample(key, item, i, ledger) for key, item in value.items()}
    batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == ledger.batch
    return value[i : i + 1] if batched and not all_share(name, value, ledger) else value
