"""FTP against its paper: section 3.2, equation (5) and section 4.4 of arXiv:2412.11494 (static and dynamic router, losses, decoding)."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, lm_head, positions
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Trainer, TrainingArguments

from hf_tokens import (
    FTP,
    ConfigError,
    FTPConfig,
    UnsupportedError,
    aux_loss,
    get_token_model,
    measure,
    search_shares,
    set_method,
    set_progress,
)
from hf_tokens.testing import CACHE, zoo
from hf_tokens.tools.surgeries import surgery_of


def static(count, sparsity):
    """The static router: the first token leads, then the newest ones; the floor(sparsity * count) last of that order are skipped."""
    order = [0, *range(count - 1, 0, -1)] if count else []
    skipped = order[count - skips(count, sparsity) :]
    return [i not in skipped for i in range(count)]


def skips(count, sparsity):
    return min(count, math.floor(sparsity * count + 1e-9))


def factors(table, sparsity):
    """The four factors of every token: relative position, latest attention score, relative rank of it, sparsity asked of the block."""
    count = len(table)
    rows = []
    for i, score in enumerate(table):
        ahead = sum(other > score or (other == score and j < i) for j, other in enumerate(table))
        rows.append((i / count, score, ahead / count, sparsity))
    return rows


def perceptron(row, weights):
    """Two layers with a ReLU between, one logit: the probability that the token runs the block."""
    w1, b1, w2, b2 = weights
    hidden = [max(0.0, sum(float(w) * x for w, x in zip(line, row, strict=True)) + float(b)) for line, b in zip(w1, b1, strict=True)]
    logit = sum(float(w) * h for w, h in zip(w2[0], hidden, strict=True)) + float(b2[0])
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def dynamic(table, sparsity, weights, strict):
    """Which tokens run: those whose probability reaches one half, or, if strict, exactly as many as the sparsity leaves."""
    chance = [perceptron(row, weights) for row in factors(table, sparsity)]
    if not strict:
        return [c >= 0.5 for c in chance], chance
    order = sorted(range(len(table)), key=lambda i: (-chance[i], i))
    running = order[: len(table) - skips(len(table), sparsity)]
    return [i in running for i in range(len(table))], chance


def naive(x, mask, blocks, sparsity, weights, strict=False):
    """One sample through all blocks: hidden states n d after the last, and per block the run flags and the chances of the real tokens.

    blocks[l](hidden m d, positions) -> (hidden m d, attention h m m) sees the running tokens only: a skipped token passes unchanged and
    lends no key or value to this block. A block that is asked for no sparsity runs all tokens and is not routed. The table holds the
    attention that each token received when it last ran.
    """
    real = [i for i in range(len(x)) if mask[i]]
    hidden = [row.clone() for row in x]
    table = [1 / len(real)] * len(real)
    routes = []
    for block, asked in zip(blocks, sparsity, strict=True):
        run, chance = dynamic(table, asked, weights, strict) if asked > 0 else ([True] * len(real), [1.0] * len(real))
        routes.append((run, chance))
        running = [k for k, flag in enumerate(run) if flag]
        if not running:
            continue
        out, attention = block(torch.stack([hidden[real[k]] for k in running]), running)
        for slot, k in enumerate(running):
            hidden[real[k]] = out[slot]
            received = [float(attention[h][q][slot]) for h in range(len(attention)) for q in range(len(running))]
            table[k] = sum(received) / len(received)
    return torch.stack(hidden), routes


def losses(routes, sparsity, student, teacher, mask):
    """Guide, sparsity and distillation loss of one sample, unweighted."""
    guide, terms, short = 0.0, 0, 0.0
    for (run, chance), asked in zip(routes, sparsity, strict=True):
        if asked == 0:
            continue
        for target, c in zip(static(len(run), asked), chance, strict=True):
            guide -= math.log(c if target else 1 - c)
            terms += 1
        short += max(asked - sum(not r for r in run) / len(run), 0.0)  # equation (5): too few skips cost, too many do not
    real = [i for i in range(len(mask)) if mask[i]]
    gap = sum((float(a) - float(b)) ** 2 for i in real for a, b in zip(student[i], teacher[i], strict=True))
    return guide / terms if terms else 0.0, short, gap / sum(float(b) ** 2 for i in real for b in teacher[i])


def decodes(sparsity, threshold=0.5):
    """Section 4.4: with a KV cache the newest token runs the blocks whose sparsity does not pass the threshold."""
    return [asked <= threshold for asked in sparsity]


# tokens, padding on the left, sparsity of every block, strict
CASES = [
    pytest.param(12, 0, (0.0, 0.25, 0.5), False, id="the paper's router"),
    pytest.param(12, 0, (0.0, 0.25, 0.5), True, id="exact counts"),
    pytest.param(17, 0, (0.3, 0.45, 0.0, 0.7), True, id="odd sizes"),
    pytest.param(17, 5, (0.3, 0.45, 0.0, 0.7), False, id="padded"),
    pytest.param(1, 0, (0.0, 0.5, 0.9), True, id="one token"),
    pytest.param(9, 8, (0.0, 0.5, 0.9), True, id="all padded but one"),
    pytest.param(8, 0, (0.0, 0.0, 0.0), False, id="nothing to skip"),
    pytest.param(8, 0, (0.0, 1.0, 0.5), True, id="a block skipped whole"),
    pytest.param(8, 2, (1.0, 1.0, 1.0), True, id="everything skipped"),
]


def network(depth, width=6, heads=2, seed=0):
    """Tiny causal attention blocks in float64 and a router of the paper's sizes."""
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)

    def block(wq, wk, wv):
        def call(hidden, positions):
            assert positions == sorted(positions)
            logits = torch.stack([(hidden @ q) @ (hidden @ k).T for q, k in zip(wq, wk, strict=True)]) / math.sqrt(width)
            seen = torch.ones(len(hidden), len(hidden)).tril().bool()
            attention = logits.masked_fill(~seen, -1e30).softmax(-1)
            return hidden + sum(a @ hidden @ v for a, v in zip(attention, wv, strict=True)), attention

        return call

    blocks = [block(*(randn(heads, width, width) * 0.3 for _ in range(3))) for _ in range(depth)]
    return blocks, (randn(64, 4), randn(64), randn(1, 64), randn(1))


