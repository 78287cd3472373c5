"""Routed tokens against a loop over them in float64, with rows of different counts in an index of one width."""

import pytest
import torch
from hf_tokens_kernels import routed_gather, routed_scatter
from largest import Largest
from tolerances import close

SHAPES = [  # batch, tokens, width of the index, features
    (2, 63, 31, 32),
    (1, 500, 7, 40),
    (3, 1, 1, 8),
    (2, 5, 5, 600),
    (2, 4, 6, 8),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [(weighted, residual) for weighted in (False, True) for residual in (False, True)]


def sample(shape, device="cpu", dtype=torch.float32, seed=0):
    """Tokens, rows for those that run, an index with holes, and weights; what is not there is NaN."""
    b, n, r, d = shape
    make = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=make).to(torch.bfloat16).to(dtype)
    x, y, weights = draw(b, n, d), draw(b, r, d), torch.rand(b, r, generator=make)
    index = torch.full((b, r), -1)
    for row in index:
        count = int(torch.randint(1, min(n, r) + 1, (), generator=make))
        places = torch.randperm(r, generator=make)[:count]
        row[places] = torch.randperm(n, generator=make)[:count]
    y[index < 0], weights[index < 0] = torch.nan, torch.nan
    return [t.to(device) for t in (x, y, index, weights)]


def naive_scatter(x, y, index, weights, residual):
    out = x.double().clone()
    for b in range(len(index)):
        for j, i in enumerate(index[b].tolist()):
            if i >= 0:
                w = 1.0 if weights is None else float(weights[b, j])
                old, new = x[b, i].double(), y[b, j].double()
                out[b, i] = old + w * (new if residual else new - old)
    return out


