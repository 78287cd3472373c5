"""The kernels as a repository of the Kernel Hub: laid out, imported from a folder of their own, pushed and pulled."""

import base64
import hashlib
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import gates
import hf_tokens_kernels
import pytest

ROOT = Path(__file__).parents[2] / "kernels"
USE = """
import sys
sys.path = [path for path in sys.path if "hf_tokens" not in path and not path.endswith(("torch-ext", "adapters"))]
sys.path.insert(0, sys.argv[1])
import torch, hf_tokens_kernels as kernels
got = kernels.attention_columns(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), scaling=0.5, causal=True)
print(kernels.__file__, got.flatten().tolist(), all(name in vars(kernels) for name in kernels.__all__))
"""


@pytest.fixture(scope="module")
def builder():
    spec = importlib.util.spec_from_file_location("build_kernels", ROOT / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(builder, tmp_path_factory):
    return builder.build(tmp_path_factory.mktemp("kernels"))


def used(folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", USE, str(folder)], capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split(" ", 1)


def test_every_backend_has_all_files_with_their_digests(folders):
    assert [folder.name for folder in folders] == ["torch-cpu", "torch-cuda", "torch-rocm", "torch-xpu"]
    for folder in folders:
        facts = json.loads((folder / "metadata.json").read_text())
        there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"metadata.json"}
        assert there == set(facts["digest"]["files"]) and facts["backend"]["type"] == folder.name.removeprefix("torch-")
        assert facts["id"].isidentifier()
        for path, told in facts["digest"]["files"].items():
            assert told == base64.b64encode(hashlib.sha256((folder / path).read_bytes()).digest()).decode()


def test_a_variant_runs_without_the_project(folders):
    file, rest = used(folders[0])
    assert Path(file) == folders[0] / "__init__.py"
    assert rest.strip() == "[1.5, 0.5] True"


@gates.kernel_uploads
def test_pushed_and_pulled(hub, builder, folders, tmp_path):
    from huggingface_hub import snapshot_download

    address = builder.push("alice/hf-tokens-kernels", folders[0].parent)
    assert "/kernels/alice/hf-tokens-kernels/" in address
    pulled = Path(snapshot_download("alice/hf-tokens-kernels", repo_type="kernel", revision="v1", local_dir=tmp_path / "pulled"))
    assert used(pulled / "build" / "torch-cpu")[1].strip() == "[1.5, 0.5] True"


@pytest.mark.skipif(not any(distributions(name="kernels")), reason="un-skip when Hugging Face's client is there: pip install kernels")
def test_the_client_of_the_kernel_hub_takes_it(folders):
    import kernels

    loaded = kernels.get_local_kernel(folders[0].parent)
    assert sorted(loaded.__all__) == sorted(hf_tokens_kernels.__all__)


def test_the_card_names_every_operation():
    card = (ROOT / "CARD.md").read_text()
    assert [name for name in hf_tokens_kernels.__all__ if f"`{name}" not in card] == []
