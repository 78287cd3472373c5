"""SimPool against a slow loop over one sample, written from equations (12) to (17) of arXiv:2309.06891."""

import math

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from hf_tokens import Dims, SimPool, SimPoolConfig, get_token_model

# per case: tokens n, special tokens in front, tokens that are real (None: all), gamma, size of each token (None: 1)
CASES = {
    "usual": (7, 1, None, 1.25, None),
    "without special tokens": (6, 0, None, 1.25, None),
    "registers": (9, 5, None, 1.25, None),
    "gamma of convolutional networks": (7, 1, None, 2.0, None),
    "plain mean": (5, 1, None, 1.0, None),
    "one token": (1, 0, None, 1.25, None),
    "one patch": (2, 1, None, 1.25, None),
    "padded but one": (6, 0, (3,), 1.25, None),
    "padding on the left": (6, 0, (2, 3, 4, 5), 2.0, None),
    "merged tokens": (6, 1, None, 1.25, (1, 3, 1, 2, 5, 1)),
    "merged tokens and padding": (6, 0, (0, 2, 4), 1.25, (2, 1, 3, 1, 4, 7)),
}
FLOOR = 2e-6  # the least value of V is not quite zero, where a power has no gradient


def layer_norm(x, weight, bias):
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-6) * weight + bias


def naive(x, w_q, w_k, weight, bias, beta, gamma):
    """u of one sample, x (p d): u0 = X 1/p, q = W_Q u0, K = W_K X, a = softmax(K^T q / sqrt d), V = X - min X, u = f^-1(f(V) a).

    K and V read the layer-normalised tokens; f(v) = v^gamma with gamma = (1 - alpha) / 2.
    """
    width = x.shape[1]
    u0 = sum(x) / len(x)
    q = w_q @ u0
    normed = [layer_norm(token, weight, bias) for token in x]
    logits = [float((w_k @ token) @ q) / math.sqrt(width) for token in normed]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    a = [power / sum(powers) for power in powers]
    least = min(float(value) for token in normed for value in token)
    u = torch.zeros(width, dtype=torch.float64)
    for channel in range(width):
        total = sum(share * (float(token[channel]) - least) ** gamma for share, token in zip(a, normed, strict=True))
        u[channel] = total ** (1 / gamma) + float(beta)
    return u


def lively(config, width=8):
    """A SimPool in float64 whose parameters are not where they start."""
    pooler = SimPool(config, Dims(width, 2, 2, 4, 3, 4, "vision", False)).double()
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(torch.randn_like(parameter))
    return pooler


def parameters(pooler):
    matrices = pooler.to_query.weight.detach(), pooler.to_key.weight.detach()
    return *matrices, pooler.norm.weight.detach(), pooler.norm.bias.detach(), pooler.beta.detach() if pooler.config.beta else 0


def sample(case, batch=2):
    """hidden (b n d), mask, sizes and positions (b n) each; the second row is all real, so that a row's padding is its own."""
    n, prefix, real, gamma, sizes = CASES[case]
    hidden = torch.randn(batch, n, 8, dtype=torch.float64)
    mask = torch.ones(batch, n, dtype=torch.bool)
    if real is not None:
        mask[0] = False
        mask[0, list(real)] = True
    weights = torch.tensor([sizes or [1] * n] * batch, dtype=torch.float32)
    positions = torch.arange(n).expand(batch, n)
    return hidden, mask, weights, positions, prefix, gamma


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("beta", [True, False])
def test_matches_the_paper(case, beta):
    hidden, mask, sizes, positions, prefix, gamma = sample(case)
    pooler = lively(SimPoolConfig(gamma=gamma, beta=beta))
    got = pooler.pool(hidden=hidden, mask=mask, sizes=sizes, positions=positions, prefix=prefix)
    for row in range(len(hidden)):
        kept = [t for t in range(hidden.shape[1]) if mask[row, t] and t >= prefix for _ in range(int(sizes[row, t]))]
        torch.testing.assert_close(got[row], naive(hidden[row, kept], *parameters(pooler), gamma), rtol=1e-7, atol=FLOOR)


def test_gradients_match_the_paper():
    hidden, mask, sizes, positions, prefix, gamma = sample("usual", batch=1)
    pooler = lively(SimPoolConfig(gamma=gamma))
    pooler.pool(hidden=hidden, mask=mask, sizes=sizes, positions=positions, prefix=prefix).sum().backward()

    def moved(name, index, by):
        changed = {key: value.detach().clone() for key, value in pooler.named_parameters()}
        changed[name].view(-1)[index] += by
        tensors = [changed[key] for key in ("to_query.weight", "to_key.weight", "norm.weight", "norm.bias", "beta")]
        return float(naive(hidden[0, prefix:], *tensors, gamma).sum())

    for name, parameter in pooler.named_parameters():
        index = min(5, parameter.numel() - 1)
        slope = (moved(name, index, 1e-6) - moved(name, index, -1e-6)) / 2e-6
        assert float(parameter.grad.view(-1)[index]) == pytest.approx(slope, rel=1e-5, abs=1e-7), name


def test_a_row_without_a_real_token_is_finite():
    hidden, mask, sizes, positions, prefix, _ = sample("usual")
    mask[0] = False
    got = lively(SimPoolConfig()).pool(hidden=hidden, mask=mask, sizes=sizes, positions=positions, prefix=prefix)
    assert got.isfinite().all()


def tiny(cls, **more):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        initializer_range=0.5, num_labels=3,
    )  # fmt: skip
    return cls(config, **more).double().eval()


def pooler_of(model):
    return next(module for module in model.modules() if isinstance(module, SimPool))


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_a_classifier_reads_what_the_paper_pools(strength):
    base, pixels = tiny(ViTForImageClassification), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        tokens = base.vit(pixels).last_hidden_state  # behind the final norm
        model = get_token_model(base, SimPoolConfig(strength=strength)).eval()
        got = model(pixels).logits
    for row in range(2):
        pooled = naive(tokens[row, 1:], *parameters(pooler_of(model)), 1.25)
        expected = base.classifier(strength * pooled + (1 - strength) * tokens[row, 0])
        torch.testing.assert_close(got[row], expected, rtol=1e-7, atol=FLOOR)


def test_it_starts_near_the_generalised_mean():
    model = get_token_model(tiny(ViTModel, add_pooling_layer=False), SimPoolConfig())
    hidden = torch.randn(1, 5, 8, dtype=torch.float64)
    given = dict(mask=torch.ones(1, 5, dtype=torch.bool), sizes=torch.ones(1, 5), positions=torch.arange(5)[None], prefix=1)
    pooler = pooler_of(model)
    flat = naive(hidden[0, 1:], *(0 * matrix for matrix in parameters(pooler)[:2]), *parameters(pooler)[2:], 1.25)
    assert (pooler.pool(hidden=hidden, **given)[0] - flat).abs().max() < 0.05
