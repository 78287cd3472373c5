"""ToCa against a slow loop over one sample, written from the equations of arXiv:2410.05317."""

import math
from dataclasses import dataclass

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

KINDS = ("attn", "cross", "mlp")


@dataclass(frozen=True)
class Knobs:
    cycle: int = 2  # N: every N-th step computes and stores everything
    ratio: float = 0.7  # R: the share of tokens that is reused
    weights: tuple[float, float, float, float] = (1.0, 0.5, 0.25, 0.4)  # lambda_1..lambda_4
    cell: int = 2  # k: side of a cell of the grid
    kinds: tuple[float, float, float] = (1.0, 1.0, 1.0)  # lambda_type of KINDS
    depth: float = 0.0  # lambda_l
    time: float = 0.0  # lambda_t


# per case: grid (height, width), steps, layers, context tokens (0: no cross-attention), valid context tokens, knobs
CASES = {
    "usual": ((4, 4), 5, 2, 3, None, Knobs(cycle=3)),
    "odd sizes": ((3, 5), 4, 2, 3, None, Knobs(cycle=3, ratio=0.5)),
    "no cross-attention": ((2, 4), 4, 2, 0, None, Knobs(cycle=3, weights=(1.0, 0.0, 0.25, 0.6))),
    "one token": ((1, 1), 4, 1, 2, None, Knobs()),
    "one step": ((2, 2), 1, 1, 2, None, Knobs()),
    "every step computes": ((2, 3), 3, 2, 2, None, Knobs(cycle=1)),
    "nothing reused": ((2, 3), 4, 2, 2, None, Knobs(cycle=4, ratio=0.0)),
    "everything reused": ((2, 3), 4, 2, 2, None, Knobs(cycle=4, ratio=1.0)),
    "only the MLP": ((3, 3), 4, 2, 2, None, Knobs(cycle=4, kinds=(0.0, 0.0, 1.0))),
    "attention reused whole": ((3, 3), 4, 2, 2, None, Knobs(cycle=4, ratio=0.6, kinds=(2.0, 1.0, 1.0))),
    "deeper reuses more": ((3, 4), 5, 3, 2, None, Knobs(cycle=4, depth=0.6)),
    "later reuses more": ((3, 4), 5, 2, 2, None, Knobs(cycle=4, time=0.6)),
    "longest reused first": ((2, 2), 6, 1, 2, None, Knobs(cycle=6, ratio=0.5, weights=(0.0, 0.0, 1.0, 0.0))),
    "context padded but one": ((2, 3), 4, 1, 4, 1, Knobs(cycle=3)),
}


def linear(layer, x):
    out = layer.weight.double() @ x
    return out if layer.bias is None else out + layer.bias.double()


def layer_norm(layer, x):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + layer.eps) * layer.weight.double() + layer.bias.double()


def attend(query, keys, values, heads):
    """The output of one query and its attention weights, their mean over heads."""
    width = len(query) // heads
    out, weights = torch.zeros(len(query), dtype=torch.float64), [0.0] * len(keys)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        logits = [float(key[part] @ query[part]) / math.sqrt(width) for key in keys]
        powers = [math.exp(logit - max(logits)) for logit in logits]
        for j, (power, value) in enumerate(zip(powers, values, strict=True)):
            out[part] += power / sum(powers) * value[part]
            weights[j] += power / sum(powers) / heads
    return out, weights


def attention(module, asking, given, chosen):
    """Rows `chosen` of the attention of `asking` to all of `given`: {token: output}, {token: weights}."""
    keys = [linear(module.to_k, x) for x in given]
    values = [linear(module.to_v, x) for x in given]
    out, weights = {}, {}
    for i in chosen:
        mixed, weights[i] = attend(linear(module.to_q, asking[i]), keys, values, module.heads)
        out[i] = linear(module.to_out[0], mixed)
    return out, weights


def feed_forward(module, asking, chosen):
    out = {}
    for i in chosen:
        inner = linear(module.net[0].proj, asking[i])
        out[i] = linear(module.net[2], inner * (1 + torch.erf(inner / math.sqrt(2))) / 2)
    return out, {}


def influence(weights):
    """s_1(x_i) = sum_j a_ji: what all the tokens together read from token i."""
    return {i: sum(row[i] for row in weights.values()) for i in weights}


