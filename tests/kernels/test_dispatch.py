"""The dispatcher: it picks by device, dtype and size, says what it picked, and refuses what cannot run."""

import pytest
import torch
from hf_tokens_kernels import Choice, backend, choose, picks

X = torch.zeros(2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_says_what_it_picked_and_why(no_gpu):
    with picks() as outer:
        choose("sum", X)
        with picks() as inner, backend("torch"):
            choose("sum", X)
    assert outer == [Choice("sum", "torch", "tensors on cpu"), Choice("sum", "torch", "asked for")]
    assert inner == outer[1:]


def test_what_cannot_run_in_triton_is_refused_where_it_was_asked_for(no_gpu):
    with backend("triton"), pytest.raises(ValueError, match=r'Under backend\("triton"\) sum must run in Triton, got tensors on cpu'):
        choose("sum", X)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (dict(refuses="a soft cap"), "a soft cap"),
        (dict(small=True), "Triton would be interpreted"),
        (dict(), "Triton would be interpreted"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="un-skip on a machine without a GPU")
def test_interpreted_kernels_are_only_run_when_asked_for(given, why):
    with picks() as picked:
        assert not choose("sum", X, **given)
    assert picked == [Choice("sum", "torch", why)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="un-skip on a machine without a GPU")
def test_what_a_twin_cannot_do_and_strange_dtypes_are_refused():
    with backend("triton"):
        assert choose("sum", X)
        with pytest.raises(ValueError, match="got a soft cap"):
            choose("sum", X, refuses="a soft cap")
        with pytest.raises(ValueError, match="got tensors of float64"):
            choose("sum", X.double())


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend must be one of"), backend("cuda"):
        pass
