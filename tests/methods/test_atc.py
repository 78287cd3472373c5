"""ATC against a slow loop over one sample, written from the equations of arXiv:2409.11923."""

import copy
import math
from itertools import combinations

import pytest
import torch
from hf_tokens_adapters.token_reducer.atc import ATC
from peft import LoraConfig
from transformers import (
    DeiTConfig,
    DeiTModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_tokens import ATCConfig, DeepPromptConfig, UnsupportedError, VQTConfig, anatomy, get_token_model, load, measure
from hf_tokens.testing import zoo

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
    """How many of n tokens stay: floor(r n), one at least; the small step undoes the rounding of r n."""
    return min(n, max(1, math.floor(rate * n + 1e-9)))


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


def parts(block):
    """The two norms of a block, and what its two updates are multiplied by."""
    names = dict(block.named_children())
    if "norm1" in names:
        return block.norm1, block.norm2, block.layer_scale1.lambda1.double(), block.layer_scale2.lambda1.double()
    return block.layernorm_before, block.layernorm_after, 1, 1


def naive_block(block, hidden, sizes, heads, rate=None, linkage="average", prefix=1, valid=None, proportional=True):
    """A ViT block that merges between attention and MLP; rate None merges nothing. Returns hidden, sizes and clusters."""
    valid = hidden.shape[0] if valid is None else valid
    before, after, first, second = parts(block)
    normed = [layer_norm(before, x.double()) for x in hidden]
    keys = [linear(block.attention.k_proj, x) for x in normed]
    values = [linear(block.attention.v_proj, x) for x in normed]
    rows, clusters = [], [[token] for token in range(len(hidden))]
    counts = sizes if proportional else torch.ones_like(sizes)
    for x, start in zip(normed, hidden, strict=True):
        query = linear(block.attention.q_proj, x)
        mixed = proportional_attention(query, keys[:valid], values[:valid], counts[:valid], heads)
        rows.append(start.double() + first * linear(block.attention.o_proj, mixed))
    middle = torch.stack(rows)
    if rate is not None:
        split = torch.stack(keys).unflatten(-1, (heads, -1)).transpose(0, 1)  # h n d
        clusters, middle, sizes = naive(split, middle, sizes, rate, linkage, prefix, valid)
    out = []
    for x in middle:
        inner = linear(block.mlp.fc1, layer_norm(after, x))
        out.append(x + second * linear(block.mlp.fc2, inner * (1 + torch.erf(inner / math.sqrt(2))) / 2))
    return torch.stack(out), sizes, clusters


def naive_stream(blocks, hidden, heads, rates, **knobs):
    """What every token of one sample has behind each block, that of the cluster that it is in (layers n d), and the sizes at the end."""
    sizes, members, outputs = torch.ones(len(hidden)).double(), [[token] for token in range(len(hidden))], []
    prefix = knobs.get("prefix", 1)
    left = len(hidden) - prefix  # of all patches, a share that falls block by block
    for layer, block in enumerate(blocks):
        rate, now = rates.get(layer), len(hidden) - prefix
        left *= 1 if rate is None else rate
        rate = None if rate is None or not now else max(1, math.floor(left + 1e-9)) / now
        hidden, sizes, clusters = naive_block(block, hidden, sizes, heads, rate, **knobs)
        members = [[token for inner in cluster for token in members[inner]] for cluster in clusters]
        place = {token: slot for slot, cluster in enumerate(members) for token in cluster}
        outputs.append(torch.stack([hidden[place[token]] for token in sorted(place)]))
    return torch.stack(outputs), sizes


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


@pytest.mark.parametrize(("n", "rate", "target"), [(196, 0.5, 98), (196, 0.25, 49), (10, 0.7, 7), (3, 0.5, 1), (5, 1.0, 5), (5, 0.0, 1)])
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
    out, sizes, _ = naive_block(block, hidden, torch.ones(7), 2, rate=0.5)
    assert out.shape == (4, 8)
    assert float(sizes.sum()) == 7


# per case: layers of the model, picture (height, width), config, prefix
MODELS = {
    "defaults": (4, (12, 8), {}),
    "odd sizes": (3, (20, 12), {"layers": (0, 2), "keep_rate": 0.7}),
    "every block": (3, (12, 12), {"layers": (0, 1, 2), "keep_rate": 0.6}),
    "to one token at once": (2, (12, 8), {"layers": (0,), "keep_rate": 0.01}),
    "on, with one token left": (3, (12, 8), {"layers": (0, 1), "keep_rate": 0.2}),
    "in the last block": (2, (12, 8), {"layers": (-1,), "keep_rate": 0.5}),
    "keep rate 1": (2, (12, 8), {"layers": (0, 1), "keep_rate": 1.0}),
    "one patch": (2, (4, 4), {"layers": (0, 1)}),
    "not proportional": (3, (12, 8), {"layers": (0, 1), "proportional_attention": False}),
    "single linkage": (3, (12, 8), {"layers": (0, 1), "linkage": "single"}),
    "complete linkage": (3, (12, 8), {"layers": (0, 1), "linkage": "complete"}),
}


def pictures(height, width, batch=2, seed=3):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)).double()


