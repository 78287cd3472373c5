"""Beams reorder the rows of a cache: what a compressor keeps for one row is no other row's, also of longer prompts than the contract's."""

import pytest
import torch
from by_hand import batch, gpt2

from hf_tokens import (
    D2OConfig,
    KIVIConfig,
    LandmarkAttentionConfig,
    MiKVConfig,
    MiniCacheConfig,
    PrefixKVConfig,
    RazorAttentionConfig,
    SqueezeAttentionConfig,
    get_token_model,
)

CASES = [
    D2OConfig(budget=0.5),
    RazorAttentionConfig(sinks=1, heads=(0, 5)),
    MiKVConfig(importance=0.3),
    KIVIConfig(group=2, residual=2),
    MiniCacheConfig(layers=(0, 1, 2, 3)),
    PrefixKVConfig(budget=0.5, distance=2),
    PrefixKVConfig(budget=0.5, online=True, distance=2),
    SqueezeAttentionConfig(policy="sinks", sinks=1),
    SqueezeAttentionConfig(policy="heavy_hitters", sinks=1),
    LandmarkAttentionConfig(block=3, local=3, retrieve=1),
]


@torch.no_grad()
@pytest.mark.parametrize("config", CASES, ids=lambda config: config.method)
def test_beams_are_those_of_each_row_alone(config):
    model = get_token_model(gpt2(), config).eval()
    ids, mask = batch((10, 6))
    given = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    together = model.generate(input_ids=ids, attention_mask=mask, **given)
    for row, n in enumerate((10, 6)):
        alone = model.generate(input_ids=ids[row : row + 1, -n:], attention_mask=mask[row : row + 1, -n:], **given)
        assert together[row, 10:].tolist() == alone[0, n:].tolist()
