"""A LoRA, and PEFT's other methods, inside a stack: they load through every door and leave the rest as it is, or are refused."""

import copy
from types import SimpleNamespace

import gates
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_config
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from tolerances import all_equal

import hf_tokens
from hf_tokens import HFTokensConfig, UnsupportedError, get_token_model
from hf_tokens.peft.nested import BEYOND_LAYERS, check_nested
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.probe import ProbeInsertConfig

KINDS = {str(kind.value): tuner for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if issubclass(tuner, BaseTuner)}
OWN_KNOBS = {  # what they need on a tiny model
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    "VBLORA": {"vector_length": 4, "num_vectors": 16},
    "WAVEFT": {"n_frequency": 20},
}
NOT_MADE = {"HF_TOKENS", "ADAMSS", "XLORA"}  # our own, one that needs another library, and one whose config takes adapters
LORAS = {
    "in all layers": {"target_modules": "all-linear"},
    "in the embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "in the head": {"target_modules": ["lm_head", "q_proj"]},
    "in a parameter": {"target_modules": [], "target_parameters": ["mlp.up_proj.weight"]},
    "with tokens": {"trainable_token_indices": [1, 2]},
    "with the head": {"modules_to_save": ["lm_head"]},
    "with a bias of its own": {"lora_bias": True},
    "of weights in directions": {"use_dora": True},
    "begun orthogonal": {"init_lora_weights": "orthogonal"},
    "begun for data": {"init_lora_weights": "eva"},
}
ON_Q = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
CASES = {
    kind: {"peft_type": kind, "target_modules": ["q_proj", "v_proj"], **OWN_KNOBS.get(kind, {})} for kind in sorted({*KINDS} - NOT_MADE)
}
CASES |= {f"LoRA {name}": {"peft_type": "LORA", **ON_Q, **more} for name, more in LORAS.items()}
REWRITING = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora, which writes in place": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": {}},
    "more blocks": {"layer_replication": [[0, 4], [2, 4]]},
    "fewer blocks": {"layer_replication": [[0, 3]]},
}
PUT_AROUND = "Put it around the model, by `peft.get_peft_model`"


@pytest.fixture(scope="module")
def llama():
    return zoo.build("llama")


def a_stack(llama, *nested, **more):
    return get_token_model(copy.deepcopy(llama.model), [ProbeInsertConfig(), *nested], **more)