def control(weights):
    """s_2(x_i) = -sum_j c_ij log c_ij: the entropy of what token i reads from the context."""
    return {i: -sum(c * math.log(c) for c in row if c > 0) for i, row in weights.items()}


def score(s1, s2, ages, grid, knobs):
    """S = sum_j lambda_j s_j;  s_3 = n_i / N;  s_4 = 1 for the best of each k x k cell by the other three."""
    l1, l2, l3, l4 = knobs.weights
    height, width = grid
    total = [l1 * s1[i] + l2 * s2[i] + l3 * ages[i] / knobs.cycle for i in range(height * width)]
    best = {}
    for i in range(height * width):
        cell = (i // width // knobs.cell, i % width // knobs.cell)
        if cell not in best or total[i] > total[best[cell]]:
            best[cell] = i
    return [value + l4 * (i in best.values()) for i, value in enumerate(total)]


def reused_share(knobs, kind, layer, layers, step, steps):
    """R(l, type, t) = R lambda_type 2 (1/2 + lambda_l (l/L - 1/2)) 2 (1/2 + lambda_t (1/2 - t/T)), kept in [0, 1].

    l/L runs from 0 to 1 over the layers, t/T from 1 to 0 over the steps; a single layer or step stands in the middle.
    """
    along = layer / (layers - 1) if layers > 1 else 0.5
    noise = 1 - step / (steps - 1) if steps > 1 else 0.5
    share = knobs.ratio * knobs.kinds[KINDS.index(kind)]
    share *= 2 * (0.5 + knobs.depth * (along - 0.5)) * 2 * (0.5 + knobs.time * (0.5 - noise))
    return min(1.0, max(0.0, share))


def choose(scores, share):
    """The tokens to compute: the n - floor(share n) best, of equal ones the first."""
    number = len(scores) - math.floor(share * len(scores) + 1e-9)
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:number])


def sublayer(block, kind, hidden, context, chosen):
    norm = {"attn": block.norm1, "cross": block.norm2, "mlp": block.norm3}[kind]
    asking = [layer_norm(norm, x) for x in hidden]
    if kind == "attn":
        return attention(block.attn1, asking, asking, chosen)
    if kind == "cross":
        return attention(block.attn2, asking, context, chosen)
    return feed_forward(block.ff, asking, chosen)


def naive(blocks, steps, context, grid, knobs, valid=None):
    """The hidden states after the blocks at every step (steps n d) and the tokens computed, {(step, layer, kind): [..]}.

    steps holds what enters the first block at each denoising step; the stores start empty at the first one.
    """
    n = grid[0] * grid[1]
    kinds = KINDS if len(context) else ("attn", "mlp")
    context = [row.double() for row in context[:valid]]
    stored, ages, computed, outputs = {}, {}, {}, []
    s1, s2 = {}, {}
    for step, entering in enumerate(steps):
        hidden = [row.double() for row in entering]
        for layer, block in enumerate(blocks):
            for kind in kinds:
                site = layer, kind
                chosen = list(range(n))
                if step % knobs.cycle:
                    scores = score(s1[layer], s2.get(layer, [0.0] * n), ages[site], grid, knobs)
                    chosen = choose(scores, reused_share(knobs, kind, layer, len(blocks), step, len(steps)))
                fresh, weights = sublayer(block, kind, hidden, context, chosen)
                if step % knobs.cycle == 0 and kind == "attn":
                    s1[layer] = influence(weights)
                if step % knobs.cycle == 0 and kind == "cross":
                    s2[layer] = control(weights)
                stored[site] = {**stored.get(site, {}), **fresh}
                ages[site] = [0 if i in fresh else ages[site][i] + 1 for i in range(n)]
                computed[step, layer, kind] = chosen
                hidden = [x + stored[site][i] for i, x in enumerate(hidden)]
        outputs.append(torch.stack(hidden))
    return torch.stack(outputs), computed


def tiny(layers, cross, seed=0):
    torch.manual_seed(seed)
    blocks = [BasicTransformerBlock(8, 2, 4, cross_attention_dim=6 if cross else None, activation_fn="gelu") for _ in range(layers)]
    for block in blocks:
        block.double().eval().requires_grad_(False)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return blocks


