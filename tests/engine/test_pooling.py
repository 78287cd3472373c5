"""What leaves a stream: the pooled vector where each head looks, the short sequence where the caller looks, and who is refused."""

import copy
import importlib
import re
from dataclasses import dataclass

import pytest
import torch
import transformers
from hf_tokens_adapters.pooler.colbert_token_pooling import ColBERTTokenPoolingConfig
from hf_tokens_adapters.token_reducer.atc import ATCConfig
from hf_tokens_kernels import cluster
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5EncoderModel,
    T5ForSequenceClassification,
    T5Model,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from hf_tokens import HFTokensConfig, MethodConfig, Pooler, UnsupportedError, anatomy, get_token_model, option, register
from hf_tokens.model import families
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import CACHE, zoo
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig

TEXT = dict(
    vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, initializer_range=0.5, num_labels=3
)
PICTURE = {**{name: value for name, value in TEXT.items() if name != "vocab_size"}, "image_size": 8, "patch_size": 4}
GPT2 = dict(vocab_size=30, n_positions=16, n_embd=8, n_layer=2, n_head=2, num_labels=3, pad_token_id=0, initializer_range=0.5)
T5 = dict(
    vocab_size=30,
    d_model=8,
    d_kv=4,
    d_ff=12,
    num_layers=2,
    num_heads=2,
    num_labels=3,
    pad_token_id=0,
    eos_token_id=1,
    decoder_start_token_id=0,
)
CLIP = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, projection_dim=6, initializer_range=0.5)


