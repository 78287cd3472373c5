"""Heads are what the cache of a block holds: one latent for all, other numbers from block to block, or fewer than attend."""

import pytest
import torch
from held import COMPRESSORS, decoded, texts
from tolerances import close

from hf_tokens import (
    DeepPromptConfig,
    FTPConfig,
    LandmarkAttentionConfig,
    MiKVConfig,
    RazorAttentionConfig,
    SqueezeAttentionConfig,
    UnsupportedError,
    calibrate,
    get_token_model,
)
from hf_tokens.testing import zoo

LATENT = "deepseek_v2 deepseek_v3 glm4_moe_lite minicpm3 mistral4 youtu".split()
FAMILIES = [*LATENT, "jetmoe", "mimo_v2_flash", "diffllama", "opt"]
BY_HEAD = "keys and values that are read as they are stored, head by head"
EVICT_BY_HEAD = "d2o squeezeattention razorattention snapkv h2o pyramidkv random ada-kv duo-attention kvzip".split()
PLACELESS = f"keys alone know their place|keys that are turned by|{BY_HEAD}"
REFUSED = {  # what of a cache's heads cannot be told, by family and method
    **{(family, "mikv"): BY_HEAD for family in LATENT},
    **{("jetmoe", name): BY_HEAD for name in ("mikv", "tova", *EVICT_BY_HEAD)},
    **{("diffllama", name): BY_HEAD for name in EVICT_BY_HEAD},
    **{(family, name): PLACELESS for family in (*LATENT, "opt") for name in ("streaming-llm turned", "expected-attention")},
    **{(family, "expected-attention"): BY_HEAD for family in ("jetmoe", "diffllama")},
    ("mimo_v2_flash", "razorattention"): "numbers among the key heads that the caches of its blocks hold",
}


@pytest.mark.parametrize("name", COMPRESSORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_row_is_that_row_alone_or_the_heads_are_refused(family, name):
    rule = REFUSED.get((family, name))
    if rule is not None:
        with pytest.raises(UnsupportedError, match=rule):
            decoded(get_token_model(zoo.build(family).model, COMPRESSORS[name]).eval(), slice(None))
        return
    model = get_token_model(zoo.build(family).model, COMPRESSORS[name]).eval()
    together, cache = decoded(model, slice(None))
    alone, _ = decoded(model, slice(1, 2))
    close(together[1:], alone, f"{family} {name}")
    assert any(layer.kv.parts is not None or layer.length < layer.seen for layer in cache.layers)


@pytest.mark.parametrize("family", [*LATENT, "llama", "opt"])
def test_what_a_cached_head_received_is_the_mean_of_those_that_read_it(family):
    specimen = zoo.build(family)
    specimen.model.set_attn_implementation("eager")
    model = get_token_model(specimen.model, SqueezeAttentionConfig(budget=1.0, p=1.0, policy="heavy_hitters")).eval()
    ids = texts()[0]
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True, output_attentions=True)
    for layer, maps in zip(out.past_key_values.layers, out.attentions, strict=True):
        columns = maps.sum(dim=2).unflatten(1, (layer.heads, -1)).mean(dim=2)
        close(layer.record.entries["received"], columns.float(), family)


CALIBRATED = {"sinks": 1, "compression": 3.0, "induction": 0.3}


@pytest.mark.parametrize(("family", "heads"), [("deepseek_v3", 1), ("minicpm3", 1), ("llama", 2)])
def test_calibrated_heads_are_numbers_among_those_that_they_were_found_among(family, heads):
    model = get_token_model(zoo.build(family).model, RazorAttentionConfig(**CALIBRATED)).eval()
    ids = torch.randint(5, 80, (1, 10), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    found = calibrate(model, [{"input_ids": ids}])["default.0"]
    with torch.no_grad():
        cache = model(input_ids=texts()[0], use_cache=True).past_key_values
    held = [n for layer in cache.layers for n in layer.there[0].sum(dim=-1).tolist()]
    assert list(found["key_heads"]) == [heads] * 4
    assert [head for head, n in enumerate(held) if n == texts()[0].shape[1]] == list(found["heads"])


@torch.no_grad()
def test_heads_are_numbered_through_blocks_that_hold_different_numbers():
    read = lambda **knobs: get_token_model(
        zoo.build("mimo_v2_flash").model, RazorAttentionConfig(sinks=1, compression=18.0, **knobs)
    ).eval()
    among = [layer.heads for layer in read()(input_ids=texts()[0], use_cache=True).past_key_values.layers]
    heads = (among[0] + 1, sum(among) - 1)
    assert len(set(among)) > 1
    model = read(heads=heads, key_heads=tuple(among))
    together, cache = decoded(model, slice(None))
    close(together[1:], decoded(model, slice(1, 2))[0])
    held = [n for layer in cache.layers for n in layer.there[0].sum(dim=-1).tolist()]
    assert [head for head, n in enumerate(held) if n > 3] == list(heads)  # a sink, the newest and the one for all between
    wrong = read(heads=heads, key_heads=tuple(n + 1 for n in among))
    with pytest.raises(UnsupportedError, match=rf"got {among[0] + 1} for a block where block 0 holds {among[0]}\. Calibrate the method"):
        wrong(input_ids=texts()[0], use_cache=True)


def test_what_reads_no_query_stores_latents_in_a_few_bits():
    model = get_token_model(zoo.build("deepseek_v3").model, MiKVConfig(importance=0.3, bits=4, balance=False)).eval()
    together, cache = decoded(model, slice(None))
    close(together[1:], decoded(model, slice(1, 2))[0])
    assert all(layer.kv.parts is not None for layer in cache.layers)


def test_a_block_with_two_slots_of_a_cache_is_refused():
    with pytest.raises(UnsupportedError, match="store their keys in a slot of a cache, got LongcatFlashDecoderLayer"):
        get_token_model(zoo.build("longcat_flash").model, COMPRESSORS["prefixkv"])
    model = get_token_model(zoo.build("longcat_flash").model, DeepPromptConfig(tokens=2)).eval()
    close(decoded(model)[0][1:], decoded(model, slice(1, 2))[0])  # what is there for one block only is there for both attentions
    specimen = zoo.build("longcat_flash")
    model = get_token_model(specimen.model, FTPConfig(sparsity=0.5, router="static")).eval()
    model(**specimen.inputs, use_cache=False)
    with pytest.raises(UnsupportedError, match="one slot of the cache each, got several in LongcatFlashDecoderLayer"):
        model(**specimen.inputs, use_cache=True)


@pytest.mark.parametrize("family", ["jetmoe", "mimo_v2_flash", "deepseek_v3"])
def test_landmarks_stand_for_blocks_whatever_the_config_says_of_heads(family):
    model = get_token_model(zoo.build(family).model, LandmarkAttentionConfig(block=4, local=4, retrieve=1, places="shared")).eval()
    close(decoded(model, slice(None))[0][1:], decoded(model, slice(1, 2))[0], family)
