"""MoE++ against its paper: sections 3.1 to 3.3 of arXiv:2410.07348, equations (1) to (7), upcycled from a trained MLP."""

import math

import pytest
import torch
from by_hand import batch, embed, gpt2, greedy, lm_head, positions
from transformers import StaticCache

from hf_tokens import FTPConfig, MoEPlusPlus, MoEPlusPlusConfig, UnsupportedError, aux_loss, get_token_model, measure, set_progress
from hf_tokens.testing import CACHE, zoo
from hf_tokens.testing.probe import ProbeInsertConfig
from hf_tokens.tools.measure import TokenCounts

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
TILT = 1.0


def softmax(values):
    top = max(values)
    raised = [math.exp(v - top) for v in values]
    return [v / sum(raised) for v in raised]


def dot(line, x):
    return sum(float(w) * float(v) for w, v in zip(line, x, strict=True))


def gates(g, taken, zeros, release):
    """What each expert counts: g where it is taken; in the release not for a zero expert, and the rest divided by its sum."""
    if not release:
        return [v if i in taken else 0.0 for i, v in enumerate(g)]
    counts = [v if i in taken and not 1 <= i <= zeros else 0.0 for i, v in enumerate(g)]
    total = sum(counts)
    return [v / total if total else 0.0 for v in counts]


def token(x, ffn, p, knobs, before):
    """One token x (d): its output, its scores G, its g, and the experts it took; ffn(x) counts its calls."""
    zeros, copies, constants, top_k = knobs["zeros"], knobs["copies"], knobs["constants"], knobs["top_k"]
    n = 1 + zeros + copies + constants
    inner = [math.tanh(dot(line, x)) for line in p["enter"]] if "enter" in p else x
    scores = [dot(p["weight"][i], inner) + (TILT if i == 0 else 0.0) for i in range(n)]
    if before is not None and "residual" in p:
        scores = [s + dot(p["residual"][i], before) for i, s in enumerate(scores)]
    g = softmax(scores)
    taken = sorted(range(n), key=lambda i: (-scores[i], i))[:top_k]
    counts = gates(g, taken, zeros, "enter" in p)
    tilted = [TILT] + [0.0] * (n - 1)
    start = gates(softmax(tilted), sorted(range(n), key=lambda i: (-tilted[i], i))[:top_k], zeros, "enter" in p)
    out = torch.zeros_like(x)
    for i in taken:
        kind = i - 1 - zeros
        if i == 0:
            out = out + counts[0] / start[0] * ffn(x)
        elif kind >= copies:
            c = kind - copies
            a1, a2 = softmax([dot(p["mix"][2 * c], x), dot(p["mix"][2 * c + 1], x)])
            out = out + counts[i] * p["scale"][kind] * (a1 * x + a2 * p["vectors"][c])
        elif kind >= 0:
            out = out + counts[i] * p["scale"][kind] * x
    return out, scores, g, taken


def naive(tokens, ffn, p, knobs, before):
    """The MLP's place for one sample, tokens (m d): outputs, scores for the next block, g and the experts taken."""
    rows = [token(x, ffn, p, knobs, None if before is None else before[i]) for i, x in enumerate(tokens)]
    out, scores, g, taken = zip(*rows, strict=True)
    return torch.stack(out), list(scores), list(g), list(taken)


def balance(g, taken, tau):
    """Equation (7) for one block, over all tokens of the batch."""
    n, total = len(g[0]), len(g)
    loss = 0.0
    for i in range(n):
        f = sum(i in t for t in taken) / total
        loss += (1.0 if i == 0 else tau) * f * sum(row[i] for row in g) / total
    return loss


KNOBS = {"zeros": 1, "copies": 1, "constants": 2, "top_k": 2}


@pytest.mark.parametrize("top_k", [1, 2, 5, 9])
def test_naive_at_its_start_is_the_mlp(top_k):
    p = {"weight": torch.zeros(5, 4), "scale": torch.zeros(3), "mix": torch.zeros(4, 4), "vectors": torch.ones(2, 4)}
    x = torch.tensor([1.0, -2.0, 3.0, 0.5])
    out, _, g, taken = token(x, lambda v: v * 7, p, {**KNOBS, "top_k": top_k}, None)
    assert torch.allclose(out, x * 7)
    assert sum(g) == pytest.approx(1) and len(taken) == min(top_k, 5) and 0 in taken


