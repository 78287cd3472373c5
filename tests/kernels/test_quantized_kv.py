"""Rows in a few bits come back as they were rounded, and attention over them is that over the rows they stand for."""

import dataclasses
import itertools
import math

import pytest
import torch
from hf_tokens_kernels import (
    Coded,
    Kept,
    Rounded,
    decode,
    encode,
    pack,
    pack_along,
    pack_bits,
    packed_attention,
    ragged_attention,
    round_rows,
    unpack,
    unpack_bits,
)
from hf_tokens_kernels.quantized_kv import reference
from largest import Largest
from tolerances import close


@pytest.fixture(autouse=True)
def reads_as_many_cells(monkeypatch):
    """The few cells of these tests are read as many are."""
    monkeypatch.setattr(reference, "FEW", 0)


def cells(lengths, widths, device="cpu", dtype=torch.float32, seed=0):
    """Rows of keys and values of cells, queries, and where the cells of each row and head lie, with room behind them."""
    make = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths)
    regions = lengths.flatten() + 2
    starts = (regions.cumsum(0) - regions).view_as(lengths)
    keys, values = (torch.randn(int(regions.sum()), w, generator=make).to(device, dtype) for w in widths)
    q = torch.randn(len(lengths), 2 * lengths.shape[1], 1, widths[0], generator=make).to(device, dtype)
    return q, keys, values, starts.to(device), lengths.to(device)


def rounded(rows, bits, group):
    return Rounded(*pack(rows, bits, group), bits, group, rows.shape[1])


def rounded_along(rows, bits, group):
    """Groups of rows that lie one behind the other, numbered from the last one on."""
    index = torch.arange(len(rows), device=rows.device).flip(0) // group
    return Rounded(*pack_along(rows, index, bits), bits, 1, rows.shape[1], index.int())


