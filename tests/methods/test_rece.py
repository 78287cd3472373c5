"""RECE against its paper: section 3 of arXiv:2407.12383 (erasure in closed form, derivation of new embeddings, their alternation)."""

import copy

import pytest
import torch
from torch import nn

from hf_tokens import RECE, Dims, RECEConfig, UnsupportedError, edit, get_token_model
from hf_tokens.testing.contract.architectures import built

D = torch.float64


def outer(a, b):
    return torch.tensor([[x * y for y in b.tolist()] for x in a.tolist()], dtype=D)


def erased(now, start, concept, anchor, kept, erase, preserve, stay, technique):
    """The closed form of one projection: each token adds to the two sums."""
    left, right = stay * now, stay * torch.eye(now.shape[1], dtype=D)
    goals = [start @ a for a in anchor]
    if technique == "tensor":
        lands = [now @ c for c in concept]
        length = sum(x * x for land in lands for x in land.tolist())
        share = sum(x * y for land, goal in zip(lands, goals, strict=True) for x, y in zip(land.tolist(), goal.tolist(), strict=True))
        goals = [goal - share / length * land for land, goal in zip(lands, goals, strict=True)]
    for c, goal in zip(concept, goals, strict=True):
        left, right = left + erase * outer(goal, c), right + erase * outer(c, c)
    for p in kept:
        left, right = left + preserve * outer(start @ p, p), right + preserve * outer(p, p)
    return left @ torch.linalg.inv(right)


def naive(
    weights,
    concept,
    anchor,
    kept,
    epochs,
    erase=1.0,
    preserve=0.1,
    stay=0.1,
    derive=0.1,
    towards="zero",
    technique="replace",
    keep="anchor",
    cumulative=True,
):
    """The paper's alternation, projection by projection and token by token."""
    knobs = (list(anchor) if keep == "anchor" and not len(kept) else kept, erase, preserve, stay, technique)
    new = {name: erased(w, w, concept, anchor, *knobs) for name, w in weights.items()}
    gone, goals = list(concept), list(anchor)
    for _ in range(epochs):
        back = []
        for c, a in zip(concept, anchor, strict=True):
            near = {"anchor": a, "concept": c}.get(towards, torch.zeros_like(c))
            gram, reached = derive * torch.eye(len(c), dtype=D) * (towards != "mapped"), derive * near
            for name, w in weights.items():
                own = new[name].T @ new[name]
                gram, reached = gram + own, reached + new[name].T @ (w @ c)
                if towards == "mapped":
                    gram, reached = gram + derive * own, reached + derive * own @ c
            back.append(torch.linalg.inv(gram) @ reached)
        gone, goals = (gone + back, goals + list(anchor)) if cumulative else (back, anchor)
        new = {name: erased(new[name], w, gone, goals, *knobs) for name, w in weights.items()}
    return new


# per case: width of the context, outputs of each projection, tokens to erase, tokens to keep, epochs, knobs
CASES = {
    "usual": (5, (4, 6), 3, 4, 2, {}),
    "no epochs": (5, (4, 6), 3, 4, 0, {}),
    "one token": (4, (3,), 1, 0, 3, {}),
    "nothing to keep": (4, (7, 2, 3), 3, 0, 1, {}),
    "more tokens than width": (3, (4, 4), 9, 8, 2, {"preserve": 1.0}),
    "strong": (5, (4, 6), 2, 3, 2, {"erase": 10.0, "stay": 1e-3, "derive": 1e-3}),
    "weak": (5, (4, 6), 2, 3, 1, {"stay": 100.0, "derive": 10.0}),
    "zero strength": (5, (4, 6), 2, 3, 2, {"erase": 0.0}),
    "near the anchor": (5, (4, 6), 3, 4, 2, {"towards": "anchor", "derive": 1.0}),
    "near the concept": (5, (4, 6), 3, 4, 2, {"towards": "concept", "derive": 1.0}),
    "where it maps to now": (5, (4, 6), 3, 4, 2, {"towards": "mapped", "derive": 1.0}),
    "across the concept": (5, (4, 6), 3, 4, 2, {"technique": "tensor"}),
    "what is derived alone": (5, (4, 6), 3, 4, 3, {"cumulative": False}),
    "the first version": (5, (4, 6), 3, 0, 2, {"keep": "nothing", "cumulative": False}),
}


