"""Clustering in parallel rounds against a plain loop that joins one pair at a time."""

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hf_tokens_kernels import agglomerate

LINKAGES = ("single", "complete", "average", "ward")
KINDS = ("random", "small integers", "all equal", "on a line", "twins", "float32")


def spread(distance, cluster):
    """The sum of squares within a cluster, by the squared distances of its members, as an exact fraction."""
    return sum((Fraction(float(distance[a, b])) for a, b in combinations(cluster, 2)), Fraction()) / len(cluster)


def gap(distance, one, other, linkage):
    if linkage == "ward":
        return float(spread(distance, one + other) - spread(distance, one) - spread(distance, other))
    reduce = {"single": min, "complete": max, "average": lambda pairs: sum(pairs) / len(pairs)}[linkage]
    return reduce([float(distance[a, b]) for a in one for b in other])


def one_at_a_time(distance, target, linkage, tokens):
    """Clusters of one sample as lists of tokens; of equally near pairs the first is joined."""
    clusters = [[token] for token in tokens]
    while len(clusters) > max(1, target):
        gaps = {(i, j): gap(distance, clusters[i], clusters[j], linkage) for i, j in combinations(range(len(clusters)), 2)}
        i, j = min(gaps, key=lambda pair: (gaps[pair], pair))
        clusters[i] = sorted(clusters[i] + clusters.pop(j))
    return clusters


def expected(distance, target, linkage, valid, protected):
    out = torch.full(distance.shape[:2], -1)
    for row in range(len(distance)):
        tokens = [t for t in range(distance.shape[1]) if valid[row, t]]
        free = [t for t in tokens if not protected[row, t]]
        for cluster in one_at_a_time(distance[row], target[row], linkage, free) + [[t] for t in tokens if protected[row, t]]:
            out[row, cluster] = cluster[0]
    return out


def make(kind, b, n, generator):
    distance = torch.rand(b, n, n, generator=generator, dtype=torch.float64)
    if kind == "small integers":
        distance = (distance * 4).floor()
    elif kind == "all equal":
        distance = torch.ones_like(distance)
    elif kind == "on a line":  # the gap to the left grows, so that every round has a single pair
        place = torch.arange(n).double() ** 2
        distance = (place[:, None] - place).abs().expand(b, n, n)
    elif kind == "twins":
        place = torch.rand(b, (n + 1) // 2, 2, generator=generator, dtype=torch.float64).repeat(1, 2, 1)[:, :n]
        distance = torch.cdist(place, place)
    elif kind == "float32":
        distance = distance.float()
    return torch.maximum(distance, distance.transpose(1, 2))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_is_the_loop(n, kind, linkage):
    generator = torch.Generator().manual_seed(n)
    distance = make(kind, 4, n, generator)
    all_, none = torch.ones(4, n, dtype=torch.bool), torch.zeros(4, n, dtype=torch.bool)
    for target in sorted({1, 2, (n + 1) // 2, max(1, n - 1), n, n + 3}):
        got = agglomerate(distance, target, linkage)
        assert got.tolist() == expected(distance, [target] * 4, linkage, all_, none).tolist(), target


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("kind", ["random", "small integers"])
def test_rows_with_targets_padding_and_protected_tokens_of_their_own(kind, linkage):
    generator = torch.Generator().manual_seed(0)
    distance = make(kind, 8, 11, generator)
    valid = torch.rand(8, 11, generator=generator) < 0.7
    valid[0], valid[1] = True, False
    valid[2] = torch.arange(11) == 5
    protected = torch.rand(8, 11, generator=generator) < 0.2
    protected[3] = True
    target = torch.tensor([1, 3, 2, 4, 3, 11, 5, 2])
    got = agglomerate(distance.masked_fill(~(valid[:, None] & valid[:, :, None]), torch.nan), target, linkage, valid, protected)
    assert got.tolist() == expected(distance, target.tolist(), linkage, valid, protected).tolist()


@pytest.mark.parametrize("linkage", LINKAGES)
def test_row_of_a_batch_is_the_row_alone(linkage):
    distance = make("random", 3, 40, torch.Generator().manual_seed(3))
    target = torch.tensor([1, 20, 39])
    alone = [agglomerate(distance[i : i + 1], int(target[i]), linkage) for i in range(3)]
    assert torch.equal(agglomerate(distance, target, linkage), torch.cat(alone))


def test_few_rounds(monkeypatch):
    from hf_tokens_kernels.agglomerate.reference import Clusters

    rounds, join = [], Clusters.join
    monkeypatch.setattr(Clusters, "join", lambda *given: rounds.append(1) or join(*given))
    points = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0))
    agglomerate(torch.cdist(points, points), 100, "average")
    assert len(rounds) < 40


@pytest.mark.parametrize("clusters", [1, 3, 20, 59])
def test_ward_is_that_of_scipy(clusters):
    from scipy.cluster import hierarchy

    points = torch.randn(60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.tensor(hierarchy.fcluster(hierarchy.linkage(points.numpy(), "ward"), clusters, "maxclust"))
    ours = agglomerate((torch.cdist(points, points) ** 2)[None], clusters, "ward")[0]
    assert torch.equal(ours[:, None] == ours, theirs[:, None] == theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_read_exactly(dtype):
    distance = make("random", 2, 9, torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(agglomerate(distance, 4), agglomerate(distance.float(), 4))


def test_unknown_linkage_is_refused():
    with pytest.raises(ValueError, match="linkage must be one of"):
        agglomerate(torch.zeros(1, 2, 2), 1, "centroid")
