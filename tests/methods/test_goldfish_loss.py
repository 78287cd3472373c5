"""Goldfish loss against its paper: section 3, equation 1, the static and the hashed mask."""

import math

import by_hand
import pytest
import torch
from hf_tokens_adapters.objective.goldfish_loss import BITS, FACTOR, MIX, GoldfishLoss
from tolerances import close

from hf_tokens import GoldfishLossConfig, Objective, get_token_model, method_info


def f(window):
    """The hash of the tokens in front: a number in [0, 1)."""
    wrap = lambda number: (number + 2**63) % 2**64 - 2**63  # 64-bit integers with a sign
    mixed = wrap(sum(wrap((token + 1) * wrap(pow(FACTOR, i + 1))) for i, token in enumerate(window)))
    mixed = wrap((mixed ^ (mixed >> 32)) * wrap(MIX))
    return ((mixed >> (64 - BITS)) % 2**BITS) / 2**BITS


def naive(tokens, logps, targets, k, h, mask, window="ending"):
    """The loss of one sample: tokens x_1 .. x_n, logps[i] = log p(x_{i+1} | x_<=i), targets[i] = -100 where that does not count."""
    total, count = 0.0, 0
    for i in range(len(tokens) - 1):  # tells x_{i+2} in the paper's counting from 1
        last = i + 1 + (window == "ending")
        drop = (i + 2) % k == 0 if mask == "static" else i + 1 >= h and f(tokens[last - h : last]) < 1 / k
        if targets[i] != -100 and not drop:
            total, count = total - logps[i], count + 1
    return total, count


CASES = [
    ([16, 9], 4, 3, "hash"),
    ([40], 2, 1, "hash"),
    ([7], 3, 13, "hash"),  # shorter than the context: nothing is dropped
    ([13, 14], 1, 13, "hash"),  # all that can be dropped is
    ([2], 1, 1, "hash"),
    ([17, 8], 4, 13, "static"),
    ([5, 1], 3, 1, "static"),
    ([9], 1, 1, "static"),  # all are dropped
]


@pytest.mark.parametrize("window", ["ending", "before"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("lengths", "k", "h", "mask"), CASES)
def test_matches_the_paper(lengths, k, h, mask, side, window):
    ids, real = by_hand.batch(lengths, side)
    logps = -torch.rand(ids.shape, dtype=torch.float64)
    labels = torch.where(real & (torch.rand(ids.shape) > 0.2), ids, -100)
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].where(real, -100)
    positions = by_hand.positions(real)
    sums = [naive(*(t[b, real[b]].tolist() for t in (ids, logps, targets)), k, h, mask, window) for b in range(len(ids))]
    expected = sum(total for total, _ in sums) / max(1, sum(count for _, count in sums))
    method = GoldfishLoss(GoldfishLossConfig(k=k, context=h, mask=mask, window=window), None)
    value = method.loss(logps=logps * (targets != -100), labels=targets, ids=ids, positions=positions)
    close(value, torch.tensor(expected, dtype=torch.float64))


def test_the_hash_is_what_it_was():
    """Numbers, not the formula: another constant would drop other tokens of a text that has been trained on."""
    ids = (torch.arange(40) * 7919 % 50000)[None]
    places = lambda **knobs: (
        GoldfishLoss(GoldfishLossConfig(**knobs), None).dropped(ids, torch.arange(40)[None])[0].nonzero()[:, 0].tolist()
    )
    assert places() == [12, 14, 20, 27, 28, 37, 38]
    assert places(window="before") == [13, 15, 21, 28, 29, 38, 39]
    assert places(k=3, context=2) == [1, 7, 10, 16, 19, 24, 26, 30, 32, 33, 34, 35, 38]


def test_one_token_in_k_is_dropped():
    ids = torch.randint(0, 30000, (8, 4000))
    positions = torch.arange(4000).expand(8, -1)
    for k in (2, 3, 4, 32):
        for given in (ids, ids % 3, ids * 0 + torch.arange(4000)):  # many tokens, three, and a count
            dropped = GoldfishLoss(GoldfishLossConfig(k=k), None).dropped(given, positions)[:, 12:]
            assert abs(dropped.double().mean().item() - 1 / k) < 6 * math.sqrt(1 / k / 4000)


