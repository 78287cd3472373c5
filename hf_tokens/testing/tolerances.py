"""How far two ways to compute the same thing may lie apart, per dtype, in units of the larger one. No test has a number of its own."""

import torch
from torch import Tensor

# dtype -> same sums in another order; a method at zero strength beside its base
ROUNDING = {torch.float64: 1e-10, torch.float32: 5e-5, torch.bfloat16: 8e-2, torch.float16: 1e-2}


def scale(a: Tensor, b: Tensor) -> float:
    return max(1.0, float(a.detach().abs().max()), float(b.detach().abs().max())) if a.numel() else 1.0


def allowed(a: Tensor, b: Tensor) -> float:
    return ROUNDING[a.dtype] * scale(a, b) if a.is_floating_point() else 0


def close(a: Tensor, b: Tensor, what: str = "") -> None:
    """Assert that two tensors are the same up to rounding."""
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
    torch.testing.assert_close(a, b, rtol=0, atol=allowed(a, b), msg=lambda text: f"{what}: {text}")


def all_close(ours: list[Tensor], theirs: list[Tensor], what: str = "") -> None:
    assert len(ours) == len(theirs), f"{what}: {len(ours)} and {len(theirs)} tensors"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        close(a, b, f"{what}[{i}]")


def all_equal(ours: list[Tensor], theirs: list[Tensor], what: str = "") -> None:
    """Assert that two lists of tensors are the same bits."""
    assert len(ours) == len(theirs), f"{what}: {len(ours)} and {len(theirs)} tensors"
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, f"{what}[{i}]: {tuple(a.shape)} and {tuple(b.shape)}"
        assert torch.equal(a, b), f"{what}[{i}] differs by {float((a.double() - b.double()).abs().max()):g}"


def differs(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    """Whether anything moved by more than rounding."""
    pairs = zip(ours, theirs, strict=True)
    return any(a.shape != b.shape or float((a - b).abs().max()) > allowed(a, b) for a, b in pairs if a.numel())