def blocks_of(model):
    return anatomy(model).streams[0].blocks


def inside(model, pixels, **more):
    """What enters the first block, and what comes out of each block, (layers b n d)."""
    with torch.no_grad():
        states = model(pixels, output_hidden_states=True, **more).hidden_states
    return states[0], torch.stack(states[1:])


def expected(model, entering, config, prefix, valid=None):
    """`naive_stream` for every sample, (layers b n d)."""
    blocks, heads = blocks_of(model), anatomy(model).streams[0].heads
    layers = config.layers or ATC.default_layers(config, len(blocks))
    rates = {layer % len(blocks): config.keep_rate for layer in layers}
    knobs = {"linkage": config.linkage, "prefix": prefix, "proportional": config.proportional_attention}
    return torch.stack([naive_stream(blocks, sample, heads, rates, **knobs)[0] for sample in entering], dim=1)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", MODELS)
def test_vit_is_the_loop(case):
    layers, size, knobs = MODELS[case]
    config, model = ATCConfig(**knobs), tiny(layers)
    pixels = pictures(*size)
    base = inside(model, pixels, interpolate_pos_encoding=True)[1]
    surgery = get_token_model(model, config)
    entering, got = inside(surgery, pixels, interpolate_pos_encoding=True)
    want = expected(model, entering, config, 1)
    close(got, want)
    assert torch.equal(got, base) == (config.keep_rate == 1 or entering.shape[1] == 2)
    with torch.no_grad():
        last = surgery(pixels, interpolate_pos_encoding=True).last_hidden_state
    close(last, torch.stack([torch.stack([layer_norm(model.layernorm, x) for x in sample]) for sample in want[-1]]))


SMALL = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, patch_size=4, initializer_range=0.5, attn_implementation="sdpa")
PREFIXED = {
    "class and distillation": (DeiTModel, DeiTConfig(intermediate_size=12, image_size=12, **SMALL), 2),
    "class": (Dinov2Model, Dinov2Config(image_size=12, layerscale_value=0.7, **SMALL), 1),
    "class and registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(image_size=12, num_register_tokens=3, **SMALL), 4),
}


@pytest.mark.parametrize("kind", PREFIXED)
def test_special_tokens_stay_alone(kind):
    cls, settings, prefix = PREFIXED[kind]
    torch.manual_seed(0)
    model = cls(settings).double().eval().requires_grad_(False)
    for parameter in model.embeddings.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    config = ATCConfig(keep_rate=0.4, layers=(0, 1))
    entering, got = inside(get_token_model(model, config), pictures(12, 12))
    assert entering.shape[1] == 9 + prefix
    close(got, expected(model, entering, config, prefix))
    alone = [len({tuple(token) for token in got[-1, 0].tolist()[:end]}) for end in (prefix, None)]
    assert alone == [prefix, prefix + 1]  # 9 patches to 3 to 1


