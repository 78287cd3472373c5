"""ATC against a slow loop over one sample, written from the equations of arXiv:2409.11923."""

import math
from itertools import combinations

import pytest
import torch
from transformers import ViTConfig, ViTModel

LINKAGES = ("single", "complete", "average")

# per case: tokens n, protected tokens at the front, valid tokens (None: all), keep rate r, size of each token (None: 1)
CASES = {
    "usual": (9, 1, None, 0.5, None),
    "odd sizes": (8, 1, None, 0.7, None),
    "weighted": (7, 1, None, 0.5, (1, 3, 1, 2, 5, 1, 4)),
    "no class token": (6, 0, None, 0.5, None),
    "two protected": (7, 2, None, 0.25, None),
    "nothing to merge": (6, 1, None, 1.0, None),
    "all into one": (6, 1, None, 0.01, None),
    "one token": (2, 1, None, 0.5, None),
    "class token alone": (1, 1, None, 0.5, None),
    "padded but one": (6, 1, 2, 0.5, None),
    "some padding": (9, 1, 6, 0.5, (1, 2, 1, 1, 3, 1, 1, 1, 1)),
}


def cosine_distance(a, b):
    return 1 - float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def linkage_distance(first, second, distance, linkage):
    """D(I, J) = min, max or mean of D(i, j) over i in I, j in J; the size of a token plays no part."""
    pairs = [distance[i][j] for i in first for j in second]
    return {"single": min(pairs), "complete": max(pairs), "average": sum(pairs) / len(pairs)}[linkage]


def kept(n, rate):
    """How many of n tokens stay: ceil(r n), one at least; the small step undoes the rounding of r n."""
    return min(n, max(1, math.ceil(rate * n - 1e-9)))


def agglomerate(features, target, linkage):
    """Clusters (lists of rows), from single rows up, the two nearest joined until `target` are left.

    Among equal distances the pair that starts first goes first; clusters stand in the order of their first row.
    """
    distance = [[cosine_distance(a, b) for b in features] for a in features]
    clusters = [[row] for row in range(len(features))]
    while len(clusters) > target:
        gaps = {pair: linkage_distance(clusters[pair[0]], clusters[pair[1]], distance, linkage)
                for pair in combinations(range(len(clusters)), 2)}  # fmt: skip
        i, j = min(gaps, key=lambda pair: (gaps[pair], pair))
        clusters[i] = sorted(clusters[i] + clusters[j])
        del clusters[j]
    return clusters


def naive(keys, hidden, sizes, rate, linkage, prefix=1, valid=None):
    """Clusters (lists of tokens), merged hidden (m d) and sizes (m) of one sample.

    keys are h n d; their mean over heads is clustered. Protected tokens stay as they are, padding vanishes.
    """
    valid = hidden.shape[0] if valid is None else valid
    tokens = list(range(prefix, valid))
    features = [sum(head[token].double() for head in keys) / len(keys) for token in tokens]
    found = agglomerate(features, kept(len(tokens), rate), linkage) if tokens else []
    clusters = [[token] for token in range(prefix)] + [[tokens[row] for row in cluster] for cluster in found]
    weights = [sum(float(sizes[token]) for token in cluster) for cluster in clusters]
    merged = [
        sum(float(sizes[token]) * hidden[token].double() for token in cluster) / weight
        for cluster, weight in zip(clusters, weights, strict=True)
    ]
    return clusters, torch.stack(merged), torch.tensor(weights, dtype=torch.float64)


def linear(layer, x):
    return layer.weight.double() @ x + layer.bias.double()


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + layer.eps) * layer.weight.double() + layer.bias.double()


def proportional_attention(query, keys, values, sizes, heads):
    """softmax(q K^T / sqrt(d) + log s) V, head by head, for one query."""
    width = len(query) // heads
    out = torch.zeros(len(query), dtype=torch.float64)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        powers = [float(s) * math.exp(float(key[part] @ query[part]) / math.sqrt(width)) for key, s in zip(keys, sizes, strict=True)]
        for power, value in zip(powers, values, strict=True):
            out[part] += power / sum(powers) * value[part]
    return out


def naive_block(block, hidden, sizes, heads, rate=None, linkage="average", prefix=1, valid=None):
    """A ViT block that merges between attention and MLP; rate None merges nothing. Returns hidden and sizes."""
    valid = hidden.shape[0] if valid is None else valid
    normed = [layer_norm(block.layernorm_before, x.double()) for x in hidden]
    keys = [linear(block.attention.k_proj, x) for x in normed]
    values = [linear(block.attention.v_proj, x) for x in normed]
    rows = []
    for x, start in zip(normed, hidden, strict=True):
        query = linear(block.attention.q_proj, x)
        mixed = proportional_attention(query, keys[:valid], values[:valid], sizes[:valid], heads)
        rows.append(start.double() + linear(block.attention.o_proj, mixed))
    middle = torch.stack(rows)
    if rate is not None:
        split = torch.stack(keys).unflatten(-1, (heads, -1)).transpose(0, 1)  # h n d
        _, middle, sizes = naive(split, middle, sizes, rate, linkage, prefix, valid)
    out = []
    for x in middle:
        inner = linear(block.mlp.fc1, layer_norm(block.layernorm_after, x))
        out.append(x + linear(block.mlp.fc2, inner * (1 + torch.erf(inner / math.sqrt(2))) / 2))
    return torch.stack(out), sizes


