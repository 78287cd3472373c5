"""Several samples in one row without padding: right, or refused."""

import pytest
import torch

from hf_tokens import DeepPromptConfig, FTPConfig, UnsupportedError, get_token_model
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
