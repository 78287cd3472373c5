"""VQT against a slow loop over one sample, written from the equations of arXiv:2212.03220."""

import math

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from hf_tokens import VQT, UnsupportedError, VQTConfig, get_token_model

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
    return ViTModel(tiny_config(layers), add_pooling_layer=False).double().eval().requires_grad_(False)


def tiny_config(layers):
    return ViTConfig(
        hidden_size=8, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        attn_implementation="sdpa", initializer_range=0.5, num_labels=3,
    )  # fmt: skip


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


def classifier(layers):
    """A whole model whose `pixel_values` are the rows that its first block gets, so that any number of tokens can be tried."""
    torch.manual_seed(0)
    model = ViTForImageClassification(tiny_config(layers)).double().eval()
    model.vit.embeddings.forward = lambda pixel_values, **_: pixel_values
    return model


def tuned(layers, config, **kwargs):
    """A classifier with queries whose head does not start at zero, and its banks."""
    base = classifier(layers)
    torch.manual_seed(2)
    model = get_token_model(base, config, **kwargs)
    banks = [module for module in model.modules() if isinstance(module, VQT)]
    for bank in banks:
        torch.nn.init.normal_(bank.weight)
    return model, base, banks


def unit(layer):
    """A block's summaries laid end to end, with the length 1."""
    joined = torch.cat([p.double() for p in layer])
    size = math.sqrt(sum(float(v) ** 2 for v in joined))
    return [joined / size]


def naive_logits(base, banks, hidden, valid, combine, class_index=0):
    """W_1 on the class token behind the final norm, and W_2 on all summaries."""
    last, summaries = naive(base.vit.layers, hidden, [bank.prompt.detach() for bank in banks], 2, valid)
    if combine == "mean":
        summaries = [[sum(layer) / len(layer)] for layer in summaries]
    elif combine == "weighted":
        summaries = [[sum(w * p for w, p in zip(bank.mix, layer, strict=True))] for bank, layer in zip(banks, summaries, strict=True)]
    weight = torch.cat([bank.weight.detach() for bank in banks], dim=1)
    class_token = layer_norm(base.vit.layernorm, last[class_index])
    read = [unit(layer) for layer in summaries] if banks[0].config.normalise else summaries
    return linear(base.classifier, class_token) + weight @ naive_features(torch.empty(0), read)


@pytest.mark.drawn
@pytest.mark.parametrize("combine", ["concat", "mean", "weighted"])
@pytest.mark.parametrize("case", [name for name, row in CASES.items() if row[1]])
def test_model_equals_naive(case, combine):
    n, queries, layers, valid, _ = CASES[case]
    model, base, banks = tuned(layers, VQTConfig(tokens=queries, combine=combine, normalise=queries != 3))
    for bank in banks if combine == "weighted" else ():
        torch.nn.init.normal_(bank.mix)
    torch.manual_seed(1)
    rows = torch.randn(2, n, 8).double()
    mask = None if valid is None else (torch.arange(n) < valid).long().expand(2, n)
    with torch.no_grad():
        logits = model(pixel_values=rows, attention_mask=mask).logits
        expected = torch.stack([naive_logits(base, banks, row, valid, combine) for row in rows])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_rows_padded_on_either_side_equal_naive():
    model, base, banks = tuned(2, VQTConfig(tokens=3))
    torch.manual_seed(1)
    rows, mask = torch.randn(3, 7, 8).double(), torch.ones(3, 7, dtype=torch.long)
    mask[0, 4:], mask[1, :5] = 0, 0
    turned = [(rows[0], 4, 0), (rows[1].roll(-5, dims=0), 2, 2), (rows[2], None, 0)]  # naive wants the real tokens first
    with torch.no_grad():
        logits = model(pixel_values=rows, attention_mask=mask).logits
        expected = torch.stack([naive_logits(base, banks, row, valid, "concat", at) for row, valid, at in turned])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_no_queries_and_a_fresh_head_are_the_base():
    rows = torch.randn(2, 5, 8).double()
    expected = classifier(3)(pixel_values=rows).logits
    for config in (VQTConfig(tokens=0), VQTConfig(tokens=0, combine="mean"), VQTConfig(tokens=2, combine="weighted")):
        got = get_token_model(classifier(3), config)(pixel_values=rows).logits
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_group_lasso_and_selection_equal_naive():
    rows, labels = torch.randn(2, 5, 8).double(), torch.tensor([0, 2])
    plain, _, _ = tuned(2, VQTConfig(tokens=2))
    model, base, banks = tuned(2, VQTConfig(tokens=2, lasso=0.1, fraction=0.4))
    weight = torch.cat([bank.weight.detach() for bank in banks], dim=1)
    grown = model.train()(pixel_values=rows, labels=labels).loss - plain.train()(pixel_values=rows, labels=labels).loss
    assert grown.item() == pytest.approx(0.1 * naive_group_lasso(weight), rel=1e-6)  # the engine adds losses in float32

    VQT.select(model)
    kept = torch.cat([bank.kept for bank in banks])
    assert kept.nonzero().flatten().tolist() == naive_select(weight, 0.4)
    with torch.no_grad():
        logits = model.eval()(pixel_values=rows).logits
        for bank in banks:
            bank.weight[:, ~bank.kept] = 0
        expected = torch.stack([naive_logits(base, banks, row, None, "concat") for row in rows])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_stay_out_of_the_frozen_stream(reentrant):
    """The gradient of each block's queries is that of the block alone on a constant input, checkpointed or not."""
    model, base, banks = tuned(3, VQTConfig(tokens=2))
    if reentrant is not None:
        base.activation_checkpointing_enable({"use_reentrant": reentrant})
    rows = torch.randn(2, 5, 8).double()
    streams = []
    for block in base.vit.layers:
        block.register_forward_hook(lambda _, __, out: streams.append(out))
    model.train()(pixel_values=rows).logits.square().sum().backward()
    assert not any(stream.requires_grad for stream in streams)

    queries = [bank.prompt.detach().clone().requires_grad_() for bank in banks]
    inputs = [rows, *streams[:-1]]
    total = base.classifier(base.vit.layernorm(streams[-1])[:, 0])
    for block, bank, p, hidden in zip(base.vit.layers, banks, queries, inputs, strict=True):
        block.eval().requires_grad_(False)
        summary = torch.stack([block_with_hidden_keys(type(block).forward.__get__(block), row, p, None)[1] for row in hidden])
        total = total + summary.flatten(1) / summary.flatten(1).norm(dim=1, keepdim=True) @ bank.weight.detach().T
    total.square().sum().backward()
    for bank, p in zip(banks, queries, strict=True):
        torch.testing.assert_close(bank.prompt.grad, p.grad, rtol=1e-9, atol=1e-9)


def test_a_trained_copy_of_the_head_still_gets_what_was_read():
    rows = torch.randn(2, 5, 8).double()
    plain, _, _ = tuned(2, VQTConfig(tokens=2))
    model, _, _ = tuned(2, VQTConfig(tokens=2), modules_to_save=["classifier"])
    torch.testing.assert_close(model(pixel_values=rows).logits, plain(pixel_values=rows).logits, rtol=0, atol=0)


def test_a_model_without_a_head_is_refused_and_left_alone():
    base = tiny(2)
    before = set(dict(base.named_modules()))
    with pytest.raises(UnsupportedError, match="'vqt' needs a linear head .* got ViTModel with no head .* Load it with a head"):
        get_token_model(base, VQTConfig())
    assert set(dict(base.named_modules())) == before
    assert not any("forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks for module in base.modules())