def trained(model):
    """A model whose adapters have left their beginnings."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model, llama):
    return [model.eval()(**llama.inputs).logits]


def acts_in_the_call(kind):
    return kind in KINDS and KINDS[kind].forward is not BaseTuner.forward


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_each_method_loads_through_every_door_and_goes_without_a_trace_or_is_refused(name, llama, tmp_path):
    config = get_peft_config(copy.deepcopy(CASES[name]))
    if acts_in_the_call(name):
        with pytest.raises(UnsupportedError, match=f"got {name}, which acts in the call of the model too. {PUT_AROUND}"):
            a_stack(llama, config)
        return
    base = copy.deepcopy(llama.model)
    before, off = snapshot(base), llama.run()
    stack = trained(get_token_model(base, [ProbeInsertConfig(), config]))
    on = logits(stack, llama)
    stack.save_pretrained(tmp_path)
    with stack.disable_adapter():
        all_equal(logits(stack, llama), off, "disabled")
    assert stack.unload() is base and not difference(before, snapshot(base))
    all_equal(logits(base, llama), off, "unloaded")

    by_transformers = copy.deepcopy(llama.model)
    assert not by_transformers.load_adapter(str(tmp_path), adapter_name="again").missing_keys
    all_equal(logits(by_transformers, llama), on, "by transformers")
    all_equal(logits(hf_tokens.load(tmp_path, copy.deepcopy(llama.model)), llama), on, "by ours")
    all_equal(logits(PeftModel.from_pretrained(copy.deepcopy(llama.model), tmp_path), llama), on, "by PEFT")


@gates.add_adapter
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_what_transformers_loaded_it_saves_again(llama, tmp_path):
    stack = trained(a_stack(llama, LoraConfig(**ON_Q)))
    stack.save_pretrained(tmp_path / "first")
    model = copy.deepcopy(llama.model)
    for name in ("first", "second"):
        model.load_adapter(str(tmp_path / "first"), adapter_name=name)
    model.set_adapter("second")
    model.save_pretrained(tmp_path / "second")
    again = copy.deepcopy(llama.model)
    again.load_adapter(str(tmp_path / "second"))
    all_equal(logits(again, llama), logits(stack, llama))


@pytest.mark.parametrize("door", ["AutoModelForCausalLM", "pipeline"])
def test_a_folder_that_names_its_base_is_enough_for_transformers(door, llama, tmp_path):
    import transformers

    llama.model.save_pretrained(tmp_path / "base")
    load = transformers.AutoModelForCausalLM.from_pretrained
    stack = trained(get_token_model(load(tmp_path / "base"), [ProbeInsertConfig(), LoraConfig(**ON_Q)]))
    stack.save_pretrained(tmp_path / "stack")
    folder = str(tmp_path / "stack")
    pipe = {
        "pipeline": lambda: (
            transformers.pipeline("text-generation", model=folder, tokenizer=SimpleNamespace(pad_token_id=0, padding_side="left")).model
        )
    }
    again = pipe.get(door, lambda: load(folder))()
    all_equal(logits(again, llama), logits(stack, llama))


def test_a_name_that_transformers_would_take_for_another_is_refused(llama, monkeypatch, tmp_path):
    a_stack(llama, LoraConfig(**ON_Q)).save_pretrained(tmp_path)
    from hf_tokens.peft.tuner import HFTokensModel

    monkeypatch.setattr(HFTokensModel, "_nested_names", lambda *_: {"q_proj.lora_A.again.weight": "q_proj.lora_Z.weight"})
    model = copy.deepcopy(llama.model)
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match="would take q_proj.lora_Z.weight as q_proj.lora_Z.weight. Use `hf_tokens.load` or PEFT"):
        model.load_adapter(str(tmp_path), adapter_name="again")
    assert not difference(before, snapshot(model))


# -- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWRITING)
def test_a_beginning_that_rewrites_the_base_is_refused_and_nothing_is_changed(name, llama):
    model = copy.deepcopy(llama.model)
    before, flags, config = snapshot(model), [p.requires_grad for p in model.parameters()], model.config.to_dict()
    good, bad = LoraConfig(r=2, target_modules=["k_proj"]), LoraConfig(**ON_Q, **REWRITING[name])
    with pytest.raises(UnsupportedError, match=r"leaves the base as it is.*got one that changes model\.layers.*Let it begin with"):
        get_token_model(model, ["deep-prompt", good, bad], modules_to_save=["lm_head"])
    assert not difference(before, snapshot(model)) and config == model.config.to_dict()
    assert flags == [p.requires_grad for p in model.parameters()]
    all_equal(logits(model, llama), llama.run(), "refused")


@pytest.mark.parametrize(("knob", "value"), [("alora_invocation_tokens", [1, 2]), ("bias", "all"), ("bias", "lora_only")])
def test_a_knob_that_a_stack_would_not_hear_is_refused(knob, value, llama):
    model = copy.deepcopy(llama.model)
    before = snapshot(model)
    nested = LoraConfig(**ON_Q, **{knob: value}, task_type="CAUSAL_LM")
    with pytest.raises(UnsupportedError, match=f"in its own layers alone, got {knob}=.* of LORA, which needs .*{PUT_AROUND}"):
        get_token_model(model, ["deep-prompt", nested])
    assert not difference(before, snapshot(model)) and {row[0] for row in BEYOND_LAYERS} >= {knob}


def test_a_bias_that_is_not_trained_any_more_does_no_harm():
    check_nested(LoraConfig(**ON_Q, bias="all", inference_mode=True))


# -- what the adapter says of itself holds for all that is in it -----------------------------------------------------

HEADS = {
    "a task": {"task_type": "SEQ_CLS"},
    "a module saved as a whole": {"modules_to_save": ["score"]},
    "both": {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", ["all-linear", ["score", "q_proj"]], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_lora_keeps_out_of_the_head_that_is_saved_as_a_whole(name, target, tmp_path):
    from transformers import LlamaForSequenceClassification

    def build():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(zoo.build("llama").model.config).eval()

    inputs = {"input_ids": torch.arange(3, 11)[None]}
    stack = trained(get_token_model(build(), ["deep-prompt", LoraConfig(r=2, target_modules=target)], **HEADS[name]))
    assert not [path for path, _ in stack.named_modules() if "score" in path and "lora" in path]
    stack.save_pretrained(tmp_path)
    with torch.no_grad():
        for again in (hf_tokens.load(tmp_path, build()), PeftModel.from_pretrained(build(), tmp_path)):
            all_equal([again.eval()(**inputs).logits], [stack(**inputs).logits])


# -- flags -----------------------------------------------------------------------------------------------------------


def flags(model, name):
    """How many tensors of an adapter are trained, of how many."""
    found = [p.requires_grad for path, p in model.named_parameters() if f".{name}." in path]
    return sum(found), len(found)


STACKS = {
    "a LoRA": [LoraConfig(**ON_Q)],
    "two LoRAs": [LoraConfig(r=2, target_modules=["q_proj"]), LoraConfig(r=2, target_modules=["v_proj"])],
    "a LoRA with a head": [LoraConfig(**ON_Q, modules_to_save=["lm_head"])],
    "none": [],
}


@pytest.mark.parametrize("nested", STACKS)
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("how", ["add", "load", "load to train"])
def test_an_adapter_that_comes_leaves_the_others_frozen_or_trained(nested, trains, how, llama, tmp_path):
    a_stack(llama, *STACKS[nested]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(llama.model), tmp_path, is_trainable=trains)
    (before, of), base = flags(model, "default"), [p for path, p in model.named_parameters() if ".default." not in path]
    assert before == (of if trains else 0)
    if how == "add":
        model.add_adapter("second", HFTokensConfig(methods=[ProbeInsertConfig(), *STACKS[nested]]))
    else:
        model.load_adapter(tmp_path, "second", is_trainable=how == "load to train")
    assert flags(model, "default") == (before, of) and not any(p.requires_grad for p in base)
    assert flags(model, "second") == (of if how == "load to train" else 0, of)


@pytest.mark.parametrize("nested", STACKS)
@pytest.mark.parametrize("trains", [True, False])
def test_an_adapter_that_was_off_for_a_while_is_as_frozen_as_before(nested, trains, llama, tmp_path):
    a_stack(llama, *STACKS[nested], modules_to_save=["norm"]).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(llama.model), tmp_path, is_trainable=trains)
    before = [p.requires_grad for p in model.parameters()]
    with model.disable_adapter(), model.disable_adapter():
        assert not any(p.requires_grad for p in model.parameters())
    assert before == [p.requires_grad for p in model.parameters()] and any(before) == trains
    model.base_model.disable_adapter_layers()
    model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    assert any(p.requires_grad for p in model.parameters()), "what is switched on by name is trained"


def test_two_loras_of_a_stack_in_one_layer_are_refused_and_the_model_is_as_it_was(llama):
    model, before = copy.deepcopy(llama.model), snapshot(llama.model)
    ours = LoraConfig(target_modules=["q_proj"]), LoraConfig(target_modules=["q_proj", "v_proj"])
    with pytest.raises(UnsupportedError, match="Each module has one LORA of a stack, got two in model.layers.0.self_attn.q_proj"):
        get_token_model(model, [ProbeInsertConfig(), *ours])
    assert difference(snapshot(model), before) == []
    get_token_model(model, [ProbeInsertConfig(), ours[0], LoraConfig(target_modules=["v_proj"])])
