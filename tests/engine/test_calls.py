"""What a call of a block or of a head may bring and give back, and whose the errors in it are."""

import contextlib
import re

import pytest
import torch
from tolerances import all_close, all_equal, close
from transformers import DynamicCache

from hf_tokens import APTConfig, DeepPromptConfig, MoEPlusPlusConfig, SSDUnlearnConfig, anatomy, get_token_model, list_methods
from hf_tokens.errors import UnsupportedError
from hf_tokens.model.parts import checks_mask
from hf_tokens.model.signatures import cache_argument
from hf_tokens.model.streams import axes
from hf_tokens.testing import probe_config, zoo
from hf_tokens.testing.contract.configs import tiny_config
from hf_tokens.testing.contract.snapshots import difference, snapshot
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig

CARRYING = """
bailing_hybrid bamba falcon_h1 granitemoehybrid jamba kimi_linear lara_mini lfm2_moe lfm3 minimax nemotron_h olmo_hybrid qwen3_5_text
qwen3_next qwen4_exp_text recurrent_gemma rwkv zamba zamba2
""".split()
FOUR = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("family", ["depth_anything", "dpt", "prompt_depth_anything", "glpn"])
def test_a_head_that_reads_a_list_of_maps_is_left_alone(family):
    specimen = zoo.build(family)
    base = specimen.run()
    get_token_model(specimen.model, {"method": "apt"})
    assert [tensor.shape for tensor in specimen.run()] == [tensor.shape for tensor in base]


@pytest.mark.parametrize("method", [{"method": "deep-prompt", "tokens": 0}, {"method": "deep-prompt", "tokens": 2}], ids=["zero", "two"])
def test_a_state_that_does_not_tell_its_length_is_not_continued(method):
    specimen = zoo.build("rwkv")
    model, ids = specimen.model, specimen.inputs["input_ids"]
    base = model.generate(ids, use_cache=False, **FOUR)
    get_token_model(model, method)
    assert torch.equal(model.generate(ids, use_cache=False, **FOUR), base) == (method["tokens"] == 0)
    with pytest.raises(UnsupportedError, match="must be told how long the sequence is that goes on, got a model's own `state`"):
        model.generate(ids, **FOUR)


def test_an_attention_may_return_a_list():
    specimen = zoo.build("openai-gpt")
    base = specimen.run()
    get_token_model(specimen.model, APTConfig().at_zero())
    all_close(specimen.run(), base, "zero strength")


def test_a_block_that_returns_its_tokens_nested_is_refused():
    specimen = zoo.build("mm-grounding-dino")
    get_token_model(specimen.model, DeepPromptConfig().at_zero())
    with pytest.raises(
        UnsupportedError, match="must return its hidden states as a tensor, or first in a tuple, got a tuple from MMGroundingDino"
    ):
        specimen.run()


@pytest.mark.parametrize("number", [1, 3])
def test_a_block_returns_as_many_tokens_as_it_was_given(number):
    specimen = zoo.build("llama")
    block = anatomy(specimen.model).streams[0].blocks[3]
    forward = block.forward
    block.forward = lambda hidden, **more: torch.cat([forward(hidden, **more), hidden[:, :number]], dim=1)
    get_token_model(specimen.model, probe_config(0.5))
    with pytest.raises(
        UnsupportedError, match=rf"A block must return as many tokens as it was given, got \(2, 9\) .* and \(2, {9 + number}\) out"
    ):
        specimen.run()


@pytest.mark.parametrize("family", [family for family in CARRYING if family in zoo.families("transformers")])
def test_families_that_carry_states_are_the_base_at_zero_strength_or_refused(family):
    specimen = zoo.build(family)
    model, ids = specimen.model, specimen.inputs["input_ids"]
    told = {"return_dict_in_generate": True, "output_logits": True, **FOUR}
    base = torch.stack(model.generate(ids, **told).logits)
    for methods in (probe_config(0.0), [{"method": "deep-prompt", "tokens": 0}]):
        operated = get_token_model(model, methods)
        try:
            close(torch.stack(model.generate(ids, **told).logits), base, family)
        except UnsupportedError as error:
            assert re.search("needs a dynamic cache|must be told how long", str(error)), error
        operated.unload()