@pytest.mark.parametrize(("tokens", "padding", "sparsity", "strict"), CASES)
def test_naive_runs_what_its_sparsity_says(tokens, padding, sparsity, strict):
    blocks, weights = network(len(sparsity))
    x = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = [i >= padding for i in range(tokens)]
    out, routes = naive(x, mask, blocks, sparsity, weights, strict)
    alone, same = naive(x[padding:], [True] * (tokens - padding), blocks, sparsity, weights, strict)
    assert torch.equal(out[padding:], alone)
    assert routes == same
    assert torch.equal(out[:padding], x[:padding])
    for (run, _), asked in zip(routes, sparsity, strict=True):
        if strict or asked == 0:
            assert run.count(False) == skips(tokens - padding, asked)
    guide, short, distance = losses(routes, sparsity, out, out, mask)
    assert guide >= 0
    assert distance == 0
    if strict:
        assert short < len(sparsity) / (tokens - padding)


def test_naive_without_sparsity_is_the_model():
    blocks, weights = network(3)
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, _ = naive(x, [True] * 7, blocks, [0.0] * 3, weights)
    for block in blocks:
        x, _ = block(x, list(range(7)))
    assert torch.equal(out, x)


def test_naive_that_skips_everything_is_the_identity():
    blocks, weights = network(2)
    x = torch.randn(5, 6, dtype=torch.float64)
    out, routes = naive(x, [True] * 5, blocks, [1.0, 1.0], weights, strict=True)
    assert torch.equal(out, x)
    assert losses(routes, [1.0, 1.0], out, x, [True] * 5)[1:] == (0.0, 0.0)


def test_naive_skipped_tokens_lend_no_key():
    blocks, weights = network(2)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, routes = naive(x, [True] * 9, blocks[1:], [0.5], weights, strict=True)
    run = routes[0][0]
    moved = x.clone()
    moved[[not r for r in run]] += 5
    first, second = (naive(v, [True] * 9, blocks[1:], [0.5], weights, strict=True)[0] for v in (x, moved))
    assert torch.equal(first[run], second[run])


