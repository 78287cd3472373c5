"""What a version of a method is held to: its defaults, where its parameters start, and one example's numbers to six digits.

PYTHONPATH=tests python tests/contract/pins.py            # writes a pin for each method whose newest version has none
PYTHONPATH=tests python tests/contract/pins.py ftp        # for this one alone

A pin that is there is never written over: numbers that change make a new version, and the old one's pin still holds. Where a new release of
Transformers makes other tiny models (`base` differs), delete the files and write them again, without a change of ours in the same commit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from contract.pairs import METHODS, PAIRS, PUBLISHED
from lots import lot
from torch import Tensor, nn

from hf_tokens.roles.config import MethodConfig
from hf_tokens.roles.registry import method_config
from hf_tokens.testing.contract.configs import tiny_config
from hf_tokens.testing.contract.pairs import ContractPair, cast, mildest, planned, refused

FOLDER = Path(__file__).parent / "pins"
DIGITS, TENSORS = 6, 4
SINGLE = ("mixtral",)  # torch multiplies grouped matrices in no double precision
Pin = dict[str, Any]


def read(name: str) -> list[Pin]:
    """The pins of a method, oldest first."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else []


def to_digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def numbers(tensors: Iterable[Tensor]) -> list[float]:
    """Of each of the first tensors one sum, of which each entry has a share of its own."""
    share = lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / t.numel() ** 0.5
    return [to_digits((t.double().nan_to_num(posinf=0, neginf=0) * share(t)).sum().item()) for t in [*tensors][:TENSORS]]


def defaults(config: type[MethodConfig], version: int) -> dict[str, Any]:
    """The defaults that a version has."""
    now = {field.name: field.default for field, _ in config.knobs()}
    return json.loads(json.dumps(now | config.defaults_of(version)))


def starts(model: nn.Module) -> dict[str, list]:
    """Of the adapter's parameters and buffers of each name: how many, the first one's shape, mean and deviation of all."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".hf_tokens." in name:
            found.setdefault(name.rpartition(".hf_tokens.")[2].partition(".")[2], []).append(tensor.detach().double())
    joined = {name: torch.cat([t.flatten() for t in tensors]) for name, tensors in sorted(found.items())}
    spread = {name: [to_digits(t.mean().item()), to_digits(t.std(correction=0).item())] for name, t in joined.items() if len(t)}
    return {name: [len(found[name]), list(found[name][0].shape), *moments] for name, moments in spread.items()}


def outcome(pair: ContractPair, model: nn.Module) -> list[float]:
    """The numbers of what a model puts out, in double precision; of an objective's model its loss."""
    model, inputs = model.double(), cast(pair.inputs, torch.float64)
    return numbers([pair.loss(model.train(), inputs).detach()] if pair.info.role == "Objective" else pair.run(model, inputs))


def example(pair: ContractPair, version: int, config: MethodConfig, size: float) -> dict[str, Any]:
    """Where the parameters of the version's defaults start, and what a config that does something makes of a tiny model."""
    default = tiny_config(pair.info.config, **pair.info.config.defaults_of(version))
    return {
        "starts": starts(pair.attach(config=default, stirred=False)),
        "outputs": outcome(pair, pair.attach(config=config, size=size)),
        "base": outcome(pair, pair.base()),
    }


def home(name: str) -> ContractPair | None:
    """The pair on which a method is pinned; None for one that a door of its own applies."""
    taken = [p for p in PAIRS if p.method == name and p.architecture not in SINGLE and planned(p) is None]
    taken = sorted(taken, key=lambda pair: (len(pair.row.streams), lot(name, pair.architecture)))
    return next((pair for pair in taken if refused(pair) is None), None)


def pin(name: str) -> Pin:
    """A pin of the newest version."""
    info, pair = METHODS[name], home(name)
    made = {"version": info.version, "defaults": defaults(info.config, info.version)}
    if pair is None:
        return made
    config, size = mildest(pair)
    return made | {"architecture": pair.architecture, "config": config.to_dict(), "stir": size} | example(pair, info.version, config, size)


def again(name: str, pinned: Pin) -> Pin:
    """The same pin, made by the code as it is."""
    made = {"version": pinned["version"], "defaults": defaults(METHODS[name].config, pinned["version"])}
    if "architecture" not in pinned:
        return made
    pair, config = ContractPair(name, pinned["architecture"]), method_config(pinned["config"])
    return (
        made | {key: pinned[key] for key in ("architecture", "config", "stir")} | example(pair, pinned["version"], config, pinned["stir"])
    )


def write(names: Iterable[str]) -> None:
    for name in names:
        pins = read(name)
        if METHODS[name].version not in [each["version"] for each in pins]:
            lines = [
                "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in each.items()) + "\n}" for each in [*pins, pin(name)]
            ]
            (FOLDER / f"{name}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")
            print(name, METHODS[name].version)


if __name__ == "__main__":
    write(sys.argv[1:] or PUBLISHED)