@pytest.mark.parametrize(
    "kind", (RuntimeError, ValueError, IndexError, AssertionError, TypeError, torch.OutOfMemoryError, KeyboardInterrupt)
)
@pytest.mark.parametrize("family", ("llama", "vit", "diffusers/FluxTransformer2DModel"))
def test_an_error_inside_a_shortened_block_is_its_raiser_s(family, kind):
    specimen, error = zoo.build(family), kind("not ours")
    block = anatomy(specimen.model).streams[-1].blocks[-1]
    base = specimen.run()
    get_token_model(specimen.model, [ProbeDropConfig(layers=(0,)), ProbeInsertConfig(layers=(0,))])
    right = specimen.run()
    for hang in (block.register_forward_pre_hook, next(block.children()).register_forward_pre_hook):
        handle = hang(lambda module, args: (_ for _ in ()).throw(error))
        with pytest.raises(kind) as raised:
            specimen.run()
        handle.remove()
        assert raised.value is error and error.__cause__ is None
        assert all(map(torch.equal, specimen.run(), right)) and not all(map(torch.equal, base, right))


WINDOWS = {
    "clap_audio_model": "audio.1",
    "cvt": "vision.1",
    "deformable_detr": "encoder",
    "funnel": "text.1",
    "gemma4_audio": None,
    "hiera": "vision.1",
    "lfm3_vl_vision": None,
    "pvt_v2": "vision.1",
    "swin": "vision.1",
    "xlnet": None,
    "diffusers/SanaVideoTransformer3DModel": None,
}


@pytest.mark.parametrize("family", WINDOWS)
def test_a_block_that_lays_its_tokens_out_is_not_shortened_and_nothing_changes(family):
    specimen = zoo.build(family)
    specimen.model.requires_grad_(False)  # some kernels differ by that
    base, before = specimen.run(), snapshot(specimen.model)
    model = get_token_model(specimen.model, [ProbeDropConfig(stream=WINDOWS[family])])
    with pytest.raises(UnsupportedError, match="must run on another number of tokens than the model gave") as refused:
        specimen.run()
    assert refused.value.__cause__ and str(refused.value.__cause__) not in str(refused.value)  # our words alone
    with model.disable_adapter():
        torch.testing.assert_close(specimen.run(), base, rtol=0, atol=0, equal_nan=True)
    model.unload()
    assert not difference(before, snapshot(specimen.model))


SIDE_BY_SIDE = "gemma3n_text deepseek_v4 hy_v4 qwen4_exp_text".split()


@pytest.mark.filterwarnings("ignore:hf-tokens")  # an edit that is not made, and layers that do not fit, as it says
@pytest.mark.parametrize("family", [family for family in SIDE_BY_SIDE if family in zoo.families("transformers")])
def test_every_method_takes_parallel_streams_or_is_refused(family):
    specimen, refused = zoo.build(family), []
    for info in list_methods():
        try:
            model = get_token_model(specimen.model, [tiny_config(info.config)])
        except UnsupportedError as error:
            refused += [info.name] if "of one residual stream" in str(error) else []
            continue
        with contextlib.suppress(UnsupportedError):
            model.generate(input_ids=specimen.inputs["input_ids"], **FOUR)
        model.unload()
    assert {"dr-llm", "dynamic-token-pooling", "selection-p"} <= {*refused}


def test_a_residual_that_a_block_lays_flat_is_that_of_each_token():
    specimen = zoo.build("opt")
    model, stream = specimen.model, anatomy(specimen.model).streams[-1]
    seen, outs = [], []
    stream.blocks[0].final_layer_norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for b, n in ((2, 16), (2, 32), (3, 3), (1, 1)):
        ids = torch.randint(5, 60, (b, n), generator=torch.Generator().manual_seed(0))
        operated = get_token_model(model, {"method": "squeezeattention"})
        site = operated.base_model.model.model.decoder.layers[0].hf_tokens
        note = next(iter(site.hf_tokens_methods["default"].values()))
        observe = note.observe
        note.observe = lambda entered, attended, observe=observe, **more: [outs.append(attended), observe(entered, attended, **more)][1]
        with torch.no_grad():
            operated(input_ids=ids, use_cache=True)
        assert torch.equal(outs[-1].flatten(0, 1), seen[-1].view(b * n, -1)) and outs[-1].shape[:2] == (b, n)
        operated.unload()