def test_static_router_keeps_the_first_and_the_newest():
    assert static(6, 0.5) == [True, False, False, False, True, True]
    assert static(5, 0.0) == [True] * 5
    assert static(5, 1.0) == [False] * 5
    assert static(1, 0.9) == [True]
    assert static(0, 0.5) == []


def test_factors_rank_from_the_most_attended():
    assert [row[2] for row in factors([0.1, 0.4, 0.4, 0.3], 0.2)] == [0.75, 0.0, 0.25, 0.5]
    assert factors([1.0], 0.7) == [(0.0, 1.0, 0.0, 0.7)]


def test_sparsity_loss_is_one_sided():
    routes = [([True, True, False, False], [0.9, 0.8, 0.1, 0.2])]
    x = torch.ones(4, 2)
    assert losses(routes, [0.75], x, x, [True] * 4)[1] == pytest.approx(0.25)
    assert losses(routes, [0.25], x, x, [True] * 4)[1] == 0


def test_decoding_threshold():
    assert decodes([0.0, 0.5, 0.51, 1.0]) == [True, True, False, False]


# -- the method in a model -------------------------------------------------------------------------------------------


def routed(layers=4, seed=0, **knobs):
    """A GPT-2 with FTP in it, and the router's weights, set far enough apart that tokens differ."""
    model = get_token_model(gpt2(layers, seed), FTPConfig(**knobs)).eval()
    leader = next(module for module in model.modules() if isinstance(module, FTP))
    if knobs.get("router") == "static":
        return model, None
    draw = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in leader.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        grid = torch.tensor([(i / 12, 1 / 12, i / 12, 0.4) for i in range(12)], dtype=torch.float64)
        leader.b2.sub_(((grid @ leader.w1.T + leader.b1).relu() @ leader.w2.T + leader.b2).median())
    return model, tuple(p.detach() for p in (leader.w1, leader.b1, leader.w2, leader.b2))


@torch.no_grad()
def all_rows(base, ids, mask, sparsity, weights, strict):
    """Last hidden states before the final norm (b n d) and routes per row."""
    rows = []
    for row, real in zip(ids, mask, strict=True):
        place = (real.long().cumsum(0) - 1).clamp(min=0)
        rows.append(naive(embed(base, row, place), real.tolist(), blocks(base), sparsity, weights, strict))
    return rows


CLOSE = {"rtol": 1e-9, "atol": 1e-9}
MODELS = [
    pytest.param((12,), (0.0, 0.25, 0.5, 0.3), False, "left", id="the paper's router"),
    pytest.param((17, 12, 5), (0.3, 0.45, 0.0, 0.7), True, "left", id="odd sizes, exact counts, padded"),
    pytest.param((17, 9, 1), (0.3, 0.45, 0.0, 0.7), False, "left", id="rows keep different numbers"),
    pytest.param((3, 11, 17), (0.3, 0.45, 0.2, 0.7), False, "right", id="padded on the right"),
    pytest.param((1,), (0.0, 0.5, 0.9, 0.2), True, "left", id="one token"),
    pytest.param((8, 6), (0.0, 1.0, 0.5, 0.5), True, "left", id="a block skipped whole"),
    pytest.param((8, 6), (1.0, 1.0, 1.0, 1.0), True, "left", id="everything skipped"),
    pytest.param((8, 6), (0.0, 0.0, 0.0, 0.0), False, "left", id="nothing to skip"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("lengths", "sparsity", "strict", "side"), MODELS)
def test_model_is_the_loop(lengths, sparsity, strict, side, cached):
    model, weights = routed(sparsities=sparsity, strict=strict)
    base = model.get_base_model()
    ids, mask = batch(lengths, side)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=cached).logits
    skipped = 0
    for row, (hidden, routes) in enumerate(all_rows(base, ids, mask, sparsity, weights, strict)):
        with torch.no_grad():
            expected = lm_head(base, hidden)
        torch.testing.assert_close(out[row][mask[row]], expected[mask[row]], **CLOSE)
        skipped += sum(run.count(False) for run, _ in routes)
    assert skipped or sum(sparsity) == 0 or max(lengths) == 1


