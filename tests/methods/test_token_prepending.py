"""Token prepending against a slow loop over one sample, written from the equations of arXiv:2412.11556."""

import math

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2Model, LlamaConfig, LlamaForCausalLM, LlamaModel

from hf_tokens import TokenPrependingConfig, UnsupportedError, get_token_model
from hf_tokens.testing import CACHE

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


def naive_layer(layer, hidden, theta, positions):
    """A decoder layer, token after token: token t reads the tokens up to itself."""
    attention, width = layer.self_attn, layer.self_attn.head_dim
    keys, values, out = [], [], []
    for position, x in zip(positions, hidden, strict=True):
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


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + layer.eps) * layer.weight.double() + layer.bias.double()


def naive_layer_gpt2(layer, hidden, theta, positions):
    """The same for GPT-2, whose positions are learned and came with the embeddings; its linear layers hold W^T."""
    linear = lambda module, x: x @ module.weight.double() + module.bias.double()
    width, keys, values, out = layer.attn.head_dim, [], [], []
    for x in hidden:
        query, key, value = linear(layer.attn.c_attn, layer_norm(layer.ln_1, x)).chunk(3)
        keys.append(list(key.split(width)))
        values.append(list(value.split(width)))
        x = x + linear(layer.attn.c_proj, attend(list(query.split(width)), keys, values))
        inner = linear(layer.mlp.c_fc, layer_norm(layer.ln_2, x))
        gelu = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        out.append(x + linear(layer.mlp.c_proj, gelu))
    return out


def naive(layers, embedded, pst, position, theta, *, start=2, end=8, exit=27, shift=True, run=naive_layer):
    """h^0..h^M of one prompt, <PST> in it (n + 1 tokens); its embedding is the last token of the last of them.

    h^0 = [h_1 .. h_{i-1}, pst, h_i .. h_n];  h^l = LLM^l(f(h^{l-1})) with f: h_{i*} := h_n for start <= l <= end.
    It moves the tokens behind it on by one place. Without `shift`, it stands where the token behind it stands (or the one before, at the
    end), and no other token moves.
    """
    hidden = [row.double() for row in embedded]
    positions = list(range(len(hidden)))
    positions.insert(position, min(position, len(hidden) - 1))
    positions = list(range(len(hidden) + 1)) if shift else positions
    hidden.insert(position, pst.double())
    states = [torch.stack(hidden)]
    for number, layer in enumerate(layers[:exit], start=1):
        if start <= number <= end:
            hidden = [hidden[-1] if index == position else x for index, x in enumerate(hidden)]
        hidden = run(layer, hidden, theta, positions)
        states.append(torch.stack(hidden))
    return states


def tiny(layers, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.5, attn_implementation="sdpa",
    )  # fmt: skip
    return exact(LlamaModel(config).double().eval().requires_grad_(False))


