"""SoftPool against a slow loop over one sample, written from equations (1) and (2) of arXiv:2101.00440."""

import math

import pytest
import torch
from tolerances import close
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from hf_tokens import Dims, SoftPool, SoftPoolConfig, UnsupportedError, get_token_model
from hf_tokens.testing import zoo

# per case: the grid, special tokens in front, side of a region (None: all), places that are real (None: all), size of each token (None: 1)
CASES = {
    "all tokens": ((2, 3), 1, None, None, None),
    "windows that fit": ((4, 4), 1, 2, None, None),
    "a rest at the edges": ((3, 5), 2, 2, None, None),
    "windows of one place": ((2, 3), 0, 1, None, None),
    "a window larger than the grid": ((2, 3), 1, 7, None, None),
    "a row of text": ((1, 7), 0, 3, None, None),
    "one token": ((1, 1), 0, None, None, None),
    "padded but one": ((1, 6), 0, 2, (4,), None),
    "padding on the right": ((1, 6), 0, None, (0, 1, 2), None),
    "pruned places": ((3, 4), 1, 2, (0, 1, 2, 5, 12), None),
    "merged tokens": ((2, 2), 1, None, None, (1, 3, 1, 2, 5)),
    "merged tokens in windows": ((2, 4), 0, 2, (0, 1, 3, 6), (2, 1, 1, 4, 1, 1, 3, 1)),
}


def softpool(region):
    """The exponentially weighted sum of the activations of one region, channel by channel."""
    width = len(region[0])
    out = torch.zeros(width, dtype=torch.float64)
    for channel in range(width):
        a = [float(token[channel]) for token in region]
        weights = [math.exp(value) / sum(math.exp(other) for other in a) for value in a]
        out[channel] = sum(weight * value for weight, value in zip(weights, a, strict=True))
    return out


def naive(tokens, grid, side):
    """The mean of what the regions of one sample give; tokens are a dict of place -> rows (d), a place once for each that it stands for."""
    height, width = grid
    if side is None:
        return softpool([row for rows in tokens.values() for row in rows])
    pooled = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            places = [y * width + x for y in range(top, min(top + side, height)) for x in range(left, min(left + side, width))]
            region = [row for place in places for row in tokens.get(place, [])]
            if region:
                pooled.append(softpool(region))
    return sum(pooled) / len(pooled)


def pooler(region):
    return SoftPool(SoftPoolConfig(region=region), Dims(8, 2, 2, 4, 3, 4, "vision", False))


def sample(case, batch=2):
    """hidden (b n d), mask, sizes and positions (b n) each; the second row is all real, so that a row's padding is its own."""
    grid, prefix, side, real, sizes = CASES[case]
    n = prefix + grid[0] * grid[1]
    hidden = torch.randn(batch, n, 8, dtype=torch.float64)
    mask = torch.ones(batch, n, dtype=torch.bool)
    if real is not None:
        mask[0] = False
        mask[0, list(real)] = True
    given = dict(hidden=hidden, mask=mask, sizes=torch.tensor([sizes or [1] * n] * batch, dtype=torch.float32))
    return {**given, "positions": torch.arange(n).expand(batch, n), "prefix": prefix, "grid": grid}, side


@pytest.mark.parametrize("case", CASES)
def test_matches_the_paper(case):
    given, side = sample(case)
    got, prefix = pooler(side).pool(**given), given["prefix"]
    for row, hidden in enumerate(given["hidden"]):
        tokens = {t - prefix: [hidden[t]] * int(given["sizes"][row, t]) for t in range(prefix, len(hidden)) if given["mask"][row, t]}
        torch.testing.assert_close(got[row], naive(tokens, given["grid"], side), rtol=1e-10, atol=1e-12)


def test_tokens_in_another_order_give_the_same():
    given, side = sample("windows that fit")
    shuffled = {**given, **{name: given[name].flip(1) for name in ("hidden", "positions")}}
    torch.testing.assert_close(pooler(side).pool(**shuffled), pooler(side).pool(**given))


