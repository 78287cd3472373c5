"""ToMe against a slow loop over one sample, written from arXiv:2210.09461 and what its release does with the order of tokens."""

import math
from types import SimpleNamespace

import pytest
import torch
from hf_tokens_adapters.token_reducer.tome import ToMe
from transformers import ViTConfig, ViTModel

from hf_tokens import Dims, ToMeConfig, VQTConfig, anatomy, get_token_model, measure
from hf_tokens.testing import zoo

# per case: tokens n, special tokens in front, real tokens (None: all), r of each block
CASES = {
    "a class token": (17, 1, None, (3, 3, 3, 3)),
    "no special token": (16, 0, None, (3, 3, 3, 3)),
    "two special tokens": (18, 2, None, (3, 3, 3, 3)),
    "three special tokens": (17, 3, None, (3, 3, 3)),
    "a schedule that rests": (21, 1, None, (5, 0, 2, 0, 4)),
    "more than there are": (14, 1, None, (99, 99, 99, 99, 99)),
    "more than there are, none special": (13, 0, None, (99, 99, 99, 99, 99)),
    "one token": (2, 1, None, (5, 5)),
    "the class token alone": (1, 1, None, (5, 5)),
    "padding": (17, 1, 10, (2, 2, 2)),
    "padding, none special": (17, 0, 9, (2, 2, 2)),
    "padded but one": (6, 0, 1, (2, 2)),
}