def test_skipped_tokens_are_not_computed_and_leave_no_entry():
    sparsity = (0.0, 0.25, 0.5, 0.75)
    model, _ = routed(sparsities=sparsity, strict=True)
    ids, _ = batch((16,))
    cost = measure(model, input_ids=ids, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, input_ids=ids, use_cache=True)
    assert cost.tokens == 16 + 12 + 8 + 4
    assert cost.kv_bytes == whole.kv_bytes * 40 // 64
    assert cost.flops < whole.flops


def test_static_router_runs_the_first_and_the_newest():
    model, _ = routed(layers=1, sparsity=0.5, router="static")
    ids, _ = batch((9,))
    changed = ids.clone()
    changed[0, 1:5] = 3
    with torch.no_grad():
        first, second = model(ids).logits[0], model(changed).logits[0]
    assert [bool(torch.equal(a, b)) for a, b in zip(first, second, strict=True)] == [True, *[False] * 4, *[True] * 4]
    assert not any("hf_tokens" in name for name, _ in model.named_parameters())


@torch.no_grad()
def decode_by_hand(base, ids, mask, sparsity, weights, strict, steps, threshold):
    """Greedy tokens of one row: the prompt routed once, then the decode rule, with each block's own list of entries."""
    ((_, routes),) = all_rows(base, ids[None], mask[None], sparsity, weights, strict)
    real = ids[mask]
    states = embed(base, real, torch.arange(len(real)))
    entries, logits = [], []
    for block, (run, _) in zip(blocks(base), routes, strict=True):
        entries.append(states[torch.tensor(run)])
        if any(run):
            states = states.clone()
            states[torch.tensor(run)] = block(entries[-1])[0]
    out = []
    for step in range(steps):
        logits.append(lm_head(base, states[-1]))
        out.append(int(logits[-1].argmax()))
        x = embed(base, torch.tensor(out[-1]), torch.tensor(len(real) + step))
        for layer, runs in enumerate(decodes(sparsity, threshold)):
            if runs:
                entries[layer] = torch.cat([entries[layer], x[None]])
                x = blocks(base)[layer](entries[layer])[0][-1]
        states = x[None]
    return out, torch.stack(logits), [len(e) for e in entries]