def sample(case):
    grid, steps, layers, context, valid, knobs = CASES[case]
    blocks = tiny(layers, cross=context > 0)
    torch.manual_seed(1)
    entering = torch.randn(1, grid[0] * grid[1], 8) + 0.3 * torch.randn(steps, grid[0] * grid[1], 8)
    return blocks, entering.double(), torch.randn(context, 6).double(), grid, knobs, valid


def plain(blocks, steps, context, valid=None):
    """Every step computed, by the blocks themselves."""
    hidden = steps
    for block in blocks:
        given = context[None, :valid].expand(len(steps), -1, -1) if len(context) else None
        hidden = block(hidden, encoder_hidden_states=given)
    return hidden


@pytest.mark.parametrize("case", ["one step", "every step computes", "nothing reused"])
def test_naive_that_reuses_nothing_is_the_model(case):
    blocks, steps, context, grid, knobs, valid = sample(case)
    got, computed = naive(blocks, steps, context, grid, knobs, valid)
    torch.testing.assert_close(got, plain(blocks, steps, context, valid), rtol=1e-10, atol=1e-10)
    assert all(tokens == list(range(grid[0] * grid[1])) for tokens in computed.values())


@pytest.mark.parametrize("case", CASES)
def test_naive_of_steps_that_are_equal_is_the_model(case):
    blocks, steps, context, grid, knobs, valid = sample(case)
    steps = steps[:1].expand_as(steps)
    torch.testing.assert_close(
        naive(blocks, steps, context, grid, knobs, valid)[0], plain(blocks, steps, context, valid), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("case", CASES)
def test_naive_computes_as_many_tokens_as_the_ratio_says(case):
    blocks, steps, context, grid, knobs, valid = sample(case)
    computed = naive(blocks, steps, context, grid, knobs, valid)[1]
    n = grid[0] * grid[1]
    for (step, layer, kind), tokens in computed.items():
        share = reused_share(knobs, kind, layer, len(blocks), step, len(steps))
        assert len(tokens) == (n if step % knobs.cycle == 0 else n - math.floor(share * n + 1e-9))
        assert len(set(tokens)) == len(tokens)


def test_naive_that_reuses_everything_adds_what_the_first_step_added():
    blocks, steps, context, grid, knobs, _ = sample("everything reused")
    got = naive(blocks, steps, context, grid, knobs)[0]
    torch.testing.assert_close(got - steps, (got - steps)[:1].expand_as(got), rtol=1e-10, atol=1e-10)


def test_naive_by_age_alone_takes_turns():
    blocks, steps, context, grid, knobs, _ = sample("longest reused first")
    computed = naive(blocks, steps, context, grid, knobs)[1]
    assert [computed[step, 0, "mlp"] for step in range(1, 5)] == [[0, 1], [2, 3], [0, 1], [2, 3]]


def test_naive_scores_of_known_attention():
    even = {i: [0.25] * 4 for i in range(4)}
    assert list(influence(even).values()) == [1.0] * 4
    assert control(even)[0] == pytest.approx(math.log(4))
    assert control({0: [1.0, 0.0]})[0] == 0
    assert influence({0: [0.1, 0.9], 1: [0.0, 1.0]}) == pytest.approx({0: 0.1, 1: 1.9})


def test_naive_bonus_goes_to_one_token_of_every_cell():
    knobs = Knobs(weights=(1.0, 0.0, 0.0, 10.0), cell=2)
    s1 = dict(enumerate([1, 5, 2, 3, 4, 9, 0, 7, 8, 6, 11, 10, 12, 13, 14]))
    scores = score(s1, [0.0] * 15, [0] * 15, (3, 5), knobs)
    assert [i for i, value in enumerate(scores) if value == s1[i] + 10] == [5, 8, 9, 10, 13, 14]


def test_naive_ratio_of_depth_and_time_keeps_the_mean():
    knobs = Knobs(ratio=0.4, depth=0.5, time=0.5)
    over_depth = [reused_share(knobs, "mlp", layer, 5, 1, 3) for layer in range(5)]
    assert over_depth == sorted(over_depth)
    assert sum(over_depth) / 5 == pytest.approx(0.4)
    over_time = [reused_share(knobs, "mlp", 1, 3, step, 5) for step in range(5)]
    assert over_time == sorted(over_time)
    assert sum(over_time) / 5 == pytest.approx(0.4)
