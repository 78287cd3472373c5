"""Bad input: each mistake is one error in the standard words (rule, what came, remedy), and the model is as it was."""

import copy
import json
import re
from importlib.metadata import EntryPoint
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig
from safetensors.torch import load_file, save_file
from tolerances import all_equal

import hf_tokens
from hf_tokens import AdapterError, ConfigError, HFTokensConfig, HFTokensError, UnsupportedError, get_token_model
from hf_tokens.errors import did_you_mean, explain
from hf_tokens.roles import registry
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.architectures import ARCHITECTURES
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig

WORDS = re.compile(r"(?s)^.+, got .+\. .+\.$")


def base(family="llama"):
    return zoo.build(family).model


def test_the_wording():
    assert explain("A rule", 3, "Do that.") == "A rule, got 3. Do that."
    for error in (ConfigError, UnsupportedError, AdapterError):
        assert issubclass(error, HFTokensError) and issubclass(error, ValueError)


@pytest.mark.parametrize(
    ("names", "known", "said"),
    [
        (["ftpp"], ["atp", "ftp", "d2o"], "Did you mean 'ftp'? "),
        (["FTP"], ["ftp", "ppt"], "Did you mean 'ftp'? "),
        (["anatom"], ["Anatomy", "anatomy"], "Did you mean 'anatomy'? "),
        (["sparsty", "colour", "hiden"], ["sparsity", "hidden"], "Did you mean 'sparsity' and 'hidden'? "),
        (["nonesuch"], ["ftp"], ""),
        ([""], ["ftp"], ""),
        ([3], ["ftp"], ""),
        (["ftp"], [], ""),
    ],
)
def test_the_nearest_name_is_asked_for(names, known, said):
    assert did_you_mean(names, known) == said


DROP = {"method": "probe-drop"}
PIXART = "diffusers/PixArtTransformer2DModel"
NONE = "A method must be one of those that `hf-tokens list` names, got 'nonesuch'. Install the package that has it, or fix the name."
MISTAKES = {
    "an unknown method": ("llama", "nonesuch", ConfigError, NONE),
    "a misspelt method": ("llama", "ftpp", ConfigError, r"got 'ftpp'\. Did you mean 'ftp'\? Install the package"),
    "a knob out of its bounds": ("llama", {**DROP, "share": 1}, ConfigError, r"Config.share must be in \[0, 1\), got 1\. Meaning: "),
    "a knob of the wrong type": ("llama", {**DROP, "share": "a"}, ConfigError, "ProbeDropConfig.share must be of type float, got 'a'"),
    "a version to come": ("llama", {**DROP, "version": 9}, ConfigError, r"'probe-drop' has the versions 1 to 1, got 9. Update hf-tokens"),
    "a LoRA alone": (
        "llama",
        [{"method": "peft", "config": {"peft_type": "LORA"}}],
        ConfigError,
        r"one method beside its LoRAs, got \['LORA'\]. Call `peft.get_peft_model`",
    ),
    "no method": ("llama", [], ConfigError, r"An adapter has at least one method, got \[\]. Pass methods="),
    "no name": ("llama", {"share": 0.5}, ConfigError, "a dict with the key 'method', got {'share': 0.5}"),
    "a name that is none": ("llama", {"method": ["ftp"]}, ConfigError, r"a dict with the key 'method', got {'method': \['ftp'\]}"),
    "a class": ("llama", ProbeDropConfig, ConfigError, "The methods of an adapter are a name, a config, or a list of them, got <class"),
    "nothing": ("llama", None, ConfigError, "An adapter has at least one method, got None"),
    "a prompt tuning in the stack": (
        "llama",
        ["probe-drop", PromptTuningConfig(num_virtual_tokens=2)],
        ConfigError,
        "one of PEFT's that act on layers, such as LORA, got 'PROMPT_TUNING'. Put another kind around the model",
    ),
    "an adapter in the stack": ("llama", [HFTokensConfig(methods="probe-drop")], ConfigError, "such as LORA, got 'HF_TOKENS'"),
    "a layer out of range": ("llama", ProbeDropConfig(layers=(4,)), ConfigError, r"layers must lie in \[-4, 3\] for the 4 blocks"),
    "a layer below the range": ("llama", ProbeDropConfig(layers=(0, -5)), ConfigError, r"got \[-5\]\. Name blocks that exist"),
    "no layer": ("llama", ProbeDropConfig(layers=[]), ConfigError, r"layers must name a block, got \(\)\. Leave it out"),
    "an unknown stream": ("llama", ProbeDropConfig(stream="vision"), ConfigError, "must be a stream of the model, got 'vision'. It has"),
    "a misspelt stream": ("llama", ProbeDropConfig(stream="test"), ConfigError, r"got 'test'\. Did you mean 'text'\? It has text"),
    "the wrong kind of model": ("vit", "prefixkv", UnsupportedError, r"Method 'prefixkv' needs a causal stream.*got ViT.* with vision"),
    "an unknown PEFT method": ("llama", {"method": "peft", "config": {"peft_type": "X"}}, ConfigError, "such as LORA, got 'X'"),
    "ratios of other blocks": ("llama", {"method": "prefixkv", "ratios": [0.5]}, ConfigError, "for each of 4 blocks, got 1. Give one a"),
    "sparsities of other blocks": ("llama", {"method": "ftp", "sparsities": [0.5]}, ConfigError, "each of 4 blocks of the stream, got 1"),
    "shares of other stages": ("llama", {"method": "transprune", "prune": [1]}, ConfigError, "each of 1 layers in `prune`, got 3. Give"),
    "stages that are not there": ("llava", {"method": "transprune", "accumulate": [9]}, ConfigError, r"lie in \[1, 4\].*, got 9. Name"),
    "no pictures in the text": ("llama", "transprune", UnsupportedError, "tokens of pictures among them, got LlamaForCausalLM with text"),
    "factors of other parts": (PIXART, {"method": "toca", "types": [1.0]}, ConfigError, "attention, cross_attention, mlp, got 1. Give"),
    "the second of a stack": ("llama", ["probe-drop", "nonesuch"], ConfigError, NONE),
}


