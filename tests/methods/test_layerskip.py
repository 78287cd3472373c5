"""LayerSkip against its paper: sections 4.1 (layer dropout, early exit loss, curricula) and 4.2 (early exit) of arXiv:2404.16710."""

import math

import pytest
import torch
from by_hand import batch, blocks, embed, gpt2, greedy, lm_head, positions
from tolerances import close

from hf_tokens import ConfigError, GoldfishLossConfig, LayerSkip, LayerSkipConfig, UnsupportedError, get_token_model, measure, set_progress


def rate(layer, layers, scale, progress=None):
    """How often a sample skips a block at p_max = 1, by how far it is from the first one; `progress` of a training from scratch."""
    share = layer / (layers - 1) if layers > 1 else 1.0
    d = {
        "uniform": 1.0,
        "exp": 2**share - 1,
        "linear": share,
        "log": math.log(layer + 1) / math.log(layers) if layers > 1 else 1.0,
        "sin": math.sin(share * math.pi / 2),
        "sigmoid": 1 / (1 + math.exp(-10 * (share - 0.5))) if share < 1 else 1.0,
    }[scale]
    return d * (1.0 if progress is None else 2**progress - 1)


def enabled(step, steps, layers, every, curriculum):
    """The blocks that have a loss at a step, the last one always: one in `every`, moved on by one with each step, or ever more of them."""
    on = [layer % every == 0 for layer in range(layers)]
    for _ in range(step if curriculum == "rotational" else 0):
        on = [on[-1], *on[:-1]]
    if curriculum == "gradual":
        on = [wanted and step / steps >= 0.5 * (layers - layer) / layers for layer, wanted in enumerate(on)]
    return [layer for layer in range(layers) if on[layer] or layer == layers - 1]


def shares(on, layers, rule, scale):
    """What the losses behind these blocks weigh."""
    raw, total = [], 0.0
    for layer in on:
        total += layer + 1
        last, number = layer == layers - 1, layer + 1
        if rule == "paper":
            e = layers - 1 + scale * sum(range(layers - 1)) if last else scale * sum(range(layer + 1))
        else:
            root = number**0.5
            e = {"sum": total, "linear": number, "sqrt": root, "uniform": 1.0, "inverse": 1 / number, "inverse_sqrt": 1 / root}[rule]
            e *= 1.0 if last else scale
        raw.append(e)
    return [e / sum(raw) for e in raw]


def naive(base, ids, skips, on, weights):
    """One sample: the sum over its targets of the losses behind the blocks, their number, and the logits."""
    x, total = embed(base, ids, torch.arange(len(ids))), 0.0
    for layer, block in enumerate(blocks(base)):
        x = x if skips[layer] else block(x)[0]
        if layer in on:
            logps = lm_head(base, x).log_softmax(-1)
            total -= weights[on.index(layer)] * sum(logps[i, ids[i + 1]] for i in range(len(ids) - 1))
    return total, len(ids) - 1, lm_head(base, x)


def test_naive_rates_and_weights_are_the_paper_s():
    assert [round(rate(layer, 32, "exp"), 6) for layer in (0, 1, 15, 31)] == [0, 0.022611, 0.398491, 1]
    assert rate(31, 32, "exp", progress=0.5) == pytest.approx(2**0.5 - 1)
    assert enabled(0, 10, 6, 4, "rotational") == [0, 4, 5] and enabled(3, 10, 6, 4, "rotational") == [1, 3, 5]
    assert [enabled(step, 12, 6, 1, "gradual")[0] for step in (0, 1, 2, 6, 7)] == [5, 5, 4, 0, 0]
    full = shares(list(range(32)), 32, "paper", 0.2)
    assert full[0] == 0 and full[-1] == pytest.approx(1 / 9)


CASES = [
    pytest.param((16,), {}, "left", 0, id="the release's"),
    pytest.param((17, 12, 5), {"dropout": 0.9, "every": 1, "curriculum": "none"}, "left", 0, id="all losses, odd sizes, padded"),
    pytest.param((9, 1), {"dropout": 0.9, "every": 2, "weights": "paper", "scale": 0.2}, "right", 3, id="the paper's weights, one token"),
    pytest.param((7, 7), {"dropout": 0.8, "dropout_scale": "uniform", "weights": "linear"}, "left", 5, id="the next blocks"),
    pytest.param((6, 4), {"every": 1, "curriculum": "gradual", "weights": "sqrt"}, "left", 1, id="gradual, at first"),
    pytest.param((6, 4), {"every": 1, "curriculum": "gradual", "weights": "inverse"}, "left", 6, id="gradual, in between"),
    pytest.param((8, 3), {"every": 9, "dropout_grows": True, "weights": "uniform"}, "left", 2, id="more than the blocks"),
    pytest.param((8, 3), {"dropout_scale": "sin", "dropout_grows": True, "weights": "inverse_sqrt"}, "left", 7, id="from scratch"),
]
STEPS, LAYERS = 10, 5