@pytest.mark.parametrize(("weighted", "residual"), FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scatter_is_the_loop_and_the_rest_keeps_its_bits(shape, weighted, residual, backend, device):
    x, y, index, weights = sample(shape, device)
    out = routed_scatter(x, y, index, weights if weighted else None, residual=residual)
    close(out, naive_scatter(x, y, index, weights if weighted else None, residual).to(x), "scatter")
    for row, before, ran in zip(out, x, index, strict=True):
        skips = [i for i in range(len(row)) if i not in ran.tolist()]
        assert torch.equal(row[skips], before[skips])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gather_is_the_loop(shape, backend, device):
    x, _, index, _ = sample(shape, device)
    want = torch.stack([torch.stack([row[i] if i >= 0 else row[0] * 0 for i in ran.tolist()]) for row, ran in zip(x, index, strict=True)])
    assert torch.equal(routed_gather(x, index), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_one_and_zero_are_exact(dtype, backend, device):
    x, y, index, _ = sample((2, 9, 5, 32), device, dtype)
    y = 1e3 * y
    whole = routed_scatter(x, y, index)
    assert torch.equal(routed_scatter(x, y, index, torch.ones(2, 5, device=device)), whole)
    assert torch.equal(routed_scatter(x, y, index, torch.zeros(2, 5, device=device)), x)
    assert torch.equal(routed_gather(whole, index)[index >= 0], y[index >= 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_and_a_row_of_a_batch(dtype, backend, device):
    x, y, index, weights = sample((3, 63, 31, 32), device, dtype)
    out = routed_scatter(x, y, index, weights)
    close(out, naive_scatter(x, y, index, weights, False).to(x), "scatter")
    for i in range(3):
        row = slice(i, i + 1)
        assert torch.equal(out[row], routed_scatter(x[row], y[row], index[row], weights[row]))


def test_counts_say_the_same_as_negative_entries(backend, device):
    x, y, _, weights = sample((3, 9, 4, 8), device)
    y, weights = y.nan_to_num(), weights.nan_to_num()
    index = torch.stack([torch.randperm(9)[:4] for _ in range(3)]).to(device)
    counts = torch.tensor([4, 0, 2], device=device)
    holes = index.masked_fill(torch.arange(4, device=device) >= counts[:, None], -1)
    assert torch.equal(routed_gather(x, index, counts), routed_gather(x, holes))
    assert torch.equal(routed_scatter(x, y, index, weights, counts=counts), routed_scatter(x, y, holes, weights))


def test_nothing_to_run_leaves_everything(backend, device):
    x, y, index, weights = sample((2, 5, 3, 8), device)
    none = torch.full_like(index, -1)
    assert torch.equal(routed_scatter(x, y, none, weights), x) and not routed_gather(x, none).any()
    assert torch.equal(routed_scatter(x, y[:, :0], index[:, :0]), x) and routed_gather(x, index[:, :0]).shape == (2, 0, 8)


def test_strides_do_not_matter(backend, device):
    x, y, index, weights = sample((2, 9, 5, 8), device)
    odd = lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(routed_gather(odd(x), odd(index)), routed_gather(x, index))
    assert torch.equal(routed_scatter(odd(x), odd(y), odd(index), odd(weights)), routed_scatter(x, y, index, weights))


@pytest.mark.parametrize(("weighted", "residual"), FORMS)
def test_gradients_are_those_of_the_dense_sequence(weighted, residual, backend, device):
    x, y, index, weights = sample((2, 9, 5, 8), device)
    g = torch.randn_like(x)
    there = (index >= 0)[..., None]
    dense = [t.double().requires_grad_() for t in (x, y.nan_to_num(), weights.nan_to_num() if weighted else torch.ones_like(weights))]
    chosen = (torch.nn.functional.one_hot(index.clamp(min=0), 9) * there).double()  # b r n
    runs, update = chosen.sum(dim=1)[..., None], chosen.mT @ (dense[1] * dense[2][..., None])
    gate = chosen.mT @ dense[2][..., None]
    want = dense[0] + update if residual else dense[0] + update - runs * gate * dense[0]
    wanted = torch.autograd.grad((want * g.double()).sum(), dense)
    ours = [x.requires_grad_(), y.requires_grad_(), weights.requires_grad_()][: 3 if weighted else 2]
    out = routed_scatter(*ours[:2], index, weights if weighted else None, residual=residual)
    for got, theirs in zip(torch.autograd.grad((out * g).sum(), ours), wanted, strict=False):
        close(got, theirs.to(got), f"{tuple(got.shape)}")


def test_the_gradient_of_gather_goes_back_to_the_tokens_that_ran(backend, device):
    x, y, index, _ = sample((2, 9, 5, 8), device)
    g = y.nan_to_num()
    (got,) = torch.autograd.grad((routed_gather(x.requires_grad_(), index) * g).sum(), x)
    assert torch.equal(got, routed_scatter(torch.zeros_like(x), g, index))


def test_bad_input_is_refused_before_anything_runs():
    x, y, index, weights = sample((2, 9, 5, 8))
    for call, said in [
        (lambda: routed_gather(x[0], index), "needs tokens"),
        (lambda: routed_gather(x, index, torch.ones(3)), "`counts` must be one number a row"),
        (lambda: routed_scatter(x, y[:, :2], index), "`y` must have a row for each index"),
        (lambda: routed_scatter(x, y.double(), index), "of torch.float64"),
        (lambda: routed_scatter(x, y, index, weights[0]), "`weights` must be one number an index"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.parametrize("counts", [[4, 4], [1, 3]])
def test_a_compiled_index_of_one_width_has_no_shape_that_depends_on_it(counts, device):
    x, y, _, weights = sample((2, 9, 4, 8), device)
    index = torch.stack([torch.randperm(9)[:4] for _ in range(2)]).to(device)
    step = lambda x, index, counts: routed_scatter(x, 2 * routed_gather(x, index, counts), index, counts=counts)
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, index, torch.tensor(counts)), step(x, index, torch.tensor(counts)))


def test_nothing_is_larger_than_the_tokens():
    for n in (512, 2048):
        x, y, index, weights = sample((1, n, n // 2, 16))
        with Largest() as seen:
            routed_scatter(x.requires_grad_(), y.nan_to_num(), index, weights.nan_to_num()).sum().backward()
        assert seen.elements <= (n + 1) * 16


@pytest.mark.parametrize(("weighted", "residual"), FORMS)
def test_the_reference_passes_gradcheck_twice(weighted, residual):
    x, y, index, weights = (t.nan_to_num() if t.is_floating_point() else t for t in sample((2, 4, 3, 2), dtype=torch.float64))
    given = [t.double().requires_grad_() for t in ((x, y, weights) if weighted else (x, y))]
    call = lambda x, y, w=None: routed_scatter(x, y, index, w, residual=residual)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(call, given) and check(lambda x: routed_gather(x, index), given[:1])