def coded(rows, channels, many, seed=0):
    make = torch.Generator().manual_seed(seed)
    book = torch.randn(rows.shape[1] // channels, many, channels, generator=make).to(rows)
    return Coded(encode(rows, book), book)


@pytest.mark.parametrize("width", [1, 5, 13, 64])
@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_survive_packing(bits, width):
    codes = torch.randint(0, 2**bits, (7, width), generator=torch.Generator().manual_seed(bits))
    packed = pack_bits(codes, bits)
    assert torch.equal(unpack_bits(packed, bits, width).long(), codes)
    assert packed.dtype == torch.uint8 and packed.shape[1] <= -(-width * bits // 8) + bits.bit_count() - 1


@pytest.mark.parametrize(("bits", "group", "width"), [(2, 32, 64), (4, 5, 13), (8, 64, 64), (3, 4, 6), (1, 8, 8), (6, 1, 3)])
def test_a_row_is_rounded_to_the_nearest_of_its_steps(bits, group, width):
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read = unpack(*pack(rows, bits, group), bits, group, width)
    for row, first in itertools.product(range(9), range(0, width, group)):
        part = rows[row, first : first + group].tolist()
        low, step = min(part), (max(part) - min(part)) / (2**bits - 1)
        steps = [low + i * step for i in range(2**bits)]
        want = [min(steps, key=lambda s, x=x: abs(s - x)) for x in part]
        assert read[row, first : first + group].tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("bits", "width"), [(2, 8), (4, 13), (1, 1), (8, 3)])
def test_a_channel_is_rounded_to_the_nearest_step_of_its_group_of_rows(bits, width):
    rows, index = (
        torch.randn(9, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.tensor([0, 2, 2, 0, 1, 2, 0, 2, 0]),
    )
    read = Rounded(*pack_along(rows, index, bits), bits, 1, width, index).rows(slice(None))
    for group, channel in itertools.product(range(3), range(width)):
        part = rows[index == group, channel].tolist()
        low, step = min(part), (max(part) - min(part)) / (2**bits - 1)
        steps = [low + i * step for i in range(2**bits)]
        want = [min(steps, key=lambda s, x=x: abs(s - x)) for x in part]
        assert read[index == group, channel].tolist() == pytest.approx(want, abs=1e-12)


def test_what_lies_beyond_given_scales_goes_to_their_ends():
    rows, low, scale = torch.tensor([[-3.0, 0.2, 9.0]]), torch.zeros(1, 3), torch.ones(1, 3)
    assert unpack(round_rows(rows, scale, low, 2, 1), scale, low, 2, 1, 3).tolist() == [[0.0, 0.0, 3.0]]


def test_no_rows_and_rows_of_one_value():
    empty = torch.zeros(0, dtype=torch.long)
    assert [len(x) for x in pack_along(torch.empty(0, 6), empty, 3)] == [0, 0, 0]
    assert unpack(*pack(torch.empty(0, 6), 3, 4), 3, 4, 6).shape == (0, 6)
    rows = torch.full((2, 6), 0.7)
    assert torch.equal(unpack(*pack(rows, 3, 4), 3, 4, 6), rows)


@pytest.mark.parametrize(("channels", "many"), [(4, 256), (2, 16), (3, 5), (1, 2)])
def test_a_code_is_the_nearest_of_its_codebook(channels, many, monkeypatch):
    from hf_tokens_kernels.quantized_kv import forms

    monkeypatch.setattr(forms, "DISTANCES", 4 * many)
    make = torch.Generator().manual_seed(0)
    rows, book = torch.randn(11, 4 * channels, generator=make), torch.randn(4, many, channels, generator=make)
    read = decode(encode(rows, book), book)
    for row, run in itertools.product(range(11), range(4)):
        x = rows[row, run * channels : (run + 1) * channels].double()
        want = min(book[run].double(), key=lambda code, x=x: float((code - x).square().sum()))
        assert torch.equal(read[row, run * channels : (run + 1) * channels].double(), want)


FORMS = {  # of keys and of values, by the width of a row
    "2 bits": (lambda x: rounded(x, 2, 32), lambda x: rounded(x, 2, 32)),
    "4 and 8 bits": (lambda x: rounded(x, 4, 16), lambda x: rounded(x, 8, 64)),
    "7 and 3 bits, small groups": (lambda x: rounded(x, 7, 5), lambda x: rounded(x, 3, 7)),
    "2 bits along the cells": (lambda x: rounded_along(x, 2, 32), lambda x: rounded(x, 2, 32)),
    "3 bits along the cells, both": (lambda x: rounded_along(x, 3, 5), lambda x: rounded_along(x, 3, 7)),
    "keys alone in 2 bits along the cells": (lambda x: rounded_along(x, 2, 32), Kept),
    "values alone in 4 bits": (Kept, lambda x: rounded(x, 4, 32)),
    "neither": (Kept, Kept),
    "4 bits, groups of part of a strip": (lambda x: rounded(x, 4, 8), lambda x: rounded(x, 8, 16)),
    "codebooks": (lambda x: coded(x, 4, 256), lambda x: coded(x, 2, 11)),
    "codes and bits": (lambda x: coded(x, 8, 200), lambda x: rounded(x, 1, 40)),
}
SHAPES = [([[7, 63], [1, 20]], (64, 64)), ([[500, 0]], (32, 48)), ([[5], [2], [9]], (256, 128)), ([[1]], (40, 40))]


def check(q, keys, values, starts, lengths, **knobs):
    """Attention over packed cells is the loop in float64 over what they stand for."""
    out, logs = packed_attention(q, keys, values, starts, lengths, scaling=0.3, **knobs)
    k, v = (x.rows(slice(None)).double() for x in (keys, values))
    sizes, cap, groups = knobs.get("sizes"), knobs.get("softcap"), q.shape[1] // starts.shape[1]
    want, want_logs = torch.zeros(out.shape, dtype=torch.float64), torch.full(logs.shape, -math.inf, dtype=torch.float64)
    for row, head, i in itertools.product(*map(range, q.shape[:3])):
        start, length = int(starts[row, head // groups]), int(lengths[row, head // groups])
        scores = [float(q[row, head, i].double() @ k[start + j]) * 0.3 for j in range(length)]
        scores = scores if cap is None else [cap * math.tanh(s / cap) for s in scores]
        scores = scores if sizes is None else [s + math.log(float(sizes[start + j])) for j, s in enumerate(scores)]
        if scores:
            weights = torch.tensor(scores, dtype=torch.float64).softmax(dim=0)
            want[row, head, i] = (weights[:, None] * v[start : start + length].cpu()).sum(dim=0)
            want_logs[row, head, i] = torch.tensor(scores, dtype=torch.float64).logsumexp(dim=0)
    close(out.cpu(), want.to(out.dtype), "read")
    assert torch.equal(logs.cpu() > -math.inf, want_logs > -math.inf)
    close(logs.cpu().clamp(min=-1e4).to(out.dtype), want_logs.clamp(min=-1e4).to(out.dtype), "log")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_attention_is_the_loop(backend, device, shape, form):
    q, keys, values, *where = cells(*shape, device)
    check(q, FORMS[form][0](keys), FORMS[form][1](values), *where)


@pytest.mark.parametrize("form", FORMS)
def test_few_cells_are_read_as_many_are(form, monkeypatch):
    q, keys, values, *where = cells([[7, 63], [1, 0]], (64, 64))
    monkeypatch.setattr(reference, "FEW", 63)
    check(q, FORMS[form][0](keys), FORMS[form][1](values), *where)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "neither"])
def test_codes_lie_channel_by_channel_and_are_read_otherwise_too(backend, device, form):
    q, keys, values, *where = cells(*SHAPES[0], device)
    both = [make(x) for make, x in zip(FORMS[form], (keys, values), strict=True)]
    assert all(x.codes.stride(0) == 1 for x in both if not isinstance(x, Kept))
    check(q, *(dataclasses.replace(x, codes=x.codes.contiguous()) for x in both), *where)


def test_sizes_and_soft_caps(backend, device):
    q, keys, values, *where = cells(*SHAPES[0], device)
    sizes = torch.randint(1, 9, (len(keys),), generator=torch.Generator().manual_seed(1)).float().to(device)
    check(q, rounded(keys, 2, 32), rounded(values, 4, 32), *where, sizes=sizes, softcap=2.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves(backend, device, dtype):
    q, keys, values, *where = cells(*SHAPES[0], device, dtype)
    check(q, rounded(keys, 2, 32), coded(values, 4, 64), *where)


def test_doubles(device):
    q, keys, values, *where = cells(*SHAPES[0], device, torch.float64)
    check(q, rounded(keys, 2, 32), coded(values, 4, 64), *where)


def test_several_queries_and_splits(backend, device, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 32)
    if backend == "triton":
        from hf_tokens_kernels.ragged_attention import twin

        monkeypatch.setattr(twin, "LEAST_BLOCKS", 1)
    q, keys, values, *where = cells([[150, 3]], (32, 32), device)
    check(torch.cat([q, -q], dim=2), rounded(keys, 4, 32), rounded(values, 2, 16), *where, longest=160)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_runs_of_any_length_that_share_their_scales(backend, device, dtype, bits, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 48)  # cuts runs of 32 in two
    q, keys, values, *where = cells([[96, 70], [1, 33]], (40, 24), device, dtype)
    index = torch.repeat_interleave(torch.arange(90), torch.arange(90) % 7)[: len(keys)].to(device)
    uneven = lambda x: Rounded(*pack_along(x, index, bits), bits, 1, x.shape[1], index.int())
    check(q, uneven(keys), uneven(values), *where, softcap=3.0)
    check(q, rounded_along(keys, bits, 32), uneven(values), *where)


@pytest.mark.parametrize("room", [0, 40], ids="room for {}".format)
def test_a_last_run_that_is_cut_off_is_read_to_its_end_and_counts_for_nothing(backend, device, room):
    """What lies behind it may be anything: codes of other cells, numbers of groups that are not there."""
    q, keys, values, starts, lengths = cells([[43]], (64, 32), device)
    states = [Rounded(*pack_along(x[:43], torch.arange(43, device=device) // 16, 2), 2, 1, x.shape[1]) for x in (keys, values)]
    number = torch.cat([torch.arange(43, device=device) // 16, torch.full((room,), 999, device=device)]).int()
    fill = lambda codes: torch.cat([codes, codes.new_full((room, codes.shape[1]), 255)])
    both = [dataclasses.replace(x, codes=fill(x.codes), index=number) for x in states]
    out, logs = packed_attention(q, *both, starts, lengths, scaling=0.3)
    same = [dataclasses.replace(x, index=number[:43]) for x in states]
    want, want_logs = packed_attention(q, *(Kept(x.rows(slice(None))) for x in same), starts, lengths, scaling=0.3)
    close(out, want, "read")
    close(logs, want_logs, "log")


@pytest.mark.parametrize("lengths", [[[70, 70], [70, 70]], [[33, 33, 5], [5, 5, 64]], [[0, 0]]], ids=str)
def test_rows_and_heads_of_one_length_are_read_together(backend, device, lengths, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 160)
    q, keys, values, starts, many = cells(lengths, (64, 48), device)
    place = torch.arange(len(keys), device=device)
    line = (torch.searchsorted(starts.flatten().contiguous(), place, right=True) - 1).clamp(min=0)
    index = line * 10 + (place - starts.flatten()[line]) // 16  # each has groups of its own, the last one cut off
    along = lambda x: Rounded(*pack_along(x, index, 2), 2, 1, x.shape[1], index.int())
    sizes = torch.arange(1, len(keys) + 1, device=device).float()
    check(torch.cat([q, -q], dim=2), along(keys), rounded(values, 4, 16), starts, many, sizes=sizes)
    check(q, rounded(keys, 2, 32), along(values), starts, many)
    _, logs, scores = packed_attention(q, along(keys), rounded(values, 4, 16), starts, many, scaling=0.3, scores=True)
    for i, (first, n) in enumerate(zip(starts.flatten().tolist(), many.flatten().tolist(), strict=True)):
        close(scores[:, first : first + n].logsumexp(dim=1), logs.flatten().unflatten(0, (-1, 2))[i])


def test_scores_of_cells_give_their_probabilities(backend, device):
    q, keys, values, starts, lengths = cells(*SHAPES[1], device)
    k, v = rounded(keys, 2, 32), rounded(values, 2, 16)
    out, logs, scores = packed_attention(q, k, v, starts, lengths, scaling=0.3, scores=True)
    weights = (scores[:, :500] - logs[0, :2]).exp()
    close(weights @ v.rows(slice(0, 500)), out[0, :2, 0])
    assert bool((scores[:, 500:] == -torch.inf).all())


def test_rows_of_eight_bits_are_read_as_plain_ones_nearly(backend, device):
    q, keys, values, *where = cells(*SHAPES[0], device)
    got, _ = packed_attention(q, rounded(keys, 8, 16), rounded(values, 8, 16), *where, scaling=0.3)
    want, _ = ragged_attention(q, keys, values, *where, scaling=0.3)
    assert float((got - want).abs().max()) < 0.05


def test_no_more_than_a_chunk_is_unpacked(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 64)
    q, keys, values, *where = cells([[2000, 900]], (64, 64))
    k, v = rounded(keys, 2, 32), rounded(values, 2, 32)
    with Largest(*k.tensors(), *v.tensors()) as seen:
        packed_attention(q, k, v, *where, scaling=0.3)
    assert seen.elements <= 64 * 64 * 2


def test_gradients_go_through_the_reference():
    q, keys, values, *where = cells(*SHAPES[0], dtype=torch.float64)
    q.requires_grad_()
    k, v = rounded(keys, 2, 32), rounded(values, 2, 32)
    packed_attention(q, k, v, *where, scaling=0.3)[0].square().sum().backward()
    got, q.grad = q.grad, None
    ragged_attention(q, k.rows(slice(None)), v.rows(slice(None)), *where, scaling=0.3)[0].square().sum().backward()
    close(got, q.grad)


def test_what_does_not_fit_is_refused():
    q, keys, values, *where = cells(*SHAPES[0])
    with pytest.raises(ValueError, match="packed in 1 to 8 bits, in groups of 1 channel or more, got .*9 bits"):
        pack(keys, 9, 4)
    with pytest.raises(ValueError, match="64 channels in 2 bits has 16 bytes, got 8. Unpack with the numbers"):
        unpack(*pack(keys[:, :32], 2, 32), 2, 32, 64)
    with pytest.raises(ValueError, match=r"with 2 to 256 codes, got \(1, 512, 64\). Couple fewer"):
        encode(keys, torch.zeros(1, 512, 64))
    with pytest.raises(ValueError, match="have 2 runs of 4 channels, got"):
        encode(keys, torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="must have the channels of the queries, and a value each"):
        packed_attention(q, rounded(keys[:, :32], 2, 32), rounded(values, 2, 32), *where, scaling=0.3)
