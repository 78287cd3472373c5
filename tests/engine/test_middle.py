"""Between attention and MLP: a block gives what it would give on the merged tokens, however its own forward is written."""

from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from tolerances import all_equal, close, differs

from hf_tokens import (
    ATCConfig,
    MethodConfig,
    PPTConfig,
    TokenMap,
    TokenReducer,
    ToMeConfig,
    UnsupportedError,
    anatomy,
    get_token_model,
    register,
)
from hf_tokens.model.parts import all_attentions, children_of, is_norm, path_of
from hf_tokens.model.streams import first_of, with_first
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import zoo
from hf_tokens.tools.surgeries import blocks_in

JOINED = 6  # of the first tokens two neighbours each become one; the one behind them vanishes
FIRST, LAST = ("final_layer_norm", "fc2", None), ("fc1", "fc2", "final_layer_norm")
OWN, NONE = ("feed_forward", "feed_forward", "final_layer_norm"), (None, None, None)
# family and stream -> where its MLP begins and ends, and the norm behind it
WRITTEN = {
    ("nomic_bert", "text"): ("mlp", "mlp", "post_mlp_layernorm"),  # a norm that its name says to be in front of the MLP
    ("moonshine", "decoder"): ("final_layernorm", "mlp", None),
    ("cohere_asr", "decoder"): ("final_layernorm", "mlp", None),
    ("sam3", "vision.3"): ("layer_norm3", "mlp", None),
    ("whisper", "encoder"): FIRST,
    ("whisper", "decoder"): FIRST,
    ("voxtral", "audio"): FIRST,
    ("qwen2_audio", "audio"): FIRST,
    ("speech_to_text", "encoder"): FIRST,
    ("m2m_100", "encoder"): FIRST,
    ("mbart", "decoder"): FIRST,
    ("pegasus", "encoder"): FIRST,
    ("bart", "encoder"): LAST,
    ("bart", "decoder"): LAST,
    ("marian", "encoder"): LAST,
    ("time_series_transformer", "encoder"): LAST,
    ("wav2vec2", "audio"): OWN,
    ("hubert", "audio"): OWN,
    ("speecht5", "encoder"): OWN,
    ("detr", "decoder"): ("mlp", "mlp", "final_layer_norm"),
    ("dia", "encoder"): ("post_sa_norm", "mlp", None),
    ("modernbert", "text"): ("mlp_norm", "mlp", None),
    ("distilbert", "text"): ("ffn", "ffn", "output_layer_norm"),
    ("olmo2", "text"): ("mlp", "mlp", "post_feedforward_layernorm"),
    ("openai-gpt", "text"): ("mlp", "mlp", "ln_2"),
    ("rt_detr", "encoder"): NONE,  # by its config it normalises before or after
    ("autoformer", "encoder"): NONE,  # it takes means over its tokens between MLP and norm
    ("opt", "text"): NONE,
    ("bert", "text"): NONE,
}


@dataclass(frozen=True)
class PairsConfig(MethodConfig):
    pass


@pytest.fixture(autouse=True)
def pairs():
    @register("test-middle", PairsConfig)
    class Pairs(TokenReducer):
        """Paper: none, arXiv:0000.00000"""

        site = "middle"

        def assign(self, mask):
            return TokenMap.pool(groups(mask))

    yield
    del METHODS["test-middle"]


def groups(mask):
    index = torch.arange(mask.shape[1]).expand_as(mask)
    group = torch.where(index < JOINED, index - index % 2, index)
    return group.masked_fill(index == JOINED, -1)


def states(specimen, stream, *hooks):
    """What the stream's last block returns, with these hooks on its modules."""
    seen, block = [], stream.blocks[-1]
    note = lambda module, args, output: seen.append(stream.read(len(stream) - 1, output))
    with ExitStack() as stack:
        for register_hook, hook, more in (*hooks, (block.register_forward_hook, note, {})):
            stack.callback(register_hook(hook, **more).remove)
        specimen.run()
    return seen[0]


def on_merged(specimen, stream):
    """What the block itself returns where its MLP gets the mean of a group for each of it; its attentions are left out for that."""
    block, entered = stream.blocks[-1], []
    first, _, behind = stream.middle(len(stream) - 1)
    states(specimen, stream, (first.register_forward_pre_hook, lambda module, args: entered.append(args[0]), {}))
    x = entered[0].clone()
    x[:, :JOINED] = x[:, :JOINED].unflatten(1, (-1, 2)).mean(dim=2).repeat_interleave(2, dim=1)
    place = stream.hidden_index(len(stream) - 1)

    def enter(module, args, kwargs):
        if place.name in kwargs:
            return args, {**kwargs, place.name: x}
        return (*args[: place.position], x, *args[place.position + 1 :]), kwargs

    zero = lambda module, args, output: with_first(output, torch.zeros_like(first_of(output)))
    same = lambda module, args, output: args[0]
    attends = [(module.register_forward_hook, zero, {}) for _, module in all_attentions(block)]
    others = [m for _, m in children_of(block) if is_norm(m) and m is not first and m is not behind]
    norms = [(module.register_forward_hook, same, {}) for module in others]
    return states(specimen, stream, (block.register_forward_pre_hook, enter, {"with_kwargs": True}), *attends, *norms)


@pytest.mark.parametrize(("family", "name"), [case for case, found in WRITTEN.items() if found != NONE])
def test_a_merge_in_the_middle_is_the_block_on_merged_tokens(family, name):
    specimen = zoo.build(family, dtype=torch.float64)
    stream = anatomy(specimen.model).stream(name)
    expected = on_merged(specimen, stream)
    model = get_token_model(specimen.model, PairsConfig(layers=(-1,), stream=name)).eval()
    found = states(specimen, stream)
    stays = torch.arange(found.shape[1]) != JOINED
    close(found[:, stays], expected[:, stays])
    assert bool(found.isfinite().all())
    model.unload()


@pytest.mark.parametrize(("family", "name"), WRITTEN)
def test_where_an_mlp_begins_and_ends_is_read_off_the_forward(family, name):
    stream = anatomy(zoo.build(family).model).stream(name)
    found = tuple(None if module is None else path_of(module, stream.blocks[0]) for module in stream.middle(0))
    assert found == WRITTEN[family, name]


def test_a_block_without_such_a_place_is_refused():
    with pytest.raises(UnsupportedError, match="a norm and an MLP"):
        get_token_model(zoo.build("bert").model, PairsConfig())


@pytest.mark.parametrize("config", [ToMeConfig(r=2), PPTConfig(r=2), ATCConfig(keep_rate=0.7)])
@pytest.mark.parametrize("family", ["whisper", "wav2vec2", "hubert", "speech_to_text", "qwen2_audio"])
def test_reducers_reach_the_encoders_of_speech_and_no_decoder(family, config):
    specimen = zoo.build(family)
    before = specimen.run()
    model = get_token_model(specimen.model, config)
    streams = [block.surgery.stream for block in blocks_in(model)]
    assert all(stream.kind == "audio" and not stream.causal for stream in streams)
    after = specimen.run()
    assert differs(before, after) and [x.shape for x in before] == [x.shape for x in after]
    model.unload()
    all_equal(specimen.run(), before)