def method(**knobs):
    return RECE(RECEConfig(**knobs), Dims(1, 1, 1, 1, 0, 1, "denoiser", False))


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    width, outputs, erase, keep, epochs, knobs = CASES[case]
    weights = {f"w{i}": torch.randn(n, width, dtype=D) for i, n in enumerate(outputs)}
    concept, anchor, kept = (torch.randn(n, width, dtype=D) for n in (erase, erase, keep))
    given = {"erase": concept, "anchor": anchor, **({"preserve": kept} if keep else {})}
    context = {group: dict.fromkeys(weights, rows) for group, rows in given.items()}
    new = method(epochs=epochs, **knobs).edit(weights, context)
    want = naive(weights, concept, anchor, kept, epochs, **knobs)
    for name in weights:
        torch.testing.assert_close(new[name], want[name], rtol=1e-8, atol=1e-8)


def test_what_is_derived_brings_the_concept_back_no_more():
    weights = {f"w{i}": torch.randn(6, 8, dtype=D) for i in range(3)}
    concept, anchor = torch.randn(2, 8, dtype=D), torch.randn(2, 8, dtype=D)
    rece, found = method(epochs=0, derive=1e-3), []
    now = rece.erase(weights, weights, concept, anchor, concept[:0])
    for _ in range(4):
        back = rece.derive(now, weights, concept, anchor)
        found.append(float(sum(((now[n] @ back.T - weights[n] @ concept.T) ** 2).sum() for n in weights)))
        now = rece.erase(now, weights, back, anchor, concept[:0])
    assert all(later > 1000 * found[0] for later in found[1:])  # how far even the best prompt stays from the concept


@pytest.mark.parametrize("seed", range(4))
def test_a_concept_that_was_erased_stays_so_where_all_directions_are_kept(seed):
    torch.manual_seed(seed)
    weights = {f"w{i}": torch.randn(6, 8, dtype=D) for i in range(3)}
    concept, anchor, kept = (torch.randn(n, 8, dtype=D) for n in (2, 2, 40))
    data = {group: dict.fromkeys(weights, rows) for group, rows in {"erase": concept, "anchor": anchor, "preserve": kept}.items()}

    def from_anchor(epochs):
        new = method(epochs=epochs).edit(weights, data)
        return float(sum((new[n] @ concept.T - w @ anchor.T).square().sum() for n, w in weights.items()))

    assert from_anchor(3) < from_anchor(0)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "PixArtTransformer2DModel"])
def test_in_a_model(name):
    base, inputs = copy.deepcopy(built(name))
    base, inputs = base.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    prompts = {group: torch.randn_like(inputs["encoder_hidden_states"]) for group in ("erase", "anchor", "preserve")}
    want = copy.deepcopy(base)
    places = {
        f"{path}.{proj}": module.get_submodule(proj)
        for path, module in want.named_modules()
        if path.endswith("attn2")
        for proj in ("to_k", "to_v")
    }
    tokens = {group: prompt.flatten(0, 1) for group, prompt in prompts.items()}
    new = naive({path: module.weight for path, module in places.items()}, tokens["erase"], tokens["anchor"], tokens["preserve"], epochs=1)
    for path, module in places.items():
        module.weight = nn.Parameter(new[path])
    model = get_token_model(base, RECEConfig(epochs=1)).eval()
    moved = edit(model, {group: [{**inputs, "encoder_hidden_states": prompt}] for group, prompt in prompts.items()})["default.0"]
    assert set(moved) == {f"{path}.weight" for path in places}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, want(**inputs).sample, rtol=1e-7, atol=1e-7)


def test_refusals():
    weights = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    rows = {"erase": dict.fromkeys(weights, torch.randn(4, 3)), "anchor": dict.fromkeys(weights, torch.randn(5, 3))}
    with pytest.raises(UnsupportedError, match="have as many real tokens, .* got 4 and 5. Pad the prompts"):
        method().edit(weights, rows)
    rows["anchor"] = {"a": torch.randn(4, 3), "b": torch.randn(4, 3)}
    with pytest.raises(UnsupportedError, match="all read the same context, got one that changes from block to block. Choose"):
        method().edit(weights, rows)
