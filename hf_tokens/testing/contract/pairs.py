"""Pairs of a method and an architecture: which ones the engine accepts, the model with the surgery in it, and what it puts out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ...api import get_token_model, set_progress
from ...engine.block import BlockSurgery
from ...engine.model import ModelSurgery
from ...errors import ConfigError, UnsupportedError
from ...handlers.token_scorer import scorers_of
from ...model.anatomy import anatomy
from ...model.streams import Stream
from ...peft.config import HFTokensConfig
from ...peft.placement import plan
from ...roles.config import MethodConfig
from ...roles.registry import MethodInfo, method_info
from ...tools.edits import edit
from ...tools.measure import Cost, measure
from ...tools.model_routing import route_to
from ...tools.prompts import kept_of_ids
from ...tools.surgeries import instances
from ..probe import ProbeInsertConfig
from ..tolerances import differs
from .architectures import ARCHITECTURES, BATCH, PADS, Architecture, Inputs, built, fresh
from .configs import strong, tiny_config, two_blocks
from .parameters import STIRS, base_parameters, stir
from .snapshots import snapshot

# What these signals say of a token does not depend on what comes behind it: a method that asks for no others decides alike with a cache.
LOCAL = {"mask", "fresh", "prefix", "positions", "kind", "layer", "layers", "visual", "memory", "sizes", "progress"}
LOCAL |= {"weights", "context", "fisher", "targets"}  # they are read once, before, or given
MAYBE = {"hidden"}  # a method may look at each token by itself, or at all of them


@cache
def found(architecture: str) -> Any:
    return anatomy(built(architecture)[0])


@dataclass(frozen=True)
class ContractPair:
    """A method on an architecture."""

    method: str
    architecture: str

    @property
    def info(self) -> MethodInfo:
        return method_info(self.method)

    @property
    def row(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.info.cls.prompt_ids(self.info.config.example())

    @property
    def inputs(self) -> Inputs:
        return with_prompt(built(self.architecture)[1], self.prompt)

    @property
    def speaks(self) -> bool:
        """Whether only a generation shows what the method does: a token after the prompt."""
        return self.info.role in ("CacheCompressor", "ModelRouter")

    @property
    def acts_on_text(self) -> bool:
        """Whether the method sits in a causal text stream of a model that generates."""
        return self.row.generates and any(s.kind == "text" and s.causal for s in self.streams())

    def base(self) -> nn.Module:
        return fresh(self.architecture)

    def streams(self) -> list[Stream]:
        """The streams that the method acts on."""
        return [p.stream for p in plan(found(self.architecture), HFTokensConfig(methods=[tiny_config(self.info.config)]))]

    def all_streams(self) -> list[Stream]:
        return found(self.architecture).streams

    @property
    def config(self) -> MethodConfig:
        """The mildest config that changes the model's cost or its outputs."""
        return mildest(self)[0]

    def attach(self, *more: Any, config: MethodConfig | None = None, train=False, stirred=True, size=STIRS[0], **kwargs: Any) -> Any:
        """A fresh base with the surgery in it; the same one at every call."""
        if config is None:
            config, size = mildest(self)
        torch.manual_seed(0)
        model = self.surgery(self.base().train(train), [config, *more], **kwargs)
        return stir(model, size) if stirred else model

    def surgery(self, model: nn.Module, methods: Any, adapter_name: str = "default", **kwargs: Any) -> Any:
        """The methods in a model, ready to act: edits of weights are made, on data from the architecture's inputs."""
        model = get_token_model(model, methods, adapter_name=adapter_name, **kwargs)
        edits = [method for method in instances(model, adapter_name) if method.role == "WeightEdit"]
        if edits:
            names = sorted({name for method in edits for name in (*method.groups, *method.maybe)})
            dtype = next(iter(base_parameters(model).values())).dtype
            edit(model, {name: [cast(self.varied(i), dtype)] for i, name in enumerate(names)}, adapter_name, loss=self.any_loss)
        return model

    def varied(self, i: int) -> Inputs:
        """The inputs of one sample, with noise of their own."""
        generator = torch.Generator().manual_seed(i)
        noisy = lambda value: isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
        one = self.row.alone(self.inputs, i % BATCH)
        return {name: v + 0.1 * torch.randn(v.shape, generator=generator) if noisy(v) else v for name, v in one.items()}

    def any_loss(self, output: Any, batch: Inputs) -> Tensor:
        """A loss that no output can hide from."""
        generator = torch.Generator().manual_seed(2)
        return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in self.row.read(output) if t.requires_grad)

    def stack(self, *more: Any, **kwargs: Any) -> Any:
        """The same with another method and more beside it; without that method where it has to stand alone."""
        try:
            return self.attach(PARTNER, *more, **kwargs)
        except UnsupportedError:
            return self.attach(*more, **kwargs)

    def loss(self, model: nn.Module, inputs: Inputs | None = None) -> Tensor:
        """What a step early in the training would minimise."""
        if isinstance(model, PeftModel):
            set_progress(model, 0.25)
        torch.manual_seed(0)
        return self.row.loss(model, self.inputs if inputs is None else inputs)

    def run(self, model: nn.Module, inputs: Inputs | None = None) -> list[Tensor]:
        """What the model puts out; a model router needs another model for it."""
        inputs = self.inputs if inputs is None else inputs
        operated = self.info.role == "ModelRouter" and any(isinstance(module, BlockSurgery) for module in model.modules())
        more = {"custom_generate": route_to(other(self.architecture))} if operated else {}
        with torch.no_grad():
            outputs = generated(model, inputs, 3, **more) if self.speaks else self.row.run(model, inputs)
        surgery = next((module.surgery.model for module in model.modules() if isinstance(module, BlockSurgery)), None)
        if surgery is not None and scorers_of(surgery):
            return only_of_kept(surgery, inputs, outputs)
        return outputs


