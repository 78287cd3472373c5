"""However a model is called, its adapter is heard, or the call is refused."""

import logging
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tolerances import all_equal, differs
from transformers.generation import ContinuousBatchingConfig

from hf_tokens import DeepPromptConfig, TransPruneConfig, UnsupportedError, get_token_model
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.pairs import ContractPair
from hf_tokens.testing.probe import ProbeDropConfig
from hf_tokens.tools.surgeries import surgery_of

LORA = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.mark.parametrize("methods", [DeepPromptConfig(tokens=2), [DeepPromptConfig(tokens=2), LORA]], ids=["alone", "stack"])
@pytest.mark.parametrize("given", [{"adapter_names": ["default", "__base__"]}, {"alora_offsets": [1, 2]}], ids=lambda given: [*given][0])
def test_an_adapter_for_each_sample_is_refused(methods, given):
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, methods)
    ids = specimen.inputs["input_ids"]
    for call in (lambda: model(input_ids=ids, **given), lambda: model.generate(input_ids=ids, max_new_tokens=1, **given)):
        with pytest.raises(UnsupportedError, match="act on all samples of a batch"):
            call()


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")  # so it is
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_lora_around_a_surgery_chooses_its_adapter_for_each_sample():
    specimen = zoo.build("llama")
    model = get_peft_model(get_token_model(specimen.model, DeepPromptConfig(tokens=2), adapter_name="prompt"), LORA).eval()
    ids = specimen.inputs["input_ids"]
    torch.nn.init.normal_(model.get_parameter(next(name for name, _ in model.named_parameters() if "lora_B" in name)))
    with torch.no_grad():
        on, mixed = model(input_ids=ids).logits, model(input_ids=ids, adapter_names=["default", "__base__"]).logits
    assert not differs([mixed[0]], [on[0]]) and differs([mixed[1]], [on[1]])


def test_an_adapter_that_is_switched_on_within_continuous_batching_is_refused(caplog):
    caplog.set_level(logging.CRITICAL, "ContinuousBatchingLogger")
    model = get_token_model(zoo.build("llama").model, ProbeDropConfig(share=0.5)).eval()
    model.generation_config.update(eos_token_id=-1, max_new_tokens=2, do_sample=False)
    small = ContinuousBatchingConfig(max_batch_tokens=64, max_memory_percent=0.001)
    with model.disable_adapter():
        manager = model.init_continuous_batching(continuous_batching_config=small)
    manager.start()
    try:
        manager.add_request(list(range(5, 15)), request_id="one")
        answer = manager.get_result("one", timeout=60)
    finally:
        manager.stop(block=True, timeout=60)
        manager.destroy()
    assert "Continuous batching lays several samples into one row" in answer.error


def test_continuous_batching_is_the_base_s_own_behind_a_surgery():
    model = get_token_model(zoo.build("llama").model, ProbeDropConfig(share=0.5))
    with pytest.raises(UnsupportedError, match="got ProbeDrop"):
        model.generate_batch([[5, 6, 7]])
    base = model.unload()
    assert "init_continuous_batching" not in vars(base)


def test_a_forward_behind_a_call_that_broke_off_around_it_hears_its_own_inputs():
    """Another library's forward stands around ours, and the error comes from there."""
    pair = ContractPair("transprune", "llava")
    model, fresh = pair.attach(config=TransPruneConfig(), stirred=False), pair.attach(config=TransPruneConfig(), stirred=False)
    base, ours = surgery_of(model).base, surgery_of(model).base.forward

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    base.forward = types.MethodType(interrupted, base)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(**pair.row.alone(pair.inputs, 0))
    base.forward = ours
    with torch.no_grad():
        all_equal(pair.row.read(base.forward(**pair.inputs)), pair.row.read(fresh(**pair.inputs)), "forward")