def tiny(layers, seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        attn_implementation="sdpa", initializer_range=0.5,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).double().eval().requires_grad_(False)


def sample(case):
    n, prefix, valid, rate, sizes = CASES[case]
    torch.manual_seed(1)
    sizes = torch.ones(n).double() if sizes is None else torch.tensor(sizes).double()
    return torch.randn(2, n, 4).double(), torch.randn(n, 8).double(), sizes, rate, prefix, valid


def by_update_rule(features, target, linkage):
    """The same clusters by Lance and Williams: only the row of the joined pair is computed anew."""
    n = len(features)
    distance = {(i, j): cosine_distance(features[i], features[j]) for i, j in combinations(range(n), 2)}
    members = {i: [i] for i in range(n)}
    gap = lambda a, b: distance[min(a, b), max(a, b)]
    while len(members) > target:
        i, j = min(combinations(members, 2), key=lambda pair: gap(*pair))
        for other in set(members) - {i, j}:
            a, b = gap(i, other), gap(j, other)
            mean = (len(members[i]) * a + len(members[j]) * b) / (len(members[i]) + len(members[j]))
            distance[min(i, other), max(i, other)] = {"single": min(a, b), "complete": max(a, b), "average": mean}[linkage]
        members[i] = sorted(members[i] + members.pop(j))
    return sorted(members.values())


def by_spanning_tree(features, target):
    """Single linkage by Kruskal: join the ends of the shortest edges until `target` trees are left."""
    tree = list(range(len(features)))
    edges = sorted(combinations(range(len(features)), 2), key=lambda e: cosine_distance(features[e[0]], features[e[1]]))
    for i, j in edges:
        if len(set(tree)) > target and tree[i] != tree[j]:
            tree = [min(tree[i], tree[j]) if root in (tree[i], tree[j]) else root for root in tree]
    return sorted([row for row, root in enumerate(tree) if root == name] for name in set(tree))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("case", CASES)
def test_naive_keeps_the_books(case, linkage):
    keys, hidden, sizes, rate, prefix, valid = sample(case)
    clusters, merged, weights = naive(keys, hidden, sizes, rate, linkage, prefix, valid)
    real = hidden.shape[0] if valid is None else valid
    assert sorted(token for cluster in clusters for token in cluster) == list(range(real))
    assert clusters[:prefix] == [[token] for token in range(prefix)]
    assert len(clusters) == prefix + (kept(real - prefix, rate) if real > prefix else 0)
    assert float(weights.sum()) == float(sizes[:real].sum())
    torch.testing.assert_close((weights[:, None] * merged).sum(0), (sizes[:, None] * hidden)[:real].sum(0), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("target", [1, 2, 4, 7, 11])
def test_naive_agrees_with_the_update_rule(target, linkage):
    torch.manual_seed(2)
    features = torch.randn(11, 3).double()
    clusters = agglomerate(features, target, linkage)
    assert sorted(clusters) == by_update_rule(features, target, linkage)
    if linkage == "single":
        assert sorted(clusters) == by_spanning_tree(features, target)


def test_naive_linkages_differ_where_a_chain_competes_with_a_ball():
    # degrees on the circle: a chain, and a looser pair far from it
    angles = torch.tensor([0.0, 18, 40, 61, 130, 155]).double() * math.pi / 180
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert agglomerate(features, 3, "single") == [[0, 1, 2, 3], [4], [5]]
    assert agglomerate(features, 3, "complete") == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(("n", "rate", "target"), [(196, 0.5, 98), (196, 0.25, 49), (10, 0.7, 7), (3, 0.5, 2), (5, 1.0, 5), (5, 0.0, 1)])
def test_naive_counts_what_stays(n, rate, target):
    assert kept(n, rate) == target


def test_naive_block_without_merging_is_the_block():
    block = tiny(1).layers[0]
    torch.manual_seed(1)
    hidden = torch.randn(5, 8).double()
    torch.testing.assert_close(naive_block(block, hidden, torch.ones(5), 2)[0], block(hidden[None])[0], rtol=1e-10, atol=1e-10)


def test_naive_block_reads_a_token_of_size_s_as_s_equal_tokens():
    block = tiny(1).layers[0]
    torch.manual_seed(1)
    hidden = torch.randn(4, 8).double()
    sizes = torch.tensor([1, 3, 1, 2])
    merged = naive_block(block, hidden, sizes, 2)[0]
    spread = naive_block(block, hidden.repeat_interleave(sizes, 0), torch.ones(7), 2)[0]
    torch.testing.assert_close(merged.repeat_interleave(sizes, 0), spread, rtol=1e-10, atol=1e-10)


def test_naive_block_merges_between_attention_and_mlp():
    block = tiny(1).layers[0]
    torch.manual_seed(1)
    hidden = torch.randn(7, 8).double()
    out, sizes = naive_block(block, hidden, torch.ones(7), 2, rate=0.5)
    assert out.shape == (4, 8)
    assert float(sizes.sum()) == 7
