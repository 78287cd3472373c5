"""Dynamic token pooling against its paper: sections 3.1 to 3.3 of arXiv:2211.09761 (pooling, upsampling, boundaries, prior)."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, lm_head, positions
from transformers import DynamicCache, Trainer, TrainingArguments

from hf_tokens import (
    ConfigError,
    DynamicTokenPooling,
    DynamicTokenPoolingConfig,
    UnsupportedError,
    aux_loss,
    calibrate,
    get_token_model,
    measure,
)
from hf_tokens.testing import CACHE, zoo

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def perceptron(x, weights):
    """The probability that a segment ends behind a token: two layers with a GELU between, on its normed state."""
    w1, b1, w2, b2 = weights
    mean = sum(x) / len(x)
    size = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    x = [(v - mean) / size for v in x]
    hidden = [sum(w * v for w, v in zip(line, x, strict=True)) + b for line, b in zip(w1, b1, strict=True)]
    hidden = [0.5 * h * (1 + math.erf(h / math.sqrt(2))) for h in hidden]
    return 1 / (1 + math.exp(-(sum(w * h for w, h in zip(w2[0], hidden, strict=True)) + b2[0])))


def naive(x, ends, null):
    """One sample x (n d): the null group and the means of the segments that have ended, and the slot that each token reads."""
    slots, reads, running = [null], [], []
    for token, end in zip(x, ends, strict=True):
        running.append(token)
        if end:
            slots.append(sum(running) / len(running))
            running = []
        reads.append(len(slots) - 1)
    return torch.stack(slots), reads


def through(base, ids, first, last, null, decide, upsample="sum"):
    """Logits (n v) of one row whose blocks from `first` to `last` run once for each segment, and the boundaries."""
    x, run = embed(base, ids, torch.arange(len(ids))), blocks(base)
    for block in run[:first]:
        x, _ = block(x)
    ends = [decide(t, row) for t, row in enumerate(x)]
    slots, reads = naive(x, ends, null)
    given = slots
    for block in run[first : last + 1]:
        slots, _ = block(slots)
    x = torch.stack([row + slots[k] - (given[k] if upsample == "update" else 0) for row, k in zip(x, reads, strict=True)])
    for block in run[last + 1 :]:
        x, _ = block(x)
    return lm_head(base, x), ends


def pooled(seed=0, **knobs):
    """A tiny GPT-2 whose predictor is random, and calls about half of its tokens the end of a segment."""
    model = get_token_model(gpt2(), DynamicTokenPoolingConfig(hidden=6, **knobs)).double().eval()
    leader = next(m for m in model.modules() if isinstance(m, DynamicTokenPooling) and m.is_first_block)
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in leader.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        if leader.config.boundaries != "fixed":
            x = embed(model.get_base_model(), batch((17,))[0][0], torch.arange(17))
            for block in blocks(model.get_base_model())[: leader.dims.layer]:
                x, _ = block(x)
            leader.b2.sub_(leader.logit(x).sort().values[8:10].mean())  # between two tokens, so that none is in doubt
    return model, leader


def chance(leader):
    weights = [p.tolist() for p in (leader.w1, leader.b1, leader.w2, leader.b2)]
    return lambda row: perceptron(row.tolist(), weights)


def decide(leader):
    ask = chance(leader)
    return lambda t, row: ask(row) > 0.5


def every(k):
    return lambda t, row: (t + 1) % k == 0


MODELS = [
    pytest.param((12,), (1, 2), "left", id="the middle blocks"),
    pytest.param((17, 9, 1), (1, 2), "left", id="odd sizes, padded on the left"),
    pytest.param((3, 11, 17), (1, 2), "right", id="padded on the right"),
    pytest.param((12, 5), (0,), "left", id="the first block"),
    pytest.param((12, 5), (3,), "right", id="the last block"),
    pytest.param((13, 6), (0, 1, 2, 3), "left", id="all blocks"),
    pytest.param((1,), (1, 2), "left", id="one token"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("upsample", ["sum", "update"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("lengths", "layers", "side"), MODELS)
def test_model_is_the_loop(lengths, layers, side, cached, upsample):
    model, leader = pooled(upsample=upsample, layers=layers)
    ids, mask = batch(lengths, side)
    seen = []
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=cached).logits
        for row, real in enumerate(mask):
            want, ends = through(model.get_base_model(), ids[row][real], layers[0], layers[-1], leader.null, decide(leader), upsample)
            torch.testing.assert_close(out[row][real], want, **CLOSE)
            seen += ends
    assert len(seen) == 1 or {True, False} == set(seen)


@pytest.mark.parametrize(("k", "n"), [(1, 6), (2, 9), (3, 9), (5, 4), (4, 1)])
def test_fixed_segments(k, n):
    model, leader = pooled(boundaries="fixed", prior=0.999999999999 if k == 1 else 1 / k, layers=(1, 2))
    ids, mask = batch((n,))
    with torch.no_grad():
        out = model(ids, attention_mask=mask).logits[0]
        want, ends = through(model.get_base_model(), ids[0], 1, 2, leader.null, every(k))
    torch.testing.assert_close(out, want, rtol=1e-6, atol=1e-6)
    cost = measure(model, input_ids=ids, use_cache=True)
    assert cost.tokens == 2 * n + 2 * (sum(ends) + 1)


@torch.no_grad()
def test_a_segment_has_the_place_of_its_last_token():
    base = zoo.build("llama").model.double().eval()
    model = get_token_model(base, DynamicTokenPoolingConfig(boundaries="fixed", prior=0.25, layers=(1, 2))).eval()
    leader = next(m for m in model.modules() if isinstance(m, DynamicTokenPooling) and m.is_first_block)
    ids = torch.randint(5, 80, (1, 14), generator=torch.Generator().manual_seed(0))
    out = model(ids).logits[0]
    inner, place = base.model, torch.arange(14)
    ends = [every(4)(t, None) for t in range(14)]
    with model.disable_adapter():
        x = inner.layers[0](inner.embed_tokens(ids), **rotary(inner, place))[0]
        slots, reads = naive(x, ends, leader.null)
        slots = slots[None]
        for i in (1, 2):
            slots = inner.layers[i](slots, **rotary(inner, torch.tensor([0, 3, 7, 11])))
        x = inner.layers[3](x[None] + slots[:, reads], **rotary(inner, place))
        torch.testing.assert_close(out, base.lm_head(inner.norm(x))[0], **CLOSE)


def rotary(inner, place):
    table = inner.rotary_emb(torch.zeros(1, dtype=torch.float64), place[None])
    return {"position_embeddings": table, "position_ids": place[None]}


def test_no_token_hears_of_a_later_one():
    model, _ = pooled()
    ids, _ = batch((14,))
    with torch.no_grad():
        whole = model(ids).logits[0]
        for n in range(1, 14):
            torch.testing.assert_close(model(ids[:, :n]).logits[0], whole[:n], **CLOSE)


@pytest.mark.drawn
@pytest.mark.parametrize("chunks", [(1,) * 13, (5, 1, 7), (2, 2, 9)])
@pytest.mark.parametrize("layers", [None, (0, 1), (2, 3)])
def test_a_sequence_in_chunks_is_the_whole(chunks, layers):
    model, _ = pooled(layers=layers)
    ids, mask = batch((13, 6))
    place, cache, logits, hidden = positions(mask), DynamicCache(), [], []
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, position_ids=place, output_hidden_states=True)
        start = 0
        for n in chunks:
            part = slice(start, start + n)
            given = {"attention_mask": mask[:, : start + n], "position_ids": place[:, part], CACHE: cache}
            out = model(ids[:, part], **given, output_hidden_states=True)
            logits.append(out.logits)
            hidden.append(out.hidden_states)
            start += n
    torch.testing.assert_close(torch.cat(logits, dim=1)[mask], whole.logits[mask], **CLOSE)
    for block, states in enumerate(zip(*hidden, strict=True)):
        torch.testing.assert_close(torch.cat(states, dim=1)[mask], whole.hidden_states[block][mask], **CLOSE)


def test_a_token_that_ends_no_segment_runs_no_middle_block():
    model, _ = pooled(boundaries="fixed", prior=0.25, layers=(1, 2))
    ids, mask = batch((8,))
    runs = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: runs.append(i)) for i, block in enumerate(model.get_base_model().transformer.h)
    ]
    cache, tokens = DynamicCache(), []
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        for step in range(8):
            runs.clear()
            model(ids[:, step : step + 1], **{CACHE: cache})
            tokens.append(tuple(runs))
    for handle in handles:
        handle.remove()
    assert tokens == [(0, 3), (0, 3), (0, 3), (0, 1, 2, 3)] * 2
    entries = lambda layer: layer.length if layer.filled is None else int(layer.filled.sum())
    assert [entries(layer) for layer in cache.layers] == [16, 5, 5, 16]
    assert cache.get_seq_length() == 16


def test_generation_with_a_cache_is_the_loop():
    model, leader = pooled()
    ids, mask = batch((13, 7, 1))
    got, logits, _ = greedy(model, ids, mask, 8)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 13:], got)
    for row, real in enumerate(mask):
        text = ids[row][real]
        for step in range(8):
            with torch.no_grad():
                want, _ = through(model.get_base_model(), text, 1, 2, leader.null, decide(leader))
            torch.testing.assert_close(logits[row, step], want[-1], **CLOSE)
            text = torch.cat([text, want[-1].argmax()[None]])
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **beams)
    for row, real in enumerate(mask):
        alone = model.generate(input_ids=ids[row][real][None], attention_mask=mask[row][real][None], **beams)
        assert together[row, 13:].tolist() == alone[0, int(real.sum()) :].tolist()


def test_a_cut_cache_is_refused():
    model, _ = pooled()
    ids, _ = batch((9,))
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        cache.crop(-2)
        with pytest.raises(UnsupportedError, match="cannot be taken back"):
            model(ids[:, :1], **{CACHE: cache})


def test_the_prior_is_the_binomial():
    model, leader = pooled(prior=0.3, weight=2.0)
    model.train()
    ids, mask = batch((11, 6))
    torch.manual_seed(3)
    noise = torch.rand(2, 11, dtype=torch.float64)
    torch.manual_seed(3)
    out = model(ids, attention_mask=mask, position_ids=positions(mask), labels=ids)
    expected, ask = 0.0, chance(leader)
    for row, real in enumerate(mask):
        n = int(real.sum())
        x = embed(model.get_base_model(), ids[row][real], torch.arange(n))
        x, _ = blocks(model.get_base_model())[0](x)
        chances = [ask(token) for token in x]
        u = noise[row][real].tolist()
        logits = [math.log(p / (1 - p)) + math.log(v / (1 - v)) for p, v in zip(chances, u, strict=True)]
        k = sum(1 / (1 + math.exp(-z / 0.5)) > 0.5 for z in logits)
        expected -= 2.0 * math.log(math.comb(n, k) * 0.3**k * 0.7 ** (n - k)) / n / 2
    assert aux_loss(model).item() == pytest.approx(expected, abs=1e-9)
    plain = model.get_base_model().loss_function(out.logits, ids, vocab_size=50).item()
    assert out.loss.item() == pytest.approx(plain + expected, abs=1e-5)


def soft_weights(x, chance, ends, null):
    """The naive pooling with a gradient: every boundary that stands in front of a token in its segment makes the token weigh more."""
    hard = [c - c.detach() + end for c, end in zip(chance, ends, strict=True)]
    slots, k = [null], 1
    begin = 0
    for t, end in enumerate(ends):
        if end:
            weights = [1 - (k - 1 - sum(hard[:j], torch.zeros(()))) for j in range(begin, t + 1)]
            assert all(w.item() == 1 for w in weights)
            slots.append(sum(w * x[j] for w, j in zip(weights, range(begin, t + 1), strict=True)) / sum(weights))
            begin, k = t + 1, k + 1
    return torch.stack(slots)


def test_the_boundaries_hear_of_the_pooling():
    _, leader = pooled(weight=0.0, upsample="sum")
    x = torch.randn(1, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask, place = torch.ones(1, 12, dtype=torch.bool), torch.arange(12)[None]

    class Rows:
        rows: dict = {}

    tokens = leader.assign(x, mask, ~mask, place, None, Rows())
    heed = torch.randn(tokens.content.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (tokens.content * heed).sum().backward()
    got = {name: p.grad.clone() for name, p in leader.named_parameters()}
    leader.zero_grad()
    w1, b1, w2, b2 = leader.w1, leader.b1, leader.w2, leader.b2
    normed = (x[0] - x[0].mean(dim=1, keepdim=True)) / (x[0].var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
    soft = torch.sigmoid(torch.nn.functional.gelu(normed @ w1.T + b1) @ w2.T + b2)[:, 0]
    ends = [decide(leader)(t, row) for t, row in enumerate(x[0])]
    slots = soft_weights(x[0], soft, ends, leader.null)
    torch.testing.assert_close(tokens.content[0], slots, **CLOSE)
    (slots * heed[0]).sum().backward()
    assert got["w1"].any()
    for name, p in leader.named_parameters():
        torch.testing.assert_close(got[name], p.grad, **CLOSE)


def test_labels_teach_the_predictor():
    model, leader = pooled(boundaries="labels")
    model.train()
    ids, mask = batch((9, 5))
    labels = torch.where(torch.arange(9) % 3 == 2, 1, 0).expand(2, -1).clone()
    labels[0, 4] = -100
    model(ids, attention_mask=mask, position_ids=positions(mask), hf_tokens_targets=labels)
    terms, ask = [], chance(leader)
    for row, real in enumerate(mask):
        x = embed(model.get_base_model(), ids[row][real], torch.arange(int(real.sum())))
        x, _ = blocks(model.get_base_model())[0](x)
        for token, label in zip(x, labels[row][real].tolist(), strict=True):
            p = ask(token)
            terms += [] if label < 0 else [-math.log(p if label else 1 - p)]
    assert aux_loss(model).item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)
    with pytest.raises(ConfigError, match=r"must hold 1, 0 or -100 for each of \(2, 9\) tokens"):
        model(ids, attention_mask=mask, hf_tokens_targets=labels[:, :-1])


@pytest.mark.parametrize("prior", [0.2, 0.5])
def test_calibrate_ends_as_many_segments_as_the_prior_wants(prior):
    model, leader = pooled(prior=prior)
    ids, mask = batch((20, 11))
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    found = calibrate(model, [given])["default.0"]["threshold"]
    x = embed(model.get_base_model(), ids, positions(mask))
    rows = [blocks(model.get_base_model())[0](row[real])[0] for row, real in zip(x, mask, strict=True)]
    chances = [chance(leader)(token) for row in rows for token in row]
    assert sum(c > found for c in chances) == int(prior * len(chances))
    assert leader.config.threshold == found
    with torch.no_grad():
        entries = model(**given, use_cache=True).past_key_values.layers[1].filled
    assert int(entries.sum()) == int(prior * len(chances)) + 2
    assert calibrate(pooled(boundaries="fixed")[0], [given]) == {}


def test_trainer_trains_the_predictor(tmp_path):
    model, _ = pooled()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, _ = batch((9, 9, 9, 9))
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True)
    Trainer(model=model, args=args, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    moved = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"w1", "b1", "w2", "b2", "null"}


def test_blocks_must_follow_each_other():
    with pytest.raises(UnsupportedError, match="blocks that follow each other"):
        get_token_model(gpt2(), DynamicTokenPoolingConfig(layers=(0, 2)))
