"""What must hold of a surgery in any family, checked against the model itself: no number here comes from the engine."""

import inspect

import pytest
import torch
from transformers import LongformerConfig, LongformerModel

from hf_tokens import DeepPromptConfig, MethodConfig, TokenMap, anatomy, get_token_model, option, register, unload
from hf_tokens.errors import UnsupportedError
from hf_tokens.registry import METHODS
from hf_tokens.roles import TokenReducer
from hf_tokens.testing import probe_config, zoo
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig

TEXTS = """
llama gpt2 gpt_neo gemma2 gemma3 gpt_oss qwen3 mixtral deepseek_v3 falcon phi glm4 cohere2 olmo2 starcoder2 bert roberta electra deberta-v2
modernbert distilbert albert mpnet xlm-roberta t5 umt5 bart mbart splinter
""".split()
TALKERS = "llama gpt2 gpt_neo gemma2 gpt_oss qwen3 falcon bamba jamba qwen3_next lfm2 granitemoehybrid t5gemma2 bart umt5".split()
SCORED = """
llama gemma2 gpt_oss qwen3 bert t5 umt5 switch_transformers vit dinov2 clip siglip phi4_multimodal_vision whisper splinter align_text_model
""".split()
DENOISERS = """
HunyuanVideoTransformer3DModel HunyuanImageTransformer2DModel HunyuanVideo15Transformer3DModel MotifVideoTransformer3DModel
QwenImageTransformer2DModel LTXVideoTransformer3DModel
PixArtTransformer2DModel LuminaNextDiT2DModel Lumina2Transformer2DModel UNet2DConditionModel
""".split()
# family -> stream; their blocks count their tokens by themselves
COUNTING = {
    "mpt": None,
    "longt5": "encoder",
    "inkling_text": None,
    "granite_speech": "audio",
    "wav2vec2-bert": None,
    "diffusers/UNetMotionModel": "denoiser.3",
}


def text_stream(model):
    """The stream that reads the text first."""
    streams = anatomy(model).streams
    return next((s for s in streams if s.name == "encoder"), streams[-1])


def first_states(specimen, stream, **more):
    """What the last block of a stream put out, b n d."""
    seen = []
    block = stream.blocks[-1]
    handle = block.register_forward_hook(lambda module, args, output: seen.append(stream.read(len(stream) - 1, output)))
    try:
        specimen.run(**more)
    finally:
        handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", TEXTS)
def test_a_dropped_token_is_as_one_that_the_mask_hides(family):
    specimen = zoo.build(family)
    stream = text_stream(specimen.model)
    ids = specimen.inputs["input_ids"]
    place = torch.arange(ids.shape[1]) - torch.tensor([[3], [0]])  # the first row is padded
    specimen.inputs["attention_mask"] = (place >= 0).long()
    more = {"use_cache": False} if "use_cache" in inspect.signature(specimen.model.forward).parameters else {}
    if "bart" in family or family in ("t5", "umt5"):
        specimen.inputs["decoder_input_ids"] = ids
    rate = 0.6
    kept = (((place + 1) * rate).floor() > (place * rate).floor()) & (place >= 0)
    hidden = first_states(specimen, stream, attention_mask=kept.long(), **more)
    model = get_token_model(specimen.model, ProbeDropConfig(share=1 - rate, layers=(0,), stream=stream.name)).eval()
    dropped = first_states(specimen, stream, **more)
    assert not torch.equal(hidden, dropped)  # those that are gone are not what the mask leaves of them
    torch.testing.assert_close(dropped[kept], hidden[kept], rtol=1e-3, atol=1e-4)
    model.unload()


@pytest.mark.parametrize("looks_everywhere", [False, True])
def test_blocks_that_take_whole_windows_get_them_filled_up(looks_everywhere):
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=99)
    base = LongformerModel(LongformerConfig(vocab_size=99, attention_window=32, pad_token_id=1, **sizes)).eval()
    ids, place = torch.randint(5, 90, (2, 16)), torch.arange(16)
    kept = (((place + 1) * 0.6).floor() > (place * 0.6).floor()).expand(2, -1)
    everywhere = torch.zeros_like(ids)
    everywhere[:, kept[0].long().argmax()] = int(looks_everywhere)
    with torch.no_grad():
        hidden = base(ids, attention_mask=kept.long(), global_attention_mask=everywhere)[0]
        model = get_token_model(base, ProbeDropConfig(share=0.4, layers=(0,))).eval()
        dropped = model(input_ids=ids, attention_mask=torch.ones_like(ids), global_attention_mask=everywhere)[0]
    torch.testing.assert_close(dropped[kept], hidden[kept], rtol=1e-4, atol=1e-5)


