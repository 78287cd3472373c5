"""LLMLingua-2 against a slow loop over one chunk, written from arXiv:2403.12968 and the facts of its release."""

import math

import pytest
import torch

from hf_tokens import Dims, LLMLingua2, LLMLingua2Config, TextWords


def percentile(values, percent):
    """The percentile of a list, between two of its values in proportion."""
    values = sorted(values)
    place = (len(values) - 1) * percent / 100
    low = values[math.floor(place)]
    return low + (values[math.ceil(place)] - low) * (place - math.floor(place))


def naive(chances, words, config, share):
    """The words of one chunk that stay; `words` are (places of tokens, tokens of the budget, forced text or -1)."""
    if share == 1:
        return [True] * len(words)
    p = []
    for tokens, _, forced in words:
        of_tokens = [1.0 if config.force_reserve_digit and t % 5 == 0 else chances[t] for t in tokens]
        mean = of_tokens[0] if config.token_to_word == "first" else sum(of_tokens) / len(of_tokens)
        p.append(1.0 if forced >= 0 else mean)
    if config.drop_consecutive:
        limit, between, last = percentile(p, int(100 * (1 - share))), False, None
        for i, (_, _, forced) in enumerate(words):
            if forced < 0:
                between = between or p[i] > limit
            else:
                if between:
                    between = False
                elif forced == last:
                    p[i] = 0.0
                last = forced
    limit = percentile([p[i] for i, word in enumerate(words) for _ in range(word[1])], int(100 * (1 - share) + 1))
    limit = limit if config.threshold is None else config.threshold
    stays, newest = [], None
    for i, (_, _, forced) in enumerate(words):
        keep = p[i] > limit or limit == 1 and p[i] == 1
        keep = keep and not (config.drop_consecutive and forced >= 0 and newest == forced)
        newest = forced if keep else newest
        stays.append(keep)
    return stays


def sample(seed, sizes, forced_share):
    """Words of random numbers of tokens, some of them forced, and a chance for each token; a special token stands in front."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda high: int(torch.randint(high, (1,), generator=draw))
    words, place = [], 0
    for _ in range(sizes):
        n = 1 + number(3)
        words.append((list(range(place, place + n)), 1 + number(3), number(2) if number(100) < 100 * forced_share else -1))
        place += n
    return torch.rand(place, generator=draw, dtype=torch.float64).tolist(), words


def laid_out(samples, share):
    """The same as a batch: padded, with a special token in front of each row."""
    m, w = max(len(chances) for chances, _ in samples) + 1, max(len(words) for _, words in samples)
    of, digits = torch.full((len(samples), m), -1), torch.zeros(len(samples), m, dtype=torch.bool)
    scores, real = torch.full((len(samples), m), torch.nan, dtype=torch.float64), torch.zeros(len(samples), w, dtype=torch.bool)
    forced, counts = torch.full((len(samples), w), -1), torch.zeros(len(samples), w, dtype=torch.long)
    for row, (chances, words) in enumerate(samples):
        scores[row, 1 : 1 + len(chances)] = torch.tensor(chances)
        digits[row, 1 : 1 + len(chances)] = torch.arange(len(chances)) % 5 == 0
        for i, (tokens, count, which) in enumerate(words):
            of[row, 1 + tokens[0] : 2 + tokens[-1]], real[row, i], forced[row, i], counts[row, i] = i, True, which, count
    share = torch.full((len(samples),), share, dtype=torch.float64)
    return scores.nan_to_num(0.5), TextWords(of, digits, real, forced, counts, share, torch.full_like(of[:, 0], -1))


def method(**knobs):
    return LLMLingua2(LLMLingua2Config(**knobs), Dims(8, 2, 2, 4, 0, 2, "text", False, outputs=2))


KNOBS = {
    "the release's defaults": {},
    "first": {"token_to_word": "first"},
    "digits": {"force_reserve_digit": True},
    "consecutive": {"drop_consecutive": True},
    "all": {"token_to_word": "first", "force_reserve_digit": True, "drop_consecutive": True},
    "a threshold": {"threshold": 0.6},
}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.29, 0.33, 0.5, 0.57, 0.9, 1.0])
@pytest.mark.parametrize("knobs", KNOBS)
def test_the_words_that_stay_are_the_loop_s(knobs, share):
    scorer = method(**KNOBS[knobs])
    samples = [sample(seed, size, forced) for seed, (size, forced) in enumerate([(1, 0), (2, 1), (17, 0), (17, 0.4), (40, 0.2), (31, 0.7)])]
    stays = scorer.keep(*laid_out(samples, share))
    for row, (chances, words) in zip(stays.tolist(), samples, strict=True):
        assert row == naive(chances, words, scorer.config, share) + [False] * (len(row) - len(words))


def test_a_token_s_score_is_the_probability_of_the_class_that_stays():
    logits = torch.randn(2, 5, 2, dtype=torch.float64)
    want = [[math.exp(b) / (math.exp(a) + math.exp(b)) for a, b in row] for row in logits.tolist()]
    torch.testing.assert_close(method().score(logits), torch.tensor(want, dtype=torch.float64))
    torch.testing.assert_close(method(label=0).score(logits), 1 - torch.tensor(want, dtype=torch.float64))


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.75, 1.0])
def test_contexts_stay_from_the_percentile_of_their_means_on(rate):
    means = torch.rand(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    limit = percentile(means.tolist(), int(100 * (1 - rate)))
    assert method(context_rate=rate).choose(means).tolist() == [mean >= limit for mean in means.tolist()]