@pytest.mark.parametrize("threshold", [0.5, 0.1])
def test_generation_with_cache_is_the_decode_rule(threshold):
    sparsity, lengths = (0.2, 0.6, 0.0, 0.5), (13, 7, 1)
    model, weights = routed(sparsities=sparsity, strict=True, threshold=threshold)
    ids, mask = batch(lengths)
    got, logits, cache = greedy(model, ids, mask, 6)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :], got)
    for row in range(len(lengths)):
        expected, told, held = decode_by_hand(model.get_base_model(), ids[row], mask[row], sparsity, weights, True, 6, threshold)
        assert got[row].tolist() == expected
        torch.testing.assert_close(logits[row], told, **CLOSE)
        kept = [int(layer.filled[row].sum()) if layer.filled is not None else layer.length for layer in cache.layers]
        pads = [0 if asked else ids.shape[1] - lengths[row] for asked in sparsity]  # an unrouted block stores the padding, unseen
        runs = decodes(sparsity, threshold)
        assert kept == [h - run + pad for h, run, pad in zip(held, runs, pads, strict=True)]
    beams = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **beams)
    for row, length in enumerate(lengths):
        alone = model.generate(input_ids=ids[row, -length:][None], attention_mask=mask[row, -length:][None], **beams)
        assert together[row, 13:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("answer", [0, 1])
def test_a_prompt_in_chunks_is_refused_and_a_second_turn_is_not(answer):
    model, _ = routed(sparsity=0.4)
    ids, _ = batch((12,))
    with pytest.raises(UnsupportedError, match="one pass"):
        model.generate(ids, max_new_tokens=1, prefill_chunk_size=6)
    cache = DynamicCache()
    with torch.no_grad():
        for part in (ids[:, :6], ids[:, 6 : 6 + answer], ids[:, 6 + answer :]):
            out = model(part, **{CACHE: cache}).logits if part.numel() else None
    assert out.shape[1] == 6 - answer
    assert cache.get_seq_length() == 12


@pytest.mark.parametrize("strict", [False, True])
def test_losses_are_those_of_the_loop(strict):
    sparsity, lengths = (0.3, 0.0, 0.45, 0.7), (13, 6)
    ids, mask = batch(lengths)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
    for weights_of, unit in (("guide_weight", 0), ("sparsity_weight", 1), ("distillation_weight", 2)):
        knobs = {"guide_weight": 0.0, "sparsity_weight": 0.0, "distillation_weight": 0.0, weights_of: 2.0}
        model, weights = routed(sparsities=sparsity, strict=strict, **knobs)
        base = model.get_base_model()
        set_progress(model.train(), 0.25)
        output = model(**given, labels=ids)
        expected = 0.0
        students = all_rows(base, ids, mask, sparsity, weights, strict)
        teachers = all_rows(base, ids, mask, (0.0,) * 4, weights, strict)
        for row, ((student, routes), (teacher, _)) in enumerate(zip(students, teachers, strict=True)):
            terms = losses(routes, sparsity, student, teacher, mask[row].tolist())
            expected += terms[unit] * 2.0 * (0.75 if unit == 0 else 1.0) / len(ids)
        assert aux_loss(model).item() == pytest.approx(expected, abs=1e-9)
        labelled = output.loss.item()
        plain = base.loss_function(output.logits, ids, vocab_size=50).item()
        assert labelled == pytest.approx(plain + expected, abs=1e-5)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")  # so it is
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("inside", [True, False], ids=["a LoRA in the adapter", "a LoRA of the base"])
def test_the_teacher_is_the_model_without_the_adapter(inside):
    base = gpt2()
    lora = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    model = base if inside else get_peft_model(base, lora, adapter_name="task")
    ids = torch.arange(9)[None]
    want = model(input_ids=ids).logits
    model = get_token_model(model, [FTPConfig(sparsity=0.5, strict=True), *([lora] if inside else [])]).train()
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with surgery_of(model).without_adapters():
        assert torch.equal(base(input_ids=ids).logits, want)
    assert not torch.equal(base(input_ids=ids).logits, want)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_training_with_trainer_trains_the_router(tmp_path):
    model, _ = routed(sparsity=0.4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ids, _ = batch((9, 9, 9, 9))
    data = [{"input_ids": row, "labels": row} for row in ids]
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True)
    Trainer(model=model, args=args, train_dataset=data).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("hf_tokens" in name for name in moved)
    assert {name.rsplit(".", 1)[1] for name in moved} == {"w1", "b1", "w2", "b2"}


def test_training_computes_what_evaluation_does():
    model, _ = routed(sparsities=(0.3, 0.45, 0.0, 0.7))
    ids, mask = batch((11, 8))
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask), "use_cache": False}
    with torch.no_grad():
        expected = model.eval()(**given).logits
    trained = model.train()(**given).logits
    torch.testing.assert_close(trained[mask], expected[mask], **CLOSE)


def trained_gradients(model, weights, **given):
    """The gradients of the router from the methods' losses and from the logits, each position weighted."""
    model.zero_grad()
    logits = model(**given).logits
    ((logits * weights[..., None]).sum() + len(logits) * aux_loss(model)).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shares", [(0.3, 0.45, 0.0, 0.7), (0.6, 0.0, 0.0, 0.0)], ids=["last block too", "first block only"])