def test_naive_experts_do_what_they_are_called():
    p = {"weight": torch.zeros(5, 2), "scale": torch.ones(3), "mix": torch.zeros(4, 2), "vectors": torch.tensor([[4.0, 0], [0, 0]])}
    p["weight"][1:] = torch.tensor([[0.0, 9], [9, 0], [9, 9], [-9, -9]])
    outs = [token(torch.tensor(x), lambda v: v * 0 + 99, p, {**KNOBS, "top_k": 1}, None)[0] for x in ([-0.1, 1.0], [1.0, -0.1], [1.0, 1.0])]
    assert outs[0].tolist() == [0, 0]  # zero
    assert outs[1][0] / outs[1][1] == pytest.approx(-10)  # copy
    assert (outs[2][0] - outs[2][1]) / outs[2][1] == pytest.approx(4)  # constant: half of x, half of v


# -- the method in a model -------------------------------------------------------------------------------------------


def routed(layers=4, seed=0, size=0.6, **knobs):
    """A GPT-2 whose routers have left their start, and each block's parameters."""
    model = get_token_model(gpt2(layers, seed), MoEPlusPlusConfig(**knobs)).eval()
    draw = torch.Generator().manual_seed(seed + 1)
    found = sorted((m for m in model.modules() if isinstance(m, MoEPlusPlus)), key=lambda m: m.dims.layer)
    with torch.no_grad():
        for parameter in (p for method in found for p in method.parameters()):
            parameter.copy_(size * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model, [{name: p.detach() for name, p in m.named_parameters()} for m in found]


@torch.no_grad()
def by_hand(base, ids, weights, knobs):
    """One row: hidden states behind the last block, tokens that each MLP computed, and each block's g and choices."""
    x, before, computed, said = embed(base, ids, torch.arange(len(ids))), None, [], []
    m = len(ids)
    for block, p in zip(base.transformer.h, weights, strict=True):
        q, k, v = block.attn.c_attn(block.ln_1(x)).view(m, 3, block.attn.num_heads, -1).permute(1, 2, 0, 3)
        logits = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(m, m).tril().bool(), -torch.inf)
        x = x + block.attn.c_proj((logits.softmax(-1) @ v).transpose(0, 1).reshape(m, -1))
        calls = []
        ffn = lambda row, block=block, calls=calls: calls.append(1) or block.mlp(row[None])[0]
        out, before, g, taken = naive(block.ln_2(x), ffn, p, knobs, before)
        x = x + out
        computed.append(len(calls))
        said.append((g, taken))
    return x, computed, said


MODELS = [
    pytest.param((12,), {}, "left", id="the paper's experts"),
    pytest.param((17, 12, 5), {"constants": 3, "copies": 2}, "left", id="odd numbers, padded"),
    pytest.param((3, 11), {"top_k": 1}, "right", id="one expert a token"),
    pytest.param((9, 1), {"zeros": 0, "constants": 0}, "left", id="a copy alone, one token"),
    pytest.param((9, 6), {"copies": 0, "constants": 0}, "left", id="a zero alone"),
    pytest.param((9, 6), {"top_k": 9}, "left", id="every expert"),
    pytest.param((9, 6), {"residual": False}, "left", id="without residuals"),
    pytest.param((9, 6), {"zeros": 3, "top_k": 2}, "left", id="many zeros, nothing but them"),
    pytest.param((12,), {"gate": "paper"}, "left", id="version 1"),
    pytest.param((17, 12, 5), {"gate": "paper", "constants": 3, "copies": 2}, "left", id="version 1, padded"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("lengths", "knobs", "side"), MODELS)
def test_model_is_the_loop(lengths, knobs, side, cached):
    (model, weights), (ids, mask) = routed(**knobs), batch(lengths, side)
    base = model.get_base_model()
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=cached).logits
    spared = 0
    for row in range(len(ids)):
        hidden, computed, _ = by_hand(base, ids[row][mask[row]], weights, {**KNOBS, **knobs})
        with torch.no_grad():
            torch.testing.assert_close(out[row][mask[row]], lm_head(base, hidden), **CLOSE)
        spared += sum(int(mask[row].sum()) - count for count in computed)
    assert spared or knobs.get("top_k") == 9 or knobs.get("constants") == 0


def test_tokens_off_the_mlp_are_not_computed():
    model, weights = routed(top_k=1)
    ids, _ = batch((16,))
    surgery = model.get_base_model().transformer.h[0].hf_tokens.surgery
    cost, listener = measure(model, input_ids=ids), TokenCounts(surgery)
    with surgery.model.listening(listener):
        model(ids)
    with model.disable_adapter():
        whole = measure(model, input_ids=ids)
    _, computed, _ = by_hand(model.get_base_model(), ids[0], weights, {**KNOBS, "top_k": 1})
    assert [listener.counts[i, "mlp"] for i in range(4)] == computed
    router = sum(2 * 16 * p.numel() for w in weights for name, p in w.items() if name not in ("scale", "vectors"))
    mlp = 2 * 2 * 12 * 48
    assert whole.flops - cost.flops == pytest.approx(mlp * (64 - sum(computed)) - router, abs=2 * 2 * 12 * 16 * 4)
    assert cost.tokens == whole.tokens


