"""Every operation runs in both forms: the torch reference, and the Triton twin, on a GPU where there is one and interpreted elsewhere."""

import pytest
import torch
from hf_tokens_kernels import backend as backend_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """The form that runs in this test."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="un-skip when triton is there: pip install 'hf-tokens[triton]'")
    with backend_of(request.param):
        yield request.param


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def nan_filled(monkeypatch):
    """What a kernel forgets to write is NaN, or the largest integer."""
    held = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(held[0], warn_only=held[1])
