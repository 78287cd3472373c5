"""FDT against a slow loop over one sample, written from the equations of arXiv:2303.14865."""

import functools
import math

import pytest
import torch
from hf_tokens_adapters.pooler import fdt
from tolerances import close
from transformers import CLIPConfig, CLIPModel

from hf_tokens import FDT, Dims, FDTConfig, get_token_model, load

# per case: tokens n, special tokens in front, tokens that are real (None: all), codes, temperature, share of the training done
CASES = {
    "usual": (7, 1, None, 11, 0.2, 1.0),
    "sharp": (7, 1, None, 11, 0.01, 1.0),
    "at first": (6, 0, None, 9, 0.01, 0.0),
    "later": (6, 0, None, 9, 0.01, 0.7),
    "one patch": (2, 1, None, 5, 0.5, 1.0),
    "one code": (4, 0, None, 1, 1.0, 0.5),
    "padded but one": (6, 0, (3,), 8, 0.1, 1.0),
}
START = 1000.0


def sparsemax(z):
    """The point of the simplex nearest to z: the threshold that leaves a sum of 1 (Martins and Astudillo, 2016)."""
    order = sorted(z, reverse=True)
    support = max(k for k in range(1, len(z) + 1) if 1 + k * order[k - 1] > sum(order[:k]))
    threshold = (sum(order[:support]) - 1) / support
    return [max(value - threshold, 0.0) for value in z]


def norm(x, weight, bias):
    """A layer's norm of one vector."""
    mean = sum(x.tolist()) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x.tolist()) / len(x) + 1e-5)
    return torch.stack([(v - mean) / spread * w + b for v, w, b in zip(x, weight, bias, strict=True)])


def mapped(token, parameters):
    """Norm, linear, GELU by the error function, norm, linear."""
    inner = parameters["1.weight"] @ norm(token, parameters["0.weight"], parameters["0.bias"]) + parameters["1.bias"]
    bent = torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner.tolist()], dtype=torch.float64)
    return parameters["4.weight"] @ norm(bent, parameters["3.weight"], parameters["3.bias"]) + parameters["4.bias"]


def naive(tokens, mapping, codes, outer, temperature, progress):
    """Each code by the token that fits it best, the sparse weights of the codes, their sum, back in the width of the stream."""
    fits = [max(float(mapping(token) @ code) for token in tokens) / math.sqrt(codes.shape[1]) for code in codes]
    temperature = math.exp(math.log(START) + progress * (math.log(temperature) - math.log(START)))
    weights = sparsemax([fit / temperature for fit in fits])
    return outer @ sum(weight * code for weight, code in zip(weights, codes, strict=True)), weights


def lively(config):
    torch.manual_seed(0)
    pooler = FDT(config, Dims(8, 2, 2, 4, 3, 4, "vision", False)).double().requires_grad_(False)
    pooler.put_in_place("default.0", pooler, pooler)
    for parameter in pooler.parameters():
        parameter.normal_()
    return pooler


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    n, prefix, real, codes, temperature, progress = CASES[case]
    pooler = lively(FDTConfig(codes=codes, dim=5, temperature=temperature))
    hidden, positions = torch.randn(1, n, 8, dtype=torch.float64), torch.arange(n)[None]
    mask = torch.ones(1, n, dtype=torch.bool) if real is None else torch.tensor([[i in real for i in range(n)]])
    got = pooler.pool(hidden=hidden, mask=mask, positions=positions, prefix=prefix, progress=progress)
    tokens = [hidden[0, i] for i in range(prefix, n) if mask[0, i]]
    mapping = functools.partial(mapped, parameters=dict(pooler.inner.named_parameters()))
    want, weights = naive(tokens, mapping, pooler.codebook, pooler.outer.weight, temperature, progress)
    torch.testing.assert_close(got[0], want)
    assert abs(sum(weights) - 1) < 1e-9 and (progress < 1 or codes == 1 or min(weights) == 0)


def test_the_first_version_has_one_layer_and_one_temperature():
    pooler = lively(FDTConfig(codes=9, dim=5, mapping="linear", start=None, temperature=0.5))
    hidden = torch.randn(1, 4, 8, dtype=torch.float64)
    given = {"mask": torch.ones(1, 4, dtype=torch.bool), "positions": torch.arange(4)[None], "prefix": 0, "progress": 0.3}
    fits = [max(float((pooler.inner.weight @ token) @ code) for token in hidden[0]) for code in pooler.codebook]
    want = pooler.outer.weight @ (torch.tensor(sparsemax([fit / 0.5 for fit in fits]), dtype=torch.float64) @ pooler.codebook)
    torch.testing.assert_close(pooler.pool(hidden=hidden, **given)[0], want)


def test_both_towers_share_one_codebook(tmp_path):
    torch.manual_seed(0)
    part = dict(intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=6)
    text = dict(**part, hidden_size=12, vocab_size=50, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    config = CLIPConfig(text_config=text, vision_config=dict(**part, hidden_size=8, image_size=8, patch_size=4), projection_dim=6)
    build = lambda: (torch.manual_seed(0), CLIPModel(config).eval())[1]
    model = get_token_model(build(), FDTConfig(codes=20, dim=5))
    books = [name for name, _ in model.named_parameters() if name.endswith("codebook")]
    assert len(books) == 1
    inputs = {"input_ids": torch.tensor([[0, 5, 7, 1], [0, 9, 4, 1]]), "pixel_values": torch.randn(2, 3, 8, 8)}
    out = model(**inputs, return_loss=True)
    out.loss.backward()
    grad = model.get_parameter(books[0]).grad
    assert grad is not None and bool((grad != 0).any())
    model.save_pretrained(tmp_path)
    again = load(tmp_path, build())
    assert torch.equal(again(**inputs).logits_per_image, model.eval()(**inputs).logits_per_image)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e9])
def test_weights_add_up_to_one_however_large_the_scores_are(size):
    scores = size * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    close(fdt.sparsemax(scores).sum(dim=1), torch.ones(3))
