"""Pooling over ragged groups, against a loop over groups and their tokens in float64."""

import pytest
import torch
from hf_tokens_kernels import backend as backend_of
from hf_tokens_kernels import pool_max, pool_power, pool_softmax
from largest import Largest
from tolerances import close

SHAPES = [  # batch, tokens, groups, channels, heads
    (2, 63, 20, 32, 4),
    (1, 500, 2, 12, 12),
    (3, 1, 1, 8, 1),
    (2, 9, 12, 520, 2),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def sample(shape, device="cpu", dtype=torch.float32, seed=0):
    """Tokens above zero and not, scores, weights and groups; what vanishes is NaN."""
    b, n, m, d, h = shape
    make = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=make).to(torch.bfloat16).to(dtype)
    x, scores = draw(b, n, d), 3 * draw(b, n, h)
    slot = torch.randint(-1, m, (b, n), generator=make)
    weights = torch.randint(1, 5, (b, n), generator=make).to(torch.float32)
    for t in (x, scores, weights):
        t[slot < 0] = torch.nan
    p = torch.linspace(0.5, 4, h)
    return [t.to(device) for t in (x, scores, slot, weights, p)]


def groups(x, slot, m):
    """Row, group and the tokens of it."""
    for b in range(len(x)):
        for s in range(m):
            yield b, s, [i for i in range(x.shape[1]) if slot[b, i] == s]