def test_dense_head_gets_every_place():
    torch.manual_seed(0)
    settings = Dinov2Config(image_size=12, out_features=["stage1", "stage3"], reshape_hidden_states=True, **SMALL)
    model = Dinov2Backbone(settings).double().eval().requires_grad_(False)
    pixels = pictures(12, 16)
    shapes = [tuple(m.shape) for m in model(pixels).feature_maps]
    config = ATCConfig(keep_rate=0.3, layers=(0, 1))
    entering = []
    handle = blocks_of(model)[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    maps = get_token_model(model, config)(pixels).feature_maps
    handle.remove()
    assert [tuple(m.shape) for m in maps] == shapes == [(2, 8, 3, 4)] * 2
    want = expected(model, entering[0], config, 1)
    for got, layer in zip(maps, (0, 2), strict=True):
        normed = torch.stack([torch.stack([layer_norm(model.layernorm, x) for x in sample]) for sample in want[layer]])
        close(got.flatten(2).mT, normed[:, 1:])


def test_padding_is_not_clustered():
    torch.manual_seed(0)
    settings = Siglip2VisionConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, patch_size=2, num_patches=16,
        attn_implementation="sdpa",
    )  # fmt: skip
    model = Siglip2VisionModel(settings).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    surgery = get_token_model(model, ATCConfig(keep_rate=0.5, layers=(0, 1)))
    shapes = torch.tensor([[3, 5], [2, 3], [1, 1]])
    patches = torch.randn(3, 15, 12).double()
    mask = (torch.arange(15) < shapes.prod(dim=1, keepdim=True)).long()
    with torch.no_grad():
        whole = surgery(patches, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
        for row, n in enumerate(shapes.prod(dim=1)):
            part = slice(row, row + 1)
            alone = surgery(patches[part, :n], pixel_attention_mask=mask[part, :n], spatial_shapes=shapes[part]).last_hidden_state
            close(whole[part, :n], alone)


# per case: knobs, tokens of a picture (one class token), tokens that are left behind each of 4 blocks
COUNTS = {
    "keep rate": ({"keep_rate": 0.5, "layers": (1, 2)}, 10, [10, 5, 3, 3]),
    "a number": ({"keep_rate": 1.0, "merged": 2}, 10, [8, 6, 4, 2]),
    "a falling number": ({"keep_rate": 1.0, "merged": 2, "schedule": "decrease"}, 10, [6, 4, 3, 3]),
    "more than there are": ({"keep_rate": 1.0, "merged": 50}, 10, [2, 2, 2, 2]),
    "both": ({"keep_rate": 0.5, "merged": 1, "layers": (0,)}, 10, [4, 4, 4, 4]),
}


@pytest.mark.parametrize("case", COUNTS)
def test_number_of_tokens_that_stay(case):
    knobs, n, left = COUNTS[case]
    model = get_token_model(tiny(4), ATCConfig(**knobs))
    got = inside(model, pictures(12, 12, batch=1), interpolate_pos_encoding=True)[1]
    assert [len({tuple(token) for token in layer[0].tolist()}) for layer in got] == left
    cost = measure(model, pixel_values=pictures(12, 12, batch=1), interpolate_pos_encoding=True)
    assert cost.tokens == sum([n, *left[:-1]])


def test_the_counts_of_the_authors_code_are_shares_of_all_patches():
    count = lambda **knobs: distinct(get_token_model(tiny(12), ATCConfig(**knobs)))[2::3]
    assert count() == [1 + n for n in (196, 98, 49, 24)]
    assert count(of="left") == [1 + n for n in (196, 98, 49, 25)]


def distinct(model):
    """How many tokens are left behind each block."""
    with torch.no_grad():
        got = model(pictures(56, 56, batch=1), interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[1:]
    return [len({tuple(token) for token in layer[0].tolist()}) for layer in got]


def test_default_layers_of_the_paper():
    assert ATC.default_layers(ATCConfig(), 12) == (3, 6, 9)
    assert ATC.default_layers(ATCConfig(merged=16), 12) == tuple(range(12))


def test_checkpointed_training_has_the_same_gradients():
    def gradients(checkpointing):
        model = tiny(4).float()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        surgery = get_token_model(model, ATCConfig(keep_rate=0.6))
        model.requires_grad_(True)
        surgery.train()
        surgery(pictures(12, 12).float(), interpolate_pos_encoding=True).last_hidden_state.square().sum().backward()
        return {name: p.grad for name, p in surgery.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and len(plain) > 60
    torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_precisions_and_backends(dtype, backend):
    model = tiny(4)
    pixels = pictures(12, 16)
    surgery = get_token_model(model, ATCConfig())
    want = inside(surgery, pixels, interpolate_pos_encoding=True)[1]
    model.set_attn_implementation(backend)
    model.to(dtype)
    got = inside(surgery, pixels.to(dtype), interpolate_pos_encoding=True)[1]
    assert got.dtype == dtype and got.isfinite().all()
    if dtype == torch.float32:
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_saved_and_stacked_and_taken_out(tmp_path):
    pixels = pictures(8, 8)
    base = tiny(4)(pixels).last_hidden_state
    config = ATCConfig(keep_rate=0.5, linkage="complete")
    stacked = get_token_model(tiny(4), [config, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)])
    out = stacked(pixels).last_hidden_state
    assert not torch.allclose(out, get_token_model(tiny(4), config)(pixels).last_hidden_state)
    stacked.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, tiny(4))(pixels).last_hidden_state, out)
    with stacked.disable_adapter():
        assert torch.equal(stacked(pixels).last_hidden_state, base)
    assert torch.equal(stacked.unload()(pixels).last_hidden_state, base)


