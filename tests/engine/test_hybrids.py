"""Streams of attention and state spaces: a method that needs an attention acts by default where there is one, and says so."""

import pytest
import torch

from hf_tokens import FTPConfig, PrefixKVConfig, RazorAttentionConfig, UnsupportedError, anatomy, get_token_model
from hf_tokens.testing import zoo
from hf_tokens.tools.surgeries import surgery_of

FAMILIES = ("jamba", "qwen3_next", "bamba", "granitemoehybrid", "nemotron_h", "recurrent_gemma")
IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def attending(model):
    """Blocks of the text with an attention."""
    (stream,) = (stream for stream in anatomy(model).streams if stream.kind == "text")
    return stream, [i for i, mixer in enumerate(stream.mixers) if mixer == "attention"]


def acting(model):
    """Blocks in which a method acts."""
    (surgery,) = surgery_of(model).streams
    return [index for index, block in surgery.blocks.items() if block.plan.acting]


def logits(model, ids, mask=None):
    """Of a prompt, and of the token behind it, through the cache."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [PrefixKVConfig(budget=0.5), FTPConfig(sparsity=0.3), "apt"], ids=["compressor", "router", "edit"])
def test_the_blocks_with_an_attention_are_chosen(family, config):
    base = zoo.build(family).model.eval()
    stream, inside = attending(base)
    assert 0 < len(inside) < len(stream)
    outside = [i for i in range(len(stream)) if i not in inside]
    with pytest.warns(UserWarning, match=rf"acts in blocks .*; \[{outside[0]}.* have no self-attention"):
        model = get_token_model(base, config).eval()
    assert acting(model) == inside
    assert logits(model, IDS).isfinite().all()
    rows = [logits(model, row[None]) for row in IDS]
    torch.testing.assert_close(logits(model, IDS), torch.cat(rows, dim=1), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:hf-tokens")
@pytest.mark.parametrize("family", FAMILIES)
def test_at_zero_strength_it_is_the_base(family):
    base = zoo.build(family).model.eval()
    before = logits(base, IDS)
    model = get_token_model(base, RazorAttentionConfig(compression=1.0)).eval()
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_without_one_that_are_named_are_refused(family):
    base = zoo.build(family).model
    stream, inside = attending(base)
    with pytest.raises(UnsupportedError, match="a self-attention module in the block|store their keys in a slot of a cache"):
        get_token_model(base, PrefixKVConfig(layers=tuple(range(len(stream)))))
