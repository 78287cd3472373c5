"""Dr.LLM against its paper: sections 3.1, 3.2 and 4 of arXiv:2510.12773 (router, windows, focal loss, paths, length-aware search)."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, lm_head, positions
from transformers import DynamicCache, Trainer, TrainingArguments

from hf_tokens import ConfigError, DrLLM, DrLLMConfig, FTPConfig, PrefixKVConfig, UnsupportedError, aux_loss, get_token_model, measure
from hf_tokens import search_path as search
from hf_tokens.testing import CACHE

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def windows(count, most):
    """The tokens of each window: the first W floor(T / W) tokens in W contiguous pieces, W clamped by T."""
    w = min(most, count)
    size = count // w
    return [list(range(k * size, (k + 1) * size)) for k in range(w)]


def router(hidden, weights, most):
    """Probabilities of skip, run and repeat: the windows' logits averaged, each Linear-GELU-Linear of its mean."""
    w1, b1, w2, b2 = weights
    total = [0.0, 0.0, 0.0]
    pieces = windows(len(hidden), most)
    for piece in pieces:
        mean = sum(hidden[i] for i in piece) / len(piece)
        z = [float(line @ mean) + float(b) for line, b in zip(w1, b1, strict=True)]
        z = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in z]
        for c in range(3):
            total[c] += (sum(float(w) * v for w, v in zip(w2[c], z, strict=True)) + float(b2[c])) / len(pieces)
    top = max(total)
    weights = [math.exp(v - top) for v in total]
    return [v / sum(weights) for v in weights]


def decide(chance, threshold=0.0):
    best = chance.index(max(chance))
    return best if chance[best] > threshold else 1


def naive(x, blocks, routers, most, path=None, threshold=0.0):
    """One sample: hidden states (n d) behind the last block, the runs of each block, and what each router said."""
    runs, chances = [], []
    for layer, block in enumerate(blocks):
        chances.append(router(x, routers[layer], most))
        runs.append(decide(chances[-1], threshold) if path is None else path[layer])
        for _ in range(runs[-1]):
            x = block(x)[0]
    return x, runs, chances


def class_weights(counts, beta):
    raw = [(1 - beta) / (1 - beta**n) for n in counts]
    return [r / (sum(raw) / 3) for r in raw]


def focal(chances, path, alpha, gamma):
    """The loss of one sample."""
    return -sum(alpha[y] * (1 - p[y]) ** gamma * math.log(p[y]) for p, y in zip(chances, path, strict=True)) / len(path)


