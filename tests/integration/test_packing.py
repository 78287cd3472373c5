"""Several samples in one row without padding: right, or refused."""

import pytest
import torch

from hf_tokens import DeepPromptConfig, FTPConfig, PPTConfig, PrefixKVConfig, UnsupportedError, get_token_model
from hf_tokens.testing import zoo

LENGTHS = (5, 1, 7)


def packed():
    rows = [torch.randint(3, 90, (n,), generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
    places = torch.cat([torch.arange(n) for n in LENGTHS])
    return rows, {"input_ids": torch.cat(rows)[None], "position_ids": places[None], "use_cache": False}


@pytest.mark.parametrize("method", [DeepPromptConfig(tokens=3, init_std=1.0), "probe-insert"], ids=["block", "input"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_each_packed_sample_has_its_own_tokens(family, method):
    model = get_token_model(zoo.build(family).model, method).eval()
    rows, inputs = packed()
    with torch.no_grad():
        together = model(**inputs).logits[0].split(LENGTHS)
        alone = [model(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_method_that_looks_at_the_whole_row_refuses_packed_samples():
    model = get_token_model(zoo.build("llama").model, FTPConfig(sparsity=0.25, strict=True)).eval()
    rule = "packs its samples into one row, and these methods take one sample a call"
    with pytest.raises(UnsupportedError, match=f"{rule}, got 3 segments and FTP. Pass `packing=False` to the trainer"):
        model(**packed()[1])


def test_packed_samples_in_several_rows_are_refused():
    model = get_token_model(zoo.build("llama").model, DeepPromptConfig(tokens=3)).eval()
    inputs = {key: value.expand(2, -1) if isinstance(value, torch.Tensor) else value for key, value in packed()[1].items()}
    with pytest.raises(UnsupportedError, match="Packed samples must lie in one row, got a batch of 2"):
        model(**inputs)


def picture(inputs, i):
    return {name: value[i : i + 1] for name, value in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral3", "lighton_ocr"])
def test_pictures_that_a_mask_keeps_apart_in_one_row_have_their_own_tokens(family):
    specimen = zoo.build(family)
    model = get_token_model(specimen.model, DeepPromptConfig(tokens=3, init_std=1.0, stream="vision")).eval()
    together = model(**specimen.inputs).logits
    for i, one in enumerate(together):
        torch.testing.assert_close(one, model(**picture(specimen.inputs, i)).logits[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral3", "lighton_ocr"])
def test_a_method_that_looks_at_the_whole_row_takes_one_such_picture_a_call(family):
    specimen = zoo.build(family)
    model = get_token_model(specimen.model, PPTConfig(layers=(1,), r=2)).eval()
    assert model(**picture(specimen.inputs, 0)).logits.isfinite().all()
    with pytest.raises(UnsupportedError, match="packs its samples into one row, .* got 2 segments and PPT"):
        model(**specimen.inputs)


N, PADS = 10, 4
SIDES = {"left": torch.arange(N) >= PADS, "right": torch.arange(N) < N - PADS}
# what a row of padding sees in a mask that somebody makes for himself
PADDING_SEES = {
    "nothing": lambda n: torch.zeros(n, n, dtype=torch.bool),
    "itself": lambda n: torch.eye(n, dtype=torch.bool),
    "everything": lambda n: torch.ones(n, n, dtype=torch.bool),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sees", PADDING_SEES)
@pytest.mark.parametrize("method", [DeepPromptConfig(tokens=3, init_std=1.0), PrefixKVConfig(budget=0.5), FTPConfig(sparsity=0.25)])
def test_a_mask_of_ones_own_says_what_is_padding(family, side, sees, method):
    model = get_token_model(zoo.build(family).model, method).eval()
    ids = torch.randint(3, 60, (2, N), generator=torch.Generator().manual_seed(0))
    real = torch.stack([torch.ones(N, dtype=torch.bool), SIDES[side]])
    seen = torch.ones(N, N, dtype=torch.bool).tril() & real[:, None] & real[:, :, None]
    seen = (seen | PADDING_SEES[sees](N) & ~real[:, :, None])[:, None]
    places = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        usual = model(input_ids=ids, attention_mask=real.long(), position_ids=places).logits
    torch.testing.assert_close(own[real], usual[real], rtol=1e-4, atol=1e-5)
