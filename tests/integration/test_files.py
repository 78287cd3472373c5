"""What stands in an adapter's files is exactly the adapter's own, or it is refused by every door and the base is as it was."""

import itertools
import json
import os
import re
import resource
import sys
import time

import gates
import pytest
import torch
from damage import ADAPTERS, FIRST, MAKERS, MORE, ODD, change, filled, held, killed_in, leaves, planted, without_digest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from tolerances import all_equal

import hf_tokens
from hf_tokens import AdapterError, ConfigError, DeepPromptConfig, HFTokensConfig, HFTokensError, get_token_model
from hf_tokens.peft.patterns import check_patterns
from hf_tokens.peft.saving import ANNOUNCED
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig


def beside(door):
    """A door of a model that has another adapter already."""

    def load(folder, base):
        model = get_token_model(base, ProbeDropConfig(), adapter_name="first")
        try:
            return door(model, folder)
        except HFTokensError:
            assert set(model.peft_config) == {"first"} and model.active_adapters == ["first"]
            raise
        finally:
            model.unload()

    return load


DOORS = {
    "hf_tokens.load": lambda folder, base: hf_tokens.load(folder, base),
    "PeftModel.from_pretrained": lambda folder, base: PeftModel.from_pretrained(base, folder),
    "on the meta device": lambda folder, base: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "transformers' load_adapter": lambda folder, base: base.load_adapter(folder),
    "hf_tokens.load beside another": beside(lambda model, folder: hf_tokens.load(folder, model, adapter_name="second")),
    "load_adapter": beside(lambda model, folder: model.load_adapter(folder, "second")),
}
CASES = [
    *(("a bank", what, change) for what, change in FIRST.items()),
    *(("a stack", what, FIRST[what]) for what in ("missing", "NaN", str(torch.int64))),
    *((adapter, what, more) for adapter in ("no parameters", "a bank") for what, more in MORE.items()),
    ("a stack", "inside the base", MORE["inside the base"]),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folders = {}
    for name, make in ADAPTERS.items():
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        make().save_pretrained(folders[name])
    return folders


def refused(door, folder, words):
    base = zoo.build("llama").model
    before = snapshot(base)
    with pytest.raises(HFTokensError, match=words):
        door(str(folder), base)
    assert not difference(before, snapshot(base))


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize(("adapter", "what", "changed"), CASES, ids=[f"{adapter}-{what}" for adapter, what, _ in CASES])
def test_a_tensor_that_is_not_the_adapters_own_is_refused_and_the_base_is_as_it_was(saved, tmp_path, door, adapter, what, changed):
    words = "are finite, got .* with NaN or infinity" if what in ("NaN", "infinite") else "file holds the .* tensors of its methods, got"
    refused(door, change(saved[adapter], tmp_path, changed), words)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floating_numbers_of_any_width_are_accepted(saved, tmp_path, door, kind):
    for adapter in ADAPTERS:
        folder = saved[adapter]
        save_file(
            {key: value.to(kind) for key, value in load_file(folder / "adapter_model.safetensors").items()},
            tmp_path / "adapter_model.safetensors",
        )
        without_digest(folder, tmp_path)
        door(str(tmp_path), zoo.build("llama").model)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("kind", ["nothing", "a pipe", "a folder", "a link to itself", "a device"])
def test_what_is_no_file_of_tensors_is_refused_and_the_base_is_as_it_was(saved, tmp_path, door, kind):
    weights = change(saved["a bank"], tmp_path, {}) / "adapter_model.safetensors"
    weights.unlink()
    made = {
        "a pipe": os.mkfifo,
        "a folder": os.mkdir,
        "a link to itself": lambda w: w.symlink_to(w),
        "a device": lambda w: w.symlink_to("/dev/zero"),
    }
    made.get(kind, lambda w: None)(weights)
    refused(door, tmp_path, "adapter_model.safetensors")


def test_a_pickle_of_tensors_is_read_as_one_and_compared_too(tmp_path):
    model, base = ADAPTERS["a stack"](), zoo.build("llama").model
    model.save_pretrained(tmp_path, safe_serialization=False)
    again = PeftModel.from_pretrained(base, tmp_path)
    all_equal(list(get_peft_model_state_dict(again).values()), list(get_peft_model_state_dict(model).values()))
    pickle = tmp_path / "adapter_model.bin"
    tensors = torch.load(pickle)
    for bad, words in (
        ({key: value + 1 for key, value in tensors.items()}, "have the digest that it names"),
        ({**tensors, "base_model.model.model.norm.weight": torch.zeros(32)}, "holds the .* tensors of its methods"),
        ([1], "must be a whole file of tensors"),
    ):
        torch.save(bad, pickle)
        refused(DOORS["PeftModel.from_pretrained"], tmp_path, words)


@pytest.mark.parametrize("what", ["missing", "NaN", "of the base"])
def test_a_state_that_is_not_the_adapters_own_is_refused_in_a_model_that_has_it(saved, tmp_path, what):
    folder = change(saved["a bank"], tmp_path, {**FIRST, **MORE}[what])
    model = ADAPTERS["a bank"]()
    before = snapshot(model)
    for load in (
        lambda: set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors")),
        lambda: model.load_adapter(str(folder), "default"),
    ):
        with pytest.raises(AdapterError):
            load()
        assert not difference(before, snapshot(model))


@pytest.mark.filterwarnings("ignore")
def test_what_peft_has_for_layers_is_loaded_in_a_stack(tmp_path):
    """Among them are some whose beginning cannot be tried without the numbers of the base."""
    tried = []
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        try:
            model = get_token_model(zoo.build("llama").model, ["probe-insert", config(target_modules=["q_proj"])]).eval()
        except (ValueError, TypeError, ImportError):  # it needs more to be told, or does not suit a model so small
            continue
        model.save_pretrained(tmp_path / str(kind))
        again = get_peft_model_state_dict(hf_tokens.load(tmp_path / str(kind), zoo.build("llama").model))
        all_equal(list(again.values()), list(get_peft_model_state_dict(model).values()), str(kind))
        tried.append(str(getattr(kind, "value", kind)))
    assert {"LORA", "ADAMSS", "BOFT", "FROD", "UNILORA"} <= set(tried) and len(tried) > 20


# -- saving ----------------------------------------------------------------------------------------------------------


def of(makers):
    return [pytest.param(maker, marks=gates.add_adapter if maker == "transformers" else ()) for maker in makers]


LIBRARIES = ("hf_tokens.load", "PeftModel.from_pretrained", "transformers' load_adapter")  # a door of each


@pytest.mark.parametrize("maker", of(MAKERS))
def test_tensors_of_one_save_and_the_config_of_another_are_refused_by_every_door(tmp_path, maker):
    make, save = MAKERS[maker]
    for value in (1, 2):
        save(filled(lambda value=value: make(value), value), tmp_path / str(value))
        hf_tokens.load(tmp_path / str(value), zoo.build("llama").model)
    (tmp_path / "2" / "adapter_config.json").write_bytes((tmp_path / "1" / "adapter_config.json").read_bytes())
    words = "have the digest that it names, sha256:.* got sha256:.* delete `digest` there if you changed it yourself"
    for door in LIBRARIES:
        refused(DOORS[door], tmp_path / "2", words)
    without_digest(tmp_path / "1", tmp_path / "2")
    hf_tokens.load(tmp_path / "2", zoo.build("llama").model)


def test_a_file_that_was_written_anew_with_the_same_tensors_is_the_same(saved, tmp_path):
    tensors = load_file(change(saved["a stack"], tmp_path, {}) / "adapter_model.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "adapter_model.safetensors", metadata={"format": "pt", "by": "somebody"})
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != (saved["a stack"] / "adapter_model.safetensors").read_bytes()
    for door in LIBRARIES:
        DOORS[door](str(tmp_path), zoo.build("llama").model)


def test_a_config_saved_by_itself_says_nothing_of_tensors(saved, tmp_path):
    config = HFTokensConfig.from_pretrained(str(saved["a bank"]))
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["digest"] is None


def kept_behind_kills(maker, folder, load=hf_tokens.load):
    """What a folder holds when saving something new into it was killed in each of its steps; the next save leaves nothing else there."""
    make, save = MAKERS[maker]
    old, new = (filled(lambda value=value: make(value), value) for value in (1, 2))
    save(old, folder)
    said, announced = None, folder / ANNOUNCED / "adapter_config.json"
    files, seen = {path.name for path in folder.iterdir()}, []
    for step in itertools.count():
        (folder / ".tmpAbC123").write_bytes(bytes(100))  # what safetensors leaves
        done = killed_in(step, save, new, folder)
        seen.append(held(folder, load))
        said = announced.read_bytes() if announced.is_file() else said
        assert not done or said in (None, (folder / "adapter_config.json").read_bytes())
        save(old, folder)
        assert {path.name for path in folder.iterdir()} == files
        if done:
            return seen


@pytest.mark.parametrize(
    ("maker", "door"), [*(("PEFT", door) for door in LIBRARIES[:2]), ("save_adapter of a model by itself", LIBRARIES[0])]
)
def test_a_save_that_is_killed_leaves_the_old_or_the_new_and_no_litter_behind_the_next(tmp_path, maker, door):
    seen = kept_behind_kills(maker, tmp_path, DOORS[door])
    assert seen[0] == (1, 1) and seen[-1] == (2, 2) and set(seen) == {(1, 1), (2, 2)}


@gates.add_adapter
def test_a_save_of_transformers_that_is_killed_leaves_the_old_or_the_new_or_is_refused(tmp_path):
    seen = kept_behind_kills("transformers", tmp_path)
    assert seen[0] == (1, 1) and seen[-1] == (2, 2) and set(seen) <= {(1, 1), (2, 2), "refused"}


def test_what_is_not_a_saves_own_stays(saved, tmp_path):
    """Files that only look like what a killed save leaves."""
    kept = [tmp_path / name for name in (".tmpAbC123", ".tmp", ".tmpAbC1234", "tmpAbC123")]
    for path in kept:
        path.write_text("somebody's notes")
    (tmp_path / ".tmpAbC124").mkdir()
    ADAPTERS["a bank"]().save_pretrained(tmp_path)
    assert all(path.read_text() == "somebody's notes" for path in kept) and (tmp_path / ".tmpAbC124").is_dir()


# -- the class of the base -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("library", "name"),
    [
        ("stranger", "Model"),
        ("transformers_stranger", "Model"),
        ("os", "system"),
        ("subprocess", "Popen"),
        ("transformers", "pipeline"),
        ("transformers", "AutoTokenizer"),
        ("transformers.nonesuch", "AutoModel"),
        ("transformers", "nonesuch"),
        ("transformers.modeling_utils", "os"),
        ("diffusers", "DDIMScheduler"),
        (None, "AutoModel"),
        ("transformers", ["AutoModel"]),
    ],
)
def test_no_module_of_a_stranger_is_imported(saved, tmp_path, monkeypatch, library, name):
    folder = change(saved["a bank"], tmp_path, {})
    for module in ("stranger", "transformers_stranger"):
        (tmp_path / f"{module}.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Model: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = json.loads((folder / "adapter_config.json").read_text())
    data |= {"auto_mapping": {"parent_library": library, "base_model_class": name}, "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(data))
    before = set(sys.modules)
    with pytest.raises(AdapterError, match="names a class of models of transformers or diffusers, got .* Load the base yourself"):
        hf_tokens.load(tmp_path)
    assert not (tmp_path / "ran").exists() and not {"stranger", "transformers_stranger"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("library", "name"), [("transformers", "AutoModelForCausalLM"), (None, None), ("transformers", "LlamaForCausalLM")]
)
def test_the_base_that_an_adapter_names_is_loaded(tmp_path, library, name):
    specimen = zoo.build("llama")
    specimen.model.save_pretrained(tmp_path / "base")
    model = get_token_model(type(specimen.model).from_pretrained(tmp_path / "base"), ProbeInsertConfig())
    model.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    data = json.loads(path.read_text())
    assert data["auto_mapping"]["parent_library"].startswith("transformers.models.llama")
    if library is not None:
        path.write_text(json.dumps({**data, "auto_mapping": {"parent_library": library, "base_model_class": name}}))
    with torch.no_grad():
        all_equal([hf_tokens.load(tmp_path / "adapter").eval()(**specimen.inputs).logits], [model.eval()(**specimen.inputs).logits])


def refused_by(door, folder, family, words):
    base = zoo.build(family).model
    before = snapshot(base)
    with pytest.raises(AdapterError, match=words):
        door(str(folder), base)
    assert not difference(before, snapshot(base))


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_model_of_another_type_with_blocks_of_the_same_shape_is_refused(tmp_path, door, family):
    get_token_model(zoo.build("llama").model, [DeepPromptConfig(tokens=3)]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    refused_by(door, tmp_path, family, f"was made for a model of type 'llama', got '{family}'. .* or delete `base_type` from its config")
    config = json.loads(path.read_text())
    assert config.pop("base_type") == "llama"
    path.write_text(json.dumps(config))  # as earlier releases saved it
    door(str(tmp_path), zoo.build(family).model)


@pytest.mark.parametrize("file", ["config.json", "model_index.json"])
def test_a_base_model_in_the_place_of_an_adapter_is_called_one(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(AdapterError, match=r"needs an adapter, got .*, which is a base model. Load it by its own `from_pretrained`"):
        hf_tokens.load(tmp_path)


# -- configs ---------------------------------------------------------------------------------------------------------


def load_config(folder, to, text):
    """Load an adapter with another text as its config: it works, or it is one of our errors and the model is as it was."""
    change(folder, to, {})
    (to / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    base = zoo.build("llama").model
    before = snapshot(base)
    try:
        hf_tokens.load(to, base).unload()
    except HFTokensError as error:
        assert not difference(before, snapshot(base))
        return str(error)
    assert not difference(before, snapshot(base))
    return ""


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_a_config_with_anything_in_it_works_or_is_one_error(saved, tmp_path_factory, data):
    folder = saved[data.draw(st.sampled_from(["a bank", "a stack"]))]
    config = json.loads((folder / "adapter_config.json").read_text())
    path = data.draw(st.sampled_from(list(leaves(config))))
    load_config(folder, tmp_path_factory.mktemp("odd"), json.dumps(planted(config, path, data.draw(st.sampled_from(ODD)))))


HANG = (
    *("(([a-z._0-9])+)+Z", "(.*)*x", ".*.*.*.*.*.*x", r"(\w+\.?)+x", r"(\w+)\1+x", "(?=(.*)*)q", "(?:(?:.?){50}){50}x", "((?:)){1000000}x"),
    "(.|.)" * 25 + "x",
)
USUAL = (
    *(r".*\.(q|v)_proj", r"^(?!.*visual).*(?:k_proj|q_proj).*", r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"),
    r"(?:.*?(?:language|layers).*?(?:self_attn|attention|attn|mlp|ffn).*?(?:k_proj|v_proj|q_proj|o_proj|up_proj).*?)|(?:\bmodel\.[\d]{1,}\.q)",
)


def with_knobs(saved, to, **knobs):
    """An adapter with other knobs in the config of its LoRA."""
    config = json.loads((change(saved["a stack"], to, {}) / "adapter_config.json").read_text())
    config["methods"][1]["config"] |= knobs
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("knob", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
@pytest.mark.parametrize("pattern", HANG)
def test_a_pattern_that_would_not_come_to_an_end_is_found(pattern, knob):
    names = [name for name, _ in zoo.build("llama").model.named_modules()]
    knobs = {"target_modules": ["q_proj"], "layers_to_transform": 1, knob: {pattern: 2} if knob == "rank_pattern" else pattern}
    if knob == "target_modules":
        del knobs["layers_to_transform"]
    with pytest.raises(ConfigError, match="takes at most 100000 steps with the name of a module, got .* Name the modules, in a list"):
        check_patterns(LoraConfig(**knobs), names)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_pattern_that_would_not_come_to_an_end_is_refused(saved, tmp_path, door):
    refused(door, with_knobs(saved, tmp_path, target_modules=HANG[0]), "takes at most 100000 steps")
    refused(door, with_knobs(saved, tmp_path, alpha_pattern={f"q{i}": 2 for i in range(2000)}), "has at most 1000 keys, got 2000")


@pytest.mark.parametrize("pattern", USUAL)
def test_usual_patterns_are_taken(tmp_path, pattern):
    model = get_token_model(zoo.build("llama").model, ["probe-insert", LoraConfig(r=2, target_modules=pattern)])
    model.save_pretrained(tmp_path)
    for door in (DOORS["hf_tokens.load"], DOORS["PeftModel.from_pretrained"]):
        state = get_peft_model_state_dict(door(str(tmp_path), zoo.build("llama").model))
        all_equal(list(state.values()), list(get_peft_model_state_dict(model).values()))


LARGE = [
    *(("probe-insert", knobs) for knobs in ({"tokens": 10**9}, {"layers": [10**9]})),
    *((kind, {"r": 10**9}) for kind in ("LORA", "BOFT", "UNILORA")),
    *(("PEANUT", {"depth": depth}) for depth in (10**5, 10**9)),
    ("UNILORA", {"theta_d_length": 10**9}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "knobs"), LARGE)
def test_what_a_config_asks_for_is_bounded_by_what_its_file_holds(tmp_path, kind, knobs):
    own = kind == "probe-insert"
    lora = [] if own else [{"method": "peft", "config": {"peft_type": kind, "target_modules": ["q_proj"]}}]
    get_token_model(zoo.build("llama").model, ["probe-insert", *lora]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    inner = config["methods"][0] if own else config["methods"][1]["config"]
    inner |= knobs
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    start, most = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    words = "is at most 16777216, got|no larger ones, than its file holds|holds the .* tensors of its methods|must go into"
    refused(DOORS["PeftModel.from_pretrained"], tmp_path, words)
    assert time.process_time() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 500 << 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "[" * 100_000, "must be a whole JSON file, got one that says: RecursionError"),
        (lambda text: text[:-2] + f', "more": {"1" * 6000}}}', "must be a whole JSON file, got one that says: ValueError"),
        (lambda text: text + " " * (1 << 20), "has at most 1048576 bytes"),
        (lambda text: text.replace('"methods": [', '"methods": [' + '{"method": "ftp"},' * 1000), "has at most 100 methods, got 1002"),
        (lambda text: text.replace('"tokens": 3', '"tokens": 1000000000000'), "is at most 16777216, got 1000000000000"),
        (lambda text: text.replace('"r": 2', '"r": 1000000000000'), "of shape"),
        (lambda text: text.replace('"lora_alpha": 8', '"lora_alpha": 1e999'), "no finite number"),
        (lambda text: text.replace('"r": 2', '"r": "2"'), "must go into LlamaForCausalLM, got one that says: TypeError"),
        (
            lambda text: text.replace('"auto_mapping"', '"self": 3, "auto_mapping"'),
            "must be that of an adapter, got one that says: TypeError",
        ),
    ],
)
def test_a_config_beyond_all_bounds_is_refused_before_anything_is_allocated(saved, tmp_path, change, words):
    text = (saved["a stack"] / "adapter_config.json").read_text()
    assert change(text) != text
    assert re.search(words, load_config(saved["a stack"], tmp_path, change(text)))
