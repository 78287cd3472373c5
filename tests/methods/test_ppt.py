"""PPT against a slow loop over one sample, written from the equations of arXiv:2310.01812."""

import math

import pytest
import torch
from hf_tokens_adapters.token_reducer.ppt import PPT
from transformers import ViTConfig, ViTModel

from hf_tokens import Dims, PPTConfig, anatomy, get_token_model, measure

# per case: tokens n, special tokens in front, real tokens (None: all), r, tau, sizes
CASES = {
    "prune": (12, 1, None, 3, 0.0, None),
    "pool": (12, 1, None, 3, 1.0, None),
    "pool, odd and weighted": (9, 1, None, 2, 1.0, (1, 3, 1, 2, 5, 1, 4, 1, 2)),
    "prune, weighted": (9, 1, None, 2, 0.0, (1, 3, 1, 2, 5, 1, 4, 1, 2)),
    "two special tokens": (9, 2, None, 3, 1.0, None),
    "no special token": (8, 0, None, 3, 1.0, None),
    "no special token, prune": (8, 0, None, 3, 0.0, None),
    "more than there are": (7, 1, None, 99, 1.0, None),
    "more than there are, prune": (7, 1, None, 99, 0.0, None),
    "one token": (2, 1, None, 5, 1.0, None),
    "the class token alone": (1, 1, None, 5, 0.0, None),
    "padding": (11, 1, 6, 2, 1.0, None),
    "padding, prune": (11, 1, 6, 2, 0.0, None),
    "padded but one": (5, 1, 2, 2, 1.0, None),
}


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def attention_of_the_class_token(queries, keys, prefix, real):
    """What each token gets from the class token, summed over heads; from all tokens on average where there is none."""
    askers = [0] if prefix else list(range(real))
    got = [0.0] * real
    for head in range(len(queries)):
        for asker in askers:
            row = softmax([float(queries[head][asker] @ keys[head][token]) / math.sqrt(keys.shape[-1]) for token in range(real)])
            got = [total + part / len(askers) for total, part in zip(got, row, strict=True)]
    return got


def significance(queries, keys, values, prefix, real):
    """S_j of the image tokens: attention times the norm of the value over all heads, as a share of their sum."""
    got = attention_of_the_class_token(queries, keys, prefix, real)
    size = [math.sqrt(sum(float(values[head][token] @ values[head][token]) for head in range(len(values)))) for token in range(real)]
    raw = {token: got[token] * size[token] for token in range(prefix, real)}
    return {token: value / sum(raw.values()) for token, value in raw.items()}