@pytest.mark.parametrize(("lengths", "knobs", "side", "step"), CASES)
def test_model_is_the_loop(lengths, knobs, side, step):
    config, base = LayerSkipConfig(**knobs), gpt2(LAYERS)
    ids, mask = batch(lengths, side)
    model = get_token_model(base, config).train().requires_grad_()
    set_progress(model, step / STEPS, step)
    torch.manual_seed(7)
    labels = ids.masked_fill(positions(mask) * mask < 1, -100)
    out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, labels=labels)
    torch.manual_seed(7)
    share = step / STEPS if config.dropout_grows else None
    rates = [config.dropout * rate(layer, LAYERS, config.dropout_scale, share) for layer in range(LAYERS)]
    skips = torch.stack([torch.rand(len(ids)) < p if p else torch.zeros(len(ids), dtype=torch.bool) for p in rates], dim=1)
    on = enabled(step, STEPS, LAYERS, config.every, config.curriculum)
    weights = shares(on, LAYERS, config.weights, config.scale)
    rows = [naive(base, row[real], skip.tolist(), on, weights) for row, real, skip in zip(ids, mask, skips, strict=True)]
    want = sum(total for total, _, _ in rows) / sum(count for _, count, _ in rows)
    close(out.loss, want.float())  # the model's own losses are in float32
    for row, (_, _, logits) in enumerate(rows):
        torch.testing.assert_close(out.logits[row][mask[row]], logits, rtol=1e-9, atol=1e-9)
    mine, theirs = (torch.autograd.grad(loss, [*base.parameters()], allow_unused=True) for loss in (out.loss, want))
    for parameter, *gradients in zip(base.parameters(), mine, theirs, strict=True):
        close(*(torch.zeros_like(parameter).float() if gradient is None else gradient.float() for gradient in gradients))


@pytest.mark.parametrize("scale", ["uniform", "exp", "linear", "log", "sin", "sigmoid"])
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_sample_skips_a_block_as_often_as_the_paper_says(scale, layers):
    model = get_token_model(gpt2(layers), LayerSkipConfig(dropout=0.5, dropout_scale=scale)).train()
    methods = [m for m in model.modules() if isinstance(m, LayerSkip)]
    for method in methods:
        assert method.rate(1.0) == pytest.approx(0.5 * rate(method.dims.layer, layers, scale))
    torch.manual_seed(0)
    gates = methods[-1].route(hidden=torch.zeros(4000, 1, 1), progress=1.0)
    assert abs(1 - gates.mean().item() - methods[-1].rate(1.0)) < 0.03


def test_outside_of_training_it_is_the_base_to_the_bit():
    ids, mask = batch((11, 6))
    given = {"attention_mask": mask, "position_ids": positions(mask), "labels": ids}
    want, out = gpt2()(ids, **given), get_token_model(gpt2(), LayerSkipConfig()).eval()(ids, **given)
    assert torch.equal(out.logits, want.logits) and torch.equal(out.loss, want.loss)


def test_at_zero_training_is_the_base_s_to_the_bit():
    ids, _ = batch((11, 11))
    model = get_token_model(gpt2(), LayerSkipConfig().at_zero()).train()
    assert torch.equal(model(ids, labels=ids).loss, gpt2().train()(ids, labels=ids).loss)


@pytest.mark.parametrize("exit", [1, 2, 4])
def test_a_pass_that_ends_early_is_the_first_blocks_norm_and_head(exit):
    base, (ids, mask) = gpt2(), batch((13, 6))
    model = get_token_model(base, LayerSkipConfig(exit_layer=exit)).eval()
    tokens, logits, cache = greedy(model, ids, mask, 5)
    for row, real in enumerate(mask):
        x = torch.cat([ids[row][real], tokens[row, :-1]])
        hidden = embed(base, x, torch.arange(len(x)))
        for block in blocks(base)[:exit]:
            hidden = block(hidden)[0]
        torch.testing.assert_close(logits[row], lm_head(base, hidden)[-5:], rtol=1e-9, atol=1e-9)
    held = [layer.length if layer.filled is None else int(layer.filled.sum()) for layer in cache.layers]
    assert held == [17] * exit + [0] * (4 - exit)
    assert measure(model, input_ids=ids).tokens == exit * ids.numel()


def test_training_goes_through_all_blocks_whatever_the_exit():
    ids, _ = batch((9,))
    model, whole = (get_token_model(gpt2(), LayerSkipConfig(exit_layer=exit, dropout=0.0)).train() for exit in (1, 0))
    assert torch.equal(model(ids, labels=ids).loss, whole(ids, labels=ids).loss)


@pytest.mark.parametrize(
    ("knobs", "got"), [({"exit_layer": 5}, r"5 and blocks \(0, 1, 2, 3\)"), ({"exit_layer": 2, "layers": (0, 3)}, "2 and")]
)
def test_an_exit_that_the_blocks_do_not_have_is_refused(knobs, got):
    with pytest.raises(ConfigError, match=rf"must be at most 4, and `layers` name all blocks behind it, got {got}"):
        get_token_model(gpt2(), LayerSkipConfig(**knobs))


def test_named_blocks_alone_are_dropped_and_have_a_loss():
    ids, _ = batch((9, 9))
    knobs = {"dropout": 0.9, "dropout_scale": "uniform", "every": 1, "curriculum": "none"}
    model = get_token_model(gpt2(), LayerSkipConfig(layers=(1, -1), **knobs)).train()
    methods = [m for m in model.modules() if isinstance(m, LayerSkip)]
    assert methods[0].blocks(1.0, 0) == [1, 3] and [m.dims.layer for m in methods] == [1, 3]
    assert model(ids, labels=ids).loss.isfinite()


def test_two_losses_in_the_place_of_the_model_s_own_are_refused():
    with pytest.raises(UnsupportedError, match=r"One objective replaces the model's own loss, got \['layerskip', 'goldfish-loss'\]"):
        get_token_model(gpt2(), [LayerSkipConfig(), GoldfishLossConfig()])


def test_a_step_s_loss_is_what_it_was():
    ids, _ = batch((12, 12))
    model = get_token_model(gpt2(6), LayerSkipConfig()).train()
    set_progress(model, 0.3, 3)
    torch.manual_seed(0)
    close(model(ids, labels=ids).loss, torch.tensor(4.0232), "loss")
