"""Clustering from features, with the matrix of distances and without, against a plain loop that joins one pair at a time."""

import sys

import pytest
import torch
from hf_tokens_kernels import agglomerate, cluster
from hf_tokens_kernels.agglomerate import LINKAGES, features, reference
from largest import Largest
from torch.nn.functional import normalize

FORMS = ("matrix", "features")
CASES = [(linkage, metric) for linkage in LINKAGES for metric in ("cosine", "euclidean") if (linkage, metric) != ("average", "euclidean")]


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    most = {linkage: 0 if request.param == "features" else 1 << 20 for linkage in LINKAGES}
    monkeypatch.setattr(sys.modules["hf_tokens_kernels.agglomerate"], "MATRIX_TOKENS", most)
    return request.param


def height(one, other, x, linkage):
    """How far two clusters, lists of tokens, are from each other."""
    if linkage == "ward":
        spread = lambda tokens: (x[tokens] - x[tokens].mean(0)).square().sum()
        return float(spread(one + other) - spread(one) - spread(other))
    gaps = [float((x[a] - x[b]).square().sum()) for a in one for b in other]
    return {"single": min, "complete": max, "average": lambda all_: sum(all_) / len(all_)}[linkage](gaps)


def loop(x, target, linkage, tokens):
    clusters = [[token] for token in tokens]
    while len(clusters) > max(1, target):
        pairs = [(i, j) for i in range(len(clusters)) for j in range(i + 1, len(clusters))]
        i, j = min(pairs, key=lambda pair: height(clusters[pair[0]], clusters[pair[1]], x, linkage))
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return clusters


def expected(x, target, linkage, metric, valid, protected):
    """With unit vectors |x - y|^2 = 2 (1 - cos), so that the loop serves both metrics."""
    x = normalize(x.double(), dim=-1) if metric == "cosine" else x.double()
    out = torch.full(x.shape[:2], -1)
    for row in range(len(x)):
        free = [t for t in range(x.shape[1]) if valid[row, t] and not protected[row, t]]
        out[row, protected[row] & valid[row]] = torch.arange(x.shape[1])[protected[row] & valid[row]]
        for found in loop(x[row], target[row], linkage, free):
            out[row, found] = found[0]
    return out


def make(b, n, d, seed=0, dtype=torch.float32):
    return torch.randn(b, n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) + 0.5


@pytest.mark.parametrize(("linkage", "metric"), CASES)
@pytest.mark.parametrize("n", [1, 2, 12])
def test_is_the_loop(n, linkage, metric, form):
    x = make(3, n, 4, dtype=torch.float64)
    all_ = torch.ones(3, n, dtype=torch.bool)
    for target in sorted({1, 2, (n + 1) // 2, max(1, n - 1), n + 3}):
        assert torch.equal(cluster(x, target, linkage, metric), expected(x, [target] * 3, linkage, metric, all_, ~all_)), target


@pytest.mark.parametrize(("linkage", "metric"), CASES)
def test_rows_with_targets_padding_and_protected_tokens_of_their_own(linkage, metric, form):
    generator = torch.Generator().manual_seed(0)
    x, target = make(6, 11, 5), torch.tensor([1, 3, 2, 4, 11, 2])
    valid, protected = torch.rand(6, 11, generator=generator) < 0.7, torch.rand(6, 11, generator=generator) < 0.2
    valid[0], valid[1] = True, False
    valid[2] = torch.arange(11) == 5
    protected[3] = True
    got = cluster(x.masked_fill(~valid[..., None], torch.nan), target, linkage, metric, valid, protected)
    assert torch.equal(got, expected(x, target.tolist(), linkage, metric, valid, protected))


@pytest.mark.parametrize(("linkage", "metric"), CASES)
@pytest.mark.parametrize("n", [63, 500])
def test_both_ways_find_the_same_clusters(n, linkage, metric, form):
    x = make(2, n, 16, dtype=torch.float64)
    u = normalize(x, dim=-1) if metric == "cosine" else x
    distance = 1 - u @ u.mT if metric == "cosine" and linkage != "ward" else torch.cdist(u, u).square()
    for target in (n // 2, n // 7):
        assert torch.equal(cluster(x, target, linkage, metric), agglomerate(distance, target, linkage))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_runs_in_both_forms_of_the_match(linkage, backend, device, form):
    x = make(2, 33, 8)
    all_ = torch.ones(2, 33, dtype=torch.bool)
    got = cluster(x.to(device), 12, linkage).cpu()
    assert torch.equal(got, expected(x, [12, 12], linkage, "cosine", all_, ~all_))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("twins", [1, 4, 40])
def test_equal_tokens_leave_as_many_clusters_as_asked_for(twins, linkage, form):
    x = make(2, twins, 6).repeat(1, 40 // twins, 1)
    for target in (1, twins, 20):
        got = cluster(x, target, linkage)
        assert [len(row.unique()) for row in got] == [target] * 2
        index = torch.arange(40).expand(2, 40)
        assert (got <= index).all() and torch.equal(got.gather(1, got), got)
        if target == twins:
            assert torch.equal(got, index % twins)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_row_of_a_batch_is_the_row_alone(linkage, form):
    x, target = make(3, 40, 8), torch.tensor([1, 20, 39])
    alone = [cluster(x[i : i + 1], int(target[i]), linkage) for i in range(3)]
    assert torch.equal(cluster(x, target, linkage), torch.cat(alone))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_read_exactly(dtype, linkage, form):
    x = make(2, 30, 8).to(dtype)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cluster(turned, 9, linkage), cluster(x.float(), 9, linkage))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_memory_grows_with_the_length_and_not_with_its_square(linkage, monkeypatch):
    monkeypatch.setattr(sys.modules["hf_tokens_kernels.agglomerate"], "MATRIX_TOKENS", dict.fromkeys(LINKAGES, 0))
    monkeypatch.setattr(features, "CHUNK_ELEMENTS", 1 << 12)
    monkeypatch.setattr(sys.modules["hf_tokens_kernels.similarity_match.reference"], "CHUNK_ELEMENTS", 1 << 12)
    largest = []
    for n in (256, 512, 1024):
        with Largest() as seen:
            cluster(make(1, n, 8), n - n // 8, linkage)
        largest.append(seen.elements)
    assert largest[2] <= 4.5 * largest[0] and largest[2] < 1024 * 1024 // 8


def test_ways_that_wait_for_each_other_end():
    distances = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))  # not symmetric, as rounding may have it
    between = distances.masked_fill(torch.eye(8, dtype=torch.bool), torch.inf)
    for linkage in LINKAGES:
        got = reference.clusters(between.clone, torch.ones(1, 8, dtype=torch.bool), torch.tensor([5]), linkage)
        assert len(got.unique()) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(linkage="centroid"), "linkage must be one of"),
        (dict(metric="l1"), "metric must be one of"),
        (dict(metric="euclidean"), "average"),
    ],
)
def test_bad_input_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        cluster(torch.zeros(1, 2, 2), 1, **given)


@pytest.mark.parametrize("strict", [False, True])
def test_one_operator_is_recorded(strict):
    class Joined(torch.nn.Module):
        def forward(self, x, valid):
            return cluster(x, 5, "complete", valid=valid)

    x, valid = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12).expand(2, -1) < 10
    program = torch.export.export(Joined(), (x, valid), strict=strict)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.hf_tokens_kernels.cluster.default in called
    assert torch.equal(program.module()(x, valid), cluster(x, 5, "complete", valid=valid))
