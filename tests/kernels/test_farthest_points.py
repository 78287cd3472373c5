"""Farthest-point selection against a plain loop that measures every token against every chosen one."""

import math

import pytest
import torch
from hf_tokens_kernels import farthest_points
from largest import Largest

METRICS = ("cosine", "euclidean")


def apart(x, y, metric):
    if metric == "euclidean":
        return math.dist(x, y)
    length = math.hypot(*x) * math.hypot(*y)
    return 1 - sum(a * b for a, b in zip(x, y, strict=True)) / length


def loop(x, k, start, valid, metric):
    out = torch.full((len(x), k), -1)
    for row, tokens in enumerate(x.double().tolist()):
        left = [i for i in range(len(tokens)) if valid[row, i]]
        chosen = [] if not left else [int(start[row])] if start is not None else left[:1]
        while 0 < len(chosen) < min(k, len(left)):
            near = {i: min(apart(tokens[i], tokens[j], metric) for j in chosen) for i in left if i not in chosen}
            chosen.append(max(near, key=lambda i: (near[i], -i)))
        out[row, : len(chosen)] = torch.tensor(chosen, dtype=torch.long)
    return out


def sample(b, n, d, dtype=torch.float32, seed=0):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (2, 5, 2), (63, 32, 9), (500, 70, 5), (40, 256, 40)])
def test_is_the_loop(n, d, k, metric, backend, device):
    x = sample(2, n, d)
    every = torch.ones(2, n, dtype=torch.bool)
    start = torch.tensor([n - 1, n // 2]) if n > 2 else None
    got = farthest_points(x.to(device), k, metric=metric, start=None if start is None else start.to(device))
    assert got.tolist() == loop(x, k, start, every, metric).tolist()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_and_views(dtype, metric, backend, device):
    x = sample(2, 33, 48, dtype)
    turned = x.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    every = torch.ones(2, 33, dtype=torch.bool)
    assert farthest_points(turned, 6, metric=metric).tolist() == loop(x, 6, None, every, metric).tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_float64_is_the_loop(metric):
    x = sample(3, 70, 4).double()
    assert farthest_points(x, 70, metric=metric).tolist() == loop(x, 70, None, torch.ones(3, 70, dtype=torch.bool), metric).tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_valid_is_neither_chosen_nor_read(metric, backend, device):
    x = sample(4, 21, 6)
    valid = torch.rand(4, 21, generator=torch.Generator().manual_seed(1)) < 0.5
    valid[1] = torch.arange(21) == 20
    valid[2] = False
    given = x.masked_fill(~valid[..., None], torch.nan).to(device)
    got = farthest_points(given, 14, metric=metric, valid=valid.to(device))
    assert got.tolist() == loop(x, 14, None, valid, metric).tolist()


def test_of_equally_far_tokens_the_first_and_each_only_once(backend, device):
    x = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [0.0, 0.0], [2.0, 0.0]]], device=device)
    assert farthest_points(x, 5, metric="euclidean").tolist() == [[0, 1, 2, 3, 4]]


def test_row_of_a_batch_is_the_row_alone(backend, device):
    x = sample(3, 140, 8).to(device)
    assert torch.equal(farthest_points(x, 7), torch.cat([farthest_points(x[i : i + 1], 7) for i in range(3)]))


def test_memory_grows_with_the_length_and_not_with_its_square():
    largest = []
    for n in (512, 1024, 2048):
        x = torch.randn(1, n, 8)
        with Largest() as seen:
            farthest_points(x, 4)
        largest.append(seen.elements)
    assert largest[2] <= 4 * largest[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(metric="l1"), "metric must be one of"),
        (dict(k=6), r"k in \[1, n\], got \(1, 5, 2\) and 6"),
        (dict(valid=torch.ones(1, 4, dtype=torch.bool)), "for each token whether it counts"),
        (dict(start=torch.tensor([2]), valid=torch.arange(5)[None] < 2), "one valid token of each sample"),
    ],
)
def test_bad_input_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        farthest_points(torch.zeros(1, 5, 2), **(dict(k=2) | given))
