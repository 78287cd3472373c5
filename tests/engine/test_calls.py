"""What a call of a block or of a head may bring and give back, and whose the errors in it are."""

import re

import pytest
import torch
from tolerances import close

from hf_tokens import anatomy, get_token_model
from hf_tokens.errors import UnsupportedError
from hf_tokens.testing import probe_config, zoo

CARRYING = """
bailing_hybrid bamba falcon_h1 granitemoehybrid jamba kimi_linear lara_mini lfm2_moe lfm3 minimax nemotron_h olmo_hybrid qwen3_5_text
qwen3_next qwen4_exp_text recurrent_gemma rwkv zamba zamba2
""".split()
FOUR = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("family", ["depth_anything", "dpt", "prompt_depth_anything", "glpn"])
def test_a_head_that_reads_a_list_of_maps_is_left_alone(family):
    specimen = zoo.build(family)
    base = specimen.run()
    get_token_model(specimen.model, {"method": "apt"})
    assert [tensor.shape for tensor in specimen.run()] == [tensor.shape for tensor in base]


@pytest.mark.parametrize("method", [{"method": "deep-prompt", "tokens": 0}, {"method": "deep-prompt", "tokens": 2}], ids=["zero", "two"])
def test_a_state_that_does_not_tell_its_length_is_not_continued(method):
    specimen = zoo.build("rwkv")
    model, ids = specimen.model, specimen.inputs["input_ids"]
    base = model.generate(ids, use_cache=False, **FOUR)
    get_token_model(model, method)
    assert torch.equal(model.generate(ids, use_cache=False, **FOUR), base) == (method["tokens"] == 0)
    with pytest.raises(UnsupportedError, match="must be told how long the sequence is that goes on, got a model's own `state`"):
        model.generate(ids, **FOUR)


@pytest.mark.parametrize("number", [1, 3])
def test_a_block_returns_as_many_tokens_as_it_was_given(number):
    specimen = zoo.build("llama")
    block = anatomy(specimen.model).streams[0].blocks[3]
    forward = block.forward
    block.forward = lambda hidden, **more: torch.cat([forward(hidden, **more), hidden[:, :number]], dim=1)
    get_token_model(specimen.model, probe_config(0.5))
    with pytest.raises(
        UnsupportedError, match=rf"A block must return as many tokens as it was given, got \(2, 9\) .* and \(2, {9 + number}\) out"
    ):
        specimen.run()


@pytest.mark.parametrize("family", [family for family in CARRYING if family in zoo.families("transformers")])
def test_families_that_carry_states_are_the_base_at_zero_strength_or_refused(family):
    specimen = zoo.build(family)
    model, ids = specimen.model, specimen.inputs["input_ids"]
    told = {"return_dict_in_generate": True, "output_logits": True, **FOUR}
    base = torch.stack(model.generate(ids, **told).logits)
    for methods in (probe_config(0.0), [{"method": "deep-prompt", "tokens": 0}]):
        operated = get_token_model(model, methods)
        try:
            close(torch.stack(model.generate(ids, **told).logits), base, family)
        except UnsupportedError as error:
            assert re.search("needs a dynamic cache|must be told how long", str(error)), error
        operated.unload()
