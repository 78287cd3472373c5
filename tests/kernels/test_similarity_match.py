"""The best destination of every source against a plain loop over all pairs."""

import math

import pytest
import torch
from hf_tokens_kernels import backend as backend_of
from hf_tokens_kernels import match
from hf_tokens_kernels.similarity_match import reference
from largest import Largest
from tolerances import close

METRICS = ("cosine", "dot", "euclidean", "ward")
SHAPES = [(2, 7, 5, 3), (1, 1, 1, 4), (3, 63, 130, 32), (2, 5, 500, 80), (1, 40, 1, 256)]  # b, s, t, d


def alike(x, y, metric, p, q):
    """How well two tokens of sizes p and q match."""
    dot, apart = sum(a * b for a, b in zip(x, y, strict=True)), sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
    if metric == "cosine":
        return dot / max(1e-12, math.sqrt(sum(a * a for a in x))) / max(1e-12, math.sqrt(sum(b * b for b in y)))
    return {"dot": dot, "euclidean": -apart, "ward": -p * q / (p + q) * apart}[metric]


def loop(src, dst, metric, p=None, q=None, barred=lambda b, i, j: False):
    """Scores of all pairs (b s t), -inf where a source may not get a destination."""
    out = torch.full((*src.shape[:2], dst.shape[1]), -math.inf, dtype=torch.float64)
    for b in range(len(src)):
        xs, ys = src[b].double().tolist(), dst[b].double().tolist()
        for i, x in enumerate(xs):
            for j, y in enumerate(ys):
                if not barred(b, i, j):
                    out[b, i, j] = alike(x, y, metric, 1 if p is None else float(p[b, i]), 1 if q is None else float(q[b, j]))
    return out


def agrees(got, full, what=""):
    """Scores are the highest ones, and each index is one that has this score up to rounding."""
    score, index = got
    close(score.double().nan_to_num(neginf=-9.0).to(score.dtype), full.amax(-1).nan_to_num(neginf=-9.0).to(score.dtype), what)
    chosen = full.gather(-1, index[..., None])[..., 0].nan_to_num(neginf=-9.0).to(score.dtype)
    close(chosen, full.amax(-1).nan_to_num(neginf=-9.0).to(score.dtype), what)
    assert not index[score == -torch.inf].any()


def sample(shape, device, dtype=torch.float32, seed=0):
    b, s, t, d = shape
    make = torch.Generator().manual_seed(seed)
    src, dst = (torch.randn(b, n, d, generator=make).to(device, dtype) for n in (s, t))
    p, q = (torch.randint(1, 5, (b, n), generator=make).to(device, torch.float32) for n in (s, t))
    return src, dst, p, q


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_loop(shape, metric, backend, device):
    src, dst, p, q = sample(shape, device)
    given = dict(src_sizes=p, dst_sizes=q) if metric == "ward" else {}
    agrees(match(src, dst, metric=metric, **given), loop(src, dst, metric, *((p, q) if given else ())))


@pytest.mark.parametrize("metric", METRICS)
def test_float64_keeps_its_digits(metric):
    src, dst, *_ = sample(SHAPES[2], "cpu", torch.float64)
    full = loop(src, dst, metric)
    score, index = match(src, dst, metric=metric)
    assert torch.equal(index, full.argmax(-1))
    close(score, full.amax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_read_exactly_and_scored_in_float32(dtype, backend, device):
    src, dst, *_ = sample((2, 33, 65, 48), device, dtype)
    for metric in METRICS:
        agrees(match(src, dst, metric=metric), loop(src, dst, metric), metric)


@pytest.mark.parametrize("metric", METRICS)
def test_what_does_not_count_is_not_read(metric, backend, device):
    src, dst, *_ = sample((4, 9, 140, 8), device)
    make = torch.Generator().manual_seed(1)
    src_mask, dst_mask = torch.rand(4, 9, generator=make) < 0.7, torch.rand(4, 140, generator=make) < 0.5
    dst_mask[1], src_mask[2] = False, False
    dst_mask[3] = torch.arange(140) == 139
    full = loop(src, dst, metric, barred=lambda b, i, j: not (src_mask[b, i] and dst_mask[b, j]))
    src, dst = src.masked_fill(~src_mask[..., None].to(device), torch.nan), dst.masked_fill(~dst_mask[..., None].to(device), torch.nan)
    agrees(match(src, dst, metric=metric, src_mask=src_mask.to(device), dst_mask=dst_mask.to(device)), full)


def test_tokens_do_not_match_their_own_group_or_themselves(backend, device):
    x, *_ = sample((2, 70, 70, 6), device)
    agrees(match(x, x, same=True, metric="dot"), loop(x, x, "dot", barred=lambda b, i, j: i == j))
    group = torch.randint(0, 4, (2, 70), generator=torch.Generator().manual_seed(2))
    got = match(x, x[:, :66], src_group=group.to(device), dst_group=group[:, :66].to(device))
    agrees(got, loop(x, x[:, :66], "cosine", barred=lambda b, i, j: group[b, i] == group[b, j]))
    score, index = match(x[:, :1], x[:, :1], same=True)
    assert not index.any() and (score == -torch.inf).all()


@pytest.mark.parametrize("k", [None, 1, 3, 6])
def test_of_equal_destinations_the_first_is_taken(k, device):
    src = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]], device=device)
    dst = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]], device=device)
    full = loop(src, dst, "dot")
    for form in ("torch", "triton") if k is None else ("torch",):
        with backend_of(form):
            score, index = match(src, dst, metric="dot", k=k)
        expected = full.sort(dim=-1, descending=True, stable=True)
        cut = slice(k) if k else 0
        assert torch.equal(index.cpu(), expected.indices[..., cut]) and torch.equal(score.double().cpu(), expected.values[..., cut])


