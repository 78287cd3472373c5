"""`torch.export` records a model with a surgery whose numbers of tokens do not depend on the data; others are refused in our words."""

import pytest
import torch

import hf_tokens
from hf_tokens import PPTConfig, UnsupportedError, get_token_model
from hf_tokens.testing import zoo

pytestmark = pytest.mark.filterwarnings("ignore")  # torch tells of what it deprecates in itself


def recorded(model, inputs):
    """What a model returns, and what the recorded one does."""
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, strict=False)
        return next(iter(model(**inputs).values())), next(iter(program.module()(**inputs).values()))


@pytest.mark.parametrize("tau", [0.5, 1.0], ids=["some lose, some join", "all join"])
@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model"])
def test_a_reducer_with_static_counts_is_recorded(family, tau):
    one = zoo.build(family)
    model = get_token_model(one.model, PPTConfig(r=3, tau=tau)).eval()
    torch.testing.assert_close(*recorded(model, {"pixel_values": one.inputs["pixel_values"]}))


@pytest.mark.parametrize("name", sorted(info.name for info in hf_tokens.list_methods() if info.cls.placed and info.cls.exports))
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
    for name, family in (("atc", "vit"), ("ftp", "llama")):
        one = zoo.build(family)
        model = get_token_model(one.model, name).eval()
        with pytest.raises(UnsupportedError, match=r"exported with methods that decide nothing by the values of tensors, got (ATC|FTP)\."):
            torch.export.export(model, (), dict(one.inputs), strict=False)


def test_padded_rows_are_refused_in_our_words():
    one = zoo.build("siglip2_vision_model")
    model = get_token_model(one.model, PPTConfig(r=3)).eval()
    with pytest.raises(UnsupportedError, match="knows the number of tokens of each row"):
        torch.export.export(model, (), dict(one.inputs), strict=False)