def naive_softmax(x, scores, slot, m, weights):
    x, scores, weights = x.double(), scores.double(), weights.double()
    rows = {}
    for b, s, inside in groups(x, slot, m):
        if not inside:
            rows[b, s] = torch.zeros(x.shape[2], dtype=torch.float64)
            continue
        e = (scores[b, inside] - scores[b, inside].amax(dim=0)).exp() * weights[b, inside, None]
        share = (e / e.sum(dim=0)).repeat_interleave(x.shape[2] // e.shape[1], dim=1)
        rows[b, s] = (share * x[b, inside]).sum(dim=0)
    return torch.stack([torch.stack([rows[b, s] for s in range(m)]) for b in range(len(x))])


def naive_power(x, p, slot, m, weights, eps=1e-6):
    x, weights, p = x.double(), weights.double(), p.double().repeat_interleave(x.shape[2] // len(p))
    rows = {}
    for b, s, inside in groups(x, slot, m):
        if not inside:
            rows[b, s] = torch.zeros(x.shape[2], dtype=torch.float64)
            continue
        share = (weights[b, inside] / weights[b, inside].sum())[:, None]
        rows[b, s] = (share * x[b, inside].clamp(min=eps) ** p).sum(dim=0) ** (1 / p)
    return torch.stack([torch.stack([rows[b, s] for s in range(m)]) for b in range(len(x))])


def naive_max(x, slot, m):
    out = torch.full((len(x), m, x.shape[2]), -torch.inf, dtype=torch.float64)
    for b, s, inside in groups(x, slot, m):
        for i in inside:
            out[b, s] = torch.maximum(out[b, s], x[b, i].double())
    return out


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_and_power_means_are_the_loop(shape, weighted, backend, device):
    x, scores, slot, weights, p = sample(shape, device)
    m, heavy = shape[2], weights if weighted else torch.ones_like(weights)
    given = weights if weighted else None
    close(pool_softmax(x, scores, slot, m, given), naive_softmax(x, scores, slot, m, heavy).to(x), "softmax")
    close(pool_softmax(x, scores[..., 0], slot, m, given), naive_softmax(x, scores[..., :1], slot, m, heavy).to(x), "one score")
    x = x.abs() + 0.1
    close(pool_power(x, p, slot, m, given), naive_power(x, p, slot, m, heavy).to(x), "power")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_maximum_is_the_loop(shape, backend, device):
    x, _, slot, _, _ = sample(shape, device)
    assert torch.equal(pool_max(x, slot, shape[2]), naive_max(x, slot, shape[2]).to(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_is_summed_in_float32(dtype, backend, device):
    x, scores, slot, weights, p = sample((2, 63, 3, 16, 4), device, dtype)
    close(pool_softmax(x, scores, slot, 3, weights), naive_softmax(x, scores, slot, 3, weights).to(x), "softmax")
    assert torch.equal(pool_max(x, slot, 3), naive_max(x, slot, 3).to(x))
    close(pool_power(x.abs() + 0.5, p, slot, 3, weights), naive_power(x.abs() + 0.5, p, slot, 3, weights).to(x), "power")


@pytest.mark.parametrize("p", [-2.0, 1.0, 100.0])
def test_exponents_from_the_minimum_over_the_mean_to_the_maximum(p, backend, device):
    x, _, slot, weights, _ = sample((2, 9, 3, 8, 1), device)
    x = x.abs() + 0.1
    close(pool_power(x, p, slot, 3, weights), naive_power(x, torch.tensor([p]), slot, 3, weights).to(x), str(p))


def test_what_is_below_eps_counts_as_eps(backend, device):
    x, slot = torch.tensor([[[-3.0], [0.0], [2.0]]], device=device), torch.zeros(1, 3, dtype=torch.long, device=device)
    close(pool_power(x, 3.0, slot, 1, eps=0.5), naive_power(x, torch.tensor([3.0]), slot, 1, torch.ones(1, 3), 0.5).to(x), "eps")


def test_groups_of_nothing_are_zero_and_their_maximum_is_minus_infinity(backend, device):
    x, scores, _, weights, p = sample((2, 5, 3, 8, 2), device)
    gone = torch.full((2, 5), -1, device=device)
    for given in (x, x[:, :0]):
        n = given.shape[1]
        assert not pool_softmax(given, scores[:, :n], gone[:, :n], 3, weights[:, :n]).any()
        assert not pool_power(given, p, gone[:, :n], 3).any()
        assert (pool_max(given, gone[:, :n], 3) == -torch.inf).all()
    x, last = x.nan_to_num(), gone.clone()
    last[:, 4] = 1
    assert torch.equal(pool_max(x, last, 3)[:, 1], x[:, 4])
    close(pool_softmax(x, scores.nan_to_num(), last, 3)[:, 1], x[:, 4], "one token")
    never = torch.zeros(2, 5, device=device)
    assert not pool_softmax(x, scores.nan_to_num(), last, 3, never).any() and not pool_power(x, p, last, 3, never).any()


def test_a_row_of_a_batch_is_the_row_alone_and_strides_do_not_matter(backend, device):
    x, scores, slot, weights, p = sample((2, 63, 4, 16, 4), device)
    odd = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)
    calls = (
        lambda r, f: pool_softmax(f(x)[r], f(scores)[r], f(slot)[r], 4, f(weights)[r]),
        lambda r, f: pool_power(f(x)[r].abs(), p, f(slot)[r], 4, f(weights)[r]),
        lambda r, f: pool_max(f(x)[r], f(slot)[r], 4),
    )
    for call in calls:
        whole = call(slice(None), lambda t: t)
        assert torch.equal(whole, call(slice(None), lambda t: t))
        close(call(slice(None), odd), whole, "strides")
        assert torch.equal(call(slice(1, 2), lambda t: t), whole[1:])


@pytest.mark.parametrize("shape", [(2, 9, 4, 8, 2), (1, 7, 2, 6, 6), (2, 70, 1, 4, 1)], ids=str)
def test_gradients_are_those_of_the_loop(shape, backend, device):
    x, scores, slot, weights, p = sample(shape, device)
    m = shape[2]
    g = torch.randn(shape[0], m, shape[3], device=device)
    for call, naive, given in [
        (lambda x, s, w: pool_softmax(x, s, slot, m, w), lambda x, s, w: naive_softmax(x, s, slot, m, w), (x, scores, weights)),
        (lambda x, p, w: pool_power(x, p, slot, m, w), lambda x, p, w: naive_power(x, p, slot, m, w), (x.abs() + 0.2, p, weights)),
    ]:
        ours = [t.detach().clone().requires_grad_() for t in given]
        theirs = [t.detach().double().requires_grad_() for t in given]
        got = torch.autograd.grad((call(*ours) * g).sum(), ours)
        want = torch.autograd.grad((naive(*theirs) * g.double()).sum(), theirs)
        for a, b in zip(got, want, strict=True):
            close(a, b.nan_to_num().to(a), f"{tuple(a.shape)}")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_scores_do_not_feel_the_rounding_of_what_was_pooled(dtype, backend, device):
    x, scores, slot, weights, _ = sample((1, 129, 9, 256, 1), device, dtype)
    x = x + 4
    g = torch.ones(1, 9, 256, dtype=dtype, device=device)
    scores = scores.float().requires_grad_()
    (got,) = torch.autograd.grad((pool_softmax(x, scores, slot, 9) * g).sum(), scores)
    wide = scores.detach().double().requires_grad_()
    (want,) = torch.autograd.grad((naive_softmax(x, wide, slot, 9, torch.ones_like(weights)) * g).sum(), wide)
    close(got, want.nan_to_num().to(got), "scores")


def test_tokens_that_are_equal_share_the_gradient_of_the_maximum(backend, device):
    x = torch.tensor([[[2.0], [1.0], [2.0], [torch.nan], [0.0]]], device=device, requires_grad=True)
    slot = torch.tensor([[0, 0, 0, -1, 1]], device=device)
    (got,) = torch.autograd.grad(pool_max(x, slot, 2).sum(), x)
    assert got.flatten().tolist() == [0.5, 0.0, 0.5, 0.0, 1.0]


def test_bad_input_is_refused_before_anything_runs():
    x, scores, slot, weights, p = sample((2, 5, 3, 8, 2))
    for call, said in [
        (lambda: pool_max(x, slot[:1], 3), "a slot for each"),
        (lambda: pool_softmax(x, scores[:, :2], slot, 3), "`scores` must be one number a token"),
        (lambda: pool_softmax(x, torch.zeros(2, 5, 3), slot, 3), "whose number divides 8"),
        (lambda: pool_power(x, torch.ones(3), slot, 3), "`p` must be one exponent"),
        (lambda: pool_power(x, p, slot, 3, weights[:1]), "`weights` must be one number a token"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
    with backend_of("triton"), pytest.raises(ValueError, match="float64"):
        pool_max(x.double(), slot, 3)


def test_nothing_is_larger_than_the_tokens():
    for n in (512, 2048):
        x, scores, slot, weights, p = (t.nan_to_num() if t.is_floating_point() else t for t in sample((1, n, n // 2, 16, 4)))
        with Largest() as seen:
            y = pool_softmax(x.requires_grad_(), scores, slot, n // 2, weights) + pool_power(x, p, slot, n // 2) + pool_max(x, slot, n // 2)
            y.nan_to_num(neginf=0).sum().backward()
        assert seen.elements <= (n + 1) * 16