def test_a_passage_loses_the_same_tokens_wherever_it_stands():
    passage = torch.randint(0, 1000, (200,))
    one = torch.cat([torch.randint(0, 1000, (37,)), passage])[None]
    other = torch.cat([torch.randint(0, 1000, (5,)), passage, torch.randint(0, 1000, (9,))])[None]
    method = GoldfishLoss(GoldfishLossConfig(k=3), None)
    found = [method.dropped(ids, torch.arange(ids.shape[1])[None])[0] for ids in (one, other)]
    assert torch.equal(found[0][37 + 12 : -1], found[1][5 + 12 : 204])
    assert found[0].any()


def by_model(base, ids, mask, labels, config):
    """The loss of a float64 GPT-2 by hand, sample by sample."""
    parts = []
    for row, real, wanted in zip(ids, mask, labels, strict=True):
        tokens, wanted = row[real], wanted[real]
        hidden = by_hand.embed(base, tokens, torch.arange(len(tokens)))
        for block in by_hand.blocks(base):
            hidden = block(hidden)[0]
        logps = by_hand.lm_head(base, hidden).log_softmax(-1)
        told = [logps[i, tokens[i + 1]].item() for i in range(len(tokens) - 1)]
        parts.append(naive(tokens.tolist(), told, [*wanted[1:].tolist(), -100], config.k, config.context, config.mask))
    return sum(total for total, _ in parts) / sum(count for _, count in parts)


@pytest.mark.parametrize("config", [GoldfishLossConfig(k=2, context=3), GoldfishLossConfig(k=3, mask="static")])
def test_in_a_whole_model(config):
    base = by_hand.gpt2().requires_grad_(False)
    ids, mask = by_hand.batch([11, 17, 6])
    labels = ids.masked_fill(by_hand.positions(mask) < 2, -100)  # a prompt of two
    given = {"attention_mask": mask, "position_ids": by_hand.positions(mask)}
    expected = by_model(base, ids, mask, labels, config)
    plain = base(ids, labels=labels, **given).loss
    model = get_token_model(base, config).train()
    close(model(ids, labels=labels, **given).loss, torch.tensor(expected), "training")
    assert torch.equal(model.eval()(ids, labels=labels, **given).loss, plain), "evaluation is the model's own loss"
    tokens = model.train()(ids, labels=labels, return_dict=False, **given)
    close(tokens[0], torch.tensor(expected), "a tuple")


def test_a_dropped_token_gives_no_gradient():
    """No bit of it: what is learnt by heart would be learnt from it."""
    base = by_hand.gpt2()
    ids, mask = by_hand.batch([15])
    method = GoldfishLoss(GoldfishLossConfig(k=2, context=1), None)
    dropped = method.dropped(ids, by_hand.positions(mask))[0, :-1]
    assert dropped.any() and not dropped.all()
    seen = []
    base.lm_head.register_forward_hook(lambda module, args, output: seen.append(output) or output.retain_grad())
    get_token_model(base, GoldfishLossConfig(k=2, context=1)).train().requires_grad_()(ids, labels=ids).loss.backward()
    moved = seen[0].grad[0, :-1].abs().sum(-1) > 0
    assert torch.equal(moved, ~dropped)


def test_packed_samples_are_each_their_own():
    base = by_hand.gpt2()
    model = get_token_model(base, GoldfishLossConfig(k=2, context=3)).train()
    ids, _ = by_hand.batch([14])
    places = torch.cat([torch.arange(6), torch.arange(8)])[None]
    method = GoldfishLoss(GoldfishLossConfig(k=2, context=3), None)
    dropped = method.dropped(ids, places)
    assert not dropped[0, 6:8].any(), "no hash reaches into the sample before"
    labels = ids.masked_fill(places == 0, -100)
    out = model(ids, position_ids=places, labels=labels)
    logps = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    kept = (labels[0, 1:] != -100) & ~dropped[0, :-1]
    close(out.loss, (-(logps * kept).sum() / kept.sum()).float())


def test_it_is_an_objective_that_replaces():
    info = method_info("goldfish-loss")
    assert issubclass(info.cls, Objective) and info.cls.replaces and info.cls.unit == "token"
