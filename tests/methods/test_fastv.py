"""FastV against a slow loop over one row, written from arXiv:2403.06764 and what its release rounds and keeps."""

import contextlib

import pytest
import torch
from by_hand import llava, llava_block, llava_rows, prompts

from hf_tokens import ConfigError, FastVConfig, get_token_model, measure
from hf_tokens.testing import CACHE


def kept(attention, image, ratio):
    """The image tokens that stay: attention h n n of one block, of whose last row the mean over heads ranks them."""
    heed = {j: sum(float(head[-1][j]) for head in attention) / len(attention) for j in image}
    count = round(len(image) * (1 - ratio))
    return sorted(sorted(image, key=lambda j: (-heed[j], j))[:count])


@torch.no_grad()
def naive(model, x, image, k, ratio):
    """Logits of the tokens that are left of one row, and which they are."""
    text, places = model.model.language_model, list(range(len(x)))
    for layer, block in enumerate(text.layers, start=1):
        x, attention = llava_block(text, block, x, places)
        if layer == k:
            stays = kept(attention, image, ratio)
            places = [place for place in places if place not in image or place in stays]
            x = x[places]
    return model.lm_head(text.norm(x)), places


# images of each row, side of the padding, K, R
MODELS = [
    pytest.param((1,), "left", 2, 0.5, id="the paper's headline"),
    pytest.param((1,), "left", 3, 0.75, id="the demo's"),
    pytest.param((2, 1, 1), "left", 2, 0.6, id="rows keep different numbers"),
    pytest.param((1, 2), "right", 2, 0.5, id="padded on the right"),
    pytest.param((1, 0, 2), "left", 1, 0.5, id="a row without an image"),
    pytest.param((2, 1), "left", 2, 1.0, id="no image token stays"),
    pytest.param((2, 1), "left", 6, 0.5, id="behind the last block"),
]


@pytest.mark.drawn
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("images", "side", "k", "ratio"), MODELS)
def test_model_is_the_loop(images, side, k, ratio, cached):
    base, given = llava(), prompts(images, side=side)
    rows = [(x.detach(), image, mask) for x, image, mask in llava_rows(base, given)]
    model = get_token_model(base, FastVConfig(k=k, ratio=ratio)).eval()
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        got = model(**given, position_ids=positions, use_cache=cached)
    for row, (x, image, mask) in enumerate(rows):
        with model.disable_adapter():
            want, places = naive(base, x, image, k, ratio)
        torch.testing.assert_close(got.logits[row][mask][places], want, rtol=1e-9, atol=1e-9)
        if cached and k < 6:
            layers, first = got.past_key_values.layers, int(mask.long().argmax())
            assert [layer.length for layer in layers[:k]] == [len(mask)] * k
            flags = mask[layers[k].origins[row]] & (True if layers[k].filled is None else layers[k].filled[row])
            assert (layers[k].origins[row][flags] - first).tolist() == places


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_of_each_row_alone(beams):
    model, given = get_token_model(llava(), FastVConfig(ratio=0.75)).eval(), prompts((2, 1, 0, 1))
    more, taken, n = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}, 0, given["input_ids"].shape[1]
    together = model.generate(**given, **more)
    for row, count in enumerate((2, 1, 0, 1)):
        ids = given["input_ids"][row][given["attention_mask"][row].bool()][None]
        pixels = {"pixel_values": given["pixel_values"][taken : taken + count]} if count else {}
        taken += count
        with contextlib.nullcontext() if count else model.disable_adapter():
            alone = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, **more)
        assert together[row, n:].tolist() == alone[0, ids.shape[1] :].tolist()


def test_steps_with_the_cache_are_the_whole_sequence():
    """The tokens that follow see what the prompt kept; the last token of the prompt, not of what follows, chose that."""
    base, given = llava(), prompts((1,))
    model = get_token_model(base, FastVConfig(k=2)).eval()
    words = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        stepwise = torch.cat([model(input_ids=words[:, i : i + 1], **{CACHE: cache}).logits for i in range(3)], dim=1)
        again = model(**given, use_cache=True).past_key_values
        together = model(input_ids=words, **{CACHE: again}).logits
    torch.testing.assert_close(stepwise, together)
    assert cache.get_seq_length() == given["input_ids"].shape[1] + 3


def test_tokens_and_memory_are_saved():
    given, model = prompts((1,), text=(2, 5)), get_token_model(llava(), FastVConfig(k=2, ratio=2 / 3)).eval()
    cost = measure(model, **given, use_cache=True)
    with model.disable_adapter():
        whole = measure(model, **given, use_cache=True)
    assert whole.tokens - cost.tokens == 4 * 6
    assert cost.kv_bytes == whole.kv_bytes * (2 * 16 + 4 * 10) // (6 * 16)


def test_the_block_exists():
    with pytest.raises(ConfigError, match=r"\[1, 6\]"):
        get_token_model(llava(), FastVConfig(k=7))
