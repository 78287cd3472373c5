"""ARC-Encoder against a slow loop over one text, written from sections 3.1 and 3.2 of arXiv:2510.20535: pooled queries, whole keys."""

import math

import pytest
import torch
from by_hand import batch, gpt2, positions
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaModel

from hf_tokens import (
    ARCEncoder,
    ARCEncoderConfig,
    ConfigError,
    Dims,
    DrLLM,
    DrLLMConfig,
    DynamicTokenPoolingConfig,
    UnsupportedError,
    embed_prompt,
    get_token_model,
    measure,
)
from hf_tokens.engine.run import Memory

# per case: tokens, pooling factor, sizes of the groups
GROUPS = {
    "even": (8, 4, [4, 4]),
    "odd": (7, 4, [4, 3]),
    "one more than even": (9, 4, [3, 3, 3]),
    "two sizes": (11, 4, [4, 4, 3]),
    "fewer than a group": (3, 8, [3]),
    "one token": (1, 4, [1]),
    "pairs": (5, 2, [2, 2, 1]),
    "ten": (10, 4, [4, 3, 3]),
}


def naive_groups(n, factor):
    """Neighbours that are pooled, as even as can be."""
    many = math.ceil(n / factor)
    sizes = [n // many + (i < n % many) for i in range(many)]
    return [list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(many)]


@pytest.mark.parametrize("case", GROUPS)
def test_groups_are_even(case):
    n, factor, sizes = GROUPS[case]
    assert [len(group) for group in naive_groups(n, factor)] == sizes


def naive(hidden, factor, encode, project, special):
    """What the decoder reads of one text: hidden (n d) enters the last block, `encode(queries, places, hidden)` is that block."""
    groups = naive_groups(len(hidden), factor)
    queries = torch.stack([sum(hidden[i] for i in group) / len(group) for group in groups])
    return torch.cat([project(encode(queries, [group[0] for group in groups], hidden)), special[None]])


def method(factor, width=None):
    torch.manual_seed(0)
    config = ARCEncoderConfig(pooling_factor=factor, bottleneck=5, width=width)
    return ARCEncoder(config, Dims(6, 2, 2, 3, 3, 4, "text", True)).double()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", GROUPS)
def test_matches_the_paper(case, side):
    n, factor, _ = GROUPS[case]
    encoder = method(factor, width=7)
    lengths = (n, max(1, n - 3), 1)
    mask = torch.stack([torch.arange(n) < k if side == "right" else torch.arange(n) >= n - k for k in lengths])
    hidden, block = torch.randn(3, n, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    encode = lambda queries, places, hidden: queries @ block + torch.tensor(places, dtype=torch.float64)[:, None] * hidden.sum(dim=0)
    project = lambda x: x @ encoder.inner.weight.mT @ encoder.outer.weight.mT
    memory = Memory()
    asked, beside = encoder.ask(hidden=hidden, mask=mask, sizes=torch.ones(3, n), fresh=torch.zeros_like(mask), memory=memory)
    start = mask.long().argmax(dim=1)
    answers = torch.stack([encode(asked[i], (beside[i] - start[i]).tolist(), hidden[i, mask[i]]) for i in range(3)])
    for targets, task in ((None, 0), (torch.tensor([0, 1, 1]), 1)):
        got = encoder.pool(answers=answers, targets=targets, memory=memory)
        for row in range(3):
            special = encoder.special[task if row else 0]
            want = naive(hidden[row, mask[row]], factor, encode, project, special)
            torch.testing.assert_close(got[row, : len(want)], want)
            assert not got[row, len(want) :].any()


def gpt2_block(b):
    """One block without a causal mask: what the queries (m d) make of themselves and of all tokens (n d)."""

    def call(queries, places, hidden):
        q, _, _ = b.attn.c_attn(b.ln_1(queries)).chunk(3, dim=-1)
        _, k, v = b.attn.c_attn(b.ln_1(hidden)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (b.attn.num_heads, -1)).transpose(0, 1) for t in (q, k, v))
        read = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        out = queries + b.attn.c_proj(read.transpose(0, 1).flatten(1))
        return out + b.mlp(b.ln_2(out))

    return call


def turn(x, places, theta=10000.0):
    """Rotary positions of x (h m e) at these places."""
    half = x.shape[-1] // 2
    angle = torch.tensor(places, dtype=x.dtype)[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def llama_block(b):
    def call(queries, places, hidden):
        attention, x, y = b.self_attn, b.input_layernorm(queries), b.input_layernorm(hidden)
        split = lambda t: t.unflatten(-1, (-1, attention.head_dim)).transpose(0, 1)
        q, k, v = split(attention.q_proj(x)), split(attention.k_proj(y)), split(attention.v_proj(y))
        many = len(q) // len(k)
        q, k, v = turn(q, places), turn(k, range(len(hidden))).repeat_interleave(many, 0), v.repeat_interleave(many, 0)
        read = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        out = queries + attention.o_proj(read.transpose(0, 1).flatten(1))
        return out + b.mlp(b.post_attention_layernorm(out))

    return call


def llama():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=12, intermediate_size=20, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    model = LlamaModel(LlamaConfig(**sizes, head_dim=6)).double().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.rotary_emb.inv_freq = model.rotary_emb.original_inv_freq = 10000.0 ** (-torch.arange(3).double() / 3)
    return model


BASES = {
    "gpt2": (lambda: gpt2().transformer, gpt2_block, lambda base, ids: base.wte(ids) + base.wpe(torch.arange(len(ids))), "h"),
    "llama": (llama, llama_block, lambda base, ids: base.embed_tokens(ids), "layers"),
}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BASES)
def test_the_encoder_is_the_model_without_its_end_and_its_mask(name, side, backend):
    make, block, embed, blocks = BASES[name]
    base, model = make(), make()
    model.set_attn_implementation(backend)
    model = get_token_model(model, ARCEncoderConfig(pooling_factor=4, truncated=1, bottleneck=5, width=7)).eval().double()
    encoder = next(module for module in model.modules() if isinstance(module, ARCEncoder))
    ids, mask = batch((13, 6, 1), side)
    got = model(ids, attention_mask=mask.long(), position_ids=positions(mask)).last_hidden_state
    assert got.shape == (3, 5, 7)
    calls = [block(b) for b in getattr(base, blocks)]
    for row in range(3):
        hidden = embed(base, ids[row, mask[row]])
        for call in calls[:2]:
            hidden = call(hidden, range(len(hidden)), hidden)
        project = lambda x: x @ encoder.inner.weight.mT @ encoder.outer.weight.mT
        want = naive(hidden, 4, calls[2], project, encoder.special[0])
        torch.testing.assert_close(got[row, : len(want)], want, rtol=1e-5, atol=1e-5)  # Llama's norms and rotary tables are float32
        assert not got[row, len(want) :].any()


@torch.no_grad()
def test_layers_at_the_end_are_spared_and_no_cache_is_kept():
    model = get_token_model(llama(), ARCEncoderConfig(pooling_factor=4, truncated=2, bottleneck=5)).eval()
    ids, _ = batch((16, 16))
    model(ids)
    assert measure(model, input_ids=ids).tokens == 2 * (16 + 16 + 4)
    assert model(ids, use_cache=True).past_key_values.get_seq_length() == 0


def test_training_makes_a_decoder_that_stays_as_it_is_say_more_of_the_text(tmp_path):
    decoder = gpt2().requires_grad_(False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    stack = [ARCEncoderConfig(pooling_factor=2, truncated=1, bottleneck=8), LoraConfig(r=2, target_modules=targets)]
    torch.manual_seed(0)
    encoder = get_token_model(llama().float(), stack).train()
    decoder = decoder.float()
    before = {name: value.clone() for name, value in decoder.state_dict().items()}
    ids, _ = batch((6, 6))
    optimizer = torch.optim.Adam([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(60):
        vectors = encoder(ids, hf_tokens_targets=torch.ones(2)).last_hidden_state
        prompt = embed_prompt(decoder, vectors, ids)
        labels = torch.nn.functional.pad(ids, (vectors.shape[1], 0), value=-100)
        losses.append(decoder(**prompt, labels=labels).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1  # a random decoder learns to repeat nothing, but it can be led
    assert all(torch.equal(value, before[name]) for name, value in decoder.state_dict().items())
    encoder.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama().float(), tmp_path).eval()
    with torch.no_grad():
        want, got = (model(ids).last_hidden_state for model in (encoder.eval(), again))
    assert torch.equal(want, got)


@torch.no_grad()
@pytest.mark.parametrize("skips", [0, 1, 2], ids=["no text", "one text", "all texts"])
def test_a_text_that_skips_the_block_in_which_its_groups_ask_is_refused(monkeypatch, skips):
    ids, _ = batch((16, 16))
    model = get_token_model(llama(), [DrLLMConfig(), ARCEncoderConfig(pooling_factor=4, truncated=1, bottleneck=5)]).eval()
    gates = torch.tensor([skips == 0, skips < 2]).double()
    monkeypatch.setattr(DrLLM, "route", lambda router, **_: gates if router.dims.layer == 2 else torch.ones_like(gates))
    if not skips:
        assert model(ids).last_hidden_state.shape == (2, 5, 12)
        return
    with pytest.raises(UnsupportedError, match=r"last block that runs, got a router that lets some skip layers.2. Give the router layers"):
        model(ids)


@torch.no_grad()
@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)], ids=str)
def test_groups_are_of_the_tokens_that_another_method_has_left_in_each_text(layers):
    pooled = DynamicTokenPoolingConfig(layers=layers, boundaries="fixed", prior=0.5)
    model = get_token_model(llama(), [pooled, ARCEncoderConfig(pooling_factor=2, truncated=2, bottleneck=5)]).eval()
    special = next(m for m in model.modules() if isinstance(m, ARCEncoder)).special[0]
    ids, mask = batch((16, 11))
    together = model(ids, attention_mask=mask.long()).last_hidden_state
    for row, real, many, vectors in zip(ids, mask, (4, 3) if 1 in layers else (8, 6), together, strict=True):
        alone = model(row[real][None]).last_hidden_state[0]
        assert len(alone) == many + 1 and torch.equal(alone[many], special)
        torch.testing.assert_close(vectors[: many + 1], alone, rtol=1e-5, atol=1e-5)
        assert not vectors[many + 1 :].any()


def test_a_column_without_a_number_for_each_text_is_refused():
    model = get_token_model(llama(), ARCEncoderConfig(bottleneck=5))
    with pytest.raises(ConfigError, match=r"a number for each of 2 texts, 1 for <Rec>, got \(2, 4\)"):
        model(batch((16, 16))[0], hf_tokens_targets=torch.ones(2, 4))


def test_an_encoder_keeps_one_layer():
    with pytest.raises(ConfigError, match="truncated must leave one of the 4 layers, got 4"):
        get_token_model(llama(), ARCEncoderConfig(truncated=4))