@pytest.mark.parametrize(("family", "methods", "error", "words"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_a_mistake_is_refused_and_the_model_is_as_it_was(family, methods, error, words):
    model = base(family)
    before, trainable = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=words) as caught:
        get_token_model(model, methods)
    assert WORDS.match(str(caught.value))
    assert not difference(before, snapshot(model))
    assert [p.requires_grad for p in model.parameters()] == trainable


def test_an_argument_that_would_be_lost_is_refused():
    config, model = HFTokensConfig(methods="probe-drop"), base()
    with pytest.raises(ConfigError, match=r"if one is passed, got one and \['modules_to_save'\] beside it. Pass them to HFTokensConfig"):
        get_token_model(model, config, modules_to_save=["lm_head"])
    for more in ({"target_modules": ["q_proj"]}, {"exclude_modules": ["layers.0"]}):
        with pytest.raises(ConfigError, match="A method's own `layers` and `stream` say where it acts, got target_modules="):
            get_token_model(model, "probe-drop", **more)


def test_a_knob_given_to_the_door_is_not_ignored():
    model = base()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"got \['module_to_save'\]\. Did you mean 'modules_to_save'\? Give a knob to its method"):
        get_token_model(model, "probe-drop", module_to_save=["lm_head"])
    words = r"takes methods and arguments of HFTokensConfig, got \['share'\]. Give a knob to its method"
    with pytest.raises(ConfigError, match=words):
        get_token_model(model, "probe-drop", share=0.5)
    assert not difference(before, snapshot(model))


def test_swapped_arguments():
    with pytest.raises(UnsupportedError, match="needs a torch module or a diffusers pipeline, got str"):
        get_token_model("probe-drop", base())


def test_a_failure_half_way_rolls_back(monkeypatch):
    """Whatever goes wrong in the middle of the attaching, nothing of it stays."""
    from hf_tokens.engine.block import BlockSurgery

    model, add = base(), BlockSurgery.add

    def fail_at_the_last(self, adapter, methods):
        if self.index == 3:
            raise RuntimeError("on purpose")
        return add(self, adapter, methods)

    monkeypatch.setattr(BlockSurgery, "add", fail_at_the_last)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="on purpose"):
        get_token_model(model, ProbeDropConfig(layers=(0, 1, 2, 3)))
    assert not difference(before, snapshot(model))


def test_a_failed_second_adapter_leaves_the_first():
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, ProbeInsertConfig())
    out = model(**specimen.inputs).logits
    before = snapshot(model)
    with pytest.raises(ConfigError):
        model.add_adapter("second", hf_tokens.HFTokensConfig(methods=[ProbeDropConfig(layers=(9,))]))
    assert not difference(before, snapshot(model))
    all_equal([model(**specimen.inputs).logits], [out])


@pytest.mark.parametrize(
    ("thing", "words"),
    [(3, "needs a torch module or a diffusers pipeline, got int"), (torch.nn.Linear(2, 2), "has no stream of Transformer blocks")],
    ids=["no model", "no blocks"],
)
def test_what_is_no_model(thing, words):
    with pytest.raises(HFTokensError, match=words):
        get_token_model(thing, "probe-drop")


# -- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    get_token_model(base(), ProbeInsertConfig()).save_pretrained(tmp_path)
    return tmp_path


def refused(folder, words, model=None):
    model = base() if model is None else model
    before = snapshot(model)
    with pytest.raises(AdapterError, match=words) as caught:
        hf_tokens.load(folder, model)
    assert WORDS.match(str(caught.value))
    assert not difference(before, snapshot(model))


