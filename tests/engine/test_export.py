"""`torch.export` records a model with a surgery whose numbers of tokens do not depend on the data; others are refused in our words."""

import pytest
import torch

import hf_tokens
from hf_tokens import ATCConfig, PPTConfig, UnsupportedError, get_token_model
from hf_tokens.testing import zoo

pytestmark = pytest.mark.filterwarnings("ignore")  # torch tells of what it deprecates in itself


def recorded(model, inputs, strict=False):
    """What a model returns, and what the recorded one does."""
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=strict)
        return next(iter(model(**inputs).values())), next(iter(program.module()(**inputs).values()))


@pytest.mark.parametrize("tau", [0.5, 1.0], ids=["some lose, some join", "all join"])
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model"])
def test_a_reducer_with_static_counts_is_recorded(family, tau):
    one = zoo.build(family)
    model = get_token_model(one.model, PPTConfig(r=3, tau=tau)).eval()
    torch.testing.assert_close(*recorded(model, {"pixel_values": one.inputs["pixel_values"]}))


ATC_KNOBS = {
    "a share": ATCConfig(keep_rate=0.5, layers=(1, 2)),
    "a count": ATCConfig(keep_rate=1.0, merged=2, schedule="decrease", linkage="complete"),
}


@pytest.mark.parametrize("family, knobs", [*(("vit", knobs) for knobs in ATC_KNOBS), ("dinov3_vit", "a share"), ("yolos", "a share")])
def test_clusters_of_known_number_are_recorded(family, knobs):
    one = zoo.build(family)
    model = get_token_model(one.model, ATC_KNOBS[knobs]).eval()
    got, want = recorded(model, {"pixel_values": one.inputs["pixel_values"]})
    assert torch.equal(got, want)


@pytest.mark.parametrize("strict", [False, True])
def test_the_base_is_recorded_by_itself_with_a_surgery_in_it(strict):
    one = zoo.build("vit")
    pixels = {"pixel_values": one.inputs["pixel_values"]}
    bare = one.run()[0]
    model = get_token_model(one.model, ATCConfig(keep_rate=0.5)).eval()
    got, want = recorded(model.get_base_model(), pixels, strict)
    assert torch.equal(got, want) and not torch.equal(got, bare)


REDUCERS = [info for info in hf_tokens.list_methods() if info.role == "TokenReducer" and info.cls.__module__ != "hf_tokens.testing.probe"]


@pytest.mark.parametrize("info", REDUCERS, ids=lambda info: info.name)
def test_every_reducer_of_pictures_is_recorded_and_every_other_one_says_that_it_looks_at_numbers(info):
    """Those for text act where padding, pictures or what a method learns decide how many tokens stay."""
    one = zoo.build("vit")
    try:
        get_token_model(one.model, info.name).eval()
    except UnsupportedError:
        assert ("vision" not in info.cls.kinds or info.cls.tower) and not info.cls.exports
    else:
        assert info.cls.exports, info.name


RECORDED = {info.name: info for info in hf_tokens.list_methods() if info.cls.placed and info.cls.exports}


@pytest.mark.drawn(of=lambda name: RECORDED[name].role)
@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_method_that_says_so_is_recorded(name):
    for family in ("vit", "llama"):
        one = zoo.build(family)
        try:
            model = get_token_model(one.model, name).eval()
        except UnsupportedError:
            continue
        inputs = (
            {"pixel_values": one.inputs["pixel_values"]} if family == "vit" else {"input_ids": one.inputs["input_ids"], "use_cache": False}
        )
        torch.testing.assert_close(*recorded(model, inputs))


def test_the_others_are_refused_in_our_words():
    for name, family in (("selection-p", "llama"), ("ftp", "llama")):
        one = zoo.build(family)
        model = get_token_model(one.model, name).eval()
        with pytest.raises(
            UnsupportedError, match=r"exported with methods that decide nothing by the values of tensors, got (SelectionP|FTP)\."
        ):
            torch.export.export(model, (), dict(one.inputs), strict=False)


@pytest.mark.parametrize("config", [PPTConfig(r=3), ATCConfig(keep_rate=0.5)], ids=["ppt", "atc"])
def test_a_table_that_all_samples_share_is_refused_where_a_block_takes_no_other(config):
    one = zoo.build("mlcd")
    model = get_token_model(one.model, config).eval()
    with pytest.raises(UnsupportedError, match="A table that all samples share"):
        torch.export.export(model, (), dict(one.inputs), strict=False)


def test_padded_rows_are_refused_in_our_words():
    one = zoo.build("siglip2_vision_model")
    model = get_token_model(one.model, PPTConfig(r=3)).eval()
    with pytest.raises(UnsupportedError, match="knows the number of tokens of each row"):
        torch.export.export(model, (), dict(one.inputs), strict=False)
