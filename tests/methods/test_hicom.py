"""HICom against a slow loop over one video, written from the description of its two compressions in arXiv:2503.16036."""

import math

import pytest
import torch
from hf_tokens_adapters.token_reducer.hicom import HICom

from hf_tokens import ConfigError, Dims, HIComConfig, get_token_model, measure
from hf_tokens.testing import zoo

D = 8
# per case: frames, height, width, instruction tokens, knobs
CASES = {
    "a picture": (1, 4, 4, 3, {"spatial": 2, "tokens": 3, "heads": 2}),
    "a video": (4, 2, 4, 2, {"spatial": 2, "temporal": 2, "tokens": 5, "heads": 2}),
    "odd sides": (3, 5, 3, 1, {"spatial": 2, "temporal": 2, "tokens": 2, "heads": 4}),
    "local alone": (1, 4, 6, 2, {"spatial": 2, "tokens": 0, "heads": 1}),
    "global alone": (2, 2, 2, 2, {"spatial": 1, "temporal": 1, "tokens": 4, "heads": 1}),
    "more global tokens than fit": (1, 2, 2, 2, {"spatial": 2, "tokens": 9, "heads": 2}),
    "the guide asks": (1, 4, 4, 3, {"spatial": 2, "tokens": 3, "heads": 2, "injection": "direct"}),
    "no instruction": (1, 4, 4, 0, {"spatial": 2, "tokens": 3, "heads": 2}),
    "one token": (1, 1, 1, 2, {"spatial": 2, "tokens": 3, "heads": 2}),
    "as the abstract has it": (3, 5, 3, 2, {"spatial": 2, "temporal": 2, "tokens": 2, "heads": 2, "rule": "abstract"}),
    "four frames to one": (5, 4, 3, 2, {"spatial": 3, "temporal": 4, "tokens": 4, "heads": 2}),
}


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def linear(weight, bias, x):
    return weight @ x + bias


def mlp(p, name, x):
    return linear(p[f"{name}.2.weight"], p[f"{name}.2.bias"], gelu(linear(p[f"{name}.0.weight"], p[f"{name}.0.bias"], x)))


