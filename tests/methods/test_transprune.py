"""TransPrune against its paper: sections 3.1 and 3.2 of arXiv:2507.20630v2, equations (1) to (6)."""

import math

import pytest
import torch


def transition(inputs, outputs):
    """Equations (1) and (2) for one module: softmax over the image tokens of 1 - |cosine|, times the ratio of the norms."""
    ratios, turns = [], []
    for before, after in zip(inputs, outputs, strict=True):
        size_in = math.sqrt(sum(float(v) ** 2 for v in before))
        size_out = math.sqrt(sum(float(v) ** 2 for v in after))
        dot = sum(float(a) * float(b) for a, b in zip(before, after, strict=True))
        ratios.append(size_out / size_in if size_in else 0.0)
        turns.append(1.0 - abs(dot / (size_in * size_out)) if size_in and size_out else 1.0)
    total = sum(math.exp(t) for t in turns)
    return [math.exp(t) / total * m for t, m in zip(turns, ratios, strict=True)]


def instruction_attention(queries, keys):
    """Equation (5): queries h l d of the instruction, keys g n d of the image tokens; softmax over the image tokens, mean over l and h."""
    heads, groups, n = len(queries), len(keys), len(keys[0])
    received = [0.0] * n
    for h in range(heads):
        shared = keys[h * groups // heads]
        for query in queries[h]:
            logits = [float(query @ key) / math.sqrt(len(query)) for key in shared]
            top = max(logits)
            total = sum(math.exp(z - top) for z in logits)
            for j in range(n):
                received[j] += math.exp(logits[j] - top) / total
    asked = heads * len(queries[0])
    return [r / asked if asked else 0.0 for r in received]


def kept(n, ratio):
    """How many of n image tokens a stage keeps; a stage never takes the last one."""
    return min(n, max(1, math.ceil(ratio * n - 1e-9)))


def naive(image, attention, ffn, guide, accumulate, prune, keep, alpha):
    """Indices of the image tokens alive after every pruning layer, for one sample.

    image: indices of the image tokens; attention[l], ffn[l]: (inputs n d, outputs n d) of the layer's two modules over the whole
    sequence, residuals left out; guide[p]: (instruction queries h l d, keys g n d) of the layer after p; layers are counted from 1.
    """
    alive, history, stages = list(image), dict.fromkeys(image, 0.0), {}
    for layer in sorted(set(accumulate) | set(prune)):
        if not alive:
            break
        if layer in accumulate:
            for inputs, outputs in (attention[layer], ffn[layer]):
                gains = transition([inputs[i] for i in alive], [outputs[i] for i in alive])
                for i, gain in zip(alive, gains, strict=True):
                    history[i] += gain  # equations (3) and (4)
        if layer in prune:
            queries, keys = guide[layer]
            asked = instruction_attention(queries, [[head[i] for i in alive] for head in keys])
            score = {i: alpha * history[i] + (1 - alpha) * a for i, a in zip(alive, asked, strict=True)}  # equation (6)
            best = sorted(alive, key=lambda i: (-score[i], i))[: kept(len(alive), keep[list(prune).index(layer)])]
            alive = sorted(best)
            stages[layer] = alive
    return stages


# tokens of the sequence, image span, instruction span, valid tokens (the rest is padding on the left), keep per stage, alpha
CASES = [
    pytest.param(16, range(3, 11), range(11, 16), 16, (0.5, 0.5, 0.5), 0.5, id="the paper's halving"),
    pytest.param(17, range(2, 13), range(13, 17), 17, (0.7, 0.5, 0.3), 0.5, id="odd sizes"),
    pytest.param(9, range(1, 8), range(8, 9), 9, (0.5, 0.5, 0.5), 1.0, id="transitions only"),
    pytest.param(9, range(1, 8), range(8, 9), 9, (0.5, 0.5, 0.5), 0.0, id="attention only"),
    pytest.param(6, range(1, 2), range(2, 6), 6, (0.5, 0.5, 0.5), 0.5, id="one image token"),
    pytest.param(5, range(0), range(0, 5), 5, (0.5, 0.5, 0.5), 0.5, id="no image token"),
    pytest.param(7, range(7), range(0), 7, (0.5, 0.5, 0.5), 0.5, id="nothing but image tokens"),
    pytest.param(8, range(1, 6), range(6, 8), 8, (1.0, 1.0, 1.0), 0.5, id="nothing to prune"),
    pytest.param(8, range(1, 6), range(6, 8), 8, (0.0, 0.0, 0.0), 0.5, id="all but one pruned"),
    pytest.param(8, range(7, 8), range(0), 1, (0.5, 0.5, 0.5), 0.5, id="all padded but one"),
]
ACCUMULATE, PRUNE = (7, 8, 9, 10, 11, 12), (7, 9, 12)


def sample(tokens, instruction, width=6, heads=4, groups=2, seed=0):
    """Random module inputs and outputs of one sample, with the queries and keys of the layers after the pruning layers."""
    draw = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
    modules = [{layer: (randn(tokens, width), randn(tokens, width)) for layer in ACCUMULATE} for _ in range(2)]
    guide = {p: (randn(heads, tokens, width)[:, list(instruction)], randn(groups, tokens, width)) for p in PRUNE}
    return *modules, guide


@pytest.mark.parametrize(("tokens", "image", "instruction", "valid", "keep", "alpha"), CASES)
def test_naive_keeps_what_its_ratios_say(tokens, image, instruction, valid, keep, alpha):
    attention, ffn, guide = sample(tokens, instruction)
    stages = naive(image, attention, ffn, guide, ACCUMULATE, PRUNE, keep, alpha)
    before = list(image)
    assert valid >= len(before)
    for layer, ratio in zip(PRUNE, keep, strict=True):
        after = stages.get(layer, [])
        assert set(after) <= set(before)
        assert after == sorted(after)
        assert len(after) == (kept(len(before), ratio) if before else 0)
        before = after


def test_naive_halves_the_published_counts():
    counts = [288]
    for _ in PRUNE:
        counts.append(kept(counts[-1], 0.5))
    assert counts == [288, 144, 72, 36]


def test_naive_prefers_the_turned_and_the_grown():
    same = torch.eye(4, dtype=torch.float64)
    turned = same.roll(1, 0)
    mixed = torch.stack([same[0], turned[1], same[2], same[3]])
    gains = transition(same, mixed)
    assert gains.index(max(gains)) == 1
    grown = torch.stack([same[0], same[1], same[2] * 3, same[3]])
    assert transition(same, grown) == pytest.approx([0.25, 0.25, 0.75, 0.25])
    assert transition(same, -same) == pytest.approx([0.25] * 4)
    assert sum(transition(same, turned)) == pytest.approx(1.0)


def test_naive_attention_is_a_mean_of_distributions():
    _, _, guide = sample(9, range(6, 9))
    queries, keys = guide[7]
    assert sum(instruction_attention(queries, keys)) == pytest.approx(1.0)
    assert instruction_attention(torch.zeros_like(queries), keys) == pytest.approx([1 / 9] * 9)
    assert instruction_attention(queries[:, :0], keys) == [0.0] * 9


def test_naive_carries_the_history_of_survivors_only():
    attention, ffn, guide = sample(10, range(8, 10))
    first = naive(range(1, 8), attention, ffn, guide, ACCUMULATE, PRUNE, (0.5, 1.0, 1.0), 1.0)[7]
    gone = next(i for i in range(1, 8) if i not in first)
    for layer in ACCUMULATE[1:]:
        attention[layer][1][gone] *= 1000
    assert naive(range(1, 8), attention, ffn, guide, ACCUMULATE, PRUNE, (0.5, 0.5, 0.5), 1.0)[7] == first
    again = naive(range(1, 8), attention, ffn, guide, ACCUMULATE, PRUNE, (0.5, 0.5, 0.5), 1.0)
    assert gone not in again[12]
