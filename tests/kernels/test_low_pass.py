"""The low-pass filter of grids, against the sums of the DCT and its inverse in float64."""

import math

import pytest
import torch
from hf_tokens_kernels import low_pass
from tolerances import close


def naive(x, height, width):
    """Frequency by frequency, forth and back."""
    p, h, w, d = x.shape
    basis = lambda size, k, i: math.cos(math.pi * (2 * i + 1) * k / (2 * size)) * math.sqrt((2 if k else 1) / size)
    out = torch.zeros(p, height, width, d, dtype=torch.float64)
    for k in range(height):
        for q in range(width):
            found = sum(basis(h, k, i) * basis(w, q, j) * x[:, i, j].double() for i in range(h) for j in range(w))
            for i in range(height):
                for j in range(width):
                    out[:, i, j] += basis(height, k, i) * basis(width, q, j) * found
    return out * math.sqrt(height * width / (h * w))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("grid", "left"), [((1, 1), (1, 1)), ((4, 6), (2, 3)), ((7, 5), (3, 5)), ((3, 9), (1, 1))])
def test_the_filter_is_the_sum(grid, left, dtype, device):
    x = torch.randn(2, *grid, 8, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    close(low_pass(x, *left), naive(x, *left).to(x), "low pass")
    close(low_pass(x.transpose(1, 2).contiguous().transpose(1, 2), *left), low_pass(x, *left), "strides")


def test_a_constant_stays_and_a_whole_grid_keeps_its_bits(device):
    x = torch.randn(3, 5, 4, 8, device=device)
    assert torch.equal(low_pass(x, 5, 4), x)
    flat = x[:, :1, :1].expand(3, 5, 4, 8)
    close(low_pass(flat, 2, 3), flat[:, :2, :3], "constant")


def test_gradients(device):
    x = torch.randn(1, 4, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: low_pass(x, 2, 2), x)


@pytest.mark.parametrize("given", [((2, 3, 4), 1, 1), ((1, 2, 3, 4), 3, 1), ((1, 2, 3, 4), 1, 0)])
def test_bad_input_is_refused(given):
    shape, *left = given
    with pytest.raises(ValueError, match="low_pass needs grids"):
        low_pass(torch.zeros(shape), *left)