@pytest.mark.parametrize("family", ["autoformer", "reformer"])
def test_a_block_returns_nothing_else_for_each_token(family):
    specimen = zoo.build(family)
    get_token_model(specimen.model, [ProbeDropConfig(stream=anatomy(specimen.model).streams[-1].name)])
    with pytest.raises(UnsupportedError, match="A block returns for each token its hidden states and nothing else"):
        specimen.run()


@pytest.mark.parametrize("family", ["lilt", "zaya"])
def test_what_a_block_hands_on_beside_its_hidden_states_is_of_the_tokens_that_the_next_one_gets(family):
    specimen = zoo.build(family)
    for layers, refused in (((0, 1, 2, 3), False), ((2, 3), False), ((0, 1), True), ((1, 3), True)):
        model = get_token_model(specimen.model, {"method": "deep-prompt", "tokens": 2, "layers": layers})
        words = "A block that is given `.*` by the one before must get the tokens that this one had"
        with pytest.raises(UnsupportedError, match=words) if refused else contextlib.nullcontext():
            specimen.run()
        model.unload()


def test_blocks_that_lay_their_tokens_last_are_not_taken_for_others():
    with pytest.raises(UnsupportedError, match="needs a stream whose tokens stand in a row, got SqueezeBert.* on a grid: b d n"):
        get_token_model(zoo.build("squeezebert").model, probe_config(0.5))


def test_an_edit_of_weights_needs_no_tokens_in_a_row():
    specimen = zoo.build("squeezebert")
    base = specimen.run()
    get_token_model(specimen.model, SSDUnlearnConfig())
    with pytest.warns(UserWarning, match="is not made and changes nothing"):
        all_equal(specimen.run(), base)


def test_a_projection_that_is_called_like_an_mlp_is_not_routed_as_one():
    with pytest.raises(UnsupportedError, match="needs an MLP of its own in the block, got AlbertLayer"):
        get_token_model(zoo.build("albert").model, MoEPlusPlusConfig())


def test_a_block_may_return_a_tuple_with_names():
    specimen = zoo.build("reformer")
    base = specimen.run()
    get_token_model(specimen.model, probe_config(0.0))
    for have, want in zip(specimen.run(), base, strict=True):
        close(have, want)


def test_a_cache_of_tokens_without_an_order_is_not_continued():
    model = zoo.build("cpmant").model
    get_token_model(model, {"method": "deep-prompt", "tokens": 2})
    with pytest.raises(UnsupportedError, match="must act where a cache holds a key of each token of a block"):
        model.generate(torch.randint(5, 60, (2, 9)), **FOUR)


@pytest.mark.parametrize("masked", [False, True])
def test_places_are_not_counted_in_a_cache_of_tokens_without_an_order_that_holds_others(masked):
    model = zoo.build("bert").model.base_model
    assert not anatomy(model).streams[0].causal
    ids, mask = torch.randint(5, 60, (2, 9)), torch.ones(2, 10).long()

    def go_on(**more):
        cached = {cache_argument(model.forward): DynamicCache(), "use_cache": True}
        first, second = ({"attention_mask": mask[:, :n]} if masked else {} for n in (9, 10))
        with torch.no_grad():
            model(ids, **cached, **first)
            return zoo.tensors(model(ids[:, :1], **cached, **second, **more))[0]

    base, placed = go_on(), {"position_ids": torch.full((2, 1), 9)}
    close(go_on(**placed), base)
    for tokens in (0, 2):
        inside = get_token_model(model, {"method": "deep-prompt", "tokens": tokens})
        if tokens:
            with pytest.raises(UnsupportedError, match=r"told the places .* got a cache of 11 tokens alone. Pass `position_ids`, or no"):
                go_on()
            assert not torch.equal(go_on(**placed), base)
        else:
            close(go_on(), base)
        inside.unload()


@pytest.mark.parametrize(
    "family, words",
    [
        ("hrm_text", "needs blocks with one slot of the cache each, got several in HrmText"),
        (
            "prophetnet",
            "A block stores a key of each of its tokens, got . of .|must act where a cache holds a key of each token of a block",
        ),
    ],
)
def test_blocks_that_store_other_keys_than_one_of_each_token_are_refused_at_once(family, words):
    specimen = zoo.build(family)
    for tokens in (0, 2):
        model = get_token_model(specimen.model, {"method": "deep-prompt", "tokens": tokens})
        with pytest.raises(UnsupportedError, match=words):
            specimen.model.generate(specimen.inputs["input_ids"], **FOUR)
        model.unload()


