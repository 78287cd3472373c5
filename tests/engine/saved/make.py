"""Adapters as a release saves them: one of each role, with a LoRA beside it and stirred, on a tiny model; and what they answer.

python tests/engine/saved/make.py tests/engine/saved/0.2.0   # run once at the release's commit; the test takes every folder that is here
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

import hf_tokens
from hf_tokens import MethodConfig, edit, get_token_model, method_info, route_to, set_progress
from hf_tokens.testing import zoo

NUMBERS = 48  # of each tensor of an answer
TEXT, PICTURE, NOISE = "llama", "vit", "diffusers/PixArtTransformer2DModel"
PROJECTIONS = {TEXT: ["q_proj", "v_proj"], PICTURE: ["q_proj", "v_proj"], NOISE: ["to_q", "to_v"]}


@dataclass(frozen=True)
class Case:
    """A method, the family that it sits in, and what is asked of it."""

    family: str
    config: MethodConfig
    question: str


CASES = [
    Case(TEXT, hf_tokens.DeepPromptConfig(tokens=2), "outputs"),
    Case(TEXT, hf_tokens.DynamicTokenPoolingConfig(layers=(1, 2), hidden=8), "outputs"),
    Case(TEXT, hf_tokens.MoEPlusPlusConfig(constants=1), "outputs"),
    Case(TEXT, hf_tokens.DrLLMConfig(layers=(1, 2), hidden=8), "outputs"),
    Case(TEXT, hf_tokens.MiKVConfig(), "generation"),
    Case(TEXT, hf_tokens.APTConfig(tokens=4), "outputs"),
    Case(NOISE, hf_tokens.CATPruningConfig(), "denoising"),
    Case(PICTURE, hf_tokens.SimPoolConfig(), "outputs"),
    Case(NOISE, hf_tokens.RECEConfig(layers=(1, 2)), "outputs"),
    Case(TEXT, hf_tokens.CAFTConfig(heads=1), "loss"),
    Case(TEXT, hf_tokens.R2RConfig(logits=8, depth=1), "routing"),
]


def base(family: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a family and its inputs, the same ones at every call."""
    specimen = zoo.build(family, seed)
    return specimen.model.requires_grad_(False), specimen.inputs


def outputs(model: Any, inputs: dict[str, Any], family: str) -> list[Tensor]:
    return zoo.tensors(model(**inputs))


def denoising(model: Any, inputs: dict[str, Any], family: str) -> list[Tensor]:
    steps = [{**inputs, "timestep": torch.full_like(inputs["timestep"], time)} for time in (900, 500, 100)]
    return [tensor for step in steps for tensor in outputs(model, step, family)]


def generation(model: Any, inputs: dict[str, Any], family: str, **more: Any) -> list[Tensor]:
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    found = model.generate(**inputs, **length, do_sample=False, output_logits=True, return_dict_in_generate=True, **more)
    return [found.sequences, *found.logits]


def routing(model: Any, inputs: dict[str, Any], family: str) -> list[Tensor]:
    """A generation with another model at hand; a model without a router asks none."""
    if not isinstance(model, PeftModel):
        return generation(model, inputs, family)
    return generation(model, inputs, family, custom_generate=route_to(base(family, seed=1)[0]))


@torch.enable_grad()
def loss(model: Any, inputs: dict[str, Any], family: str) -> list[Tensor]:
    """The loss in the middle of a training, where schedules have left their start."""
    if isinstance(model, PeftModel):
        set_progress(model, 0.5)
    return [model.train()(**inputs, labels=inputs["input_ids"]).loss.detach()]


QUESTIONS: dict[str, Callable[..., list[Tensor]]] = {ask.__name__: ask for ask in (outputs, denoising, generation, routing, loss)}


@torch.no_grad()
def answer(model: Any, family: str, question: str) -> list[Tensor]:
    """Some numbers of each tensor that a model answers with."""
    torch.manual_seed(0)
    found = QUESTIONS[question](model, base(family)[1], family)
    return [t.flatten()[:: max(1, t.numel() // NUMBERS)][:NUMBERS] for t in found]


def attach(case: Case) -> Any:
    """The base with the method and a LoRA in it, all of their parameters away from where they start."""
    model, inputs = base(case.family)
    torch.manual_seed(0)
    model = get_token_model(model, [case.config, LoraConfig(r=2, target_modules=PROJECTIONS[case.family])]).eval()
    if method_info(case.config.method).role == "WeightEdit":
        other = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].flip(0)}
        edit(model, {"erase": [inputs], "anchor": [other]})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def numbers(tensors: Iterable[Tensor]) -> list[list[float]]:
    """Tensors in JSON; nine digits bring back a float32."""
    return [[float(f"{x:.9g}") if isinstance(x, float) else x for x in tensor.tolist()] for tensor in tensors]


def make(folder: Path) -> None:
    for case in CASES:
        path = folder / method_info(case.config.method).role
        model = attach(case)
        model.save_pretrained(path)
        for name in ("README.md", "use_it.py"):  # which no one loads
            (path / name).unlink()
        found = {
            "family": case.family,
            "question": case.question,
            "base": numbers(answer(base(case.family)[0], case.family, case.question)),
            "answer": numbers(answer(model, case.family, case.question)),
        }
        (path / "answer.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