def test_several_destinations_are_the_best_ones():
    src, dst, *_ = sample((2, 20, 50, 8), "cpu", torch.float64)
    mask = torch.arange(50).expand(2, -1) % 16 == 0
    for metric in METRICS:
        want = loop(src, dst, metric).sort(dim=-1, descending=True, stable=True)
        score, index = match(src, dst, metric=metric, k=7)
        close(score, want.values[..., :7])
        assert torch.equal(index, want.indices[..., :7])
        score, index = match(src, dst, metric=metric, k=7, dst_mask=mask)
        assert (score[..., 4:] == -torch.inf).all() and not index[..., 4:].any() and (index[..., :4] % 16 == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_rows_of_a_batch_views_and_empty_ones(metric, backend, device):
    src, dst, *_ = sample((3, 30, 40, 16), device)
    both = match(src, dst, metric=metric)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (src, dst)]
    agrees(match(*turned, metric=metric), loop(src, dst, metric))
    alone = [match(src[i : i + 1], dst[i : i + 1], metric=metric) for i in range(3)]
    assert torch.equal(both[1], torch.cat([index for _, index in alone]))
    close(both[0], torch.cat([score for score, _ in alone]))
    assert match(src[:, :0], dst, metric=metric)[0].shape == (3, 0)


@pytest.mark.parametrize("metric", METRICS)
def test_the_score_is_differentiable(metric, backend, device):
    src, dst, p, q = sample((2, 9, 12, 5), device)
    src, dst = src.requires_grad_(), dst.requires_grad_()
    given = dict(src_sizes=p, dst_sizes=q) if metric == "ward" else {}
    mask = torch.ones(2, 9, dtype=torch.bool, device=device)
    mask[0, :4] = False
    score, index = match(src, dst, metric=metric, src_mask=mask, **given)
    got = torch.autograd.grad(score.where(mask, 0).square().sum(), (src, dst))
    x, y = src.detach().double().requires_grad_(), dst.detach().double().requires_grad_()
    u, v = (torch.nn.functional.normalize(part, dim=-1) for part in (x, y)) if metric == "cosine" else (x, y)
    full = u @ v.mT if metric in ("cosine", "dot") else -(u[:, :, None] - v[:, None]).square().sum(-1)
    if metric == "ward":
        full = full * (p[:, :, None] * q[:, None] / (p[:, :, None] + q[:, None]))
    want = torch.autograd.grad(full.amax(-1).where(mask, 0).square().sum(), (x, y))
    for ours, theirs in zip(got, want, strict=True):
        close(ours, theirs.float())


def test_chunks_do_not_change_what_is_found(monkeypatch):
    src, dst, *_ = sample((3, 90, 110, 8), "cpu", torch.float64)
    mask = torch.rand(3, 90, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = match(src, dst, metric="euclidean", src_mask=mask)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    again = match(src, dst, metric="euclidean", src_mask=mask)
    assert torch.equal(whole[1], again[1])
    assert torch.equal(whole[0], again[0])


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 14)
    largest = []
    for n in (512, 1024, 2048):
        x = torch.randn(2, n, 8)
        with Largest() as seen:
            match(x, x, same=True)
        largest.append(seen.elements)
    assert largest[2] <= 4 * largest[0] < 2048 * 2048


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(metric="l1"), "metric must be one of"),
        (dict(dst=torch.zeros(2, 0, 4)), "one destination at least, got"),
        (dict(dst=torch.zeros(2, 3, 5)), "Bring them to one batch and width"),
        (dict(src_mask=torch.ones(2, 4)), "src_mask must have one number for each token of src"),
        (dict(src_group=torch.ones(2, 3)), "go together, got one of them"),
        (dict(dst=torch.zeros(2, 5, 4), same=True), "same=True takes the same tokens"),
        (dict(dst_sizes=torch.ones(2, 3)), 'under metric="ward" only'),
        (dict(k=4), r"k must lie in \[1, 3\]"),
    ],
)
def test_bad_input_is_refused(change, message):
    given = dict(src=torch.zeros(2, 3, 4), dst=torch.zeros(2, 3, 4)) | change
    with pytest.raises(ValueError, match=message):
        match(given.pop("src"), given.pop("dst"), **given)


def test_the_twin_says_what_it_cannot_do():
    with backend_of("triton"), pytest.raises(ValueError, match="several destinations of a source"):
        match(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), k=2)
