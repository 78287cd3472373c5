"""Streams of attention and state spaces: a method that needs an attention acts by default where there is one, and says so."""

import pytest
import torch

from hf_tokens import (
    DynamicTokenPoolingConfig,
    FTPConfig,
    PrefixKVConfig,
    RazorAttentionConfig,
    SelectionPConfig,
    UnsupportedError,
    anatomy,
    get_token_model,
)
from hf_tokens.model import families
from hf_tokens.model.arguments import shown_by
from hf_tokens.model.signatures import CACHES, parameters
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


@pytest.mark.filterwarnings("ignore:hf-tokens")
@pytest.mark.parametrize("config", [SelectionPConfig(keep=0.5), DynamicTokenPoolingConfig()], ids=["reducer", "pooling"])
@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "olmo_hybrid", "minimax", "kimi_linear", "bailing_hybrid"])
@torch.no_grad()
def test_a_mask_of_ones_means_the_same_in_every_dtype(family, config):
    """Blocks without an attention are given the mask as the user wrote it."""
    model = get_token_model(zoo.build(family).model, config).eval()
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    said = lambda dtype: model(input_ids=IDS, attention_mask=mask.to(dtype)).logits[mask.bool()]
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        torch.testing.assert_close(said(dtype), said(torch.long), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32, torch.bfloat16])
def test_what_a_mask_shows_is_known_in_either_form(dtype):
    there = torch.tensor([[0, 1, 1], [1, 1, 1]])
    assert torch.equal(shown_by(there.to(dtype)), there.bool())
    if dtype.is_floating_point:
        lowest = torch.finfo(dtype).min
        assert torch.equal(shown_by((1 - there.to(dtype)) * lowest), there.bool())
        assert bool(shown_by(torch.zeros(2, 3, dtype=dtype)).all()) and bool(shown_by(torch.tensor([[0.0, -lowest]], dtype=dtype)).all())


RECURRENT = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "zamba", "zamba2", "lfm2", "olmo_hybrid", "kimi_linear", "rwkv")


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES[:-1], *RECURRENT])
def test_it_is_known_which_read_several_tokens_behind_others_as_if_those_were_not_there(family):
    model, n = zoo.build(family).model.eval(), IDS.shape[1]
    whole = model(torch.cat([IDS, IDS], dim=1)).logits[:, n:]
    numbered = "position_ids" in parameters(type(model))

    def behind(**positions):
        first = model(IDS, use_cache=True)
        name = next(name for name in (*CACHES, "cache_params", "state") if name in parameters(type(model)) and name in first)
        return model(IDS, use_cache=True, **{name: first[name]}, **positions).logits

    resumes = not families.RESUMES_BY_TOKEN.search(type(model).__name__)
    told = {"position_ids": torch.arange(n, 2 * n).expand(2, -1)} if numbered else {}
    alike = lambda got: torch.allclose(got, whole, rtol=1e-4, atol=1e-4)
    assert alike(behind(**told)) == resumes
    assert alike(behind()) == (resumes and not families.NUMBERS_FROM_ZERO.search(type(model).__name__))