def test_a_padded_batch_gets_the_gradients_of_its_samples(shares, side):
    model, weights = routed(sparsities=shares)
    model = get_token_model(gpt2(), FTPConfig(sparsities=shares, layers=tuple(i for i, share in enumerate(shares) if share)))
    leader = next(module for module in model.modules() if isinstance(module, FTP))
    for parameter, value in zip((leader.w1, leader.b1, leader.w2, leader.b2), weights, strict=True):
        parameter.data.copy_(value)
    model.train()
    ids, mask = batch((11, 6), side)
    heed = torch.randn(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * mask
    together = trained_gradients(model, heed, input_ids=ids, attention_mask=mask, position_ids=positions(mask))
    alone = [trained_gradients(model, w[None, m], input_ids=i[None, m]) for i, m, w in zip(ids, mask, heed, strict=True)]
    for both, *each in zip(together, *alone, strict=True):
        torch.testing.assert_close(both, sum(each), **CLOSE)


def test_a_row_of_padding_leaves_the_loss_a_number():
    model, _ = routed(sparsity=0.4)
    ids, mask = batch((9, 0))
    model.train()(input_ids=ids, attention_mask=mask, position_ids=positions(mask))
    with_a_row = aux_loss(model).item()
    model(input_ids=ids[:1], attention_mask=mask[:1], position_ids=positions(mask)[:1])
    assert with_a_row == pytest.approx((aux_loss(model).item() + 4 * 0.4) / 2, abs=1e-9)  # L_s: it skips nothing in 4 blocks


def test_a_gate_hears_what_running_would_change():
    model, weights = routed(sparsities=(0.0, 0.0, 0.0, 0.6), guide_weight=0.0, sparsity_weight=0.0, distillation_weight=0.0)
    base, (ids, _) = model.get_base_model(), batch((12,))
    place = torch.arange(12)
    with torch.no_grad():
        hidden, table = embed(base, ids[0], place), None
        for block in blocks(base)[:3]:
            hidden, attention = block(hidden)
            table = attention.mean(dim=0).mean(dim=0).tolist()
        runs, chance = dynamic(table, 0.6, weights, False)
        updates = []
        for i in range(12):
            seen = [j for j in range(i) if runs[j]] + [i]
            updates.append(blocks(base)[3](hidden[seen])[0][-1] - hidden[i])
    assert any(runs) and not all(runs)
    gate = torch.tensor(runs, dtype=torch.float64, requires_grad=True)
    heed = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    (lm_head(base, hidden + gate[:, None] * torch.stack(updates)).sum(dim=-1) * heed).sum().backward()
    chance = torch.tensor(chance, dtype=torch.float64)
    *_, b2 = trained_gradients(model.train(), heed[None], input_ids=ids)
    torch.testing.assert_close(b2, (gate.grad * chance * (1 - chance)).sum()[None], **CLOSE)


def test_search_finds_the_block_that_minds_least():
    model, _ = routed(layers=3, sparsity=0.5, router="static", strict=True)
    ids, _ = batch((12, 12))
    tried = []

    @torch.no_grad()
    def loss(shares):
        tried.append(shares)
        set_method(model, FTPConfig(sparsity=0.5, router="static", strict=True, sparsities=shares))
        return model(ids, labels=ids).loss.item()

    best = search_shares(loss, (0.5,) * 3, population=8, generations=4, seed=1)
    assert all(sum(shares) / 3 == pytest.approx(0.5, abs=1e-12) and 0 <= min(shares) <= max(shares) <= 1 for shares in tried)
    assert loss(best) <= loss((0.5, 0.5, 0.5))
    assert loss(best) == min(loss(shares) for shares in list(tried))
    assert tuple(model.peft_config["default"].methods[0]["sparsities"]) == tried[-1]


def test_zero_strength_is_the_base():
    model, _ = routed(sparsity=0.3)
    zero = get_token_model(gpt2(), FTPConfig(sparsity=0.3).at_zero()).eval()
    ids, mask = batch((9, 4))
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(zero(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def test_sparsities_must_fit_the_depth():
    with pytest.raises(ConfigError, match="one value for each of 4 blocks"):
        get_token_model(gpt2(), FTPConfig(sparsities=(0.1, 0.2)))


@pytest.mark.filterwarnings("ignore:hf-tokens")
@pytest.mark.parametrize("family", [family for family in ("gemma3n_text", "hy_v4", "glm5_next") if family in zoo.families()])
def test_the_teacher_of_streams_side_by_side_is_one_token_for_each(family):
    specimen = zoo.build(family)
    model = get_token_model(specimen.model, FTPConfig(sparsity=0.0, guide_weight=0.0, sparsity_weight=0.0)).train()
    set_progress(model, 0.5)
    model(**specimen.inputs)
    assert aux_loss(model).item() == 0  # all tokens run, so the student is the teacher