def layer_norm(p, name, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def inject(p, level, x, guide, how):
    """The query that knows the instruction: scaled and shifted by it, or the instruction itself."""
    if how == "direct":
        return mlp(p, f"{level}_guide", guide)[:D]
    both = mlp(p, f"{level}_guide", guide)
    return layer_norm(p, f"{level}_norm", x * (1 + both[:D]) + both[D:])


def cells(size, kernel):
    """Cell of each place: ceil(size / kernel) of them, as even as can be."""
    count = math.ceil(size / kernel)
    return [place * count // size for place in range(size)]


def between(size, count):
    """For each of `count` places on a line of `size`: two places that it lies between, and its share of the second."""
    out = []
    for i in range(count):
        at = max(0.0, (i + 0.5) * size / count - 0.5)
        out.append((int(at), min(int(at) + 1, size - 1), at - int(at)))
    return out


def trilinear(video, counts):
    """A smaller video, each token the mean of the eight that it lies between, {(i, j, k): token}."""
    lines = [between(size, count) for size, count in zip(video.shape, counts, strict=False)]
    small = {}
    for i, (i0, i1, a) in enumerate(lines[0]):
        for j, (j0, j1, b) in enumerate(lines[1]):
            for k, (k0, k1, c) in enumerate(lines[2]):
                corners = [(x, y, z) for x in ((i0, 1 - a), (i1, a)) for y in ((j0, 1 - b), (j1, b)) for z in ((k0, 1 - c), (k1, c))]
                small[i, j, k] = sum(x[1] * y[1] * z[1] * video[x[0], y[0], z[0]] for x, y, z in corners)
    return small


def place_of(i, j, k):
    """The sum over frame, row and column of sin(place / 10000^(2m / d)) at 2m and its cosine at 2m + 1."""
    wave = lambda place, m: (math.sin if m % 2 == 0 else math.cos)(place / 10000 ** (m // 2 * 2 / D))
    return torch.tensor([sum(wave(place, m) for place in (i, j, k)) for m in range(D)], dtype=torch.float64)


def local(p, video, guide, c):
    """One token for each cell: its query attends to the tokens of the cell."""
    t, h, w, _ = video.shape
    ct, ch, cw = cells(t, c.temporal if t > 1 else 1), cells(h, c.spatial), cells(w, c.spatial)
    members = {}
    for i in range(t):
        for j in range(h):
            for k in range(w):
                members.setdefault((ct[i], ch[j], cw[k]), []).append(video[i, j, k])
    out, small = [], trilinear(video, (ct[-1] + 1, ch[-1] + 1, cw[-1] + 1))
    for key in sorted(members):
        tokens = members[key]
        asks = sum(tokens) / len(tokens) if c.rule == "abstract" else small[key]
        query = inject(p, "local", asks, guide, c.injection)
        weights = softmax([float(query @ x) / math.sqrt(D) for x in tokens])
        got = sum(weight * x for weight, x in zip(weights, tokens, strict=True))
        out.append(got + mlp(p, "local_readout", got))
    return out


def everywhere(p, tokens, guide, c, count):
    """Learnable queries that know the instruction attend, head by head, to all tokens."""
    out, width = [], D // c.heads
    keys, values = ([p[f"{name}.weight"] @ x for x in tokens] for name in ("wk", "wv"))
    for learnt in p["queries"][:count]:
        query = inject(p, "global", learnt, guide, c.injection)
        asked = p["wq.weight"] @ query
        got = torch.zeros(D, dtype=torch.float64)
        for head in range(c.heads):
            part = slice(head * width, (head + 1) * width)
            weights = softmax([float(asked[part] @ key[part]) / math.sqrt(width) for key in keys])
            got[part] = sum(weight * value[part] for weight, value in zip(weights, values, strict=True))
        got = query + p["wo.weight"] @ got
        out.append(got + mlp(p, "global_readout", got))
    return out


def naive(p, video, words, c):
    """Local tokens at the first place of their cell, global ones at the last places that are left; (m d) in order of places."""
    t, h, w, _ = video.shape
    guide = sum(words) / len(words) if len(words) else torch.zeros(D, dtype=torch.float64)
    small = local(p, video, guide, c) if (c.spatial, c.temporal) != (1, 1) else [x for x in video.flatten(0, 2)]
    ct, ch, cw = cells(t, c.temporal if t > 1 else 1), cells(h, c.spatial), cells(w, c.spatial)
    first = {}
    for i in range(t):
        for j in range(h):
            for k in range(w):
                first.setdefault((ct[i], ch[j], cw[k]), (i * h + j) * w + k)
    taken = {place: small[n] for n, place in enumerate(first[key] for key in sorted(first))}
    free = [place for place in range(t * h * w) if place not in taken]
    count = min(c.tokens, len(free))
    placed = [video[i, j, k] + (0 if c.rule == "abstract" else place_of(i, j, k)) for i in range(t) for j in range(h) for k in range(w)]
    wide = everywhere(p, placed, guide, c, count)
    taken |= dict(zip(free[len(free) - count :], wide, strict=True))
    return torch.stack([taken[place] for place in sorted(taken)])


def build(config, seed=0):
    torch.manual_seed(seed)
    method = HICom(config, Dims(D, 2, 2, 4, 0, 4, "text", True)).double().requires_grad_(False)
    for parameter in method.parameters():
        parameter.normal_(std=0.5)
    return method, dict(method.named_parameters())


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    t, h, w, asked, knobs = CASES[case]
    method, p = build(HIComConfig(**knobs))
    n, before = t * h * w, 2
    hidden = torch.randn(2, before + n + asked, D, dtype=torch.float64)
    index = torch.arange(before, before + n).view(1, t, h, w) + hidden.shape[1] * torch.arange(2).view(2, 1, 1, 1)
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool)
    words = torch.arange(hidden.shape[1]).expand(2, -1) >= before + n
    found = method.assign(hidden=hidden, mask=mask, pictures=[index], instruction=words)
    got = hidden if found is None else found.apply(hidden)
    for row in range(2):
        video, question = hidden[row, before : before + n].view(t, h, w, D), hidden[row, before + n :]
        want = naive(p, video, question, method.config)
        torch.testing.assert_close(got[row], torch.cat([hidden[row, :before], want, question]))


def test_it_starts_from_what_the_tokens_say():
    torch.manual_seed(0)
    method = HICom(HIComConfig(spatial=2, tokens=0, heads=2), Dims(D, 2, 2, 4, 0, 4, "text", True))
    hidden = torch.ones(1, 4, D)
    found = method.assign(hidden, torch.ones(1, 4, dtype=torch.bool), [torch.arange(4).view(1, 1, 2, 2)], torch.zeros(1, 4).bool())
    torch.testing.assert_close(found.apply(hidden), torch.ones(1, 1, D))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="HIComConfig.heads must divide the width of the stream"):
        get_token_model(zoo.build("llava").model, HIComConfig(heads=5))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_language_model_gets_fewer_tokens(family):
    specimen = zoo.build(family)
    base = measure(specimen.model, **specimen.inputs, use_cache=True)
    got = measure(get_token_model(specimen.model, HIComConfig(tokens=1, heads=2)), **specimen.inputs, use_cache=True)
    assert got.kv_bytes < base.kv_bytes and got.flops < base.flops
