"""SSD against its paper: section 4 of arXiv:2308.07707 (diagonal Fisher, selection by alpha, dampening by lambda), weight by weight."""

import copy

import pytest
import torch
from by_hand import batch, gpt2
from transformers import ViTConfig, ViTForImageClassification

from hf_tokens import Dims, SSDUnlearn, SSDUnlearnConfig, edit, get_token_model


def naive(weight, forget, retain, alpha, lam, exponent=1.0):
    """One weight as a list of numbers, with the squared gradients of every batch of both groups."""
    out = []
    for i, w in enumerate(weight):
        f = sum(batch[i] ** 2 for batch in forget) / len(forget)
        d = sum(batch[i] ** 2 for batch in retain) / len(retain)
        beta = min((lam * d / f) ** exponent, 1.0) if f > alpha * d else 1.0
        out.append(beta * w)
    return out


CASES = {
    "usual": (7, 3, 4, 2.0, 1.0, 1.0),
    "one batch each": (5, 1, 1, 1.5, 0.5, 1.0),
    "one weight": (1, 2, 2, 0.5, 1.0, 1.0),
    "nothing selected": (6, 2, 3, 1e6, 1.0, 1.0),
    "all selected": (6, 2, 3, 0.0, 1.0, 1.0),
    "never above 1": (6, 2, 3, 0.1, 1e6, 1.0),
    "set to zero": (6, 2, 3, 1.0, 0.0, 1.0),
    "an exponent": (6, 2, 3, 0.5, 1.0, 2.0),
    "the exponent 0": (6, 2, 3, 0.5, 1.0, 0.0),
}


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    n, forgets, retains, alpha, lam, exponent = CASES[case]
    weight, forget, retain = (torch.randn(*size, dtype=torch.float64) for size in ((n,), (forgets, n), (retains, n)))
    method = SSDUnlearn(SSDUnlearnConfig(alpha=alpha, lam=lam, exponent=exponent), Dims(1, 1, 1, 1, 0, 1, "text", True))
    fisher = {"forget": {"w": (forget**2).mean(0)}, "retain": {"w": (retain**2).mean(0)}}
    out = method.edit({"w": weight}, fisher)["w"]
    want = naive(weight.tolist(), forget.tolist(), retain.tolist(), alpha, lam, exponent)
    torch.testing.assert_close(out, torch.tensor(want, dtype=torch.float64))


def test_a_weight_that_matters_to_nothing_stays():
    method = SSDUnlearn(SSDUnlearnConfig(alpha=0), Dims(1, 1, 1, 1, 0, 1, "text", True))
    weight, none = torch.randn(3), torch.zeros(3)
    assert torch.equal(method.edit({"w": weight}, {"forget": {"w": none}, "retain": {"w": none}})["w"], weight)


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "image_size": 8, "patch_size": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, num_channels=1, num_labels=3)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def pictures(count, label):
    return {"pixel_values": torch.randn(count, 1, 8, 8, dtype=torch.float64), "labels": torch.full((count,), label)}


def texts(lengths, seed):
    ids, mask = batch(lengths, "right", seed)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def by_hand(base, data, prefix, alpha):
    """The model with the weights that the paper gives it, from gradients of a plain one."""
    squares = {}
    for group, batches in data.items():
        squares[group] = []
        for one in batches:
            base.zero_grad()
            base(**one).loss.backward()
            squares[group].append({name: p.grad.flatten().tolist() for name, p in base.named_parameters()})
    edited = copy.deepcopy(base)
    for name, weight in edited.named_parameters():
        if name.startswith(prefix):
            forget, retain = ([one[name] for one in squares[group]] for group in ("forget", "retain"))
            new = naive(weight.flatten().tolist(), forget, retain, alpha, 1.0)
            weight.data = torch.tensor(new, dtype=torch.float64).view_as(weight)
    return edited.requires_grad_(False)


@pytest.mark.parametrize("weights", ["model", "block"])
@pytest.mark.parametrize("kind", ["vit", "gpt2"])
def test_in_a_model(kind, weights):
    if kind == "vit":
        base, prefix = vit(), "vit.layers."
        data = {"forget": [pictures(2, 0), pictures(1, 0)], "retain": [pictures(3, 1), pictures(2, 2)]}
    else:
        base, prefix = gpt2(), "transformer.h."  # its head is tied to its embeddings
        data = {"forget": [texts([5, 3], 1)], "retain": [texts([4, 6], 2), texts([1, 5], 3)]}
    prefix = prefix if weights == "block" else ""
    want = by_hand(copy.deepcopy(base), data, prefix, alpha=2.0)
    model = get_token_model(base, SSDUnlearnConfig(alpha=2.0, weights=weights)).eval()
    moved = edit(model, data)["default.0"]
    assert moved.keys() == {name for name, _ in want.named_parameters() if name.startswith(prefix)}
    inputs = data["retain"][0]
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, want(**inputs).logits, rtol=1e-10, atol=1e-10)
    merged = model.merge_and_unload().state_dict()
    for name, weight in want.state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=1e-12, atol=1e-12)
