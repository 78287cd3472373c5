"""What every method owes without any model: a config that says its bounds, survives JSON and refuses bad values, and a whole card."""

import dataclasses
import doctest
import inspect
import json
import math
import sys
import types
import typing
from dataclasses import replace

import pytest

from hf_tokens.errors import ConfigError
from hf_tokens.roles.config import interval, matches
from hf_tokens.roles.registry import NEEDS, method_config
from hf_tokens.roles.signals import SIGNALS

from ..pairs import pairs_of, planned, refused

WRONG = {int: ("1", 1.5, True), float: ("1", None, False), str: (1, None), bool: ("yes", None)}


def plain_types(hint) -> tuple:
    """The types inside of an optional, a union or a tuple."""
    args = [arg for arg in typing.get_args(hint) if arg is not Ellipsis]
    nested = typing.get_origin(hint) in (typing.Union, types.UnionType, tuple, list)
    return tuple(inner for arg in args for inner in plain_types(arg)) if nested else (hint,)


def listed(hint) -> bool:
    return any(typing.get_origin(part) in (tuple, list) for part in (hint, *typing.get_args(hint)))


def bad_values(field: dataclasses.Field, hint) -> list:
    """Values just outside of a knob's bounds, made from the bounds."""
    meta, step = field.metadata, 1 if int in plain_types(hint) and float not in plain_types(hint) else 1e-6
    bad = [meta[key] + sign * step for key, sign in (("ge", -1), ("le", 1)) if key in meta]
    bad += [meta[key] for key in ("gt", "lt") if key in meta]
    bad += [math.nan] if float in plain_types(hint) else []
    bad += ["no such choice"] if "choices" in meta else []
    return [in_tuples(value, hint) for value in bad] if listed(hint) else bad


def in_tuples(value, hint):
    """The value in as many tuples as the hint has."""
    inner = next((arg for arg in typing.get_args(hint) if arg is not Ellipsis and listed(arg)), None)
    if typing.get_origin(hint) in (tuple, list):
        return (value if inner is None else in_tuples(value, inner),)
    return in_tuples(value, inner)


def test_json(method):
    info = method
    half = {f.name: f.metadata["zero"] for f, _ in info.config.knobs() if "zero" in f.metadata}
    for config in (info.config(), info.config(layers=(0, -1), stream="text"), info.config(**half)):
        data = json.loads(json.dumps(config.to_dict()))
        assert data["method"] == info.name and data["version"] == info.version
        assert method_config(data) == config


def test_a_key_of_a_newer_release_is_dropped_with_a_warning(method):
    config = method.config
    with pytest.warns(UserWarning, match=rf"{config.__name__} does not know \['knob_of_tomorrow'\]"):
        assert method_config({"method": method.name, "version": method.version, "knob_of_tomorrow": 1}) == config()


def test_zero_strength_is_declared(placed):
    config = placed.config()
    zeros = [field for field, _ in config.knobs() if "zero" in field.metadata]
    assert zeros, "no knob declares the value at which the method changes nothing: option(..., zero=...)"
    assert config.at_zero().at_zero() == config.at_zero()


def test_every_knob_says_its_bound_and_meaning(knob):
    config, field, hint = knob
    assert field.metadata["help"].endswith("."), "the help of a knob is a sentence"
    if {int, float} & set(plain_types(hint)):
        assert field.metadata.keys() & {"ge", "gt", "le", "lt", "choices"}, "a number without a bound"
    if field.name != "stream" and str in plain_types(hint):
        assert field.metadata.keys() & {"choices", "free"}, "a string without choices, which is not free"


def test_bad_values_are_refused_in_the_standard_words(knob):
    config, field, hint = knob
    if "free" in field.metadata:
        with pytest.raises(ConfigError, match=rf"^{config.__name__}\.{field.name} must not be empty, got ''. Meaning: "):
            config(**{field.name: ""})
    for value in bad_values(field, hint):
        with pytest.raises(ConfigError) as caught:
            config(**{field.name: value})
        rule = "one of" if "choices" in field.metadata else "in"
        said, meaning = f"{config.__name__}.{field.name} must be {rule} {interval(field.metadata)}", field.metadata["help"]
        assert str(caught.value) == f"{said}, got {value!r}. Meaning: {meaning}"


def test_wrong_types_are_refused_in_the_standard_words(knob):
    config, field, hint = knob
    wrong = [value for kind in plain_types(hint) for value in WRONG.get(kind, ()) if not matches(value, hint)]
    wrong = [[value] for value in wrong] if listed(hint) else wrong
    assert wrong or typing.Any in plain_types(hint)
    for value in wrong:
        with pytest.raises(ConfigError, match=rf"^{config.__name__}\.{field.name} must be of type .*, got .*\. Meaning: "):
            config(**{field.name: value})


def test_configs_are_frozen_and_replaceable(method):
    config = method.config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.__setattr__("layers", (0,))
    assert replace(config, layers=[0]).layers == (0,)


def test_card(published):
    info = published
    assert info.claim.endswith(".") and "\n" not in info.claim, "the claim is one line, a sentence"
    assert info.arxiv is not None, "the paper has no arXiv:NNNN.NNNNN"
    assert info.maths and info.differs
    measures = "calibrate" in vars(info.cls) and info.need not in ("training", "calibration")
    learns = info.role == "Objective" and info.need != "training"
    assert info.need in NEEDS and not measures and not learns, "what it needs is not what its class does"
    assert ">>>" in info.doc


def test_the_card_s_example_runs(published):
    module = sys.modules[published.cls.__module__]
    result = doctest.testmod(module)
    assert result.attempted and not result.failed


def test_the_class_is_final_and_asks_for_known_signals(method):
    cls = method.cls
    assert cls.__bases__[0].__name__ == cls.role, "a method is one class right below its role"
    assert not cls.__subclasses__()
    assert set(cls.signals) <= cls.vocabulary <= SIGNALS.keys() and cls.site in cls.sites
    assert len(inspect.getsource(sys.modules[cls.__module__]).splitlines()) <= 150


def test_some_architecture_takes_the_method(placed):
    taken = [pair for pair in pairs_of([placed.name]) if planned(pair) is None]
    assert any(refused(pair) is None for pair in taken)
