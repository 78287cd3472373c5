"""FTP against its paper: section 3.2, equation (5) and section 4.4 of arXiv:2412.11494 (static and dynamic router, losses, decoding)."""

import math

import pytest
import torch


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
    squares = [(float(a) - float(b)) ** 2 for i in range(len(mask)) if mask[i] for a, b in zip(student[i], teacher[i], strict=True)]
    return guide / terms if terms else 0.0, short, sum(squares) / len(squares)


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
    x = torch.zeros(4, 2)
    assert losses(routes, [0.75], x, x, [True] * 4)[1] == pytest.approx(0.25)
    assert losses(routes, [0.25], x, x, [True] * 4)[1] == 0


def test_decoding_threshold():
    assert decodes([0.0, 0.5, 0.51, 1.0]) == [True, True, False, False]
