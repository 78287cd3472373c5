"""A generated token goes through a block as through the base model's, where no method has a word to say before it is done."""

from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
from tolerances import all_close, close

from hf_tokens import (
    CacheCompressor,
    DeepPromptConfig,
    FTPConfig,
    KIVIConfig,
    LayerSkipConfig,
    MethodConfig,
    MixtureOfDepthsConfig,
    PrefixKVConfig,
    RazorAttentionConfig,
    SqueezeAttentionConfig,
    TokenPrependingConfig,
    TokenReducer,
    UnsupportedError,
    get_token_model,
    register,
    set_method,
)
from hf_tokens.engine import stream
from hf_tokens.engine.surgery import Listener
from hf_tokens.handlers import cache_compressor
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import CACHE, probe_config, zoo
from hf_tokens.tools.surgeries import surgery_of

STACKS = {
    "tokens in front": [DeepPromptConfig(tokens=3)],
    "tokens that skip blocks": [FTPConfig(sparsity=0.5, router="static", layers=(1, 2))],
    "an entry that goes for each that comes": [PrefixKVConfig(budget=0.5)],
    "entries that go by what they receive": [SqueezeAttentionConfig(budget=0.5, policy="heavy_hitters")],
    "entries that stand for several": [RazorAttentionConfig(sinks=1, compression=2)],
    "heads of different lengths": [RazorAttentionConfig(sinks=1, compression=2, heads=(1, 2))],
    "entries in few bits": [KIVIConfig(group=4, residual=4)],
    "all of them": [DeepPromptConfig(tokens=3), FTPConfig(sparsity=0.5, router="static", layers=(1, 2)), PrefixKVConfig(budget=0.5)],
}
QUIET = {*STACKS} - {"entries that go by what they receive"}
STEPS = 5


@torch.no_grad()
def decoded(model, ids, **more):
    """What the model says of a prompt, and of some tokens more one at a time."""
    out = model(input_ids=ids, use_cache=True, **more)
    said = [out.logits[:, -1]]
    for step in range(STEPS):
        more = {name: torch.cat([mask, mask[:, -1:]], dim=1) for name, mask in more.items()}
        out = model(input_ids=torch.full((len(ids), 1), 3 + step), **{CACHE: out.past_key_values}, use_cache=True, **more)
        said.append(out.logits[:, -1])
    return said, [layer.origins for layer in out.past_key_values.layers]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("stack", STACKS)
def test_a_quiet_block_says_what_one_that_keeps_all_books_says(stack, family):
    specimen = zoo.build(family)
    ids = specimen.inputs["input_ids"]
    model = get_token_model(specimen.model, STACKS[stack]).eval()
    with patch.object(stream, "run_quietly", side_effect=stream.run_quietly) as quiet:
        said, kept = decoded(model, ids)
    with patch.object(stream, "is_quiet", return_value=False):
        slow, held = decoded(model, ids)
    all_close(said, slow)  # entries lie in another order
    assert all(torch.equal(a, b) for a, b in zip(kept, held, strict=True))
    assert (quiet.call_count > 0) == (stack in QUIET)


def test_a_padded_batch_is_never_quiet():
    specimen = zoo.build("llama")
    mask = torch.ones_like(specimen.inputs["input_ids"])
    mask[0, :3] = 0
    model = get_token_model(specimen.model, STACKS["all of them"]).eval()
    with patch.object(stream, "run_quietly", side_effect=stream.run_quietly) as quiet:
        decoded(model, specimen.inputs["input_ids"], attention_mask=mask)
    assert quiet.call_count == 0


@pytest.mark.parametrize("decodes", [False, True])
def test_a_method_speaks_of_a_generated_token_if_it_says_so(decodes):
    heard = []

    @dataclass(frozen=True)
    class ListenConfig(MethodConfig):
        pass

    try:

        @register("listen", ListenConfig)
        class Listen(TokenReducer):
            of_prompts = ("keys",)

            def assign(self, hidden, keys, prefill):
                heard.append((prefill, keys is not None))

        Listen.decodes = decodes
        specimen = zoo.build("llama")
        decoded(get_token_model(specimen.model, ListenConfig(layers=(1,))).eval(), specimen.inputs["input_ids"])
    finally:
        METHODS.pop("listen", None)
    assert heard == [(True, True)] + decodes * STEPS * [(False, False)]