@pytest.mark.parametrize(("count", "most"), [(16, 8), (17, 8), (3, 8), (1, 8), (5, 1), (9, 4)])
def test_naive_windows_are_contiguous_and_alike(count, most):
    pieces = windows(count, most)
    assert len(pieces) == min(count, most)
    assert {len(piece) for piece in pieces} == {count // len(pieces)}
    assert sum(pieces, []) == list(range(len(pieces) * (count // len(pieces))))


def test_naive_loss_is_cross_entropy_without_focus():
    chances = [[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]
    assert focal(chances, [1, 2], [1, 1, 1], 0) == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert focal(chances, [1, 2], [1, 1, 1], 2) < focal(chances, [1, 2], [1, 1, 1], 0)
    assert class_weights((10, 1000, 30), 0.999)[0] > class_weights((10, 1000, 30), 0.999)[2] > class_weights((10, 1000, 30), 0.999)[1]
    assert class_weights((10, 1000, 30), 0.0) == [1, 1, 1]


# -- the method in a model -------------------------------------------------------------------------------------------


def routed(layers=6, seed=0, **knobs):
    """A GPT-2 with routers, and their weights: far enough apart that all three actions are taken."""
    model = get_token_model(gpt2(layers, seed), DrLLMConfig(hidden=5, **knobs)).eval()
    draw = torch.Generator().manual_seed(seed + 2)
    found = sorted((m for m in model.modules() if isinstance(m, DrLLM)), key=lambda m: m.dims.layer)
    with torch.no_grad():
        for parameter in (p for method in found for p in method.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model, [tuple(p.detach() for p in (m.w1, m.b1, m.w2, m.b2)) for m in found]


@torch.no_grad()
def all_rows(base, ids, mask, routers, most, paths=None, threshold=0.0):
    rows = []
    for i, (row, real) in enumerate(zip(ids, mask, strict=True)):
        x = embed(base, row[real], torch.arange(int(real.sum())))
        rows.append(naive(x, blocks(base), routers, most, None if paths is None else paths[i], threshold))
    return rows


MODELS = [
    pytest.param((12,), {}, "left", id="the paper's router"),
    pytest.param((17, 12, 5), {"windows": 4}, "left", id="rows of odd sizes"),
    pytest.param((3, 11, 17), {}, "right", id="padded on the right"),
    pytest.param((9, 1), {}, "left", id="all padded but one"),
    pytest.param((1,), {"windows": 1}, "left", id="one token"),
    pytest.param((9, 6), {"threshold": 0.6}, "left", id="only what is sure"),
    pytest.param((9, 6), {"threshold": 1.0}, "left", id="nothing to route"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("lengths", "knobs", "side"), MODELS)
def test_model_is_the_loop(lengths, knobs, side, cached):
    actions = set()
    for seed in range(3):
        model, routers = routed(seed=seed, **knobs)
        base, (ids, mask) = model.get_base_model(), batch(lengths, side)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=cached).logits
        rows = all_rows(base, ids, mask, routers, knobs.get("windows", 8), threshold=knobs.get("threshold", 0.0))
        for row, (hidden, runs, _) in enumerate(rows):
            with torch.no_grad():
                torch.testing.assert_close(out[row][mask[row]], lm_head(base, hidden), **CLOSE)
            actions |= set(runs)
    assert actions == ({1} if knobs.get("threshold") == 1 else {0, 1, 2})


@pytest.mark.parametrize("cached", [False, True])
def test_a_given_path_is_followed(cached):
    model, _ = routed(layers=4)
    base, (ids, mask) = model.get_base_model(), batch((9, 6, 4))
    paths = torch.tensor([[0, 1, 2, 1], [2, 2, 0, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=cached, hf_tokens_targets=paths).logits
    for row, (hidden, *_) in enumerate(all_rows(base, ids, mask, routed(4)[1], 8, paths.tolist())):
        with torch.no_grad():
            torch.testing.assert_close(out[row][mask[row]], lm_head(base, hidden), **CLOSE)


def test_what_is_skipped_is_not_computed_and_a_second_run_has_its_own_entries():
    model, _ = routed(layers=4)
    ids, _ = batch((16,))
    given = {"input_ids": ids, "use_cache": True}
    with model.disable_adapter():
        whole = measure(model, **given)
    model(
        **given, hf_tokens_targets=torch.tensor([[1, 0, 0, 1]])
    )  # a block that skips for the first time runs filler to see what it returns
    short = measure(model, **given, hf_tokens_targets=torch.tensor([[1, 0, 0, 1]]))
    longer = measure(model, **given, hf_tokens_targets=torch.tensor([[1, 0, 2, 2]]))
    assert (short.tokens, longer.tokens) == (32, 80)
    assert (short.kv_bytes, longer.kv_bytes) == (whole.kv_bytes // 2, whole.kv_bytes * 5 // 4)
    assert short.flops < whole.flops


@torch.no_grad()
def decode_by_hand(base, ids, path, steps):
    """Greedy tokens of one row along a path, each run of each block over the whole sequence so far."""
    ids, logits = ids.tolist(), []
    for _ in range(steps):
        x = embed(base, torch.tensor(ids), torch.arange(len(ids)))
        for block, runs in zip(blocks(base), path, strict=True):
            for _ in range(runs):
                x = block(x)[0]
        logits.append(lm_head(base, x[-1]))
        ids.append(int(logits[-1].argmax()))
    return ids[-steps:], torch.stack(logits)


def stored(layer, row, pads):
    """Real entries of a row in a cache layer."""
    if not layer.length:
        return 0
    there = layer.origins[row] >= pads
    return int((there if layer.filled is None else there & layer.filled[row]).sum())


def test_generation_keeps_the_path_of_the_prompt():
    lengths, seen = (13, 7, 1), set()
    for seed in range(3):
        model, routers = routed(seed=seed)
        base, (ids, mask) = model.get_base_model(), batch(lengths)
        got, logits, cache = greedy(model, ids, mask, 6)
        told = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.generate(**told)[:, ids.shape[1] :], got)
        beams = model.generate(**told, num_beams=3)
        for row, (_, runs, _) in enumerate(all_rows(base, ids, mask, routers, 8)):
            real = ids[row][mask[row]]
            expected, want = decode_by_hand(base, real, runs, 6)
            assert got[row].tolist() == expected
            torch.testing.assert_close(logits[row], want, **CLOSE)
            for layer, times in zip(cache.layers, runs, strict=True):
                entries = [stored(one, row, len(ids[row]) - len(real)) for one in (layer, *layer.reruns)]
                assert entries + [0] * (2 - len(entries)) == [(len(real) + 5) * (times > run) for run in range(2)]
            alone = model.generate(input_ids=real[None], max_new_tokens=6, do_sample=False, num_beams=3)
            assert beams[row, ids.shape[1] :].tolist() == alone[0, len(real) :].tolist()
            seen |= set(runs)
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("answer", [0, 1])
def test_a_later_turn_goes_on_along_the_path(answer):
    model, routers = routed()
    base, (ids, mask) = model.get_base_model(), batch((12,))
    ((_, runs, _),) = all_rows(base, ids[:, :6], mask[:, :6], routers, 8)
    cache = DynamicCache()
    with torch.no_grad():
        parts = [part for part in (ids[:, :6], ids[:, 6 : 6 + answer], ids[:, 6 + answer :]) if part.numel()]
        got = [model(part, **{CACHE: cache}).logits for part in parts]
        x = embed(base, ids[0], torch.arange(12))
        for block, times in zip(blocks(base), runs, strict=True):
            for _ in range(times):
                x = block(x)[0]
        torch.testing.assert_close(torch.cat(got, dim=1)[0], lm_head(base, x), **CLOSE)
    with pytest.raises(UnsupportedError, match="one pass"):
        model.generate(ids, max_new_tokens=1, prefill_chunk_size=6)


def test_a_cropped_cache_forgets_of_every_run():
    model, _ = routed(layers=3)
    ids, _ = batch((10,))
    path = {"hf_tokens_targets": torch.tensor([[2, 1, 2]])}
    with torch.no_grad():
        cache = model(ids, use_cache=True, **path).past_key_values
        first = model(ids[:, :1], **{CACHE: cache}, **path).logits
        cache.crop(-1)
        again = model(ids[:, :1], **{CACHE: cache}, **path).logits
    torch.testing.assert_close(again, first, **CLOSE)


@pytest.mark.parametrize("knobs", [{}, {"gamma": 0.0}, {"counts": (10, 1000, 30)}, {"counts": (10, 1000, 30), "beta": 0.9}])
def test_the_loss_is_that_of_the_loop(knobs):
    lengths, paths = (13, 6), torch.tensor([[0, 1, 2, 1], [1, 1, 0, 2]])
    ids, mask = batch(lengths)
    model, routers = routed(layers=4, **knobs)
    alpha = class_weights(knobs["counts"], knobs.get("beta", 0.999)) if "counts" in knobs else [1.0] * 3
    model.train()(input_ids=ids, attention_mask=mask, position_ids=positions(mask), hf_tokens_targets=paths)
    rows = all_rows(model.get_base_model(), ids, mask, routers, 8, paths.tolist())
    expected = sum(focal(chances, path, alpha, knobs.get("gamma", 2.0)) for (_, path, chances) in rows) / 2
    assert aux_loss(model).item() == pytest.approx(expected, abs=1e-9)


def test_labels_are_optional_and_checked():
    model, _ = routed(layers=4)
    ids, mask = batch((9, 9))
    given = {"input_ids": ids, "attention_mask": mask}
    free = torch.full((2, 4), -100)
    with torch.no_grad():
        assert torch.equal(model(**given, hf_tokens_targets=free).logits, model(**given).logits)
    for bad in (torch.ones(2, 3, dtype=torch.long), torch.full((2, 4), 3)):
        with pytest.raises(ConfigError, match="must hold 0, 1 or 2 runs for each of 4 blocks"):
            model(**given, hf_tokens_targets=bad)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**given, hf_tokens_targets=free).logits, model(**given).logits)


def test_training_with_trainer_teaches_the_path(tmp_path):
    model, _ = routed(layers=4)
    ids, _ = batch((9, 9, 9, 9))
    path = torch.tensor([0, 1, 2, 1])
    data = [{"input_ids": row, "labels": row, "hf_tokens_targets": path} for row in ids]
    args = TrainingArguments(
        str(tmp_path), max_steps=60, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=args, train_dataset=data).train()
    with torch.no_grad():
        model.eval()
        assert torch.equal(model(ids).logits, model(ids, hf_tokens_targets=path.expand(4, -1)).logits)


def test_without_labels_the_routers_hear_the_models_loss():
    model, _ = routed(layers=4)
    ids, _ = batch((9, 9))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 16 and all(grad is not None and grad.any() for grad in grads)


def test_beside_what_tells_runs_apart_it_is_refused():
    twice = {"hf_tokens_targets": torch.tensor([[2, 2]])}
    ids, _ = batch((9,))
    for other in (FTPConfig(sparsity=0.3), PrefixKVConfig(budget=0.5)):
        model = get_token_model(gpt2(2), [DrLLMConfig(hidden=5), other]).eval()
        with pytest.raises(UnsupportedError, match="A block that runs several times needs"):
            model(ids, use_cache=True, **twice)
        model(ids, use_cache=True, hf_tokens_targets=torch.tensor([[1, 1]]))


def test_the_search_finds_a_shorter_path_that_is_as_good():
    model, _ = routed(layers=4)
    base, (ids, _) = model.get_base_model(), batch((12,))
    with torch.no_grad():
        base.transformer.h[2].attn.c_proj.weight.zero_(), base.transformer.h[2].attn.c_proj.bias.zero_()
        base.transformer.h[2].mlp.c_proj.weight.zero_(), base.transformer.h[2].mlp.c_proj.bias.zero_()
        best = model(ids, labels=ids, hf_tokens_targets=torch.ones(1, 4, dtype=torch.long)).loss.item()
    tried = []

    @torch.no_grad()
    def reward(path):
        tried.append(path)
        return float(model(ids, labels=ids, hf_tokens_targets=torch.tensor([path])).loss.item() <= best + 1e-9)

    found = search(reward, 4, simulations=60, seed=1)
    assert reward(found) == 1 and sum(found) < 4
    assert len(set(tried[:-1])) == len(tried[:-1])