def cosine(x, y):
    dot = lambda a, b: sum(float(i) * float(j) for i, j in zip(a, b, strict=True))
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def naive(tokens, weights, counts, prefix):
    """Groups of the given tokens with what they hold, as blocks whose keys are `weights` of a token merge them: [(members, value)]."""
    sequence = [(frozenset([i]), token) for i, token in enumerate(tokens)]
    special = [frozenset([i]) for i in range(prefix)]
    for weight, r in zip(weights, counts, strict=True):
        keys = [sum((value @ head for head in weight), start=0) / len(weight) for _, value in sequence]
        n = len(sequence)
        r = min(r, (n - prefix) // 2)
        if r == 0:
            continue
        free = [place for place in range(n) if sequence[place][0] not in special]
        sources, targets = [p for p in free if p % 2 == 0], [p for p in free if p % 2 == 1]
        best = {a: max((cosine(keys[a], keys[b]), -b) for b in targets) for a in sources}
        ranked = sorted(sources, key=lambda a: (-best[a][0], a))
        joined = {place: [place] for place in range(n)}
        for a in ranked[:r]:
            joined[-best[a][1]].append(a)
        merged = {}
        for place, group in joined.items():
            size = sum(len(sequence[i][0]) for i in group)
            value = sum(len(sequence[i][0]) * sequence[i][1] for i in group) / size
            merged[place] = (frozenset().union(*(sequence[i][0] for i in group)), value)
        rest = sorted(ranked[r:]) if prefix else ranked[r:]
        front = [place for place in range(n) if place not in free]
        sequence = [merged[place] for place in [*front, *rest, *targets]]
    return dict(sequence)


def ours(tokens, weights, counts, prefix, real, n):
    """The same from the verb, on a sequence that is padded to n and stays in its own order."""
    hidden = torch.full((1, n, tokens.shape[1]), torch.nan, dtype=tokens.dtype)
    hidden[0, :real] = tokens[:real]
    mask, positions, sizes = torch.arange(n)[None] < real, torch.arange(n)[None], torch.ones(1, n)
    slot, memory = torch.arange(n)[None], SimpleNamespace(tokens={})
    for layer, weight in enumerate(weights):
        method = ToMe(ToMeConfig(schedule=counts), Dims(8, 2, 2, 4, layer, len(weights), "vision", False))
        keys = torch.einsum("bnd,hde->bhne", hidden, weight)
        found = method.assign(
            keys, mask, positions, torch.zeros_like(mask), prefix, memory, plain=mask.shape[1] - prefix if real == n else None
        )
        if found is None:
            continue
        hidden, sizes = found.apply(hidden, sizes), found.count(sizes)
        filled = torch.ones(1, found.m, dtype=torch.bool) if found.filled is None else found.filled
        mask, positions = found.gather(mask) & filled, found.gather(positions)
        memory.tokens = {name: found.gather(value) for name, value in memory.tokens.items()}
        slot = torch.where(slot < 0, -1, found.slot.gather(1, slot.clamp(min=0)))
    groups = {}
    for token, place in enumerate(slot[0, :real].tolist()):
        groups.setdefault(place, set()).add(token)
    return {frozenset(members): hidden[0, place] for place, members in groups.items()}


@pytest.mark.parametrize("case", CASES)
def test_blocks_in_a_row_are_the_loop(case):
    n, prefix, real, counts = CASES[case]
    real = n if real is None else real
    torch.manual_seed(len(case))
    tokens, weights = torch.randn(real, 8, dtype=torch.float64), torch.randn(len(counts), 2, 8, 4, dtype=torch.float64)
    want, got = naive(tokens, weights, counts, prefix), ours(tokens, weights, counts, prefix, real, n)
    assert want.keys() == got.keys()
    for members, value in want.items():
        torch.testing.assert_close(got[members], value)


def test_the_order_of_the_release_is_another_than_that_of_the_sequence():
    torch.manual_seed(0)
    tokens, weights = torch.randn(17, 8, dtype=torch.float64), torch.randn(2, 2, 8, 4, dtype=torch.float64)
    both = naive(tokens, weights, (3, 3), 1).keys()
    first = naive(tokens, weights[:1], (3,), 1)
    again = naive(torch.stack([first[group] for group in sorted(first, key=min)]), weights[1:], (3,), 1)
    named = sorted(first, key=min)
    assert both != {frozenset().union(*(named[i] for i in group)) for group in again}


@pytest.mark.parametrize(
    ("knobs", "counts"),
    [
        ({"r": 13}, [13] * 12),
        ({"r": 8, "inflect": -1.0}, [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]),
        ({"r": 8, "inflect": 1.0}, [0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16]),
        ({"schedule": (5, 0, 3)}, [5, 0, 3, *[0] * 9]),
        ({"schedule": ()}, [0] * 12),
    ],
)
def test_schedules(knobs, counts):
    assert [ToMeConfig(**knobs).loses(layer, 12) for layer in range(12)] == counts


def tiny(seed=0):
    torch.manual_seed(seed)
    size = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, image_size=16, patch_size=4)
    model = ViTModel(ViTConfig(**size), add_pooling_layer=False).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def test_a_vit_loses_r_tokens_between_attention_and_mlp_of_every_block():
    model, seen = get_token_model(tiny(), ToMeConfig(r=4)), []
    for i in range(3):
        anatomy(model).streams[0].mlp(i).register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert model(pixels).last_hidden_state.shape[1] == 17
    assert seen == [13, 9, 5]
    assert measure(model, pixel_values=pixels).tokens == 2 * (17 + 13 + 9)


def test_a_key_counts_by_its_size_unless_told_otherwise():
    pixels = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    plain, sized = (
        get_token_model(tiny(), ToMeConfig(r=4, proportional_attention=sized))(pixels).last_hidden_state for sized in (False, True)
    )
    assert not torch.allclose(plain, sized)


@pytest.mark.parametrize("first", [True, False])
def test_tokens_of_another_method_stand_outside_the_places(first):
    """Queries that no token sees, whose readout starts at zero, change neither the pairs nor the numbers."""
    specimen = zoo.build("vit")
    stack = [VQTConfig(tokens=3), ToMeConfig(r=2)]
    with torch.no_grad():
        want = get_token_model(zoo.build("vit").model, ToMeConfig(r=2))(**specimen.inputs).logits
        got = get_token_model(specimen.model, stack if first else stack[::-1])(**specimen.inputs).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