def test_an_attention_whose_queries_are_no_tokens_in_a_row_is_not_shaped():
    model = zoo.build("inkling2_text").model
    get_token_model(model, {"method": "landmark-attention", "block": 4, "places": "shared"})
    with pytest.raises(UnsupportedError, match="a query for each token of each sample|must be told the places of its tokens"):
        model(input_ids=torch.randint(5, 60, (2, 16)), use_cache=False)


@pytest.mark.parametrize("method", ["apt", "deep-prompt"])
def test_a_method_with_weights_of_its_own_acts_in_blocks_as_wide_as_their_stream(method):
    specimen = zoo.build("fun_asr_nano_encoder")
    base = specimen.run()
    model = get_token_model(specimen.model, method).eval()
    with pytest.raises(UnsupportedError, match=r"as wide as their stream, 32, got \d+ features at layers\.0\. Choose other layers"):
        specimen.run()
    model.unload()
    model = get_token_model(specimen.model, {"method": method, "layers": (1, 2, 3)}).eval()
    assert [t.shape for t in specimen.run()] == [t.shape for t in base]


@pytest.mark.parametrize("family", ["zamba", "zamba2"])
def test_an_edit_reads_what_an_attention_is_given_where_that_is_as_wide_as_the_stream(family):
    specimen = zoo.build(family)
    base = specimen.run()
    model = get_token_model(specimen.model, {"method": "apt", "layers": (1, 3)}).eval()
    with pytest.raises(UnsupportedError, match=r"APT reads what an attention is given, in 32 features, .* got 64 at model\.layers\.\d"):
        specimen.run()
    model.unload()
    assert all(map(torch.equal, specimen.run(), base))


def test_a_block_that_joins_rows_takes_no_mask_over_them():
    specimen = zoo.build("rf_detr")  # two tokens a window: where rows keep different numbers, as many are left as there were
    get_token_model(specimen.model, {"method": "tome", "r": 1})
    with pytest.raises(UnsupportedError, match=r"run on 2 tokens of which a mask hides some, or weighs them, got RfDetrDinov2Layer"):
        specimen.run()


def test_tokens_join_in_blocks_that_keep_their_width():
    specimen = zoo.build("fun_asr_nano_encoder")
    get_token_model(specimen.model, "tome")
    with pytest.raises(UnsupportedError, match=r"must keep their width, got 112 features in and 32 out, at layers\.0\. Choose other"):
        specimen.run()


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v4", "hy_v4", "hy_v4_vl", "glm5_next", "qwen4_exp"])
def test_the_tokens_of_a_stream_lie_as_its_anatomy_says(family):
    if family not in zoo.families("transformers"):
        pytest.skip("un-skip when the installed transformers has it")
    specimen, seen = zoo.build(family), {}
    for stream in anatomy(specimen.model).streams:

        def note(module, args, kwargs, stream=stream):
            seen[stream.name] = stream.bind(0, args, kwargs).dim(), axes(stream.layout)

        stream.blocks[0].register_forward_pre_hook(note, with_kwargs=True)
    specimen.run()
    assert seen and all(axes_there == axes_told for axes_there, axes_told in seen.values()), seen


def test_an_attention_that_takes_nothing_but_a_full_mask_gets_one():
    specimen = zoo.build("clvp_encoder")
    assert checks_mask(type(anatomy(specimen.model).streams[0].attention(0)))
    assert not checks_mask(type(anatomy(zoo.build("bert").model).streams[0].attention(0)))
    model = get_token_model(specimen.model, "dr-llm").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if "hf_tokens" in name:
            parameter.data.normal_(generator=generator)
    together = specimen.run()
    for i in range(2):
        alone = zoo.tensors(model(**{name: value[i : i + 1] for name, value in specimen.inputs.items()}))
        close(together[0][i : i + 1], alone[0])


def test_labels_are_no_argument_over_the_tokens_of_a_tower():
    """A contrastive model hands them on to the blocks of both, and its texts may be as long as its pictures have patches."""
    specimen = zoo.build("clip")
    get_token_model(specimen.model, DeepPromptConfig())
    all_close(specimen.run(labels=specimen.inputs["input_ids"]), specimen.run())