def variance(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def bipartite(keys, prefix, real, r):
    """Pairs (source, destination): every second token is a source, each goes to its most alike destination, the r most alike of them."""
    mean = [sum(keys[head][token] for head in range(len(keys))) / len(keys) for token in range(real)]
    cosine = lambda i, j: float(mean[i] @ mean[j]) / math.sqrt(float(mean[i] @ mean[i]) * float(mean[j] @ mean[j]))
    sources = [token for token in range(prefix, real) if token % 2 == 0]
    destinations = [token for token in range(prefix, real) if token % 2 == 1]
    edges = [max((cosine(i, j), -j, i) for j in destinations) for i in sources] if destinations else []
    return [(i, -j) for _, j, i in sorted(edges, key=lambda edge: (-edge[0], edge[2]))[:r]]


def naive(queries, keys, values, hidden, sizes, prefix, real, r, tau):
    """Hidden states and sizes that are left: the r least significant tokens go, or the r most alike pairs join."""
    r = min(r, (real - prefix) // 2)
    if r == 0:
        return hidden[:real], sizes[:real]
    score = significance(queries, keys, values, prefix, real)
    if variance(list(score.values())) >= tau:
        gone = sorted(score, key=lambda token: (score[token], -token))[:r]
        stays = [token for token in range(real) if token not in gone]
        return hidden[stays], sizes[stays]
    groups = {token: [token] for token in range(real)}
    for source, destination in bipartite(keys, prefix, real, r):
        groups[destination] += groups.pop(source)
    joined = [groups[token] for token in sorted(groups)]  # in the places of the destinations
    merged = [sum(sizes[i] * hidden[i] for i in group) / sum(sizes[i] for i in group) for group in joined]
    return torch.stack(merged), torch.stack([sum(sizes[i] for i in group) for group in joined])


class Rows:
    """The signal `scores` of a call whose padding sees and is seen by nobody."""

    def __init__(self, queries, keys, mask):
        products = queries @ keys.mT / math.sqrt(keys.shape[-1])
        self.attention = products.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)  # b h n n
        self.mask = mask

    def rows(self, index):
        return self.attention.gather(2, index[:, None, :, None].expand(-1, self.attention.shape[1], -1, self.attention.shape[3]))

    def columns(self):
        return (self.attention * self.mask[:, None, :, None]).sum(dim=2)


def ask(queries, keys, values, sizes, prefix, real, r, tau):
    n = keys.shape[2]
    method = PPT(PPTConfig(r=r, tau=tau), Dims(8, 2, 2, 4, 3, 12, "vision", False))
    mask = torch.arange(n)[None] < real
    scores = Rows(queries, keys, mask)
    fresh, positions = torch.zeros(1, n, dtype=torch.bool), torch.arange(n)[None]
    return method.assign(keys=keys, values=values, scores=scores, mask=mask, positions=positions, fresh=fresh, prefix=prefix)


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    n, prefix, real, r, tau, sizes = CASES[case]
    real = n if real is None else real
    torch.manual_seed(1)
    queries, keys, values = (torch.randn(1, 2, n, 4, dtype=torch.float64) for _ in range(3))
    hidden, sizes = torch.randn(1, n, 6, dtype=torch.float64), torch.tensor([sizes or [1] * n], dtype=torch.float64)
    found = ask(queries, keys, values, sizes, prefix, real, r, tau)
    want, weights = naive(queries[0], keys[0], values[0], hidden[0], sizes[0], prefix, real, r, tau)
    filled = torch.ones(1, found.m, dtype=torch.bool) if found.filled is None else found.filled
    torch.testing.assert_close(found.apply(hidden, sizes)[filled], want)
    torch.testing.assert_close(found.sum(sizes[..., None])[..., 0][filled] if found.joins else found.gather(sizes)[filled], weights)


def test_each_sample_chooses_for_itself():
    torch.manual_seed(2)
    keys, values, hidden = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(3))
    queries = torch.randn(2, 2, 9, 4, dtype=torch.float64) * torch.tensor([0.01, 6.0])[:, None, None, None]
    spread = [variance(list(significance(queries[i], keys[i], values[i], 1, 9).values())) for i in range(2)]
    tau = sum(spread) / 2
    method = PPT(PPTConfig(r=2, tau=tau), Dims(8, 2, 2, 4, 3, 12, "vision", False))
    mask, fresh = torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    positions, sizes = torch.arange(9).expand(2, 9), torch.ones(2, 9, dtype=torch.float64)
    found = method.assign(keys, values, Rows(queries, keys, mask), mask, positions, fresh, 1)
    assert [int((found.slot[i] < 0).sum()) for i in range(2)] == [0, 2], "the calm sample pools, the other one prunes"
    got = found.apply(hidden[:, 0], sizes)
    for i in range(2):
        torch.testing.assert_close(got[i], naive(queries[i], keys[i], values[i], hidden[i, 0], sizes[i], 1, 9, 2, tau)[0])


@pytest.mark.parametrize(("layers", "blocks"), [(12, (3, 6, 9)), (4, (1, 2, 3)), (1, (0,))])
def test_blocks(layers, blocks):
    assert PPT.default_layers(PPTConfig(), layers) == blocks


def test_a_vit_loses_r_tokens_between_attention_and_mlp():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=4)
    base = ViTModel(config, add_pooling_layer=False).eval()
    model = get_token_model(base, PPTConfig(r=4, layers=(1,)))
    seen = []
    handle = anatomy(model).streams[0].mlp(1).register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    pixels = torch.randn(2, 3, 16, 16)
    assert model(pixels).last_hidden_state.shape[1] == 17
    handle.remove()
    assert measure(model, pixel_values=pixels).tokens == 2 * (17 + 17 + 13)
    assert seen[0] == 17, "behind the block all tokens are back"


def test_a_variance_that_no_shares_have_asks_for_no_scores():
    outputs, size = [], dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=4)
    for tau in (0.99, 1.0):
        torch.manual_seed(0)
        model = get_token_model(ViTModel(ViTConfig(**size), add_pooling_layer=False).eval(), PPTConfig(r=4, tau=tau))
        (method, *_) = [module for module in model.modules() if isinstance(module, PPT)]
        assert ("scores" in method.ignores) == (tau == 1)
        outputs.append(model(torch.randn(2, 3, 16, 16)).last_hidden_state)
    assert torch.equal(*outputs)
