"""VQT against a slow loop over one sample, written from the equations of arXiv:2212.03220."""

import math

import pytest
import torch
from transformers import ViTConfig, ViTModel

# per case: tokens n (class token among them), queries T, layers M, valid tokens (None: all), residual
CASES = {
    "usual": (7, 3, 2, None, True),
    "odd sizes": (5, 1, 3, None, True),
    "without residual": (6, 2, 2, None, False),
    "one token": (1, 2, 1, None, True),
    "no queries": (4, 0, 2, None, True),
    "more queries than tokens": (3, 8, 1, None, True),
    "padded but one": (6, 2, 2, 1, True),
    "some padding": (6, 3, 2, 4, False),
}


def linear(layer, x):
    return layer.weight.double() @ x + layer.bias.double()


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + layer.eps) * layer.weight.double() + layer.bias.double()


def attend(query, keys, values, heads):
    """V softmax(K^T q / sqrt(d)), head by head, for one query."""
    width = len(query) // heads
    out = torch.zeros(len(query), dtype=torch.float64)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = [float(key[part] @ query[part]) / math.sqrt(width) for key in keys]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        for power, value in zip(powers, values, strict=True):
            out[part] += power / sum(powers) * value[part]
    return out


def naive_block(block, hidden, queries, heads, valid=None, residual=True):
    """[Z_m, Z'_m] = MLP o MSA with Q from [Z, P] and K, V from Z alone."""
    normed = [layer_norm(block.layernorm_before, x) for x in hidden]
    asking = normed + [layer_norm(block.layernorm_before, p) for p in queries]
    keys = [linear(block.attention.k_proj, x) for x in normed[:valid]]
    values = [linear(block.attention.v_proj, x) for x in normed[:valid]]
    out = []
    for index, (start, x) in enumerate(zip([*hidden, *queries], asking, strict=True)):
        mixed = linear(block.attention.o_proj, attend(linear(block.attention.q_proj, x), keys, values, heads))
        keeps_start = residual or index < len(hidden)
        middle = mixed + start if keeps_start else mixed
        inner = linear(block.mlp.fc1, layer_norm(block.layernorm_after, middle))
        gelu = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        out.append(middle + linear(block.mlp.fc2, gelu))
    return out[: len(hidden)], out[len(hidden) :]


def naive(blocks, hidden, queries, heads, valid=None, residual=True):
    """Z_M (n d) and the summaries Z'_1..Z'_M (layers T d) of one sample; what was summarised is not fed on."""
    stream = [row.double() for row in hidden]
    summaries = []
    for block, bank in zip(blocks, queries, strict=True):
        stream, summary = naive_block(block, stream, [p.double() for p in bank], heads, valid, residual)
        summaries.append(torch.stack(summary) if summary else bank.double())
    return torch.stack(stream), torch.stack(summaries)


def naive_features(class_token, summaries):
    """What the linear head reads: the last class token and every summary, side by side."""
    return torch.cat([class_token.double(), *[p.double() for layer in summaries for p in layer]])


def naive_group_lasso(weight):
    """sum_f || W[:, f] ||_2: one group is all the weights (classes) of one feature."""
    return sum(math.sqrt(sum(float(w) ** 2 for w in column)) for column in weight.double().T)


def naive_select(weight, fraction):
    """The features kept: the ceil(fraction * F) groups of largest norm, in their order."""
    norms = [math.sqrt(sum(float(w) ** 2 for w in column)) for column in weight.double().T]
    best = sorted(range(len(norms)), key=lambda f: (-norms[f], f))
    return sorted(best[: math.ceil(fraction * len(norms))])


def tiny(layers, seed=0):
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        attn_implementation="sdpa", initializer_range=0.5,
    )  # fmt: skip
    return ViTModel(config, add_pooling_layer=False).double().eval().requires_grad_(False)


def sample(case):
    n, queries, layers, valid, residual = CASES[case]
    blocks = tiny(layers).layers
    torch.manual_seed(1)
    return blocks, torch.randn(n, 8).double(), torch.randn(layers, queries, 8).double(), valid, residual


def block_with_hidden_keys(block, hidden, queries, valid):
    """The same by the block itself: queries put in as tokens whose keys nobody may see."""
    n, total = len(hidden), len(hidden) + len(queries)
    mask = torch.zeros(1, 1, total, total, dtype=torch.float64)
    mask[..., n if valid is None else valid :] = -math.inf
    out = block(torch.cat([hidden, queries])[None], attention_mask=mask)[0]
    return out[:n], out[n:]


@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row[-1]])
def test_naive_is_the_block_with_the_keys_of_the_queries_hidden(case):
    blocks, hidden, queries, valid, _ = sample(case)
    last, summaries = naive(blocks, hidden, queries, 2, valid)
    stream = hidden
    for block, bank, summary in zip(blocks, queries, summaries, strict=True):
        stream, expected = block_with_hidden_keys(block, stream, bank, valid)
        torch.testing.assert_close(summary, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, stream, rtol=1e-10, atol=1e-10)


def test_naive_leaves_the_stream_as_it_is():
    blocks, hidden, queries, _, _ = sample("without residual")
    stream = hidden[None]
    for block in blocks:
        stream = block(stream)
    for residual in (True, False):
        torch.testing.assert_close(naive(blocks, hidden, queries, 2, residual=residual)[0], stream[0], rtol=1e-10, atol=1e-10)


def test_naive_query_equal_to_a_token_gives_the_token():
    blocks, hidden, _, _, _ = sample("odd sizes")
    last, summaries = naive(blocks[:1], hidden, hidden[None, 2:3], 2)
    torch.testing.assert_close(summaries[0, 0], last[2], rtol=0, atol=0)


def test_naive_head_and_selection():
    weight = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 0.0, 2.0]])
    assert naive_group_lasso(weight) == 5 + 0 + 1 + 2
    assert naive_select(weight, 0.5) == [0, 3]
    assert naive_select(weight, 0.0) == []
    assert naive_select(weight, 1.0) == [0, 1, 2, 3]
    assert naive_features(torch.zeros(4), torch.zeros(3, 2, 4)).shape == (4 + 3 * 2 * 4,)
