"""MACE's closed form against its paper: section 4.1 of arXiv:2403.06135 (residual information of the words around a concept)."""

import copy

import pytest
import torch
from torch import nn

from hf_tokens import MACE, Dims, MACEConfig, UnsupportedError, edit, get_token_model
from hf_tokens.testing.contract.architectures import built

D = torch.float64


def naive(weight, beside, replaced, prior, erase=1.0, preserve=1e-4, stay=0.5):
    """One projection, number by number: the sums of the closed form, and the inverse."""
    outputs, width = weight.shape
    weight = weight.tolist()
    left = [[stay * weight[o][i] for i in range(width)] for o in range(outputs)]
    right = [[stay * float(i == j) for j in range(width)] for i in range(width)]
    pairs = [(f, g, erase) for f, g in zip(beside, replaced, strict=True)] + [(p, p, preserve) for p in prior]
    for f, g, share in ((f.tolist(), g.tolist(), share) for f, g, share in pairs):
        target = [sum(weight[o][i] * g[i] for i in range(width)) for o in range(outputs)]
        for i in range(width):
            for o in range(outputs):
                left[o][i] += share * target[o] * f[i]
            for j in range(width):
                right[j][i] += share * f[j] * f[i]
    return torch.tensor(left, dtype=D) @ torch.linalg.inv(torch.tensor(right, dtype=D))


# per case: width of the context, outputs, words beside the concept, prior words, knobs
CASES = {
    "usual": (5, 4, 6, 7, {"stay": 1.0}),
    "the defaults": (5, 4, 6, 7, {}),
    "one word": (3, 2, 1, 0, {"stay": 0.1}),
    "no prior": (4, 6, 5, 0, {"stay": 0.5}),
    "a strong prior": (4, 3, 2, 9, {"stay": 0.1, "preserve": 100.0}),
    "only the prior": (4, 3, 2, 6, {"erase": 0.0}),
    "hardly any ridge": (3, 5, 8, 4, {"stay": 1e-6}),
    "no ridge": (3, 5, 8, 4, {"stay": 0.0}),
    "no ridge, held by the prior": (5, 4, 2, 9, {"stay": 0.0, "preserve": 0.1}),
    "the first version": (5, 4, 6, 7, {"stay": 1000.0, "preserve": 1.0}),
}


def method(**knobs):
    return MACE(MACEConfig(**knobs), Dims(1, 1, 1, 1, 0, 1, "denoiser", False))


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    width, outputs, words, priors, knobs = CASES[case]
    weights = {f"w{i}": torch.randn(outputs + i, width, dtype=D) for i in range(2)}
    groups = {group: torch.randn(n, width, dtype=D) for group, n in (("erase", words), ("anchor", words), ("preserve", priors))}
    context = {group: dict.fromkeys(weights, rows) for group, rows in groups.items() if len(rows)}
    new = method(**knobs).edit(weights, context)
    for name, weight in weights.items():
        want = naive(weight, groups["erase"], groups["anchor"], groups["preserve"], **knobs)
        torch.testing.assert_close(new[name], want, rtol=1e-8, atol=1e-8)
        if not knobs.get("erase", 1.0):
            assert torch.equal(new[name], weight)


def test_projections_may_read_different_tokens():
    weights = {"a": torch.randn(3, 4, dtype=D), "b": torch.randn(3, 6, dtype=D)}
    context = {group: {name: torch.randn(5, w.shape[1], dtype=D) for name, w in weights.items()} for group in ("erase", "anchor")}
    new = method(stay=0.5).edit(weights, context)
    for name, weight in weights.items():
        torch.testing.assert_close(new[name], naive(weight, context["erase"][name], context["anchor"][name], [], stay=0.5))


def test_few_words_map_to_what_replaces_them():
    weight, beside, replaced = torch.randn(6, 8, dtype=D), torch.randn(3, 8, dtype=D), torch.randn(3, 8, dtype=D)
    new = method(stay=1e-9).edit({"w": weight}, {"erase": {"w": beside}, "anchor": {"w": replaced}})["w"]
    torch.testing.assert_close(beside @ new.T, replaced @ weight.T, rtol=1e-6, atol=1e-6)


def test_without_a_ridge_what_no_word_says_stays():
    weight, beside, replaced = torch.randn(6, 8, dtype=D), torch.randn(3, 8, dtype=D), torch.randn(3, 8, dtype=D)
    new = method(stay=0.0).edit({"w": weight}, {"erase": {"w": beside}, "anchor": {"w": replaced}})["w"]
    torch.testing.assert_close(beside @ new.T, replaced @ weight.T)
    across = torch.linalg.svd(beside).Vh[3:]  # directions that no word has a part in
    torch.testing.assert_close(across @ new.T, across @ weight.T)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "PixArtTransformer2DModel"])
def test_in_a_model_with_the_concept_s_words_hidden(name):
    base, inputs = copy.deepcopy(built(name))
    base, inputs = base.double(), {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    prompts = {group: torch.randn_like(inputs["encoder_hidden_states"]) for group in ("erase", "anchor")}
    masks = {group: torch.ones(prompt.shape[:2]) for group, prompt in prompts.items()}
    masks["erase"][:, 2:4] = masks["anchor"][:, 2:4] = 0  # where the concept stands
    masks["erase"][1, 9:] = masks["anchor"][1, 9:] = 0  # a shorter prompt
    want = copy.deepcopy(base)
    projections = {
        f"{p}.{name}": m.get_submodule(name) for p, m in want.named_modules() if p.endswith("attn2") for name in ("to_k", "to_v")
    }
    words = {group: prompt[masks[group].bool()] for group, prompt in prompts.items()}
    for module in projections.values():
        module.weight = nn.Parameter(naive(module.weight, words["erase"], words["anchor"], [], stay=2.0))
    model = get_token_model(base, MACEConfig(stay=2.0)).eval()
    data = {g: [{**inputs, "encoder_hidden_states": prompts[g], "encoder_attention_mask": masks[g].double()}] for g in prompts}
    assert set(edit(model, data)["default.0"]) == {f"{path}.weight" for path in projections}
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, want(**inputs).sample, rtol=1e-7, atol=1e-7)


def test_other_numbers_of_words_are_refused():
    context = {"erase": {"w": torch.randn(4, 3)}, "anchor": {"w": torch.randn(5, 3)}}
    with pytest.raises(UnsupportedError, match="have as many real tokens, .* got 4 and 5. Hide the words of the concept"):
        method().edit({"w": torch.randn(2, 3)}, context)
