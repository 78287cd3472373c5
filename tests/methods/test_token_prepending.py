"""Token prepending against a slow loop over one sample, written from the equations of arXiv:2412.11556."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

# per case: prompt tokens n, position i* of <PST>, start layer, end layer k, exit layer M, layers L (layers count from 1)
CASES = {
    "usual": (6, 3, 2, 3, 4, 5),
    "odd sizes": (7, 1, 2, 2, 3, 3),
    "first of the prompt": (5, 0, 2, 4, 4, 4),
    "right before the last token": (5, 4, 2, 3, 4, 4),
    "after the last token": (4, 4, 2, 3, 3, 3),
    "one token": (1, 0, 2, 3, 3, 3),
    "no layer replaces": (5, 2, 2, 1, 3, 3),
    "every layer replaces": (5, 2, 2, 3, 3, 3),
    "late start": (5, 2, 3, 3, 4, 4),
    "leaves after the first layer": (5, 2, 2, 4, 1, 4),
}


def rms_norm(layer, x):
    return x / math.sqrt(sum(float(value) ** 2 for value in x) / len(x) + layer.variance_epsilon) * layer.weight.double()


def rotate(x, position, theta):
    """Rotary positions of one head: the pair (i, i + d/2) turns by position * theta^(-2i/d)."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


def heads_of(linear, x, width):
    return list((linear.weight.double() @ x).split(width))


def attend(queries, keys, values):
    """One query (a list of heads) over all the keys given; query head h reads key head h * kv / heads."""
    out = []
    for head, query in enumerate(queries):
        shared = head * len(keys[0]) // len(queries)
        logits = [float(key[shared] @ query) / math.sqrt(len(query)) for key in keys]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        out.append(sum(power / sum(powers) * value[shared] for power, value in zip(powers, values, strict=True)))
    return torch.cat(out)


def naive_layer(layer, hidden, theta):
    """A decoder layer, token after token: token t reads the tokens up to itself."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    keys, values, out = [], [], []
    for position, x in enumerate(hidden):
        normed = rms_norm(layer.input_layernorm, x)
        keys.append([rotate(key, position, theta) for key in heads_of(attention.k_proj, normed, width)])
        values.append(heads_of(attention.v_proj, normed, width))
        queries = [rotate(query, position, theta) for query in heads_of(attention.q_proj, normed, width)]
        x = x + attention.o_proj.weight.double() @ attend(queries, keys, values)
        normed = rms_norm(layer.post_attention_layernorm, x)
        gate = layer.mlp.gate_proj.weight.double() @ normed
        up = layer.mlp.up_proj.weight.double() @ normed
        out.append(x + layer.mlp.down_proj.weight.double() @ (gate / (1 + torch.exp(-gate)) * up))
    return out


def naive(layers, embedded, pst, position, theta, *, start=2, end=8, exit=27):
    """h^0..h^M of one prompt, <PST> in it (n + 1 tokens); its embedding is the last token of the last of them.

    h^0 = [h_1 .. h_{i-1}, pst, h_i .. h_n];  h^l = LLM^l(f(h^{l-1})) with f: h_{i*} := h_n for start <= l <= end.
    """
    hidden = [row.double() for row in embedded]
    hidden.insert(position, pst.double())
    states = [torch.stack(hidden)]
    for number, layer in enumerate(layers[:exit], start=1):
        if start <= number <= end:
            hidden = [hidden[-1] if index == position else x for index, x in enumerate(hidden)]
        hidden = naive_layer(layer, hidden, theta)
        states.append(torch.stack(hidden))
    return states


def tiny(layers, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaModel(config).double().eval().requires_grad_(False)


def sample(case):
    n, position, start, end, exit, layers = CASES[case]
    model = tiny(layers)
    torch.manual_seed(1)
    scope = {"start": start, "end": end, "exit": exit}
    return model, torch.randn(n, 8).double(), torch.randn(8).double(), position, scope


def by_the_model(model, embedded, pst, position, scope):
    """The same by the model itself: <PST> as an input embedding, overwritten before the layers in scope."""

    def overwrite(_, args):
        hidden = args[0].clone()
        hidden[:, position] = hidden[:, -1]
        return hidden, *args[1:]

    for layer in model.layers[scope["start"] - 1 : scope["end"]]:
        layer.register_forward_pre_hook(overwrite)
    outputs = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    rows = torch.cat([embedded[:position], pst[None], embedded[position:]])
    model(inputs_embeds=rows[None], use_cache=False)
    return [rows, *outputs]


@pytest.mark.parametrize("case", CASES)
def test_naive_is_the_model_with_one_overwritten_token(case):
    model, embedded, pst, position, scope = sample(case)
    states = naive(model.layers, embedded, pst, position, model.config.rope_parameters["rope_theta"], **scope)
    assert len(states) == scope["exit"] + 1
    for got, expected in zip(states, by_the_model(model, embedded, pst, position, scope), strict=False):
        # the norms of the model round through float32
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_naive_leaves_what_stands_before_the_token_as_it_is():
    model, embedded, pst, position, scope = sample("usual")
    theta = model.config.rope_parameters["rope_theta"]
    with_token = naive(model.layers, embedded, pst, position, theta, **scope)[-1]
    alone = naive(model.layers, embedded[:position], pst, position, theta, start=2, end=1, exit=scope["exit"])[-1]
    torch.testing.assert_close(with_token[:position], alone[:position], rtol=1e-12, atol=1e-12)


def test_naive_start_of_the_token_reaches_only_what_was_computed_from_it():
    model, embedded, pst, position, scope = sample("every layer replaces")
    theta = model.config.rope_parameters["rope_theta"]
    one = naive(model.layers, embedded, pst, position, theta, **scope)[-1]
    other = naive(model.layers, embedded, pst + 1, position, theta, **scope)[-1]
    assert not torch.allclose(one[-1], other[-1])
    torch.testing.assert_close(one[:position], other[:position], rtol=0, atol=0)