def generate(model, inputs, **more):
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, return_dict_in_generate=True, output_logits=True, **more
        )
    return out.sequences[:, -6:], torch.stack(out.logits)


@pytest.mark.parametrize("family", TALKERS)
def test_cached_generation_and_a_padded_batch_give_what_each_sample_gives_alone(family):
    specimen = zoo.build(family)
    model, ids = specimen.model, specimen.inputs["input_ids"]
    stream = anatomy(model).streams[-1]
    insert, drop = probe_config(0.5)
    get_token_model(model, [ProbeInsertConfig(tokens=insert.tokens, stream=stream.name), ProbeDropConfig(drop.share, stream=stream.name)])
    model.eval()
    inputs = {name: value for name, value in specimen.inputs.items() if name not in ("labels", "decoder_input_ids", "attention_mask")}
    mask = torch.ones_like(ids)
    if not model.config.is_encoder_decoder:
        mask[0, :4] = 0
    inputs["attention_mask"] = mask
    sequences, logits = generate(model, inputs)
    for uncached in (False, True):
        for row in range(len(ids)):
            real = mask[row].bool()
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            one |= {name: one[name][:, real] for name in ("input_ids", "attention_mask")}
            alone, its_logits = generate(model, one, use_cache=not uncached)
            assert torch.equal(sequences[row], alone[0])
            torch.testing.assert_close(logits[:, row], its_logits[:, 0], rtol=1e-3, atol=2e-3)


@pytest.fixture
def watch(monkeypatch):
    """A method that changes nothing and notes each block's column sums."""
    monkeypatch.setitem(METHODS, "watch", {})
    seen = {}

    class WatchConfig(MethodConfig):
        sharp: float = option(1.0, ge=0, zero=0.0, help="Nothing.")

    @register("watch", WatchConfig)
    class Watch(TokenReducer):
        def assign(self, scores, layer):
            seen.setdefault(layer, scores.columns())

    return WatchConfig, seen


def maps_of(stream, seen):
    """Hooks that note the attention maps which a stream's attentions return."""

    def hook(layer):
        def note(module, args, output):
            maps = [item for item in output[1:] if isinstance(item, torch.Tensor) and item.dim() == 4]
            seen.setdefault(layer, maps[-1])  # T5 returns its bias before

        return note

    return [stream.attention(i).register_forward_hook(hook(i)) for i in range(len(stream))]


