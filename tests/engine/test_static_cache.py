"""Tokens of a surgery in front of a static cache: they take none of its places, and generation is that of a dynamic one."""

import pytest
import torch
from transformers import StaticCache

from hf_tokens import DeepPromptConfig, PrefixKVConfig, UnsupportedError, get_token_model
from hf_tokens.testing import CACHE, zoo

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(9) >= torch.tensor([[3], [0]])).long()}
ROOM = 20


def prompted(family, **more):
    """A model with prompts that change what it says."""
    model = get_token_model(zoo.build(family).model, DeepPromptConfig(tokens=3, **more)).eval()
    for name, parameter in model.named_parameters():
        if "prompt" in name:
            torch.nn.init.normal_(parameter)
    return model


def write(model, **more):
    """The text, and the logits of each of its tokens."""
    out = model.generate(**PADDED, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True, **more)
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "opt", "phi3", "mixtral"])
@pytest.mark.parametrize("layers", [None, (1, 2)], ids=["all", "two"])
def test_prompts_of_each_block_run_with_a_static_cache(family, layers):
    model = prompted(family, layers=layers)
    ids, logits = write(model)
    for more in ({}, {"prefill_chunk_size": 4}):
        of_static = write(model, cache_implementation="static", **more)
        assert torch.equal(of_static[0], ids)
        torch.testing.assert_close(of_static[1], logits, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        base = write(model, cache_implementation="static")
        assert not torch.allclose(base[1], logits)
        torch.testing.assert_close(base[1], write(model)[1], rtol=1e-4, atol=1e-5)


def test_a_block_that_reads_the_picture_runs_with_a_static_cache():
    """A mask of the rows that see it has no column for the tokens in front."""
    specimen = zoo.build("mllama")
    model = get_token_model(specimen.model, DeepPromptConfig(tokens=3, stream="text")).eval()
    given = {name: value for name, value in specimen.inputs.items() if name != "labels"}
    options = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, suppress_tokens=[*range(80, 99)])
    said = model.generate(**given, **options)
    assert torch.equal(model.generate(**given, **options, cache_implementation="static"), said)


def test_beams_take_their_prompts_along():
    model = prompted("llama")
    dynamic, static = (write(model, num_beams=3, **more) for more in ({}, {"cache_implementation": "static"}))
    assert torch.equal(dynamic[0], static[0])


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_generation_is_one_graph():
    model = prompted("llama")
    steps = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.compiler.reset()
        cache = StaticCache(config=model.config, max_cache_len=ROOM)
        with torch.no_grad():
            model(input_ids=IDS, **{CACHE: cache})
            steps.append(run(input_ids=IDS[:, :1], **{CACHE: cache}, position_ids=torch.full((2, 1), 9)).logits)
    torch.testing.assert_close(*steps)


def test_a_cache_with_prompts_is_read_with_them_alone():
    model = prompted("llama")
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        model(input_ids=IDS, **{CACHE: cache})
        with model.disable_adapter(), pytest.raises(UnsupportedError, match="read by that surgery only"):
            model(input_ids=IDS[:, :1], **{CACHE: cache})
        cache = StaticCache(config=model.config, max_cache_len=ROOM)
        with model.disable_adapter():
            model(input_ids=IDS, **{CACHE: cache})
        with pytest.raises(UnsupportedError, match="in its first pass, got a static cache of 9 tokens"):
            model(input_ids=IDS[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("family", ["llama", "mistral", "bloom"])
def test_what_moves_tokens_in_the_cache_is_refused(family):
    stack = [PrefixKVConfig()] if family == "llama" else [DeepPromptConfig(tokens=3)]  # a window of its own; a bias by distance
    model = get_token_model(zoo.build(family).model, stack).eval()
    with pytest.raises(UnsupportedError, match="needs a dynamic cache, got a cache of Static"):
        write(model, cache_implementation="static")