@pytest.fixture
def mean(monkeypatch):
    """The weighted mean of the real tokens."""
    monkeypatch.setitem(METHODS, "mean", {})

    @dataclass(frozen=True)
    class MeanConfig(MethodConfig):
        strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share.")

    @register("mean", MeanConfig)
    class Mean(Pooler):
        def __init__(self, config, dims):
            super().__init__(config, dims)
            self.bias = nn.Parameter(torch.zeros(dims.width))

        @property
        def strength(self) -> float:
            return self.config.strength

        def pool(self, hidden: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
            weight = (sizes * mask).to(hidden.dtype)[..., None]
            return (hidden * weight).sum(dim=1) / weight.sum(dim=1) + self.bias

    return MeanConfig


@pytest.fixture
def first_real(monkeypatch):
    """The real tokens but the last of each row, for whoever called the model."""
    monkeypatch.setitem(METHODS, "first-real", {})

    @dataclass(frozen=True)
    class FirstConfig(MethodConfig):
        strength: float = option(1.0, ge=0, le=1, zero=0.0, help="Share.")

    @register("first-real", FirstConfig)
    class First(Pooler):
        site = "output"

        def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
            rows = [row[real][:-1] for row, real in zip(hidden, mask, strict=True)]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    return FirstConfig


def build(cls, config, **more):
    torch.manual_seed(0)
    model = cls(config, **more)
    zoo.liven(model)
    return model.double().eval().requires_grad_(False)


def padded(lengths, side, n=7):
    ids = torch.randint(3, 30, (len(lengths), n))
    keep = [torch.arange(n) < k if side == "right" else torch.arange(n) >= n - k for k in lengths]
    mask = torch.stack(keep).long()
    return ids * mask, mask


def mean_of(tokens, mask):
    return torch.stack([row[real.bool()].mean(dim=0) for row, real in zip(tokens, mask, strict=True)])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_that_reads_the_last_real_token(mean, side):
    base = build(GPT2ForSequenceClassification, GPT2Config(**GPT2))
    ids, mask = padded((7, 4), side)
    expected = base.score(mean_of(base.transformer(ids, attention_mask=mask).last_hidden_state, mask))
    close(get_token_model(base, mean()).eval()(ids, attention_mask=mask).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifier_that_reads_the_first_token(mean, side):
    base = build(BertForSequenceClassification, BertConfig(**TEXT))
    ids, mask = padded((7, 3), side)
    pooled = mean_of(base.bert(ids, attention_mask=mask).last_hidden_state, mask)
    close(
        get_token_model(base, mean()).eval()(ids, attention_mask=mask).logits, base.classifier(torch.tanh(base.bert.pooler.dense(pooled)))
    )


@torch.no_grad()
def test_a_norm_that_takes_the_pooled_token_alone_comes_behind_the_pooling(mean):
    base = build(CLIPVisionModelWithProjection, CLIPVisionConfig(**CLIP, image_size=8, patch_size=4))
    pixels = torch.randn(2, 3, 8, 8).double()
    tokens = base.vision_model(pixels).last_hidden_state
    expected = base.visual_projection(base.vision_model.post_layernorm(tokens.mean(dim=1)))
    close(get_token_model(base, mean()).eval()(pixels).image_embeds, expected)


@torch.no_grad()
def test_a_head_that_reads_the_end_of_text_reads_behind_the_norm(mean):
    base = build(CLIPTextModelWithProjection, CLIPTextConfig(**CLIP, vocab_size=30, max_position_embeddings=16, eos_token_id=29))
    ids, mask = padded((7, 4), "right")
    ids[0, 6] = ids[1, 3] = 29
    tokens = base.text_model(ids, attention_mask=mask).last_hidden_state
    expected = base.text_projection(mean_of(tokens, mask))
    close(get_token_model(base, mean()).eval()(ids, attention_mask=mask).text_embeds, expected)


@torch.no_grad()
def test_a_head_that_attends_to_all_tokens_finds_one(mean):
    base = build(SiglipVisionModel, SiglipVisionConfig(**PICTURE))
    pixels = torch.randn(2, 3, 8, 8).double()
    out = base(pixels)
    pooled = out.last_hidden_state.mean(dim=1, keepdim=True)
    got = get_token_model(base, mean()).eval()(pixels)
    close(got.last_hidden_state, pooled.expand_as(out.last_hidden_state))
    close(got.pooler_output, base.vision_model.head(pooled) if "vision_model" in dict(base.named_children()) else base.head(pooled))


@torch.no_grad()
def test_encoders_of_t5(mean):
    ids, mask = padded((7, 4), "right")
    encoder = build(T5EncoderModel, T5Config(**T5))
    want = mean_of(encoder(ids, attention_mask=mask).last_hidden_state, mask)
    got = get_token_model(encoder, mean()).eval()(ids, attention_mask=mask).last_hidden_state
    close(got, want[:, None].expand_as(got))
    both = build(T5ForSequenceClassification, T5Config(**T5))
    ids[0, 6] = ids[1, 3] = 1
    states = both.transformer(ids, attention_mask=mask, decoder_input_ids=both._shift_right(ids)).last_hidden_state
    got = get_token_model(both, mean()).eval()(ids, attention_mask=mask).logits
    assert got.shape == (2, 3) and states.shape == (2, 7, 8)
    close(got, both.classification_head(states.mean(dim=1)))  # the decoder is given no mask


@torch.no_grad()
@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_the_strength_is_the_share_of_the_pooled_vector(mean, strength):
    base, pixels = build(ViTModel, ViTConfig(**PICTURE), add_pooling_layer=False), torch.randn(2, 3, 8, 8).double()
    tokens = base(pixels).last_hidden_state
    got = get_token_model(base, mean(strength=strength)).eval()(pixels).last_hidden_state
    close(got, strength * tokens.mean(dim=1, keepdim=True) + (1 - strength) * tokens)
    assert strength or torch.equal(got, tokens)
    assert got.view(-1, 8).shape == (10, 8), "a head may want a view of what it gets"


@torch.no_grad()
def test_tokens_that_are_gone_or_inserted_do_not_count_and_merged_ones_count_as_many(mean):
    base, pixels = build(ViTModel, ViTConfig(**PICTURE), add_pooling_layer=False), torch.randn(2, 3, 8, 8).double()
    inserting = get_token_model(copy.deepcopy(base), ProbeInsertConfig(tokens=3)).eval()(pixels).last_hidden_state
    torch.manual_seed(0)
    both = get_token_model(copy.deepcopy(base), [ProbeInsertConfig(tokens=3), mean()]).eval()
    assert not torch.equal(inserting, base(pixels).last_hidden_state)
    expected = get_token_model(copy.deepcopy(base), ProbeInsertConfig(tokens=3)).eval()
    expected.load_state_dict({k: v for k, v in both.state_dict().items() if k in expected.state_dict()})
    close(both(pixels).last_hidden_state[:, 0], expected(pixels).last_hidden_state.mean(dim=1))

    dropping = get_token_model(copy.deepcopy(base), ProbeDropConfig(share=0.5)).eval()(pixels).last_hidden_state
    kept = [1, 3]  # (p + 1) / 2 steps up there
    close(
        get_token_model(copy.deepcopy(base), [ProbeDropConfig(share=0.5), mean()]).eval()(pixels).last_hidden_state[:, 0],
        dropping[:, kept].mean(dim=1),
    )

    atc = ATCConfig(keep_rate=0.5, layers=(0,))
    merging = get_token_model(copy.deepcopy(base), atc).eval()(pixels).last_hidden_state  # copies of their cluster
    close(get_token_model(copy.deepcopy(base), [atc, mean()]).eval()(pixels).last_hidden_state[:, 0], merging.mean(dim=1))


@torch.no_grad()
def test_the_short_sequence_goes_to_the_caller_and_the_model_s_own_head_sees_all(first_real):
    base = build(BertModel, BertConfig(**TEXT))
    ids, mask = padded((7, 4), "left")
    want = base(ids, attention_mask=mask, output_hidden_states=True)
    model = get_token_model(base, first_real()).eval()
    got = model(ids, attention_mask=mask, output_hidden_states=True)
    assert got.last_hidden_state.shape == (2, 6, 8)
    close(got.last_hidden_state[0], want.last_hidden_state[0, :6])
    close(got.last_hidden_state[1, :3], want.last_hidden_state[1, 3:6])
    assert not got.last_hidden_state[1, 3:].any()
    close(got.pooler_output, want.pooler_output)
    assert [h.shape for h in got.hidden_states] == [h.shape for h in want.hidden_states]
    as_tuple = model(ids, attention_mask=mask, return_dict=False)
    close(as_tuple[0], got.last_hidden_state)
    close(as_tuple[1], want.pooler_output)
    with model.disable_adapter():
        close(model(ids, attention_mask=mask).last_hidden_state, want.last_hidden_state)


@torch.no_grad()
def test_the_short_sequence_needs_a_place(first_real):
    base = build(BertForSequenceClassification, BertConfig(**TEXT))
    model = get_token_model(base, first_real()).eval()
    with pytest.raises(
        UnsupportedError, match=r"in the place of `last_hidden_state`, got the outputs \['logits'\]. Load the encoder alone"
    ):
        model(*padded((7,), "right"))


def test_a_trained_copy_of_the_norm_is_the_norm(mean, tmp_path):
    base, pixels = build(ViTForImageClassification, ViTConfig(**PICTURE)), torch.randn(2, 3, 8, 8).double()
    clean = copy.deepcopy(base)
    model = get_token_model(base, HFTokensConfig(methods=[mean()], modules_to_save=["layernorm", "classifier"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        vit = model.base_model.model.vit
        got = model.eval()(pixels).logits
        side = vit.layers[-1].hf_tokens
        with model.disable_adapter():
            close(model(pixels).logits, clean(pixels).logits)
        states = clean.vit(pixels, output_hidden_states=True).hidden_states[-1]
        pooled = vit.layernorm.modules_to_save["default"](states).mean(dim=1) + side.hf_tokens_methods["default"]["0"].bias
        close(got, model.base_model.model.classifier.modules_to_save["default"](pooled))
        twin = copy.deepcopy(model)
        close(twin(pixels).logits, got)
        model.save_pretrained(tmp_path)
        close(PeftModel.from_pretrained(copy.deepcopy(clean), tmp_path).eval()(pixels).logits, got)
        close(model.unload()(pixels).logits, clean(pixels).logits)
        close(twin(pixels).logits, got)


REFUSED = {
    "a language model": (GPT2LMHeadModel, GPT2Config(**GPT2), "GPT2LMHeadModel, whose head reads the tokens one by one"),
    "a masked language model": (BertForMaskedLM, BertConfig(**TEXT), "BertForMaskedLM, whose head"),
    "a tagger": (BertForTokenClassification, BertConfig(**TEXT), "BertForTokenClassification, whose head"),
    "a painter": (ViTForMaskedImageModeling, ViTConfig(**PICTURE), "ViTForMaskedImageModeling, whose head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_heads_that_read_each_token_are_refused(mean, case):
    cls, config, came = REFUSED[case]
    base = cls(config)
    with pytest.raises(UnsupportedError, match=f"needs a stream that is read as a whole.*, got {came}"):
        get_token_model(base, mean())
    assert not any("hf_tokens" in name for name, _ in base.named_modules())


def test_streams_that_another_one_reads_are_refused(mean):
    with pytest.raises(UnsupportedError, match="T5Model, whose stream 'decoder' reads the tokens one by one"):
        get_token_model(T5Model(T5Config(**T5)), mean(stream="encoder"))
    swin = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=3)
    base = build(SwinForImageClassification, swin)
    pixels = torch.randn(2, 3, 16, 16).double()
    model = get_token_model(base, mean()).eval()
    assert [name for name, module in model.named_modules() if type(module).__name__ == "Mean"] == [
        "base_model.model.swin.encoder.layers.1.blocks.0.hf_tokens.hf_tokens_methods.default.0"
    ]
    with torch.no_grad(), model.disable_adapter():
        expected = model(pixels).logits
    close(model(pixels).logits, expected)  # a Swin reads the mean of its last stage anyhow


def test_a_pooler_stands_behind_the_last_block_and_alone(mean):
    base = BertModel(BertConfig(**TEXT))
    with pytest.raises(UnsupportedError, match=r"acts behind the last block of a stream, 1 of 'text', got layers \(0,\). Leave out"):
        get_token_model(base, mean(layers=(0,)))
    with pytest.raises(UnsupportedError, match=r"The stream 'text' takes one Pooler, got \['mean', 'mean'\]"):
        get_token_model(base, [mean(), mean()])
    assert get_token_model(base, mean(layers=(-1,))) is not None


@torch.no_grad()
def test_a_part_of_a_sequence_is_refused(mean):
    model = get_token_model(build(GPT2Model, GPT2Config(**GPT2)), mean()).eval()
    ids, _ = padded((7,), "right")
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(UnsupportedError, match="Mean must see the whole sequence in one pass, got a cache of 7 tokens"):
        model(ids[:, :1], **{CACHE: cache})


@torch.no_grad()
def test_readers_elsewhere_than_the_structure_says_are_refused(mean, monkeypatch):
    base, pixels = build(ViTForImageClassification, ViTConfig(**PICTURE)), torch.randn(2, 3, 8, 8).double()
    model = get_token_model(base, mean()).eval()
    base.vit.layernorm = nn.Identity()
    with pytest.raises(UnsupportedError, match="a norm behind the blocks .* got a norm that was not called, in ViTForImageClassification"):
        model(pixels)
    monkeypatch.setattr(families, "POOLED_NORM", families.READS_EACH)
    clip = build(CLIPVisionModelWithProjection, CLIPVisionConfig(**CLIP, image_size=8, patch_size=4))
    model = get_token_model(clip, mean()).eval()
    with pytest.raises(UnsupportedError, match=r"that takes every token, or none, got a norm that took \(2, 8\), in CLIPVisionModelWith"):
        model(pixels)


FINAL_NORMS = {
    "bert": [None],
    "gpt2": ["transformer.ln_f"],
    "llama": ["model.norm"],
    "t5": ["encoder.final_layer_norm", "decoder.final_layer_norm"],
    "mbart": ["model.encoder.layer_norm", "model.decoder.layer_norm"],
    "opt": ["model.decoder.final_layer_norm"],
    "t5gemma": ["model.encoder.norm", "model.decoder.norm"],
    "vit": ["vit.layernorm"],
    "dinov2_with_registers": ["dinov2_with_registers.layernorm"],
    "dinov3_vit": ["norm"],
    "videomae": [None],
    "clip": ["text_model.final_layer_norm", None],
    "siglip": ["text_model.final_layer_norm", "vision_model.post_layernorm"],
    "altclip": ["text_model.pre_LN", None],
}


@pytest.mark.parametrize("family", FINAL_NORMS)
def test_the_norm_behind_the_blocks_is_found_and_gets_what_the_last_block_returns(family):
    specimen = zoo.build(family)
    paths = {module: path for path, module in specimen.model.named_modules()}
    streams = anatomy(specimen.model).streams
    assert [paths.get(s.final_norm) for s in streams] == FINAL_NORMS[family]
    for stream in streams:
        assert stream.final_norm is None or heard_by_the_norm(stream, specimen) is True


def heard_by_the_norm(stream, specimen):
    """Whether the final norm of a stream gets the very tensor that the last block returns."""
    seen = []
    handles = [
        stream.blocks[-1].register_forward_hook(lambda module, args, kwargs, out: seen.append(stream.read(-1, out)), with_kwargs=True),
        stream.final_norm.register_forward_hook(lambda module, args, out: seen.append(args[0])),
    ]
    specimen.run()
    for handle in handles:
        handle.remove()
    return seen[0] is seen[1]


@pytest.fixture
def asker(monkeypatch):
    """Lets the first and the last real token ask once more, and gives what they gathered."""
    monkeypatch.setitem(METHODS, "asker", {})

    @dataclass(frozen=True)
    class AskerConfig(MethodConfig):
        alone: bool = option(False, zero=True, help="Whether nobody asks.")
        last: int = option(2, ge=1, help="Blocks that run.")
        everyone: bool = option(False, help="Whether all see all.")

    @register("asker", AskerConfig)
    class Asker(Pooler):
        site = "output"
        exit = property(lambda self: self.config.last)
        sees_all = property(lambda self: self.config.everyone)

        def ask(self, hidden: Tensor, mask: Tensor):
            if self.config.alone:
                return None
            place = torch.arange(mask.shape[1]).expand_as(mask)
            ends = torch.stack([torch.where(mask, place, 99).amin(dim=1), torch.where(mask, place, -1).amax(dim=1)], dim=1)
            return hidden.gather(1, ends[..., None].expand(-1, -1, hidden.shape[-1])), ends

        def pool(self, answers: Tensor | None):
            return answers

    return AskerConfig


ENCODERS = {
    "bert": lambda: BertModel(BertConfig(**TEXT), add_pooling_layer=False),
    "gpt2": lambda: GPT2Model(GPT2Config(**GPT2)),
    "t5": lambda: T5EncoderModel(T5Config(**T5)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", ENCODERS)
def test_a_token_that_asks_again_hears_what_it_heard(asker, name):
    base = ENCODERS[name]().double().eval()
    ids, mask = torch.randint(1, 30, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    model = get_token_model(copy.deepcopy(base), asker(last=1, everyone=True)).eval()
    got = model(ids, attention_mask=mask).last_hidden_state
    whole = get_token_model(base, asker(last=1, everyone=True, alone=True)).eval()
    want = whole(ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]  # in front of the final norm
    torch.testing.assert_close(got, torch.stack([want[0, [0, 5]], want[1, [0, 3]]]))


@torch.no_grad()
def test_without_its_mask_a_decoder_sees_what_comes(asker):
    base = GPT2Model(GPT2Config(**GPT2)).double().eval()
    ids = torch.randint(1, 30, (1, 6))
    other = ids.clone()
    other[0, 5] = (ids[0, 5] + 1) % 30
    for everyone in (True, False):
        model = get_token_model(copy.deepcopy(base), asker(everyone=everyone, alone=True)).eval()
        one, two = (model(i).last_hidden_state[0, 0] for i in (ids, other))
        assert torch.equal(one, two) != everyone
        assert model.unload() is not None


def test_a_causal_stream_where_tokens_ask_and_one_that_cannot_be_told_are_refused(asker):
    ids = torch.randint(1, 30, (1, 6))
    with pytest.raises(UnsupportedError, match="sees all"):
        get_token_model(GPT2Model(GPT2Config(**GPT2)), asker()).eval()(ids)
    base = GPT2Model(GPT2Config(**GPT2))
    model = get_token_model(base, asker(everyone=True)).eval()
    base.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="without their causal mask need an argument"):
        model(ids)


RETRIEVERS = ("colpali", "colqwen2", "colmodernvbert")


@pytest.mark.parametrize("family", RETRIEVERS)
def test_the_vectors_of_a_retriever_are_pooled(family):
    one = zoo.build(family)
    with torch.no_grad():
        before = one.model(**one.inputs).embeddings
        model = get_token_model(one.model, ColBERTTokenPoolingConfig(pool_factor=3, protected_tokens=0)).eval()
        after = model(**one.inputs).embeddings
    real = one.inputs["attention_mask"].bool()
    for row, given, there in zip(after, before, real, strict=True):
        group = cluster(given[there][None], int(there.sum()) // 3, "ward")[0]
        means = torch.stack([given[there][group == first].mean(dim=0) for first in group.unique()])
        torch.testing.assert_close(row[row.any(dim=-1)], means)


def test_all_late_interaction_models_are_known():
    names = [name for name in dir(transformers) if re.match(r"Col\w+ForRetrieval$", name)]
    assert len(names) == len(RETRIEVERS) and all(families.LATE_INTERACTION.search(name) for name in names)
    for name in names:
        module = importlib.import_module(getattr(transformers, name).__module__)
        assert families.VECTORS in getattr(module, f"{name}Output").__dataclass_fields__


@pytest.mark.parametrize("family", [*RETRIEVERS, "modernvbert"])
@pytest.mark.parametrize("method", ["softpool", "simpool", "ggem", "arc-encoder"])
def test_one_vector_for_all_tokens_is_nothing_for_who_reads_each(family, method):
    with pytest.raises(UnsupportedError, match="read as a whole|needs a"):
        get_token_model(zoo.build(family).model, method)


def test_a_library_that_cuts_by_the_mask_is_told():
    model = get_token_model(zoo.build("bert").model.base_model, ColBERTTokenPoolingConfig()).eval()
    caller = {"__name__": "sentence_transformers.base.modules.transformer"}
    exec("def encode(model, **inputs):\n    return model(**inputs)", caller)
    ids = torch.arange(3, 19)[None]
    with pytest.raises(UnsupportedError, match="may not cut them by the text's mask, got sentence_transformers"):
        caller["encode"](model, input_ids=ids)
    assert model(input_ids=ids).last_hidden_state.shape[1] < ids.shape[1]