@pytest.mark.parametrize("family", SCORED)
def test_scores_are_the_attention_maps_that_the_model_returns(family, watch):
    config, columns = watch
    specimen = zoo.build(family)
    specimen.model.set_attn_implementation("eager")
    for stream in anatomy(specimen.model).streams:
        columns.clear()
        model = get_token_model(specimen.model, config(stream=stream.name)).eval()
        maps = {}
        handles = maps_of(stream, maps)
        specimen.run()
        for handle in handles:
            handle.remove()
        model.unload()
        assert maps.keys() == columns.keys() == set(range(len(stream)))
        for layer, full in maps.items():
            torch.testing.assert_close(columns[layer], full.sum(dim=2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DENOISERS)
def test_what_a_mask_hides_from_a_denoiser_stays_hidden(family):
    specimen = zoo.build(f"diffusers/{family}")
    parameters = inspect.signature(specimen.model.forward).parameters
    text = specimen.inputs["encoder_hidden_states"]
    seen = torch.ones(text.shape[:2], dtype=torch.bool)
    seen[0, text.shape[1] // 2 :] = False
    names = ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask")
    mask = next(name for name in names if name in parameters)
    given = specimen.inputs.get(mask)
    specimen.inputs[mask] = seen if given is None else seen.to(given.dtype)
    other = torch.where(seen[..., None], text, text + 5)
    model = get_token_model(specimen.model, probe_config(0.5))
    base = [out for out in specimen.run(encoder_hidden_states=text)]
    for a, b in zip(base, specimen.run(encoder_hidden_states=other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(base, specimen.run(encoder_hidden_states=text + 5), strict=True))
    del model


@pytest.mark.parametrize("family", COUNTING)
def test_blocks_that_count_their_tokens_are_not_shortened(family):
    specimen = zoo.build(family)
    get_token_model(specimen.model, [ProbeDropConfig(stream=COUNTING[family])])
    with pytest.raises(UnsupportedError, match="A block must be told the places of its tokens"):
        specimen.run()


def test_a_block_that_treats_the_first_tokens_otherwise_is_told_which_are_left():
    specimen, seen = zoo.build("instructblip"), []
    get_token_model(specimen.model, [ProbeDropConfig(stream="text.1"), ProbeInsertConfig(tokens=3, stream="text.1", layers=(3,))])
    for block in specimen.model.qformer.encoder.layer:
        block.intermediate_query.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    specimen.run()
    queries = specimen.model.query_tokens.shape[1]
    left = queries // 2  # every other one from the second on
    assert seen == [queries, queries, left, left + 3]


def test_a_cache_of_an_own_kind_is_not_continued():
    model = zoo.build("minimax").model
    get_token_model(model, ProbeDropConfig())
    with pytest.raises(UnsupportedError, match="needs a dynamic cache, got a cache of MiniMaxCache"):
        model.generate(torch.ones(1, 4, dtype=torch.long), max_new_tokens=3)


def test_a_state_space_takes_no_rows_of_different_lengths_in_the_middle_of_a_sequence():
    model = zoo.build("bamba").model
    get_token_model(model, ProbeDropConfig()).eval()
    ids, mask = torch.randint(5, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0  # the rows drop their new tokens in turn
    with pytest.raises(UnsupportedError, match="mix tokens by something else than one attention need as many tokens in each row"):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4)


def test_blocks_that_read_the_keys_of_others_get_the_tokens_that_these_had():
    specimen = zoo.build("gemma3n_text")
    model, ids = specimen.model, specimen.inputs["input_ids"]
    more = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    base = model.generate(ids, **more)
    for methods in (probe_config(0.0), ProbeDropConfig(layers=(0,))):
        get_token_model(model, methods)
        cached, whole = model.generate(ids, **more), model.generate(ids, use_cache=False, **more)
        assert torch.equal(cached, whole) and torch.equal(cached, base) == isinstance(methods, list)
        unload(model)
    for methods in (ProbeDropConfig(layers=(2,)), DeepPromptConfig(tokens=3, layers=(0,))):
        get_token_model(model, methods)
        for use_cache in (False, True):
            with pytest.raises(UnsupportedError, match="reads the keys of another one must get the tokens that this one had"):
                specimen.run(use_cache=use_cache)
        unload(model)


def test_a_block_that_changes_the_width_is_not_shortened():
    specimen = zoo.build("fun_asr_nano_encoder")
    get_token_model(specimen.model, ProbeDropConfig(layers=(0,)))
    with pytest.raises(UnsupportedError, match="must keep their width, got 112 features in and 32 out, at layers.0"):
        specimen.run()


SHORTENED = """
vit dinov3_vit siglip beit clip qwen2_vl qwen2_5_vl internvl instructblip whisper wav2vec2 videomae
diffusers/FluxTransformer2DModel diffusers/Flux2Transformer2DModel diffusers/SD3Transformer2DModel diffusers/HunyuanVideoTransformer3DModel
diffusers/HiDreamImageTransformer2DModel diffusers/WanTransformer3DModel
diffusers/LTXVideoTransformer3DModel diffusers/StableAudio3DiTModel diffusers/ZImageTransformer2DModel diffusers/Lumina2Transformer2DModel
diffusers/PixArtTransformer2DModel diffusers/MochiTransformer3DModel
""".split()


class HiddenKeys:
    """torch's attention with the keys of some tokens hidden, in calls over these tokens alone or beside a second sequence."""

    def __init__(self, monkeypatch):
        self.inside, self.gone, self.offset, self.second = False, None, 0, 0
        self.inner = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", self)

    def __call__(self, query, key, value, attn_mask=None, is_causal=False, **more):
        n, length = len(self.gone), key.shape[-2]
        if not self.inside or length not in (n, n + self.second):
            return self.inner(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **more)
        seen = torch.ones(query.shape[-2], length, dtype=torch.bool)
        seen = seen.tril() if is_causal else seen
        first = self.offset if length > n else 0
        seen[:, first : first + n] &= ~self.gone
        seen |= ~seen.any(dim=-1, keepdim=True)
        if attn_mask is None:
            attn_mask = seen
        else:
            attn_mask = attn_mask & seen if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~seen, -torch.inf)
        return self.inner(query, key, value, attn_mask=attn_mask, **more)

    def states(self, specimen, stream, gone, second, offset):
        """What the last block puts out with these tokens' keys hidden in every block of the stream."""
        self.gone, self.second, self.offset = gone, second, offset
        enter, leave = (lambda *_: setattr(self, "inside", True)), (lambda *_: setattr(self, "inside", False))
        handles = [b.register_forward_pre_hook(enter) for b in stream.blocks] + [b.register_forward_hook(leave) for b in stream.blocks]
        try:
            return first_states(specimen, stream)
        finally:
            for handle in handles:
                handle.remove()


@pytest.mark.parametrize("family", SHORTENED)
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
def test_dropped_tokens_are_as_those_whose_keys_are_hidden(family, monkeypatch):
    specimen = zoo.build(family)
    for name, value in specimen.inputs.items():  # a second sequence of another length cannot be taken for the first
        if family.startswith("diffusers") and name.startswith("encoder_") and isinstance(value, torch.Tensor) and value.shape[1] == 16:
            specimen.inputs[name] = value[:, :11]
    if "Flux" in family:
        specimen.inputs["txt_ids"] = specimen.inputs["txt_ids"][..., :11, :]
    hidden_keys = HiddenKeys(monkeypatch)
    for stream in anatomy(specimen.model).streams:
        if stream.layout != "b n d" or stream.causal:
            continue
        entered, context = [], stream.context_index(0)

        def look(module, args, kwargs, stream=stream, context=context, entered=entered):
            given = {**dict(zip(inspect.signature(type(module).forward).parameters, (module, *args), strict=False)), **kwargs}
            second = given.get("encoder_hidden_states" if context is None else context.name)
            entered.append((stream.bind(0, args, kwargs).shape[1], 0 if second is None else second.shape[1]))

        handle = stream.blocks[0].register_forward_pre_hook(look, with_kwargs=True)
        hidden_keys.gone = torch.zeros(0, dtype=torch.bool)
        specimen.run()
        handle.remove()
        if not entered:
            continue  # the zoo's inputs do not reach it
        n, second = entered[0]
        place = torch.arange(n)
        kept = ((place + 1) * 0.6).floor() > (place * 0.6).floor()
        either = [hidden_keys.states(specimen, stream, ~kept, second, offset)[:, kept] for offset in {0, second}]
        model = get_token_model(specimen.model, ProbeDropConfig(share=0.4, layers=(0,), stream=stream.name))
        specimen.model.eval()
        ours = first_states(specimen, stream)[:, kept]
        unload(model)
        errors = [(ours - one).abs().max() / one.abs().max().clamp(min=1) for one in either]
        assert min(errors) < 1e-4, (stream.name, errors)


RAGGED = "llama bert t5 vit jamba qwen3_next diffusers/Lumina2Transformer2DModel diffusers/PixArtTransformer2DModel".split()
MIXED = ["convbert", "parakeet_encoder", "diffusers/LTX2VideoTransformer3DModel"]


@pytest.fixture
def uneven(monkeypatch):
    """A reducer that keeps another number of tokens in each sample."""
    monkeypatch.setitem(METHODS, "uneven", {})

    class UnevenConfig(MethodConfig):
        sharp: float = option(1.0, ge=0, zero=0.0, help="Nothing.")

    @register("uneven", UnevenConfig)
    class Uneven(TokenReducer):
        site = "before"

        def assign(self, hidden, mask):
            first = torch.arange(hidden.shape[1]) == 0
            return TokenMap.select((hidden[..., 0] > hidden[..., 1]) & mask | first)

    return UnevenConfig


@pytest.mark.parametrize("family", RAGGED)
def test_rows_that_keep_different_numbers_are_as_each_alone(family, uneven):
    specimen = zoo.build(family)
    for stream in anatomy(specimen.model).streams:
        get_token_model(specimen.model, uneven(stream=stream.name, layers=(1,)))
        specimen.model.eval()
        both = specimen.run()
        for row in range(2):
            one = {
                name: value[row : row + 1] if isinstance(value, torch.Tensor) and value.dim() and len(value) == 2 else value
                for name, value in specimen.inputs.items()
            }
            with torch.no_grad():
                alone = zoo.tensors(specimen.model(**one))
            for a, b in zip(both, alone, strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=1e-3, atol=1e-4)
        unload(specimen.model)


@pytest.mark.parametrize("family", MIXED)
def test_rows_that_keep_different_numbers_need_one_attention_a_block(family, uneven):
    specimen = zoo.build(family)
    get_token_model(specimen.model, uneven(layers=(1,)))
    specimen.model.eval()
    with pytest.raises(UnsupportedError, match="by something else than one attention need as many tokens in each row"):
        specimen.run()
