"""Configs: one declaration gives the check, the words, JSON and the zero; and the registry says what a method must bring."""

import copy
import dataclasses
import inspect
import json
import math
import pickle
from dataclasses import dataclass

import peft
import pytest
from torch import Tensor

from hf_tokens import ConfigError, HFTokensConfig, MethodConfig, TokenReducer, method_info, option, register
from hf_tokens.peft.config import plain_form
from hf_tokens.roles.config import inside, interval, matches
from hf_tokens.roles.registry import METHODS, method_config, read_card
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig


@dataclass(frozen=True)
class Toy(MethodConfig):
    count: int = option(3, ge=0, le=9, zero=0, help="How many.")
    share: float = option(0.5, gt=0, lt=1, help="Which part.")
    mode: str = option("mean", choices=("mean", "max"), help="How.")
    stages: tuple[float, ...] = option((0.1, 0.2), ge=0, le=1, help="Where.")
    limit: float | None = option(None, ge=0, help="At most.")
    exact: bool = option(False, help="Whether.")


Toy.method = "toy"

WORDS = [
    ({"count": -1}, "Toy.count must be in [0, 9], got -1. Meaning: How many."),
    ({"count": 10}, "Toy.count must be in [0, 9], got 10. Meaning: How many."),
    ({"count": 1.5}, "Toy.count must be of type int, got 1.5. Meaning: How many."),
    ({"count": True}, "Toy.count must be of type int, got True. Meaning: How many."),
    ({"share": 0}, "Toy.share must be in (0, 1), got 0. Meaning: Which part."),
    ({"share": 1.0}, "Toy.share must be in (0, 1), got 1.0. Meaning: Which part."),
    ({"share": math.nan}, "Toy.share must be in (0, 1), got nan. Meaning: Which part."),
    ({"share": math.inf}, "Toy.share must be in (0, 1), got inf. Meaning: Which part."),
    ({"share": "half"}, "Toy.share must be of type float, got 'half'. Meaning: Which part."),
    ({"mode": "sum"}, "Toy.mode must be one of {mean, max}, got 'sum'. Meaning: How."),
    ({"mode": "meen"}, "Toy.mode must be one of {mean, max}, got 'meen'. Did you mean 'mean'? Meaning: How."),
    ({"stages": (0.1, 2)}, "Toy.stages must be in [0, 1], got (0.1, 2). Meaning: Where."),
    ({"stages": ("a",)}, "Toy.stages must be of type tuple[float, ...], got ('a',). Meaning: Where."),
    ({"limit": -1}, "Toy.limit must be in [0, inf), got -1. Meaning: At most."),
    ({"limit": math.inf}, "Toy.limit must be in [0, inf), got inf. Meaning: At most."),
    ({"limit": "no"}, "Toy.limit must be of type float | None, got 'no'. Meaning: At most."),
    ({"exact": 1}, "Toy.exact must be of type bool, got 1. Meaning: Whether."),
    ({"layers": "all"}, "Toy.layers must be of type tuple[int, ...] | None, got 'all'. Meaning: Blocks the method acts on;"),
]


@pytest.mark.parametrize(("knobs", "words"), WORDS, ids=[next(iter(knobs)) for knobs, _ in WORDS])
def test_words(knobs, words):
    with pytest.raises(ConfigError) as caught:
        Toy(**knobs)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("knobs", [{"count": 0}, {"count": 9}, {"share": 1e-9}, {"limit": None}, {"limit": 0}, {"stages": []}])
def test_bounds_are_inside_where_they_say_so(knobs):
    Toy(**knobs)


def test_lists_become_tuples_and_json_comes_back():
    toy = Toy(stages=[0.5, 1], layers=[0, -1], count=4)
    assert toy.stages == (0.5, 1) and toy.layers == (0, -1)
    data = json.loads(json.dumps(toy.to_dict()))
    assert data == {"method": "toy", "version": 1, "stages": [0.5, 1], "layers": [0, -1], "count": 4}
    assert Toy.from_dict(data) == toy
    assert Toy().to_dict() == {"method": "toy", "version": 1}


def test_zero_strength_keeps_the_other_knobs():
    assert Toy(share=0.3).at_zero() == Toy(share=0.3, count=0)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Toy().count = 1


def test_unknown_keys_are_named_and_dropped():
    with pytest.warns(UserWarning, match=r"hf-tokens: Toy does not know \['b', 'c'\]; these keys are ignored\.$"):
        assert Toy.from_dict({"method": "toy", "c": 1, "b": 2, "count": 1}) == Toy(count=1)
    with pytest.warns(UserWarning, match=r"\['cuont', 'shares'\]; these keys are ignored\. Did you mean 'count' and 'share'\?$"):
        assert Toy.from_dict({"method": "toy", "cuont": 1, "shares": 0.1}) == Toy()