@pytest.mark.parametrize("prompts", [False, True])
def test_a_method_that_observes_prompts_alone_is_asked_no_more_behind_a_generated_token(prompts):
    heard = []

    @dataclass(frozen=True)
    class WatchConfig(MethodConfig):
        pass

    try:

        @register("watch", WatchConfig)
        class Watch(TokenReducer):
            observes_prompts = prompts

            def assign(self, hidden): ...

            def observe(self, prefill):
                heard.append(prefill)

        specimen = zoo.build("llama")
        decoded(get_token_model(specimen.model, WatchConfig(layers=(1,))).eval(), specimen.inputs["input_ids"])
    finally:
        METHODS.pop("watch", None)
    assert heard == [True] + (not prompts) * STEPS * [False]


GOING = {
    "by age": lambda positions, received: positions.double(),
    "all alike": lambda positions, received: torch.zeros_like(positions, dtype=torch.float32),
    "two that are alike": lambda positions, received: (positions // 2).float(),
    "the newest": lambda positions, received: -positions.double(),
    "what has no number stays": lambda positions, received: torch.where(positions % 3 == 0, torch.nan, positions),
    "in each head": lambda positions, received: received,
}


@pytest.mark.parametrize("rule", GOING)
def test_the_one_entry_that_goes_is_that_of_a_look_at_all(rule):
    @dataclass(frozen=True)
    class GoConfig(MethodConfig):
        pass

    try:

        @register("go", GoConfig)
        class Go(CacheCompressor):
            decodes = True

            def score(self, positions, received):
                positions = positions if positions.dim() == received.dim() else positions[:, None].expand_as(received)
                return GOING[rule](positions if rule == "in each head" else positions[:, 0], received)

            def budget(self, length, seen):
                return min(length, 6)

        specimen = zoo.build("llama")
        model = get_token_model(specimen.model, GoConfig()).eval()
        with patch.object(cache_compressor, "drop_entry", side_effect=cache_compressor.drop_entry) as dropped:
            said, kept = decoded(model, specimen.inputs["input_ids"])
        with patch.object(cache_compressor, "surplus", return_value=None):
            slow, held = decoded(model, specimen.inputs["input_ids"])
    finally:
        METHODS.pop("go", None)
    assert dropped.call_count == STEPS * len(kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, held, strict=True)) and all(origins.shape[-1] == 6 for origins in kept)
    for a, b in zip(said, slow, strict=True):
        close(a, b, rule)