def test_an_adapter_of_another_width(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=99)
    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, **small))
    refused(
        saved,
        "made for a base with text: 4 blocks of width 32 at model.layers, got text: 4 blocks of width 64 at model.layers",
        wide,
    )
    deep = LlamaForCausalLM(LlamaConfig(hidden_size=32, num_hidden_layers=6, **small))
    refused(saved, "text: 4 blocks of width 32 at model.layers, got text: 6 blocks of width 32", deep)


def test_an_adapter_of_another_kind_of_model(saved):
    refused(saved, "made for a base with text: 4 blocks", base("t5"))


def test_a_truncated_file(saved):
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(saved, "adapter_model.safetensors must be a whole safetensors file, got one that says: .* Download or save it again")


def test_a_file_that_is_no_safetensors(saved):
    (saved / "adapter_model.safetensors").write_bytes(b"<html>404</html>")
    refused(saved, "must be a whole safetensors file")


@pytest.mark.parametrize("text", ["", "{", "\xff"])
def test_a_config_that_is_no_json(saved, text):
    (saved / "adapter_config.json").write_bytes(text.encode("latin-1"))
    refused(saved, "adapter_config.json must be a whole JSON file, got one that says: .* Download or save it again")


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"peft_type": "nonesuch"}'])
def test_a_config_of_no_adapter(saved, text):
    (saved / "adapter_config.json").write_text(text)
    refused(saved, "hf_tokens.load needs an adapter of type HF_TOKENS, got (None|'nonesuch'). Use peft for other adapters")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file(saved, name):
    (saved / name).unlink()
    refused(saved, rf"An adapter has a file {name}, got .* without it. Save or download the adapter again")


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such", "~/adapter"])
def test_a_folder_that_is_not_there(name):
    refused(name, f"An adapter is a folder or a Hub id like owner/name, got '{name}'. There is no such folder")


def test_missing_and_foreign_tensors(saved):
    weights = saved / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({f"{key}.more": value for key, value in tensors.items()}, weights)
    refused(saved, "An adapter's file holds the 1 tensors of its methods, got 2 that are not right, the first .*bank missing. Save")


def test_tensors_of_another_shape(saved):
    weights = saved / "adapter_model.safetensors"
    save_file({key: torch.zeros(7, 3) for key in load_file(weights)}, weights)
    refused(saved, r"got 1 that are not right, the first .*bank of shape \[7, 3\]. Save the adapter again")


def test_a_damaged_adapter_beside_another(saved):
    """What is refused alone is refused beside another one, and so is a name that is taken."""
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, ProbeDropConfig(), adapter_name="first").eval()
    out = model(**specimen.inputs).logits
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    save_file({f"{key}.more": value for key, value in load_file(weights).items()}, weights)
    refused(saved, "got 2 that are not right", model)
    assert set(model.peft_config) == {"first"} and model.active_adapters == ["first"]
    weights.write_bytes(whole)
    with pytest.raises(ConfigError, match="has a name of its own, got 'first' for HF_TOKENS beside 'first' for HF_TOKENS"):
        hf_tokens.load(saved, model, adapter_name="first")
    all_equal([model(**specimen.inputs).logits], [out])
    assert hf_tokens.load(saved, model, adapter_name="second") is model


def test_an_adapter_of_another_type(tmp_path):
    from peft import get_peft_model

    get_peft_model(base(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    refused(tmp_path, "hf_tokens.load needs an adapter of type HF_TOKENS, got .*LORA")


def test_a_config_with_an_unknown_method(saved):
    path = saved / "adapter_config.json"
    data = json.loads(path.read_text())
    data["methods"] = [{"method": "nonesuch", "version": 1}]
    path.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="A method must be one of .*, got 'nonesuch'. Install the package that has it"):
        hf_tokens.load(saved, base())


def test_an_adapter_of_a_format_to_come(saved):
    path = saved / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hf_tokens_version": 2}))
    with pytest.raises(ConfigError, match="reads adapters of format 1, got hf_tokens_version=2. Update hf-tokens"):
        hf_tokens.load(saved, base())


# -- calls -----------------------------------------------------------------------------------------------------------


def test_a_static_cache_with_token_dropping():
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, ProbeDropConfig())
    with pytest.raises(UnsupportedError, match="needs a dynamic cache, got a cache of StaticLayer. Leave out `cache_implementation`"):
        model.generate(**specimen.inputs, max_new_tokens=2, cache_implementation="static")
    assert model.generate(**specimen.inputs, max_new_tokens=2, min_new_tokens=2).shape == (2, 18)