@pytest.mark.parametrize("make", [Toy, lambda **knobs: dataclasses.replace(Toy(), **knobs)], ids=["new", "replaced"])
def test_an_unknown_knob_is_named_with_the_nearest(make):
    with pytest.raises(ConfigError) as caught:
        make(cuont=1, count=2)
    assert str(caught.value) == "Toy takes the knobs that it declares, got 'cuont'. Did you mean 'count'? `help(Toy)` names them."
    with pytest.raises(ConfigError, match=r"got 'nonesuch'\. `help\(Toy\)` names them\.$"):
        make(nonesuch=1)
    assert set(inspect.signature(Toy).parameters) == {field.name for field in dataclasses.fields(Toy)}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_config_is_copied_and_pickled(protocol):
    config = ProbeDropConfig(share=0.25)
    assert pickle.loads(pickle.dumps(config, protocol)) == copy.copy(config) == copy.deepcopy(config) == config


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"ge": 0, "lt": 1}, "[0, 1)"),
        ({"gt": 0}, "(0, inf)"),
        ({"le": 2.5}, "(-inf, 2.5]"),
        ({"choices": ("a", "b")}, "{a, b}"),
        ({}, "(-inf, inf)"),
    ],
)
def test_interval(bounds, text):
    assert interval(bounds) == text
    assert not any(inside(value, bounds) for value in (math.nan, math.inf, -math.inf))


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [(1, float, True), (True, float, False), (True, int, False), ((1, 2), tuple[int, ...], True), ([1, "a"], tuple[int, ...], False),
     (None, int | None, True), (None, int, False), ({}, dict, True), ({}, dict[str, int], True), ("a", str, True)],
)  # fmt: skip
def test_matches(value, hint, fits):
    assert matches(value, hint) is fits


# -- the registry ----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr("hf_tokens.roles.registry.METHODS", dict(METHODS))


def test_unknown_signals_are_refused_at_import(registry):
    words = r"Other.assign may ask for signals of its role, .*, got \['colour', 'query'\]. Did you mean 'queries'\? Rename the arguments."
    with pytest.raises(ConfigError, match=words):

        @register("other", Toy)
        class Other(TokenReducer):
            def assign(self, hidden: Tensor, colour: Tensor, query: Tensor):
                return None


def test_a_name_is_taken_once(registry):
    with pytest.raises(ConfigError, match="registered once per version, got 'probe-drop' v1 again. Choose another name."):

        @register("probe-drop", Toy)
        class Other(TokenReducer):
            def assign(self, hidden: Tensor):
                return None


def test_unknown_names_and_versions():
    with pytest.raises(ConfigError, match=r"A method must be one of those that `hf-tokens list` names, got 'nonesuch'\. Install the"):
        method_info("nonesuch")
    with pytest.raises(ConfigError, match=r"got 'Probe_Drop'\. Did you mean 'probe-drop'\? Install the package that has it"):
        method_info("Probe_Drop")
    with pytest.raises(ConfigError, match=r"Method 'probe-drop' has the versions 1 to 1, got 7. Update hf-tokens"):
        method_info("probe-drop", 7)


def test_what_a_file_of_an_older_version_leaves_unsaid_is_as_it_was(registry):
    @dataclass(frozen=True)
    class AgedConfig(MethodConfig):
        share: float = option(0.7, ge=0, le=1, was={1: 0.5, 3: 0.6}, help="Which part.")
        exact: bool = option(True, was={2: False}, help="Whether.")
        count: int = option(3, ge=0, help="How many.")

    @register("aged", AgedConfig, version=4)
    class Aged(TokenReducer):
        def assign(self, hidden: Tensor):
            return None

    read = [method_config({"method": "aged", "version": version}) for version in (1, 2, 3, 4)]
    assert [(c.share, c.exact, c.count) for c in read] == [(0.5, False, 3), (0.6, False, 3), (0.6, True, 3), (0.7, True, 3)]
    assert method_config({"method": "aged", "version": 1, "share": 0.7}) == AgedConfig(exact=False)
    assert method_config({"method": "aged"}) == method_config("aged") == AgedConfig()
    assert method_config(read[0].to_dict()) == read[0] and read[0].to_dict()["version"] == 4
    for version in (0, 5, True, "1"):
        with pytest.raises(ConfigError, match=f"'aged' has the versions 1 to 4, got {version!r}"):
            method_config({"method": "aged", "version": version})


@pytest.mark.parametrize("spec", ["probe-drop", {"method": "probe-drop"}, ProbeDropConfig()])
def test_a_method_may_be_named_in_three_ways(spec):
    assert method_config(spec) == ProbeDropConfig()