CHANGES = {
    "it looks at attention now": (SqueezeAttentionConfig(budget=0.5, policy="window"), SqueezeAttentionConfig(budget=0.5)),
    "it looks no more": (SqueezeAttentionConfig(budget=0.5), SqueezeAttentionConfig(budget=0.5, policy="window")),
    "it speaks of generated tokens now": (FTPConfig(sparsity=0.1, router="static"), FTPConfig(sparsity=0.9, router="static")),
    "it speaks of them no more": (FTPConfig(sparsity=0.9, router="static"), FTPConfig(sparsity=0.1, router="static")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_config_that_is_changed_in_place_is_as_one_from_the_start(change):
    before, after = CHANGES[change]
    said = []
    for config in (after, before):
        specimen = zoo.build("llama")
        model = get_token_model(specimen.model, config).eval()
        set_method(model, after)
        said.append(decoded(model, specimen.inputs["input_ids"])[0])
    assert all(torch.equal(a, b) for a, b in zip(*said, strict=True))


@pytest.mark.parametrize("method", [{"method": "deep-prompt"}, probe_config(0.5)], ids=["prompts", "fewer tokens"])
@pytest.mark.parametrize("family", ["cpmant", "prophetnet"])
def test_a_cache_that_is_not_of_the_blocks_tokens_is_refused_before_anything_is_computed(family, method):
    specimen = zoo.build(family)
    ids, called = specimen.inputs["input_ids"][:, :8], []
    get_token_model(specimen.model, method).eval()
    for module in specimen.model.modules():
        module.register_forward_pre_hook(lambda module, args: called.append(module))
    told = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with pytest.raises(UnsupportedError, match="must act where a cache holds a key of each token of a block"):
        specimen.model.generate(ids, **told)
    assert not called
    if family == "cpmant":  # ProphetNet's blocks take their own number of tokens only
        assert specimen.model.generate(ids, use_cache=False, **told).shape[1] == 11


EARLY = {
    "tokens in front": [DeepPromptConfig(tokens=3)],
    "tokens that skip blocks": [MixtureOfDepthsConfig(sampling="router")],
    "both": [DeepPromptConfig(tokens=2), MixtureOfDepthsConfig(sampling="router")],
    "an end of its own": [LayerSkipConfig(exit_layer=3)],
}


def continued(base, stack, exits):
    """What a model with methods in it makes of a prompt, by itself and with the drafts of its first blocks."""
    model = get_token_model(base, stack).eval()
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "hf_tokens" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    ids = torch.randint(5, 80, (1, 9), generator=draw)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    return model, [model.generate(ids, **given, assistant_early_exit=exit) for exit in exits]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3_moe", "cohere"])
@pytest.mark.parametrize("stack", EARLY)
def test_drafts_of_the_first_blocks_change_no_token(stack, family):
    specimen = zoo.build(family)
    layers = specimen.model.config.num_hidden_layers
    model, answers = continued(specimen.model, EARLY[stack], (None, 1, 2, layers - 1))
    assert all(torch.equal(answers[0], answer) for answer in answers[1:])
    assert specimen.model.config.num_hidden_layers == layers


def test_a_pass_that_the_model_ends_early_is_over():
    """What was left of the tokens is not there in the next one, nor does a cache wait for blocks that do not run."""
    specimen = zoo.build("llama")
    ids, model = specimen.inputs["input_ids"], get_token_model(specimen.model, FTPConfig(sparsity=0.5, router="static", layers=(1,))).eval()
    closed = []

    class Ends(Listener):
        def closed(self, surgery, run):
            closed.append(run.at)

    specimen.model.config.num_hidden_layers = 2
    with torch.no_grad(), surgery_of(model).listening(Ends()):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        model(input_ids=ids[:, :1], **{CACHE: cache}, use_cache=True)
    assert closed == [1, 1] and [layer.seen for layer in cache.layers] == [ids.shape[1] + 1] * 2


def test_a_model_that_runs_more_blocks_than_its_config_counts_is_refused():
    specimen = zoo.build("gpt2")  # it slices no list of blocks
    model = get_token_model(specimen.model, DeepPromptConfig(tokens=3)).eval()
    specimen.model.config.num_hidden_layers = 2
    rule = (
        r"runs as many blocks of the stream 'text' as its config counts, got 2 by the config, and a call of transformer\.h\.2\. Leave out"
    )
    with pytest.raises(UnsupportedError, match=rule):
        model(**specimen.inputs, use_cache=False)
    specimen.model.config.num_hidden_layers = 4
    model(**specimen.inputs, use_cache=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "qwen2_vl"])
def test_what_must_see_the_whole_is_refused_before_anything_is_computed(family):
    specimen = zoo.build(family)
    model = get_token_model(specimen.model, TokenPrependingConfig(places="shared")).eval()
    ran = []
    specimen.model.get_input_embeddings().register_forward_hook(lambda *_: ran.append(1))
    ids = torch.randint(5, 80, specimen.inputs["input_ids"].shape)
    with pytest.raises(UnsupportedError, match="whole sequence in one pass, got 4 new tokens with a cache.*`use_cache=False`"):
        model.generate(input_ids=ids, max_new_tokens=4)
    assert not ran
    assert model.generate(input_ids=ids, max_new_tokens=1).shape[1] == ids.shape[1] + 1
    assert model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, use_cache=False).shape[1] == ids.shape[1] + 4
