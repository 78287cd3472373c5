"""How an adapter is saved: its config is written whole, with a digest of the tensors beside it; what a killed save left there goes.

The tensors and the config are two files. The config is announced before the tensors take their place, and takes its own behind them:
whenever a save is killed, one of the two configs has the digest of the tensors that are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

PEFT_PREFIX = "base_model.model."  # how a file calls what is in the base
OURS = ".tmp-adapter-"  # how our temporary folders begin
ANNOUNCED = f"{OURS}announced"  # holds the config of tensors that are being written
OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # how safetensors calls a file that it writes


def has_bytes(tensor: object) -> bool:
    """Whether it is a tensor whose numbers are all here."""
    return isinstance(tensor, Tensor) and not tensor.is_meta and not is_traceable_wrapper_subclass(tensor)


def hash_of(tensor: Tensor) -> str:
    """The hash of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).hexdigest()


def mark_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """What a tensor is known by while a save is under way; None for one that does not tell whether it was written to."""
    return None if tensor.is_inference() else (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride())


def hashes_of(tensors: Iterable[Tensor]) -> dict[tuple[Any, ...], str]:
    """The hashes of tensors by their marks: a file is written between them and its digest, and the less lies between those, the better."""
    return {mark: hash_of(tensor) for tensor in tensors if has_bytes(tensor) and (mark := mark_of(tensor)) is not None}


def digest_of(tensors: Iterable[tuple[str, Tensor]], known: Mapping[tuple[Any, ...], str] | None = None) -> str:
    """A digest of tensors by their names, kinds, shapes and bytes, in whatever order and layout a file has them.

    Args:
        tensors: The tensors, with their names in the file.
        known: Hashes of some of them by their marks.
    """
    lines = []
    for name, tensor in tensors:
        found = known.get(mark_of(tensor)) if known else None
        lines.append(f"{name.removeprefix(PEFT_PREFIX)} {tensor.dtype} {list(tensor.shape)} {found or hash_of(tensor)}")
    return "sha256:" + hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def left_over(path: Path) -> bool:
    """Whether a killed save left it: a folder of ours, or a file of safetensors' that got no name."""
    if path.name.startswith(OURS):
        return True
    if not OF_SAFETENSORS.fullmatch(path.name) or path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    return not any(start) or start[8:] == b"{"


@contextlib.contextmanager
def replacing(folder: Path, name: str) -> Iterator[Path]:
    """A temporary folder, of which a file then takes its place in another one, in one step; behind it what killed saves left there goes."""
    with written_beside(folder) as written:
        yield written
        Path(written, name).replace(folder / name)


@contextlib.contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """A temporary folder in one that may not be there yet, and is not after an error; behind it what killed saves left there goes."""
    new = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=OURS, dir=folder) as written:
            yield Path(written)
    except BaseException:
        for part in new:
            with contextlib.suppress(OSError):
                part.rmdir()
        raise
    for path in filter(left_over, list(folder.iterdir())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def placing(folder: Path) -> Iterator[Path]:
    """A temporary folder, whose files then take their places in another one, each in one step, those that name others last."""
    with written_beside(folder) as written:
        yield written
        files = sorted((path for path in written.rglob("*") if path.is_file()), key=lambda path: (path.suffix == ".json", path))
        for path in files:
            place = folder / path.relative_to(written)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