def test_cached_generation_is_uncached_and_a_static_cache_is_right():
    model, _ = routed()
    ids, mask = batch((13, 7, 1))
    told = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    want = model.generate(**told, use_cache=False)
    assert torch.equal(model.generate(**told), want)
    assert torch.equal(model.generate(**told, cache_implementation="static", disable_compile=True), want)
    got, _, _ = greedy(model, ids, mask, 6)
    assert torch.equal(want[:, 13:], got)
    cache = StaticCache(model.get_base_model().config, max_cache_len=16)
    with torch.no_grad():
        whole = model(ids[:1]).logits
        parts = [model(part, **{CACHE: cache}).logits for part in (ids[:1, :6], ids[:1, 6:7], ids[:1, 7:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


@pytest.mark.parametrize(("tau", "beta"), [(0.75, 0.01), (0.1, 2.0)])
def test_the_loss_is_that_of_the_loop(tau, beta):
    (model, weights), (ids, mask) = routed(tau=tau, beta=beta), batch((13, 6))
    model.train()(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
    rows = [by_hand(model.get_base_model(), row[real], weights, KNOBS)[2] for row, real in zip(ids, mask, strict=True)]
    expected = 0.0
    for layer in range(4):
        g, taken = ([item for row in rows for item in row[layer][part]] for part in (0, 1))
        expected += beta * balance(g, taken, tau) / 4
    assert aux_loss(model).item() == pytest.approx(expected, abs=1e-9)


def test_an_upcycled_model_is_the_base_to_the_bit_and_can_learn():
    base, (ids, mask) = gpt2(), batch((9, 4))
    with torch.no_grad():
        want = base(ids, attention_mask=mask).logits
        model = get_token_model(base, MoEPlusPlusConfig()).eval()
        assert torch.equal(model(ids, attention_mask=mask).logits, want)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for step in range(30):
        loss = model(ids, attention_mask=mask, labels=ids).loss
        first = loss.item() if step == 0 else first
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss.item() < first - 0.1


def test_scores_follow_the_tokens_through_other_surgery():
    """Tokens that stand in front for a while, and tokens that skip a block, leave each token its own scores."""
    ids, mask = batch((12, 8))
    model, _ = routed()
    stack = get_token_model(
        gpt2(), [ProbeInsertConfig(tokens=2), FTPConfig(sparsities=(0.0, 0.5, 0.0, 0.5), strict=True), MoEPlusPlusConfig()]
    )
    state = {k: v for k, v in model.state_dict().items() if "hf_tokens" in k}
    told = {k.replace(".default.0.", ".default.2."): v for k, v in state.items()}
    assert told.keys() <= stack.state_dict().keys()
    stack.load_state_dict(told, strict=False)
    stack.eval()
    with torch.no_grad():
        together = stack(ids, attention_mask=mask, position_ids=positions(mask)).logits
        for row in range(2):
            real = mask[row]
            alone = stack(ids[row][real][None], position_ids=torch.arange(int(real.sum()))[None]).logits[0]
            torch.testing.assert_close(together[row][real], alone, **CLOSE)
    set_progress(stack.train(), 0.5)
    stack(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in stack.named_parameters() if ".default.2." in n and p.requires_grad
    )


def test_experts_of_limited_capacity_are_refused():
    with pytest.raises(UnsupportedError, match="computes each token from itself alone"):
        get_token_model(zoo.build("switch_transformers").model, MoEPlusPlusConfig(layers=(1,)))


def test_a_sparse_block_is_one_expert_and_its_products_are_counted():
    base = zoo.build("mixtral")
    tokens, c = base.inputs["input_ids"].numel(), base.model.config
    whole = measure(base.model, **base.inputs)
    experts = 4 * 2 * tokens * c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    assert whole.flops > experts
    model = get_token_model(base.model, MoEPlusPlusConfig(top_k=1)).eval()
    for method in (m for m in model.modules() if isinstance(m, MoEPlusPlus)):
        torch.nn.init.constant_(method.scale, 1.0)
        method.weight.data[0] -= 10 * torch.sign(method.weight.data[0] + 1)
        method.weight.data[1] += 10
    none = measure(model, **base.inputs)
    assert none.flops < whole.flops - experts / 4