def only_of_kept(surgery: ModelSurgery, inputs: Inputs, outputs: list[Tensor]) -> list[Tensor]:
    """What the model puts out for the tokens that its scorer lets stay, and zeros."""
    stays = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, kept in zip(stays, kept_of_ids(surgery, inputs["input_ids"], inputs["attention_mask"]), strict=True):
        row[kept] = True
    return [torch.where(stays[..., None], output, 0) for output in outputs]


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs with their fractions in this precision."""
    return {name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in inputs.items()}


@cache
def other(architecture: str) -> nn.Module:
    """A model of this architecture with weights of its own."""
    model, generator = fresh(architecture), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel(), generator=generator)].view_as(parameter))
    return model


def with_prompt(inputs: Inputs, words: tuple[int, ...]) -> Inputs:
    """The batch with these ids in its text, at the first place where only text stands; the end of `input_ids` may become padding."""
    out = dict(inputs)
    for name, end in (("input_ids", PADS), ("decoder_input_ids", 0)) if words else ():
        if name in out:
            text = (out[name] < 80).all(dim=0)
            fits = (i for i in range(1, len(text) - end - len(words) + 1) if text[i : i + len(words)].all())
            if (i := next(fits, None)) is not None:
                out[name] = out[name].clone()
                out[name][:, i : i + len(words)] = torch.tensor(words)
    return out


def pairs_of(methods: Iterable[str]) -> list[ContractPair]:
    """Each of these methods with each architecture that it may meet; those that doors of their own apply have none."""
    infos = [info for info in map(method_info, methods) if info.cls.placed]
    return [
        ContractPair(info.name, architecture)
        for info in infos
        for architecture, row in ARCHITECTURES.items()
        if not row.headless or info.cls.site == "output"
        if not row.tagger or info.role == "TokenScorer"
    ]


def generated(model: nn.Module, inputs: Inputs, new: int = 4, **more: Any) -> list[Tensor]:
    """The tokens and logits of a greedy generation."""
    given = {name: value for name, value in inputs.items() if name not in ("position_ids", "decoder_input_ids")}
    torch.manual_seed(0)
    with torch.no_grad():
        out = model.generate(
            **given, max_new_tokens=new, min_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True, **more
        )
    return [out.sequences, *(out.logits or ())]


@cache
def planned(pair: ContractPair) -> str | None:
    """Why the engine refuses a pair before it touches the model; None if it does not."""
    try:
        plan(found(pair.architecture), HFTokensConfig(methods=[tiny_config(pair.info.config)]))
    except UnsupportedError as error:
        return str(error)
    return None


def base_run(pair: ContractPair) -> list[Tensor]:
    """What the model puts out without the surgery."""
    return unoperated(pair.architecture, pair.prompt, pair.speaks)[0]


def base_snapshot(pair: ContractPair) -> dict[str, Any]:
    """The model without the surgery, after it ran: some note things at their first call."""
    return unoperated(pair.architecture, pair.prompt, pair.speaks)[1]


@cache
def unoperated(architecture: str, words: tuple[int, ...], speaks: bool) -> tuple[list[Tensor], dict[str, Any]]:
    row, model, inputs = ARCHITECTURES[architecture], fresh(architecture), with_prompt(built(architecture)[1], words)
    with torch.no_grad():
        outputs = generated(model, inputs, 3) if speaks else row.run(model, inputs)
    return outputs, snapshot(model)


@cache
def outputs_with(pair: ContractPair, config: MethodConfig, size: float) -> list[Tensor]:
    """What it puts out with this config and stir."""
    return pair.run(pair.attach(config=config, size=size))


def attached_run(pair: ContractPair) -> list[Tensor]:
    """What it puts out with the surgery as `attach` makes it."""
    return outputs_with(pair, *mildest(pair))


@cache
def start_run(pair: ContractPair) -> list[Tensor]:
    """What it puts out before its parameters are moved."""
    return pair.run(pair.attach(stirred=False))


@cache
def refused(pair: ContractPair) -> str | None:
    """Why the engine refuses a pair when it sees the model or the first inputs; None if it does not."""
    try:
        outputs_with(pair, tiny_config(pair.info.config), STIRS[0])
    except UnsupportedError as error:
        return str(error)
    return None


def simplest(pairs: Iterable[ContractPair], of: Callable[[ContractPair], Hashable]) -> list[ContractPair]:
    """One pair for each value, of a model with few streams that takes its method: for what is too slow to do with each pair."""
    small = sorted((pair for pair in pairs if planned(pair) is None), key=lambda pair: len(pair.row.streams))
    return [*{of(pair): pair for pair in reversed(small)}.values()]


def attempt(pair: ContractPair, config: MethodConfig, size: float) -> bool:
    """Whether it saves something; no where the model lacks blocks that the config names."""
    try:
        return saves(pair, config, size)
    except ConfigError:
        if config.layers is None:
            raise
        return False


@cache
def mildest(pair: ContractPair) -> tuple[MethodConfig, float]:
    """The first config, and stir of the parameters, with which the method does something."""
    tries = itertools.product(STIRS, (two_blocks if pair.info.role == "LayerRouter" else strong)(pair.info.config))
    return next(((config, size) for size, config in tries if attempt(pair, config, size)), (tiny_config(pair.info.config), STIRS[0]))


# role, or site where that says more -> the costs that must fall; a role that is not here adds tokens and must change the outputs, but an
# objective: it changes the loss
FALLS = {
    "TokenReducer": ("tokens", "flops"),
    "TokenRouter": ("tokens", "flops"),
    "LayerRouter": ("tokens", "flops"),
    "CacheCompressor": ("kv_bytes",),
    "FeatureCache": ("flops",),
    "mlp": ("flops",),  # at these sites the block itself carries all its tokens
    "sublayer": ("flops",),
}


def cost(pair: ContractPair, model: nn.Module, inputs: Inputs) -> Cost:
    """The cost of one use of the model: of the last denoising step where there are some; of a sample where each goes its own way."""
    inputs = pair.row.alone(inputs, 0) if pair.info.role == "LayerRouter" else inputs
    calls = pair.row.calls(inputs)
    with torch.no_grad():
        for call in calls[:-1]:
            model(**call)
    more = {"use_cache": True} if pair.acts_on_text else {}
    return measure(model, **calls[-1], **more)


@cache
def base_cost(pair: ContractPair) -> Cost:
    return cost(pair, pair.base(), pair.inputs)


def saves(pair: ContractPair, config: MethodConfig, size: float) -> bool:
    """Whether a method does what its role promises with this config."""
    falls = FALLS.get(pair.info.cls.site, FALLS.get(pair.info.role))
    if falls is None and pair.info.role != "Objective":
        return differs(outputs_with(pair, config, size), base_run(pair))
    model = pair.attach(config=config, size=size)
    if falls is None:
        return differs([pair.loss(model.train()).detach()], [pair.loss(pair.base().train()).detach()])
    before, after = base_cost(pair), cost(pair, model, pair.inputs)
    return all(getattr(after, name) < getattr(before, name) for name in falls)


PARTNER = ProbeInsertConfig(tokens=2)  # another method to stack on, one that every architecture takes
