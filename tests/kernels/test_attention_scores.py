"""Scores by tiles equal the attention matrix that they never build, forward and backward, in both forms."""

import math

import pytest
import torch
from hf_tokens_kernels import attention_columns, attention_entropy, attention_lse, attention_rows, attention_with_columns
from hf_tokens_kernels.attention_scores import fused, reference
from largest import Largest
from tolerances import close
from torch.nn.functional import scaled_dot_product_attention

SHAPES = [  # batch, query heads, key heads, queries, keys, head size
    (2, 4, 2, 7, 7, 8),
    (1, 1, 1, 1, 1, 4),
    (3, 6, 2, 5, 13, 16),
    (2, 4, 4, 1, 9, 8),
    (1, 9, 3, 63, 63, 32),
]


def matrix(q, k, scaling, mask=None, causal=False, softcap=None, sinks=None):
    """softmax(q k^T) row by row, with one key head for each group of query heads."""
    b, h, m, _ = q.shape
    g, n = k.shape[1], k.shape[2]
    out = torch.zeros(b, h, m, n, dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            for i in range(m):
                logits = [float(q[row, head, i] @ k[row, head * g // h, j]) * scaling for j in range(n)]
                for j in range(n):
                    logits[j] = logits[j] if softcap is None else softcap * math.tanh(logits[j] / softcap)
                    seen = j <= i + n - m if causal else True
                    seen = seen and (mask is None or bool(mask[row, 0, i, j]))
                    logits[j] = logits[j] if seen else -math.inf
                logits += [] if sinks is None else [float(sinks[head])]
                top = max(logits)
                weights = [0.0 if v == -math.inf else math.exp(v - top) for v in logits]
                out[row, head, i] = torch.tensor(weights[:n], dtype=torch.float64) / (sum(weights) or 1.0)
    return out


def sample(shape, seed=0):
    b, h, g, m, n, e = shape
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, m, e, generator=make, dtype=torch.float64)
    k = torch.randn(b, g, n, e, generator=make, dtype=torch.float64)
    mask = torch.rand(b, 1, m, n, generator=make) > 0.3
    mask[..., 0] = True
    return q, k, mask


@pytest.mark.parametrize("chunk", [1, 1 << 30], ids=["one query at a time", "all at once"])
@pytest.mark.parametrize("case", ["open", "causal", "mask", "additive"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_rows_and_entropy_are_those_of_the_matrix(shape, case, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(reference, "FEWEST", 1)
    q, k, mask = sample(shape)
    given = {"mask": mask} if case == "mask" else {"mask": torch.where(mask, 0.0, -torch.inf)} if case == "additive" else {}
    causal = case == "causal"
    full = matrix(q, k, 0.3, mask if case in ("mask", "additive") else None, causal)
    torch.testing.assert_close(attention_columns(q, k, scaling=0.3, causal=causal, **given), full.sum(2))
    torch.testing.assert_close(attention_columns(q, k, scaling=0.3, causal=causal, reduce="max", **given), full.amax(2))
    index = torch.randint(q.shape[2], (q.shape[0], 3))
    rows = torch.stack([full[b][:, index[b]] for b in range(len(q))])
    torch.testing.assert_close(attention_rows(q, k, index, scaling=0.3, causal=causal, **given), rows)
    if not causal:
        entropy = -(full * full.clamp(min=1e-300).log()).sum(-1)
        torch.testing.assert_close(attention_entropy(q, k, scaling=0.3, **given), entropy)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_soft_caps_and_sinks_shape_the_probabilities(shape, causal):
    q, k, _ = sample(shape)
    given = {"softcap": 0.7, "sinks": torch.linspace(-1, 1, shape[1], dtype=torch.float64)}
    full = matrix(q, k, 0.3, causal=causal, **given)
    torch.testing.assert_close(attention_columns(q, k, scaling=0.3, causal=causal, **given), full.sum(2))
    index = torch.randint(q.shape[2], (q.shape[0], 3))
    rows = torch.stack([full[b][:, index[b]] for b in range(len(q))])
    torch.testing.assert_close(attention_rows(q, k, index, scaling=0.3, causal=causal, **given), rows)


def eager(q, k, scaling=0.3, mask=None, causal=False, softcap=None, sinks=None):
    """The same as a tensor that can be differentiated."""
    h, g, m, n = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(h // g, dim=1).mT * scaling
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    if causal:
        s = s.masked_fill(~torch.ones(m, n, dtype=torch.bool, device=q.device).tril(n - m), -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if sinks is not None:
        s = torch.cat([s, sinks.view(1, -1, 1, 1).expand(len(q), -1, m, 1)], dim=-1)
    return s.softmax(dim=-1)[..., :n].nan_to_num(0.0)


CASES = {  # what a call is given beside queries and keys
    "open": lambda q, k, mask: {},
    "causal": lambda q, k, mask: dict(causal=True),
    "mask": lambda q, k, mask: dict(mask=mask),
    "a mask of every head": lambda q, k, mask: dict(mask=mask.expand(-1, q.shape[1], -1, -1)),
    "additive": lambda q, k, mask: dict(mask=torch.where(mask, 0.1, -torch.inf)),
    "soft cap and sinks": lambda q, k, mask: dict(softcap=0.7, causal=True, sinks=torch.linspace(-1, 1, q.shape[1])),
}


def given(backend, device, shape, case, seed=0):
    """Inputs in the form's widest dtype, the call's arguments, and the whole matrix in float64."""
    q, k, mask = sample(shape, seed)
    extra = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in CASES[case](q, k, mask).items()}
    dtype = torch.float32 if backend == "triton" else torch.float64
    q, k = q.to(device, dtype), k.to(device, dtype)
    cast = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in extra.items()}
    return q, k, extra, eager(q.double(), k.double(), **cast)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_and_sums_of_both_forms_are_those_of_the_matrix(backend, device, shape, case):
    q, k, extra, full = given(backend, device, shape, case)
    for reduce, expected in (("sum", full.sum(2)), ("max", full.amax(2))):
        close(attention_columns(q, k, scaling=0.3, reduce=reduce, **extra), expected.to(q.dtype), reduce)
    known = attention_lse(q, k, scaling=0.3, **extra)
    close(attention_columns(q, k, scaling=0.3, lse=known, **extra), full.sum(2).to(q.dtype), "with a known log-sum-exp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("groups", "e"), [(1, 32), (3, 80), (8, 128), (2, 256)], ids=str)
def test_head_sizes_groups_and_dtypes(backend, device, groups, e, dtype):
    q, k, mask = sample((1, groups * 2, 2, 9, 33, e))
    q, k = q.to(device, dtype), k.to(device, dtype)
    got = attention_columns(q, k, scaling=e**-0.5, causal=True)
    assert got.dtype == torch.float32
    close(got, eager(q.double(), k.double(), e**-0.5, causal=True).sum(2).float())


def test_a_length_of_several_tiles_that_none_divides(backend, device):
    q, k, _ = sample((1, 2, 1, 140, 500, 16))
    q, k = q.to(device).float(), k.to(device).float()
    close(attention_columns(q, k, scaling=0.3, causal=True), eager(q.double(), k.double(), causal=True).sum(2).float())


@pytest.mark.parametrize("heads", [1, 2])
def test_positions_and_key_masks_of_each_row_stand_in_for_a_mask(backend, device, heads):
    q, k, _ = sample((3, 4, 2, 5, 9, 8))
    queries = torch.tensor([[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [7, 7, 2, 0, 1]])
    keys = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(i)) for i in range(3 * heads)]).view(3, heads, 9)
    there = keys != 4
    there[1], there[2] = False, keys[2] == 0  # a row of nothing but padding, and one with a single key
    mask = ((keys[:, :, None] <= queries[:, None, :, None]) & there[:, :, None]).repeat_interleave(4 // heads, dim=1)
    full = eager(q, k, mask=mask)
    q, k, queries, keys, there = (x.to(device) for x in (q.float(), k.float(), queries, keys, there))
    k = k.masked_fill(~there.expand(-1, 2, -1)[..., None], torch.nan) if heads == 2 else k
    got = attention_columns(q, k, scaling=0.3, query_positions=queries, key_positions=keys, key_mask=there)
    close(got, full.sum(2).float().to(device))
    only = attention_columns(q, k, scaling=0.3, key_mask=there)
    close(only, eager(q.double(), k.double().nan_to_num(), mask=there.repeat_interleave(4 // heads, 1)[:, :, None]).sum(2).float())


def test_a_window_and_chosen_queries_are_rows_of_the_matrix(backend, device):
    q, k, extra, full = given(backend, device, SHAPES[4], "causal")
    ask = lambda **more: attention_columns(q, k, scaling=0.3, **extra, **more)
    close(ask(window=7), full[:, :, -7:].sum(2).to(q.dtype))
    close(ask(window=99), full.sum(2).to(q.dtype))
    index = torch.tensor([[5, 60, 5]], device=device)
    weights = torch.tensor([[1.0, 0.5, 0.0]], device=device, dtype=q.dtype)
    close(ask(queries=index, weights=weights), (full[:, :, index[0]] * weights[:, None, :, None]).sum(2).to(q.dtype))


def test_heads_are_averaged_as_asked(backend, device):
    q, k, extra, full = given(backend, device, SHAPES[2], "open")
    close(attention_columns(q, k, scaling=0.3, heads="key"), full.sum(2).unflatten(1, (2, 3)).mean(2).to(q.dtype))
    close(attention_columns(q, k, scaling=0.3, heads="mean"), full.sum(2).mean(1).to(q.dtype))


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_matrix(backend, device, case, reduce):
    q, k, extra, _ = given(backend, device, (2, 4, 2, 21, 34, 8), case)
    weights = torch.rand(2, 21, dtype=q.dtype, device=device)
    weights[0, :3] = 0
    inputs = [x.requires_grad_() for x in (q, k, weights)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    cast = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in extra.items()}
    p = eager(*exact[:2], **cast) * exact[2][:, None, :, None]
    toward = torch.linspace(-1, 1, 34, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(((p.sum(2) if reduce == "sum" else p.amax(2)) * toward).sum(), exact)
    got = attention_columns(q, k, scaling=0.3, weights=weights, reduce=reduce, **extra)
    found = torch.autograd.grad((got * toward.to(got.dtype)).sum(), inputs)
    for name, ours, theirs in zip(("q", "k", "weights"), found, expected, strict=True):
        close(ours, theirs.to(ours.dtype), name)


def test_gradients_reach_a_learnt_bias_and_sinks():
    q, k, _ = sample((2, 4, 2, 5, 6, 8))
    learnt = [torch.randn(1, 4, 5, 6, dtype=torch.float64).requires_grad_(), torch.randn(4, dtype=torch.float64).requires_grad_()]
    toward = torch.linspace(-1, 1, 6, dtype=torch.float64)
    for reduce in ("sum", "max"):
        full = eager(q, k, mask=learnt[0], sinks=learnt[1])
        expected = torch.autograd.grad(((full.sum(2) if reduce == "sum" else full.amax(2)) * toward).sum(), learnt)
        got = attention_columns(q, k, scaling=0.3, mask=learnt[0], sinks=learnt[1], reduce=reduce)
        torch.testing.assert_close(torch.autograd.grad((got * toward).sum(), learnt), expected)


def test_strided_inputs(backend, device):
    q, k, _ = sample((2, 3, 4, 7, 9, 8))
    q, k = (x.to(device).float().transpose(1, 2) for x in (q, k))  # heads behind tokens in memory, as models have them
    q, k = q[:, :4], k[:, ::9, ::2]
    close(attention_columns(q, k, scaling=0.3), eager(q.double(), k.double()).sum(2).float())


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("case", ["open", "causal", "positions", "mask of each head"])
def test_heads_that_are_looked_at_one_after_the_other_are_those_of_all(case, reduce, monkeypatch):
    q, k, _ = sample((2, 6, 3, 40, 40, 8))
    make = torch.Generator().manual_seed(1)
    more = {
        "open": {},
        "causal": dict(causal=True, sinks=torch.randn(6, generator=make)),
        "positions": dict(causal=True, key_mask=torch.rand(2, 3, 40, generator=make) > 0.2),
        "mask of each head": dict(mask=torch.rand(2, 6, 40, 40, generator=make) > 0.3, weights=torch.rand(2, 40, generator=make)),
    }[case]
    want = attention_columns(q, k, scaling=0.3, reduce=reduce, **more)
    seen = []
    together = reference.columns_together
    monkeypatch.setattr(reference, "columns_together", lambda q, *rest: seen.append(q.shape[1]) or together(q, *rest))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 2 * 2 * 16 * 40)
    close(attention_columns(q, k, scaling=0.3, reduce=reduce, **more), want)
    assert seen == [2, 2, 2]


def test_a_row_of_a_batch_is_the_row_alone(backend, device):
    q, k, extra, _ = given(backend, device, SHAPES[2], "mask")
    together = attention_columns(q, k, scaling=0.3, **extra)
    for i in range(len(q)):
        alone = attention_columns(q[i : i + 1], k[i : i + 1], scaling=0.3, mask=extra["mask"][i : i + 1])
        close(together[i : i + 1], alone)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda q, k: attention_columns(q, k[:, :1, :, :4], scaling=1), "must have the same b and e"),
        (lambda q, k: attention_columns(q, k, scaling=1, mask=torch.ones(2, 3)), r"mask must be \(b\|1 h\|1 m\|1 n\)"),
        (lambda q, k: attention_columns(q, k, scaling=1, key_mask=torch.ones(2, 3, dtype=torch.bool)), "key_mask must be"),
        (lambda q, k: attention_columns(q, k, scaling=1, key_positions=torch.ones(2, 7)), "need query_positions"),
        (lambda q, k: attention_columns(q, k, scaling=1, query_positions=torch.ones(2, 7)), "need key_positions"),
        (lambda q, k: attention_columns(q, k, scaling=1, reduce="mean"), "reduce is one of"),
        (lambda q, k: attention_columns(q, k, scaling=1, window=2, queries=torch.zeros(2, 1)), "queries or a window, got both"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    q, k, _ = sample(SHAPES[0])
    with pytest.raises(ValueError, match=words):
        call(q, k)


def test_weights_leave_queries_out():
    q, k, _ = sample(SHAPES[0])
    weights = torch.tensor([[0, 0, 1, 1, 1, 1, 0.5], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    full = matrix(q, k, 0.3)
    expected = (full * weights[:, None, :, None]).sum(2)
    torch.testing.assert_close(attention_columns(q, k, scaling=0.3, weights=weights), expected)


@pytest.mark.parametrize("learns", [False, True], ids=["forward", "and backward"])
def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch, learns):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 14)
    largest = []
    for n in (512, 1024, 2048):
        q, k = torch.randn(1, 2, n, 8, requires_grad=learns), torch.randn(1, 1, n, 8)
        with Largest() as seen:
            got = attention_columns(q, k, scaling=0.3, causal=True)
            if learns:
                got[..., ::2].sum().backward()
        largest.append(seen.elements)
    assert largest[2] <= 4 * largest[0]
    assert largest[2] < 2 * 2048 * 2048 / 16


@pytest.mark.parametrize("few", [False, True], ids=["all at once", "few at a time"])
@pytest.mark.parametrize("case", ["open", "causal", "mask", "a mask of every head", "a query that sees nothing"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_attention_with_its_columns_is_the_attention_and_the_columns(shape, case, few, monkeypatch):
    if few:
        for name in ("ROWS", "FEWEST", "TOGETHER"):
            monkeypatch.setattr(fused, name, 1)
    q, k, mask = sample(shape)
    v = torch.randn(*k.shape[:3], k.shape[3] + 3, dtype=torch.float64)
    if case == "a query that sees nothing":
        mask[:, :, 0] = False
    looks = CASES[case](q, k, mask) if case in CASES else {"mask": mask}
    weights = torch.arange(q.shape[0] * q.shape[2], dtype=torch.float64).view(q.shape[0], q.shape[2]) % 3
    p = eager(q, k, **looks)
    read = (p @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)).transpose(1, 2)
    for given, sums in ((None, p.sum(dim=2)), (weights, (p * weights[:, None, :, None]).sum(dim=2))):
        out, columns = attention_with_columns(q, k, v, scaling=0.3, weights=given, **looks)
        torch.testing.assert_close(out, read)
        torch.testing.assert_close(columns, sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_attention_with_its_columns_sums_in_float32_and_reads_nan_of_no_hidden_key(dtype):
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 40, heads, 16, generator=make).transpose(1, 2).to(dtype) for heads in (6, 2, 2))  # strided
    mask = torch.ones(40, 40, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[..., :3] = False
    k[:, :, :3] = torch.nan
    out, columns = attention_with_columns(q, k, v, scaling=0.3, mask=mask)
    want = attention_columns(q, k, scaling=0.3, mask=mask)
    assert out.dtype == dtype and columns.dtype == torch.float32
    close(columns, want)
    want = scaled_dot_product_attention(q, k.nan_to_num(0.0), v, attn_mask=mask, scale=0.3, enable_gqa=True)
    close(out, want.nan_to_num(0.0).transpose(1, 2))


def test_an_attention_with_its_columns_takes_no_gradient_and_no_additive_mask():
    q, k, mask = sample((1, 2, 1, 4, 4, 8))
    for change, words in (
        ({"mask": torch.where(mask, 0.0, -torch.inf)}, "must be bool"),
        ({"v": k[:, :, :3]}, "Pass the values of these keys"),
        ({"q": q.clone().requires_grad_()}, "takes no gradient"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_with_columns(**{"q": q, "k": k, "v": k, "scaling": 0.3, **change})


def test_an_attention_with_its_columns_holds_some_queries_at_a_time(monkeypatch):
    monkeypatch.setattr(fused, "ELEMENTS", 1)
    monkeypatch.setattr(fused, "TOGETHER", 1)
    q, k, _ = sample((1, 4, 2, 512, 512, 4))
    with Largest() as seen:
        attention_with_columns(q, k, k, scaling=0.3, causal=True)
    assert seen.elements <= 512 * fused.FEWEST < 512 * 512
