"""Lay out the kernels as the Kernel Hub wants them: a folder for each backend, of pure Python.

python kernels/build.py                           # kernels/build/torch-cpu, torch-cuda, ...
python kernels/build.py --out /tmp/build
python kernels/build.py --push me/hf-tokens-kernels   # and upload them as a kernel repository, to its branch v1
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETTINGS = tomllib.loads((HERE / "build.toml").read_text())

# What a variant holds besides our files: the names of its torch operations, and the package under its own name.
OPS = """import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
"""
PACKAGE = '''"""The kernel under its own name, for a path that holds the variant's folder."""

import importlib.util
import sys
from pathlib import Path

_path = Path(__file__).resolve().parent.parent / "__init__.py"
_spec = importlib.util.spec_from_file_location("{name}", _path, submodule_search_locations=[str(_path.parent)])
_module = importlib.util.module_from_spec(_spec)
sys.modules["{name}"] = _module
_spec.loader.exec_module(_module)
globals().update(vars(_module))
'''


def sources() -> dict[str, bytes]:
    """Our files, by their path in a variant."""
    root, kinds = HERE / "torch-ext" / SETTINGS["general"]["name"].replace("-", "_"), SETTINGS["torch-noarch"]["pyext"]
    found = sorted(path for kind in kinds for path in root.rglob(f"*.{kind}"))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def digest(data: bytes) -> str:
    """The digest of a file as the client checks it."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def variant(backend: str) -> dict[str, bytes]:
    """The files of a backend's folder, by their path in it."""
    general, ours = SETTINGS["general"], sources()
    package = general["name"].replace("-", "_")
    state = hashlib.sha256(b"".join(path.encode() + b"\0" + data for path, data in ours.items())).hexdigest()[:7]
    name = f"_{package}_{backend}_{state}"
    files = {**ours, "_ops.py": OPS.format(name=name).encode(), f"{package}/__init__.py": PACKAGE.format(name=name).encode()}
    facts = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": {path: digest(data) for path, data in sorted(files.items())}},
    }
    return {**files, "metadata.json": (json.dumps(facts, indent=2) + "\n").encode()}


def build(out: Path) -> list[Path]:
    """Write all variants; returns their folders."""
    folders = []
    for backend in SETTINGS["general"]["backends"]:
        folder = out / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for path, data in variant(backend).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        folders.append(folder)
    return folders


def push(repo: str, out: Path) -> str:
    """Upload the variants and the card; returns the address."""
    from huggingface_hub import HfApi

    api, branch = HfApi(), f"v{SETTINGS['general']['version']}"
    api.create_repo(repo, repo_type="kernel", exist_ok=True)
    api.create_branch(repo, branch=branch, repo_type="kernel", exist_ok=True)
    api.upload_folder(repo_id=repo, repo_type="kernel", folder_path=out, path_in_repo="build", revision=branch)
    return str(
        api.upload_file(path_or_fileobj=HERE / "CARD.md", path_in_repo="README.md", repo_id=repo, repo_type="kernel", revision=branch)
    )


def main() -> None:
    """Build, and upload if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "build")
    parser.add_argument("--push", metavar="REPO", help="kernel repository to upload to")
    args = parser.parse_args()
    for folder in build(args.out):
        print(folder)
    if args.push:
        print(push(args.push, args.out))


if __name__ == "__main__":
    main()
