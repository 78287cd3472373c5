"""Attention over cells that lie row by row and head by head is the loop over them, whatever their lengths."""

import math

import pytest
import torch
from hf_tokens_kernels import backend as backend_of
from hf_tokens_kernels import merge_attention, picks, ragged_attention
from largest import Largest
from tolerances import close

SHAPES = [  # query heads, queries, head size, width of a value, and the lengths of rows and key heads
    (4, 1, 32, 32, [[7, 63], [1, 20]]),
    (6, 3, 64, 64, [[5, 40, 3]]),
    (2, 1, 256, 128, [[33, 9]]),
    (9, 1, 48, 80, [[500, 0, 17]]),
    (8, 2, 32, 32, [[3], [2], [90]]),
    (1, 1, 40, 40, [[1]]),
    (6, 2, 32, 48, [[40, 40, 40], [40, 0, 5], [5, 300, 300]]),
]


def loop(q, keys, values, starts, lengths, scaling, sizes=None, softcap=None, causal=False):
    """From the definition, cell by cell, in float64."""
    b, h, m, _ = q.shape
    groups = h // starts.shape[1]
    out, logs = torch.zeros(b, h, m, values.shape[1], dtype=torch.float64), torch.full((b, h, m), -math.inf, dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            start, length = int(starts[row, head // groups]), int(lengths[row, head // groups])
            for i in range(m):
                end = length - (m - 1 - i) if causal else length
                scores = []
                for cell in range(start, start + max(end, 0)):
                    score = float(q[row, head, i].double() @ keys[cell].double()) * scaling
                    score = score if softcap is None else softcap * math.tanh(score / softcap)
                    scores.append(score if sizes is None else score + math.log(float(sizes[cell])))
                if scores:
                    top = max(scores)
                    weights = [math.exp(s - top) for s in scores]
                    logs[row, head, i] = top + math.log(sum(weights))
                    for j, weight in enumerate(weights):
                        out[row, head, i] += weight / sum(weights) * values[start + j].double()
    return out, logs


def sample(shape, device="cpu", dtype=torch.float32, room=3, seed=0):
    """Queries and cells, with NaN in the room behind the cells of each row and head."""
    h, m, e, f, lengths = shape
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    regions = lengths.flatten() + room
    starts = (regions.cumsum(0) - regions).view_as(lengths)
    q = torch.randn(len(lengths), h, m, e, generator=make)
    keys, values = torch.randn(int(regions.sum()), e, generator=make), torch.randn(int(regions.sum()), f, generator=make)
    for start, length in zip(starts.flatten().tolist(), lengths.flatten().tolist(), strict=True):
        keys[start + length : start + length + room] = values[start + length : start + length + room] = torch.nan
    return (*(x.to(device, dtype) for x in (q, keys, values)), starts.to(device), lengths.to(device))


def check(got, want, dtype):
    out, logs = got
    assert out.dtype == dtype and logs.dtype == torch.promote_types(dtype, torch.float32)
    close(out.cpu(), want[0].to(dtype), "read")
    there = want[1] > -math.inf
    assert torch.equal(logs.cpu() > -math.inf, there)
    tolerant = torch.where(there, logs.cpu().double(), 0).to(dtype), torch.where(there, want[1], 0).to(dtype)
    close(*tolerant, "log")


@pytest.mark.parametrize("knobs", [{}, {"softcap": 2.0, "causal": True}], ids=["plain", "capped, causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ragged_attention_is_the_loop(backend, device, shape, knobs):
    given = sample(shape, device)
    check(ragged_attention(*given, scaling=0.3, **knobs), loop(*given, 0.3, **knobs), torch.float32)


def test_rows_and_heads_that_lie_alike_are_read_without_a_copy():
    given = sample((4, 1, 64, 64, [[200, 200], [200, 200]]))
    with Largest(*given[1:3]) as seen:
        out, logs, scores = ragged_attention(*given, scaling=0.3, scores=True)
    assert seen.elements <= scores.numel()
    check((out, logs), loop(*given, 0.3), torch.float32)
    for line, start in enumerate(given[3].flatten().tolist()):
        close(scores[:, start : start + 200].logsumexp(dim=1), logs.flatten().unflatten(0, (-1, 2))[line])


def test_a_cell_of_three_tokens_counts_three_times(backend, device):
    given = sample(SHAPES[0], device)
    sizes = torch.randint(1, 9, (len(given[1]),), generator=torch.Generator().manual_seed(1)).float().to(device)
    check(ragged_attention(*given, scaling=0.3, sizes=sizes), loop(*given, 0.3, sizes), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(backend, device, dtype):
    given = sample(SHAPES[1], device, dtype)
    check(ragged_attention(*given, scaling=0.3), loop(*given, 0.3), dtype)


@pytest.mark.parametrize("mixed", [("float32", "float32", "bfloat16"), ("bfloat16", "float32", "bfloat16")], ids=str)
def test_under_an_autocast_it_works_in_its_dtype_whatever_came(backend, device, mixed):
    q, keys, values, starts, lengths = sample(SHAPES[1], device, torch.bfloat16)
    want = ragged_attention(q, keys, values, starts, lengths, scaling=0.3)
    states = [x.to(getattr(torch, dtype)) for x, dtype in zip((q, keys, values), mixed, strict=True)]
    with torch.autocast(device, torch.bfloat16):
        got = ragged_attention(*states, starts, lengths, scaling=0.3)
        doubles = ragged_attention(*(x.double() for x in states), starts, lengths, scaling=0.3)[0] if backend == "torch" else q.double()
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert doubles.dtype == torch.float64


def test_doubles(device):
    given = sample(SHAPES[1], device, torch.float64)
    check(ragged_attention(*given, scaling=0.3), loop(*given, 0.3), torch.float64)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4]], ids=str)
def test_scores_of_cells_give_their_probabilities(backend, device, shape):
    """exp(score - log) are the weights with which the values are read; the room behind them gets none."""
    q, keys, values, starts, lengths = sample(shape, device)
    out, logs, scores = ragged_attention(q, keys, values, starts, lengths, scaling=0.3, scores=True)
    groups, (b, h, m, _) = q.shape[1] // starts.shape[1], q.shape
    assert int((scores > -torch.inf).sum()) == int(lengths.sum()) * groups * m
    for row in range(b):
        for head in range(h):
            start, length = int(starts[row, head // groups]), int(lengths[row, head // groups])
            for i in range(m):
                weights = (scores[head % groups * m + i, start : start + length] - logs[row, head, i]).exp()
                close(weights @ values[start : start + length], out[row, head, i])


def test_long_rows_are_split_and_joined(backend, device, monkeypatch):
    if backend == "triton":
        from hf_tokens_kernels.ragged_attention import twin

        monkeypatch.setattr(twin, "LEAST_BLOCKS", 1)
        monkeypatch.setattr(twin, "block_of", lambda features, size: 32)
    given = sample((4, 1, 32, 32, [[150, 3]]), device)
    check(ragged_attention(*given, scaling=0.3, longest=153), loop(*given, 0.3), torch.float32)


def test_cells_may_lie_in_a_wider_buffer(backend, device):
    q, keys, values, starts, lengths = sample(SHAPES[1], device)
    both = torch.cat([keys, values], dim=1)
    got = ragged_attention(q.mT.contiguous().mT, both[:, :64], both[:, 64:], starts, lengths, scaling=0.3)
    check(got, loop(q, keys, values, starts, lengths, 0.3), torch.float32)


def test_a_row_of_a_batch_is_the_row_alone(backend, device):
    q, keys, values, starts, lengths = sample(SHAPES[4], device)
    together = ragged_attention(q, keys, values, starts, lengths, scaling=0.3)
    for row in range(len(q)):
        alone = ragged_attention(q[row : row + 1], keys, values, starts[row : row + 1], lengths[row : row + 1], scaling=0.3)
        close(together[0][row : row + 1], alone[0])
        close(together[1][row : row + 1], alone[1])


def test_nothing_to_read_gives_zeros(backend, device):
    q, keys, values, starts, lengths = sample((2, 1, 32, 32, [[0, 0]]), device)
    out, logs = ragged_attention(q, keys[:0], values[:0], starts * 0, lengths, scaling=0.3)
    assert not out.any() and bool((logs == -math.inf).all())


def test_pools_are_joined_as_if_they_were_one(backend, device):
    """The cells of each row and head, once in one pool and once in two, beside a key without a value."""
    q, keys, values, starts, lengths = sample((4, 2, 32, 32, [[9, 30], [12, 5]]), device)
    first = lengths // 3
    parts = [(starts, first), (starts + first, lengths - first)]
    got = merge_attention([ragged_attention(q, keys, values, *part, scaling=0.3) for part in parts])
    whole, logs = ragged_attention(q, keys, values, starts, lengths, scaling=0.3)
    close(got, whole)
    sinks = torch.linspace(-1, 1, 4, device=device)
    left = logs.exp() / (logs.exp() + sinks.exp()[:, None])
    close(merge_attention([(whole, logs)], sinks), whole * left[..., None])


def test_gradients_go_through_the_reference():
    q, keys, values, starts, lengths = sample(SHAPES[0], dtype=torch.float64, room=0)
    keys.requires_grad_()
    with picks() as picked:
        ragged_attention(q, keys, values, starts, lengths, scaling=0.3)[0].square().sum().backward()
    assert picked[0].backend == "torch" and bool(keys.grad.isfinite().all())
    step = torch.zeros_like(keys)
    step[8, 3] = 1e-5
    with torch.no_grad():
        up, down = (ragged_attention(q, keys + s, values, starts, lengths, scaling=0.3)[0].square().sum() for s in (step, -step))
    assert float((up - down) / 2e-5) == pytest.approx(float(keys.grad[8, 3]), rel=1e-4)
    with backend_of("triton"), pytest.raises(ValueError, match="must run in Triton, got"):
        ragged_attention(q.float(), keys.float(), values.float(), starts, lengths, scaling=0.3)


def test_shapes_that_do_not_fit_are_refused():
    q, keys, values, starts, lengths = sample(SHAPES[0])
    with pytest.raises(ValueError, match=r"h a multiple of g, got .*Give each head its own"):
        ragged_attention(q[:, :3], keys, values, starts, lengths, scaling=0.3)
    with pytest.raises(ValueError, match=r"values \(cells, f\), got .*Flatten the cells"):
        ragged_attention(q, keys[:, :5], values, starts, lengths, scaling=0.3)


def test_cells_are_read_where_they_lie():
    """Nothing as large as the pool of cells is made."""
    given = sample((2, 1, 64, 64, [[2000, 900]]))
    with Largest(*given) as seen:
        ragged_attention(*given, scaling=0.3)
    assert seen.elements <= 2 * 2000