class ExactNorm(torch.nn.Module):
    """RMSNorm without the way through float32."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class ExactRotary(torch.nn.Module):
    """Rotary tables without the way through float32."""

    def __init__(self, config):
        super().__init__()
        self.rope_type = "default"
        self.theta, self.width = config.rope_parameters["rope_theta"], config.head_dim

    def forward(self, x, position_ids):
        powers = torch.arange(0, self.width, 2, dtype=torch.float64) / self.width
        angles = position_ids[..., None] * self.theta**-powers
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def exact(model):
    """A Llama whose arithmetic is float64 all through."""
    for layer in model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = ExactNorm(layer.input_layernorm), ExactNorm(layer.post_attention_layernorm)
    model.rotary_emb = ExactRotary(model.config)
    return model


def tiny_gpt2(layers):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=11, n_embd=8, n_layer=layers, n_head=2, n_positions=32, initializer_range=0.5, attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2Model(config).double().eval().requires_grad_(False)


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
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


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


def test_naive_without_shift_differs_by_the_positions_behind_the_token():
    model, embedded, pst, position, scope = sample("usual")
    theta = model.config.rope_parameters["rope_theta"]
    here, moved = (naive(model.layers, embedded, pst, position, theta, shift=shift, **scope)[-1] for shift in (False, True))
    torch.testing.assert_close(here[:position], moved[:position], rtol=0, atol=0)
    assert not torch.allclose(here[position:], moved[position:])


FAMILIES = {
    "rotary": (tiny, lambda model: model.layers, naive_layer, "own"),
    "rotary, shared": (tiny, lambda model: model.layers, naive_layer, "shared"),
    "learned": (tiny_gpt2, lambda model: model.h, naive_layer_gpt2, "shared"),
}


def prepended(family, case):
    """A model with <PST>, the outputs that its layers will have, and a loop over one sample of embeddings (n d)."""
    n, position, start, end, exit, layers = CASES[case]
    build, blocks, run, places = FAMILIES[family]
    base = build(layers)
    torch.manual_seed(2)
    model = get_token_model(base, TokenPrependingConfig(position=position, start=start, end=end, exit=exit, places=places))
    pst = dict(model.named_buffers())[next(name for name, _ in model.named_buffers() if name.endswith(".pst"))][0]
    outputs = []
    for layer in blocks(base):
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    theta = base.config.rope_parameters["rope_theta"] if build is tiny else None

    def loop(rows):
        where = min(position, len(rows))
        states = naive(blocks(base), rows, pst, where, theta, start=start, end=end, exit=exit, shift=places == "own", run=run)
        states = [torch.cat([state[:where], state[where + 1 :]]) for state in states[1:]]
        return states + states[-1:] * (layers - exit)  # what lies behind the exit passes the tokens on

    return model, outputs, loop


def rows_of(base, family, lengths, place):
    """Embeddings with positions in them (b n d), position ids and mask of prompts of these lengths, padded on one side."""
    torch.manual_seed(1)
    longest = max(lengths)
    rows, ids, mask = torch.randn(len(lengths), longest, 8).double(), torch.zeros(len(lengths), longest).long(), []
    for row, n in zip(ids, lengths, strict=True):
        real = torch.arange(longest) < n if place == "right" else torch.arange(longest) >= longest - n
        row[real] = torch.arange(n)
        mask.append(real)
    given = rows + base.wpe(ids) if family == "learned" else rows
    return rows, given, ids, torch.stack(mask)


@pytest.mark.drawn
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", CASES)
def test_model_equals_naive(case, family):
    model, outputs, loop = prepended(family, case)
    rows, given, ids, _ = rows_of(model.base_model.model, family, [CASES[case][0]] * 2, "right")
    model(inputs_embeds=rows, position_ids=ids)  # with the cache that a model makes by default
    expected = [torch.stack(states) for states in zip(*map(loop, given), strict=True)]
    assert len(outputs) == len(expected)
    for got, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.drawn
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [[7, 1, 3, 4], [2, 1]], ids=["long and short", "shorter than the template"])
@pytest.mark.parametrize("case", ["usual", "first of the prompt", "after the last token", "leaves after the first layer"])
def test_padded_batch_equals_naive(case, lengths, side, family):
    model, outputs, loop = prepended(family, case)
    rows, given, ids, mask = rows_of(model.base_model.model, family, lengths, side)
    model(inputs_embeds=rows, attention_mask=mask.long(), position_ids=ids)
    for index, real in enumerate(mask):
        for got, want in zip(outputs, loop(given[index, real]), strict=True):
            torch.testing.assert_close(got[index, real], want, rtol=1e-9, atol=1e-9)


def test_hidden_states_hold_the_embedding_and_no_block_behind_the_exit_runs():
    model, outputs, _ = prepended("rotary", "usual")
    base, exit = model.base_model.model, CASES["usual"][4]
    ran = []
    for index, layer in enumerate(base.layers):
        layer.mlp.register_forward_hook(lambda _, __, out, index=index: ran.append(index))
    for _ in range(2):  # the first call learns that the blocks return their hidden states alone
        ran.clear()
        out = model(inputs_embeds=torch.randn(2, 6, 8).double(), output_hidden_states=True)
    assert ran == list(range(exit))
    torch.testing.assert_close(out.hidden_states[exit], outputs[-1], rtol=0, atol=0)
    torch.testing.assert_close(out.last_hidden_state, base.norm(outputs[-1]), rtol=0, atol=0)


def test_a_cache_with_tokens_and_generate_are_refused():
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny(3).config).eval()
    model = get_token_model(base, TokenPrependingConfig(end=3))
    ids = torch.randint(3, 11, (2, 5))
    wanted = "TokenPrepending must see the whole sequence in one pass, got {}. Pass no cache, and `use_cache"
    cache = DynamicCache()
    model(input_ids=ids, **{CACHE: cache})
    with pytest.raises(UnsupportedError, match=wanted.format("a cache of 5 tokens")):
        model(input_ids=ids[:, :1], **{CACHE: cache})
    with pytest.raises(UnsupportedError, match=wanted.format("3 new tokens with a cache")):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids, use_cache=False).logits, rtol=0, atol=0)