def test_large_activations_stay_finite_and_come_near_the_maximum():
    given, side = sample("all tokens")
    given["hidden"] = 1e6 * given["hidden"].float()
    got = pooler(side).pool(**given)
    close(got, given["hidden"][:, 1:].amax(dim=1))


@pytest.mark.parametrize("case", ["a rest at the edges", "padding on the right"])
def test_gradients_are_those_of_the_softmax_and_padding_has_none(case):
    given, side = sample(case)
    given["hidden"][~given["mask"]] = 1e4
    hidden = given.pop("hidden").requires_grad_()
    pooler(side).pool(hidden=hidden, **given).sum().backward()
    grads = hidden.grad.clone()
    assert grads.isfinite().all() and not grads[~given["mask"]].any() and not grads[:, : given["prefix"]].any()
    with torch.no_grad():
        for place in given["mask"][0, given["prefix"] :].nonzero()[:2, 0].tolist():
            moved = [hidden.clone() for _ in range(2)]
            for x, by in zip(moved, (1e-6, -1e-6), strict=True):
                x[0, given["prefix"] + place, 3] += by
            up, down = (pooler(side).pool(hidden=x, **given).sum() for x in moved)
            assert float(grads[0, given["prefix"] + place, 3]) == pytest.approx(float(up - down) / 2e-6, rel=1e-5, abs=1e-8)


def test_a_row_without_a_real_token_is_zero():
    given, side = sample("a rest at the edges")
    given["mask"][0] = False
    got = pooler(side).pool(**given)
    assert not got[0].any() and got.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("region", [None, 2])
def test_a_classifier_of_pictures_that_are_not_square(region):
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=(12, 20), patch_size=4,
        initializer_range=0.5, num_labels=3,
    )  # fmt: skip
    base, pixels = ViTForImageClassification(config).double().eval(), torch.randn(2, 3, 12, 20, dtype=torch.float64)
    tokens = base.vit(pixels).last_hidden_state
    pooled = [naive({place: [token] for place, token in enumerate(row[1:])}, (3, 5), region) for row in tokens]
    got = get_token_model(base, SoftPoolConfig(region=region)).eval()(pixels).logits
    torch.testing.assert_close(got, base.classifier(torch.stack(pooled)), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_tower_that_is_called_by_itself_knows_its_picture():
    specimen = zoo.build("clip")
    model = get_token_model(specimen.model, SoftPoolConfig(region=2, stream="vision")).eval()
    model(**specimen.inputs)  # square
    wide = torch.randn(2, 3, 32, 64)
    got = specimen.model.get_image_features(pixel_values=wide, interpolate_pos_encoding=True).pooler_output
    with model.disable_adapter():
        tokens = specimen.model.vision_model(wide, interpolate_pos_encoding=True).last_hidden_state
    n = tokens.shape[1] - 1
    height = int((n // 2) ** 0.5)
    pooled = torch.stack([naive({p: [t] for p, t in enumerate(row[1:].double())}, (height, 2 * height), 2) for row in tokens]).float()
    want = specimen.model.visual_projection(specimen.model.vision_model.post_layernorm(pooled))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_patches_without_a_picture_have_no_windows():
    given, _ = sample("windows that fit")
    with pytest.raises(UnsupportedError, match="region needs a picture"):
        pooler(2).pool(**{**given, "grid": None})
    assert pooler(None).pool(**{**given, "grid": None}).isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_of_padded_text(side):
    config = BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, initializer_range=0.5, num_labels=3
    )
    base, ids = BertForSequenceClassification(config).double().eval(), torch.randint(1, 30, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    tokens = base.bert(ids, attention_mask=mask).last_hidden_state
    pooled = torch.stack([softpool(list(row[real.bool()])) for row, real in zip(tokens, mask, strict=True)])
    expected = base.classifier(torch.tanh(base.bert.pooler.dense(pooled)))
    got = get_token_model(base, SoftPoolConfig()).eval()(ids, attention_mask=mask).logits
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
