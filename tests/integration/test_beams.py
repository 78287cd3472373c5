"""Beams reorder the rows of a cache: what a compressor keeps for one row is no other row's, also of longer prompts than the contract's."""

import pytest
import torch
from by_hand import batch, gpt2
from tolerances import close
from transformers import BartConfig, BartForConditionalGeneration, DPRConfig, DPRQuestionEncoder, RagTokenForGeneration

from hf_tokens import (
    D2OConfig,
    DeepPromptConfig,
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
    LandmarkAttentionConfig(block=3, local=3, retrieve=1, places="shared"),
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


@torch.no_grad()
def test_beams_over_documents_are_those_without_a_cache():
    torch.manual_seed(0)
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "init_std": 0.5}
    config = BartConfig(vocab_size=50, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **layers)
    generator = BartForConditionalGeneration(config)
    asker = DPRConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    question = DPRQuestionEncoder(asker)
    base = RagTokenForGeneration(question_encoder=question, generator=generator)
    model = get_token_model(base, DeepPromptConfig(tokens=3, init_std=2.0, stream="decoder")).eval()
    ids, scores = torch.randint(5, 45, (6, 8)), torch.tensor([[0.0, 1.0, 0.5], [1.0, 0.2, 0.0]])
    given = {"context_input_ids": ids, "context_attention_mask": torch.ones_like(ids), "doc_scores": scores, "n_docs": 3}
    given |= {"num_beams": 3, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    cached, uncached = (model.generate(**given, use_cache=use) for use in (True, False))
    assert cached.sequences.tolist() == uncached.sequences.tolist()
    close(torch.stack(cached.scores), torch.stack(uncached.scores))
