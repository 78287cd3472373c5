"""The chunked scores equal the attention matrix that they never build."""

import math

import pytest
import torch
from hf_tokens_kernels import attention_columns, attention_entropy, attention_rows
from hf_tokens_kernels.attention_scores import reference
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["one query at a time", "all at once"])
@pytest.mark.parametrize("case", ["open", "causal", "mask", "additive"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_columns_rows_and_entropy_are_those_of_the_matrix(shape, case, chunk, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
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


def test_weights_leave_queries_out():
    q, k, _ = sample(SHAPES[0])
    weights = torch.tensor([[0, 0, 1, 1, 1, 1, 0.5], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    full = matrix(q, k, 0.3)
    expected = (full * weights[:, None, :, None]).sum(2)
    torch.testing.assert_close(attention_columns(q, k, scaling=0.3, weights=weights), expected)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 14)
    largest = []
    for n in (512, 1024, 2048):
        q, k = torch.randn(1, 2, n, 8), torch.randn(1, 1, n, 8)
        with Largest() as seen:
            attention_columns(q, k, scaling=0.3, causal=True)
        largest.append(seen.elements)
    assert largest[2] <= 4 * largest[0]
    assert largest[2] < 2 * 2048 * 2048 / 16
