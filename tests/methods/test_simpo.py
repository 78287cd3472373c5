"""SimPO against its paper: section 2, equations 4 to 6."""

import contextlib
import math
import re

import by_hand
import pytest
import torch
from hf_tokens_adapters.objective.simpo import SimPO
from tolerances import close

from hf_tokens import ConfigError, SimPOConfig, UnsupportedError, get_token_model


def naive(chosen, rejected, beta, gamma, loss_type="sigmoid", label_smoothing=0.0):
    """The loss of one pair, given the log-probabilities of each answer's tokens."""
    reward = lambda logps: beta / len(logps) * sum(logps)
    margin = reward(chosen) - reward(rejected) - gamma
    if loss_type == "hinge":
        return max(0.0, 1 - margin)
    wins = lambda x: math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x
    return (1 - label_smoothing) * wins(margin) + label_smoothing * wins(-margin)


CASES = [
    ([5, 3], [2, 7], 2.0, 1.0),
    ([1], [1], 2.5, 0.3),
    ([9, 1, 4], [4, 8, 2], 0.1, 0.0),
    ([6], [6], 10.0, 5.4),
    ([3], [0], 2.0, 1.0),
    ([4, 0, 3, 2], [2, 5, 0, 3], 2.0, 1.0),
]
KNOBS = [{}, {"label_smoothing": 0.2}, {"loss_type": "hinge"}, {"sft_weight": 0.3}]


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize(("chosen", "rejected", "beta", "gamma"), CASES)
def test_matches_the_paper(chosen, rejected, beta, gamma, knobs):
    lengths, n = [*chosen, *rejected], max(*chosen, *rejected) + 2
    targets = torch.full((len(lengths), n), -100)
    for row, length in zip(targets, lengths, strict=True):
        row[torch.randperm(n)[:length]] = 7
    logps = -3 * torch.rand(targets.shape, dtype=torch.float64) * (targets != -100)
    told = [row[wanted != -100].tolist() for row, wanted in zip(logps, targets, strict=True)]
    pairs = zip(told[: len(chosen)], told[len(chosen) :], strict=True)
    whole = [(c, r) for c, r in pairs if c and r]
    of_pair = {name: value for name, value in knobs.items() if name != "sft_weight"}
    expected = sum(naive(c, r, beta, gamma, **of_pair) for c, r in whole) / max(1, len(whole))
    own = [logp for row in told[: len(chosen)] for logp in row]
    expected -= knobs.get("sft_weight", 0) * sum(own) / len(own)
    empty = [i for i, pair in enumerate(zip(chosen, rejected, strict=True)) if 0 in pair]
    with pytest.warns(UserWarning, match=re.escape(f"such as {empty} of a batch")) if empty else contextlib.nullcontext():
        value = SimPO(SimPOConfig(beta=beta, gamma=gamma, **knobs), None).loss(logps=logps, labels=targets)
    close(value, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_in_a_whole_model(training):
    base = by_hand.gpt2().requires_grad_(False)
    ids, mask = by_hand.batch([11, 8, 9, 12], side="right")
    prompt = 4
    labels = torch.where(mask & (torch.arange(ids.shape[1]) >= prompt), ids, -100)
    told = []
    for row, real in zip(ids, mask, strict=True):
        tokens = row[real]
        hidden = by_hand.embed(base, tokens, torch.arange(len(tokens)))
        for block in by_hand.blocks(base):
            hidden = block(hidden)[0]
        logps = by_hand.lm_head(base, hidden).log_softmax(-1)
        told.append([logps[i, tokens[i + 1]].item() for i in range(prompt - 1, len(tokens) - 1)])
    expected = sum(naive(told[i], told[2 + i], 2.0, 0.5) for i in range(2)) / 2
    model = get_token_model(base, SimPOConfig()).train(training)
    close(model(ids, attention_mask=mask, labels=labels).loss, torch.tensor(expected))


def test_a_hinge_is_not_smoothed():
    with pytest.raises(ConfigError, match="label_smoothing is for the loss_type 'sigmoid', got 0.1 for 'hinge'. Leave one"):
        get_token_model(by_hand.gpt2(), SimPOConfig(loss_type="hinge", label_smoothing=0.1))


def test_half_a_pair_is_refused():
    model = get_token_model(by_hand.gpt2(), SimPOConfig())
    ids, _ = by_hand.batch([5, 5, 5])
    with pytest.raises(
        UnsupportedError, match="the chosen rows and, behind them, as many rejected ones, got a batch of 3. Let the collator"
    ):
        model(ids, labels=ids)