@pytest.mark.parametrize("guest", ["deep-prompt", "vqt"])
def test_tokens_that_are_there_for_one_block_do_not_join(guest):
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=16, patch_size=4, num_labels=3
    )
    base = ViTForImageClassification(ViTConfig(**sizes)).double().eval()
    for parameter in base.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    base.vit.embeddings.position_embeddings.data[:, 1:] = 0  # patches alike are tokens alike
    patches = torch.randn(2, 3, 2, 4, 4, 4, dtype=torch.float64).expand(2, 3, 2, 4, 4, 4)
    pixels = torch.stack([patches, patches], dim=2).reshape(2, 3, 4, 4, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 16, 16)

    def logits(*more):
        torch.manual_seed(1)
        model = get_token_model(copy.deepcopy(base), [{"method": guest, "tokens": 3}, *more]).eval()
        draw = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            if ".hf_tokens." in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
        with torch.no_grad():
            return model(pixel_values=pixels).logits, measure(model, pixel_values=pixels).tokens

    (merged, fewer), (apart, all_of_them) = logits(ATCConfig(keep_rate=0.5, layers=(1,))), logits()
    close(merged, apart)
    assert fewer < all_of_them


@pytest.mark.parametrize("vqt_first", [True, False])
def test_tokens_that_only_ask_leave_the_merging_alone(vqt_first):
    """A VQT whose head starts at zero adds nothing, and no token sees its queries: what is left is ATC."""
    stack = [VQTConfig(tokens=3), ATCConfig()]
    want = get_token_model(zoo.build("vit").model, ATCConfig())
    got = get_token_model(zoo.build("vit").model, stack if vqt_first else stack[::-1])
    inputs = zoo.build("vit").inputs
    with torch.no_grad():
        assert torch.allclose(got(**inputs).logits, want(**inputs).logits, atol=1e-6)


def test_prompts_pass_the_block_unmerged():
    """Between attention and MLP the patches become means of patches; prompts and class token pass as they are."""
    specimen = zoo.build("vit")
    block, given, middle = specimen.model.vit.layers[1], [], []
    get_token_model(specimen.model, [DeepPromptConfig(tokens=3, layers=(1,)), ATCConfig(layers=(1,), keep_rate=0.5)])
    block.layernorm_after.register_forward_pre_hook(lambda module, args: given.append(args[0]), prepend=True)
    block.layernorm_after.register_forward_pre_hook(lambda module, args: middle.append(args[0]))
    specimen.run()
    assert given[0].shape[1] == 3 + 17 and middle[0].shape[1] == 3 + 1 + 8
    assert torch.equal(given[0][:, :4], middle[0][:, :4])  # prompts and class token
    assert middle[0][:, 4:].amax() <= given[0][:, 4:].amax() and middle[0][:, 4:].amin() >= given[0][:, 4:].amin()


@pytest.mark.parametrize("family", ["sam", "qwen2_vl"])
def test_tokens_that_lie_otherwise_are_refused(family):
    with pytest.raises(UnsupportedError, match="needs tokens that lie as 'b n d'"):
        get_token_model(zoo.build(family).model, ATCConfig())
