"""What objectives hear: targets, tokens and places as the model's own loss has them; and where they stand."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tolerances import close

from hf_tokens import (
    CAFTConfig,
    ConfigError,
    DiffusionDPOConfig,
    GoldfishLossConfig,
    MethodConfig,
    Objective,
    SimPOConfig,
    TokenReducer,
    UnsupportedError,
    get_token_model,
    objective_loss,
    register,
)
from hf_tokens.handlers.judged import ObjectiveSignals, first_tensor, labels_of, log_probabilities
from hf_tokens.handlers.objective import objectives_of
from hf_tokens.model.signatures import decoder_ids
from hf_tokens.testing import zoo
from hf_tokens.tools.surgeries import blocks_in, surgery_of

FISH = GoldfishLossConfig(k=2, context=3)


@pytest.mark.parametrize(("role", "word"), [(Objective, "queries"), (Objective, "mask"), (TokenReducer, "logps"), (TokenReducer, "head")])
def test_a_verb_asks_for_the_words_of_its_role(role, word):
    body = {role.verb: eval(f"lambda self, {word}: None"), "__module__": __name__}
    with pytest.raises(ConfigError, match=rf"may ask for .*, got \['{word}'\]\. .*Rename the arguments"):
        register("test-of-words", MethodConfig)(type("Stranger", (role,), body))


def signals(surgery, wanted, **given):
    return ObjectiveSignals(surgery_of(surgery), given, None, wanted, first_tensor, {})


def test_positions_count_from_0_in_every_sample():
    surgery, wanted = get_token_model(zoo.build("llama").model, FISH), torch.zeros(2, 6, dtype=torch.long)
    place = torch.arange(6).repeat(2, 1)
    assert torch.equal(signals(surgery, wanted).positions, place)
    left = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert signals(surgery, wanted, attention_mask=left).positions[1, 2:].tolist() == [0, 1, 2, 3]
    given = dict(attention_mask=left, position_ids=(left.cumsum(1) - 1).clamp(min=0))
    assert signals(surgery, wanted, **given).positions[1, 2:].tolist() == [0, 1, 2, 3]
    packed = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert torch.equal(signals(surgery, wanted[:1], position_ids=packed).positions, packed)


def test_targets_are_those_of_the_model_s_own_loss():
    labels = torch.tensor([[5, 6, -100, 7]])
    for name, want in (
        ("llama", [[6, -100, 7, -100]]),
        ("gpt2", [[6, -100, 7, -100]]),
        ("t5", labels.tolist()),
        ("whisper", labels.tolist()),
    ):
        model = zoo.build(name).model
        assert labels_of(model, {"labels": labels}, None).tolist() == want, name
        assert labels_of(model, {"shift_labels": labels, "labels": labels}, None).tolist() == labels.tolist()
        assert labels_of(model, {}, None) is None


def test_a_decoder_s_tokens_are_those_that_the_model_makes_of_its_labels():
    specimen = zoo.build("t5")
    model, ids = specimen.model, specimen.inputs["input_ids"]
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    surgery = get_token_model(model, FISH).eval()
    objectives_of(surgery_of(surgery))[0].train()
    labels = torch.randint(5, 80, (2, 15))
    labels[1, 11:] = -100
    alone = surgery(input_ids=ids, labels=labels).loss
    given = surgery(input_ids=ids, labels=labels, decoder_input_ids=model._shift_right(labels)).loss
    assert torch.equal(alone, given)


SHIFTING = ("bart", "mbart", "plbart", "t5gemma", "m2m_100", "marian", "umt5", "whisper", "speecht5", "seamless_m4t_v2", "blenderbot")


@pytest.mark.parametrize("family", SHIFTING)
def test_what_a_decoder_reads_of_labels_is_what_its_table_is_asked_for(family):
    """Some begin with the last word, which is the language; what is no target is padding there."""
    specimen = zoo.build(family)
    model, read = specimen.model, []
    model.get_decoder().get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0]))
    labels = torch.tensor([[5, 6, -100, 7, 2], [8, 9, 2, -100, -100]])
    given = {name: value for name, value in specimen.inputs.items() if not name.startswith("decoder") and name != "labels"}
    with torch.no_grad():
        model(**given, labels=labels)
    assert torch.equal(decoder_ids(model, labels, -100), read[-1])


def test_what_a_decoder_reads_of_labels_is_refused_where_nothing_says_it():
    silent = SimpleNamespace(config=SimpleNamespace(pad_token_id=0))
    with pytest.raises(UnsupportedError, match="config names the token that it begins with.*labels alone. Pass `decoder_input_ids`"):
        decoder_ids(silent, torch.tensor([[5, 6]]), -100)


def test_an_objective_of_the_text_is_refused_where_a_decoder_is_given_embeddings():
    specimen = zoo.build("bart")
    labels = torch.randint(5, 80, (2, 15))
    embeds, given = specimen.model.get_input_embeddings()(labels), {"input_ids": specimen.inputs["input_ids"], "labels": labels}
    fish = get_token_model(specimen.model, FISH).train()
    with pytest.raises(UnsupportedError, match="got `decoder_inputs_embeds` without `decoder_input_ids`. Pass the ids"):
        fish(**given, decoder_inputs_embeds=embeds)
    assert fish(**given).loss.isfinite()


def test_without_ids():
    specimen = zoo.build("llama")
    ids = specimen.inputs["input_ids"]
    embeds = specimen.model.get_input_embeddings()(ids)
    fish, pairs = (get_token_model(copy.deepcopy(specimen.model), config).train() for config in (FISH, SimPOConfig()))
    with pytest.raises(UnsupportedError, match="reads the tokens of the text, got `inputs_embeds` without `input_ids`. Pass the ids"):
        fish(inputs_embeds=embeds, labels=ids)
    close(pairs(inputs_embeds=embeds, labels=ids).loss, pairs(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("name", ["llama", "llava", "t5", "diffusers/UNet2DConditionModel"])
def test_an_objective_stands_in_one_block_and_touches_none(name):
    specimen = zoo.build(name)
    surgery = get_token_model(specimen.model, DiffusionDPOConfig() if specimen.model.__module__.startswith("diffusers") else FISH)
    assert len(objectives_of(surgery_of(surgery))) == 1
    assert not any(block.plan.prompt.methods for block in blocks_in(surgery))


def test_a_static_cache_may_stay():
    specimen = zoo.build("llama")
    given = dict(max_new_tokens=3, do_sample=False, cache_implementation="static", disable_compile=True)
    want = specimen.model.generate(**specimen.inputs, **given)
    assert torch.equal(get_token_model(specimen.model, [FISH, CAFTConfig()]).generate(**specimen.inputs, **given), want)


def test_named_layers_hold_one_that_speaks():
    surgery = get_token_model(zoo.build("llama").model, CAFTConfig(layers=(1, 3), heads=2, layer="linear"))
    assert len(objectives_of(surgery_of(surgery))) == 1
    assert len([p for p in surgery.parameters() if p.requires_grad]) == 2  # its weight and its bias


def test_a_copy_after_a_call_holds_nothing_of_it():
    specimen = zoo.build("diffusers/SD3Transformer2DModel")
    surgery = get_token_model(specimen.model, DiffusionDPOConfig()).train().requires_grad_()
    out = surgery(**specimen.inputs).sample
    twin = copy.deepcopy(surgery)
    assert surgery_of(twin).waiting is None
    assert objective_loss(surgery, torch.zeros_like(out)).requires_grad
    with pytest.raises(UnsupportedError, match="once"):
        objective_loss(surgery, torch.zeros_like(out))


def test_nothing_is_kept_of_a_call_without_objectives():
    specimen = zoo.build("diffusers/SD3Transformer2DModel")
    surgery = get_token_model(specimen.model, DiffusionDPOConfig())
    with surgery.disable_adapter():
        surgery(**specimen.inputs)
    assert surgery_of(surgery).waiting is None


def test_a_head_that_reads_something_else_is_refused():
    from transformers import OPTConfig, OPTForCausalLM

    sizes = dict(vocab_size=90, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16)
    surgery = get_token_model(OPTForCausalLM(OPTConfig(**sizes)), CAFTConfig(heads=1)).train()
    ids = torch.randint(5, 80, (1, 8))
    with pytest.raises(UnsupportedError, match=r"a head that reads the blocks' 32 features of every token, got \(1, 8, 16\)"):
        surgery(input_ids=ids, labels=ids)


def test_the_reference_of_a_text_model_is_the_model_without_the_adapter():
    specimen = zoo.build("llama")
    base = copy.deepcopy(specimen.model).eval()
    surgery = get_token_model(specimen.model, [LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), FISH]).eval()
    given = {**specimen.inputs, "labels": specimen.inputs["input_ids"]}
    wanted = labels_of(base, given, None)
    there = ObjectiveSignals(surgery_of(surgery), given, surgery(**given), wanted, first_tensor, {})
    assert torch.equal(there.reference, log_probabilities(base(**given), wanted))
    assert not torch.equal(there.reference, there.logps)