def test_no_ids_where_a_method_acts_on_images():
    row = ARCHITECTURES["llava"]
    asking = [info.name for info in hf_tokens.list_methods() if {"visual", "instruction"} & set(info.cls.signals)]
    for name in asking:
        model, inputs = row.build()
        surgery = get_token_model(model, name)
        text = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
        with pytest.raises(UnsupportedError, match="acts on visual tokens, got an input without any image or video token. Give the model"):
            surgery(**text)
        with surgery.disable_adapter():
            surgery(**text)
        surgery(**inputs)


def test_a_config_that_needs_other_parameters():
    model = get_token_model(base(), ProbeInsertConfig(tokens=2))
    with pytest.raises(UnsupportedError, match=r"keeps its parameters, got a config that needs {'bank': \(3, 32\)} in block 2. Take"):
        hf_tokens.set_method(model, ProbeInsertConfig(tokens=3))
    assert model.peft_config["default"].methods == [ProbeInsertConfig(tokens=2).to_dict()]


def test_a_merge_is_refused():
    model = get_token_model(base(), "probe-insert")
    for name in ("merge_adapter", "merge_and_unload"):
        with pytest.raises(UnsupportedError, match=r"cannot be merged, got a call of merge. Use `unload\(\)`"):
            getattr(model, name)()


@pytest.mark.parametrize("methods", [["probe-insert"], ["probe-insert", LoraConfig(r=2, target_modules=["q_proj"])]])
def test_a_sum_of_adapters_is_refused(methods):
    model = get_token_model(base(), methods)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    with pytest.raises(UnsupportedError, match=r"cannot be summed.*got a call of add_weighted_adapter. Let several act"):
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both")


@pytest.mark.parametrize("door", [hf_tokens.aux_loss, hf_tokens.unload, lambda model: hf_tokens.set_progress(model, 0.5)])
def test_doors_need_a_surgery(door):
    with pytest.raises(UnsupportedError, match="needs a model with a surgery, got LlamaForCausalLM. Call get_token_model first"):
        door(base())


@pytest.mark.parametrize("progress", [1.5, -0.1, float("nan"), "half", None])
def test_progress_is_a_share(progress):
    model = get_token_model(base(), "probe-drop")
    with pytest.raises(ConfigError, match=r"is in \[0, 1\], got .*\. Pass steps done / steps to do"):
        hf_tokens.set_progress(model, progress)


def test_calibrating_without_data_or_without_need():
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, "probe-drop")
    with pytest.raises(UnsupportedError, match="`calibrate` needs at least one batch, got none"):
        hf_tokens.calibrate(model, [])
    with pytest.raises(UnsupportedError, match=r"an adapter that acts, one of \['default'\], got 'nonesuch'. Switch to it"):
        hf_tokens.calibrate(model, [specimen.inputs], "nonesuch")
    assert hf_tokens.calibrate(model, [specimen.inputs]) == {}


def test_peft_s_own_door_refuses_the_same(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    wide = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=32, vocab_size=99))
    before = snapshot(wide)
    with pytest.raises(AdapterError, match="made for a base with text: 4 blocks of width 32"):
        PeftModel.from_pretrained(wide, saved)
    assert not difference(before, snapshot(wide))


def test_an_adapter_of_another_part(tmp_path):
    get_token_model(base(), "probe-insert").save_pretrained(str(tmp_path))
    with pytest.raises(AdapterError, match=r"4 blocks of width 32 at model.layers, got text: 4 blocks of width 32 at layers\. Load"):
        hf_tokens.load(tmp_path, zoo.build("llama").model.model)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: hf_tokens.list_methods("nonesuch"),
            ConfigError,
            r"A role with methods is one of \[.*'TokenBank'.*\], got 'nonesuch'\. Leave it",
        ),
        (lambda: hf_tokens.list_methods("Tokenbank"), ConfigError, r"got 'Tokenbank'\. Did you mean 'TokenBank'\? Leave it out"),
        (lambda: hf_tokens.save_adapter(base(), "nowhere"), UnsupportedError, "needs a model with a surgery, got LlamaForCausalLM"),
        (lambda: hf_tokens.set_method(base(), "probe-drop"), UnsupportedError, "needs a model with a surgery, got LlamaForCausalLM"),
        (lambda: get_token_model(torch.compile(base()), "probe-drop"), UnsupportedError, "Got one that is compiled already. Attach first"),
    ],
    ids=["an unknown role", "a misspelt role", "nothing to save", "nothing to change", "compiled"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_cannot_be_asked(call, error, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        call()
    assert not list(tmp_path.iterdir())


def test_a_broken_package_of_methods_is_named(monkeypatch):
    entry = EntryPoint("mine", "nonesuch.methods", "hf_tokens.methods")
    vars(entry)["dist"] = SimpleNamespace(name="my-methods")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match="'mine' of my-methods, nonesuch.methods, which says: ModuleNotFoundError"):
        registry.discover.__wrapped__()