DOORS_OF_PEFT = {
    "get_peft_model": lambda model, config: peft.get_peft_model(model, config),
    "add_adapter": lambda model, config: peft.get_peft_model(model, ProbeInsertConfig(), "first").add_adapter("default", config),
    "inject_adapter_in_model": lambda model, config: peft.inject_adapter_in_model(config, model),
}


@pytest.mark.parametrize("door", DOORS_OF_PEFT)
def test_where_a_config_of_peft_s_is_due_a_method_s_is_an_adapter_of_one(door):
    model = zoo.build("llama").model
    DOORS_OF_PEFT[door](model, ProbeDropConfig())
    config = model.peft_config["default"]
    assert type(config) is HFTokensConfig and config.stack() == [ProbeDropConfig()]


def test_what_peft_notes_on_a_method_s_config_is_the_adapter_s():
    model, config = zoo.build("llama").model, ProbeDropConfig()
    model.name_or_path, config.task_type = "me/base", "CAUSAL_LM"
    surgery = peft.get_peft_model(model, config, revision="v1")
    adapter = surgery.peft_config["default"]
    assert isinstance(surgery, peft.PeftModelForCausalLM)
    assert (adapter.base_model_name_or_path, adapter.revision, adapter.task_type) == ("me/base", "v1", "CAUSAL_LM")
    assert config == ProbeDropConfig() and config.to_dict() == {"method": "probe-drop", "version": 1}


def test_a_method_s_config_is_peft_s_and_frozen_all_the_same(tmp_path):
    config = ProbeDropConfig()
    assert (
        isinstance(config, peft.PeftConfig) and type(config).__name__ == "ProbeDropConfig" and repr(config).startswith("ProbeDropConfig(")
    )
    for again in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert again == config and hash(again) == hash(config) and type(again) is type(config)
    for name in ("layers", "typo", "peft_type"):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{name}'"):
            setattr(config, name, 1)
    with pytest.raises(
        AttributeError, match="has the knobs that it declares, and what every config of PEFT's has, got 'typo'. What belongs"
    ):
        _ = config.typo
    with pytest.raises(ConfigError, match="saved in that of an adapter, got `ProbeDropConfig.save_pretrained`. Save the model, or"):
        config.save_pretrained(tmp_path)


@pytest.mark.parametrize("spec", [3, None, {"name": "probe-drop"}, ["probe-drop"]])
def test_what_is_no_method(spec):
    with pytest.raises(ConfigError, match="A method is a name, a MethodConfig, or a dict with the key 'method', got "):
        method_config(spec)


def test_a_card_is_read_by_its_headings():
    checked = "a/b@01234567, all: largest difference 0."
    headings = (
        f"Paper:   P, arXiv:1234.56789\n         and more\nNeeds:   training\nMaths:   x = y\nDiffers: nothing.\nChecked: {checked}\n"
    )
    card = read_card(f"A claim.\n\n{headings}\n>>> 1\n1\n")
    paper = "P, arXiv:1234.56789\nand more"
    known = {"paper": paper, "needs": "training", "maths": "x = y", "differs": "nothing.", "checked": checked}
    assert card == {"claim": "A claim.", **known}


# -- the adapter's config --------------------------------------------------------------------------------------------


def test_a_stack_is_kept_in_order_and_plain():
    config = HFTokensConfig(methods=[ProbeDropConfig(share=0.25), "probe-insert"])
    assert config.methods == [{"method": "probe-drop", "version": 1, "share": 0.25}, {"method": "probe-insert", "version": 1}]
    assert config.stack() == [ProbeDropConfig(share=0.25), ProbeInsertConfig()]
    assert not config.is_prompt_learning


def test_an_adapter_has_a_method():
    with pytest.raises(ConfigError, match="An adapter has at least one method, got None. Pass methods="):
        HFTokensConfig()


def test_a_lora_among_the_methods():
    from peft import LoraConfig

    config = HFTokensConfig(methods=[LoraConfig(r=3, target_modules=["q", "k"])])
    json.dumps(config.methods)
    (inner,) = config.peft_configs()
    assert inner.r == 3 and inner.target_modules == {"q", "k"} and config.stack() == []
    with pytest.raises(ConfigError, match="A 'peft' method has a config with a 'peft_type'"):
        plain_form({"method": "peft", "config": {"r": 3}})


def test_one_method_is_a_stack_of_one():
    want = HFTokensConfig(methods=[ProbeDropConfig(share=0.25)]).methods
    for one in (ProbeDropConfig(share=0.25), {"method": "probe-drop", "share": 0.25}, (ProbeDropConfig(share=0.25),)):
        assert HFTokensConfig(methods=one).methods == want
    assert HFTokensConfig(methods="probe-drop").methods == [{"method": "probe-drop", "version": 1}]
