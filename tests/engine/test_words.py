"""Tokens of a bank in the place of a word that the text encoders of a pipeline read, against encoders whose tables hold them."""

import contextlib
import copy
import functools
import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from denoisers import blocks, denoiser, with_pictures
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hf_tokens_adapters.token_bank.neti import NeTI
from hf_tokens_adapters.token_bank.prospect import ProSpect
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tolerances import all_equal, close
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from hf_tokens import (
    ConfigError,
    NeTIConfig,
    ProSpectConfig,
    UnsupportedError,
    get_token_model,
    load,
    save_adapter,
    set_method,
    unload,
)
from hf_tokens.model.encoders import ENCODERS, READ_BESIDE

WORD, LETTERS = "<cat>", "abcdefghijklmnopqrstuvwxyz"
WIDTHS = {"sd": (6,), "xl": (6, 8)}
SIZES = dict(hidden=8, frequencies=5)
SAFE = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def tokenizer():
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    made = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=12)
    made.add_tokens(WORD)
    return made


def encoder(width, seed, cls=CLIPTextModel):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=width, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2, projection_dim=5)
    ids = dict(vocab_size=55, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = cls(CLIPTextConfig(**sizes, **ids)).double().eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16).double()


def pipeline(kind="sd"):
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    if kind == "sd":
        parts = dict(text_encoder=encoder(6, 1), tokenizer=tokenizer(), unet=denoiser("unet"))
        pipe = StableDiffusionPipeline(vae=vae(), scheduler=scheduler, **parts, **SAFE)
    else:
        more = dict(cross_attention_dim=14, addition_embed_type="text_time", addition_time_embed_dim=2)
        more |= dict(projection_class_embeddings_input_dim=17)
        sizes = {name: value for name, value in denoiser("unet").config.items() if name != "_use_default_values"}
        torch.manual_seed(0)
        unet = UNet2DConditionModel.from_config({**sizes, **more}).double().eval().requires_grad_(False)
        encoders = dict(text_encoder=encoder(6, 1), text_encoder_2=encoder(8, 2, CLIPTextModelWithProjection))
        parts = dict(tokenizer=tokenizer(), tokenizer_2=tokenizer(), unet=unet, **encoders)
        pipe = StableDiffusionXLPipeline(vae=vae(), scheduler=scheduler, add_watermarker=False, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, prompt=f"a {WORD} b", steps=4, **given):
    size = dict(height=16, width=16) if isinstance(pipe, StableDiffusionXLPipeline) else dict(height=8, width=8)
    rows = given.get("num_images_per_prompt", 1) * (1 if isinstance(prompt, str) else len(prompt or (0,)))
    given = {"guidance_scale": 4.0, "latents": torch.randn(rows, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double(), **given}
    return pipe(prompt, num_inference_steps=steps, output_type="latent", **size, **given).images


def with_rows(model, vector):
    """A copy of an encoder whose table has this vector (d) for the word."""
    twin = copy.deepcopy(model)
    twin.get_input_embeddings().weight.data[54] = vector
    return twin


@contextlib.contextmanager
def by_hand(pipe, vectors):
    """A plain pipeline whose UNet reads, at each of its calls, a prompt that was encoded with vectors(time) as the row of the word."""
    plain, encoded = pipe.unet.forward, pipe.encode_prompt
    asked = {}

    def encode_prompt(*args, **kwargs):
        asked.update(args=args, kwargs=kwargs)
        return encoded(*args, **kwargs)

    def forward(sample, timestep, encoder_hidden_states, **more):
        names = ["text_encoder", "text_encoder_2"][: len(WIDTHS["xl" if "text_encoder_2" in pipe.components else "sd"])]
        held = {name: getattr(pipe, name) for name in names}
        widths = [held[name].config.hidden_size for name in names]
        parts = vectors(float(timestep)).split(widths)
        for name, part in zip(names, parts, strict=True):
            vars(pipe)[name] = with_rows(held[name], part)
        told = encoded(*asked["args"], **asked["kwargs"])
        vars(pipe).update(held)
        guided = len(encoder_hidden_states) > len(told[0])
        encoder_hidden_states = torch.cat([told[1], told[0]]) if guided else told[0]
        if len(names) == 2:
            pooled = torch.cat([told[3], told[2]]) if guided else told[2]
            more["added_cond_kwargs"] = {**more["added_cond_kwargs"], "text_embeds": pooled}
        return plain(sample, timestep, encoder_hidden_states, **more)

    pipe.encode_prompt, pipe.unet.forward = encode_prompt, forward
    yield pipe
    del pipe.encode_prompt, pipe.unet.forward


def stage_of(bank, time):
    return bank[min(len(bank) - 1, int(len(bank) - 1 - time * len(bank) // 1000)), 0]


def surgery(kind="sd", **knobs):
    torch.manual_seed(5)
    pipe = get_token_model(pipeline(kind), ProSpectConfig(stages=3, word=WORD, init_std=1.0, **knobs))
    return pipe, next(module for module in pipe.unet.modules() if isinstance(module, ProSpect)).bank.detach()


# what a pipeline is asked for
ASKED = {
    "guided": {},
    "without guidance": {"guidance_scale": 1.0},
    "two prompts, two pictures": {"prompt": [f"a {WORD} b", "c d"], "num_images_per_prompt": 2},
    "the word at another place": {"prompt": f"{WORD}"},
    "twice": {"prompt": f"{WORD} and {WORD}"},
    "in the negative prompt": {"prompt": "a dog", "negative_prompt": f"bad {WORD}"},
    "nowhere": {"prompt": "a dog"},
}


@torch.no_grad()
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("kind", WIDTHS)
def test_the_text_encoders_read_the_tokens_of_each_step_in_the_place_of_the_word(kind, asked):
    pipe, bank = surgery(kind)
    with by_hand(pipeline(kind), functools.partial(stage_of, bank)) as plain:
        want = drawn(plain, **ASKED[asked])
    close(drawn(pipe, **ASKED[asked]), want)
    assert torch.equal(want, drawn(pipeline(kind), **ASKED[asked])) == (asked == "nowhere")


@torch.no_grad()
def test_runs_behind_each_other_read_their_own_prompts():
    pipe, bank = surgery()
    for prompt in (f"a {WORD}", f"b {WORD} c", "a dog", f"a {WORD}"):
        with by_hand(pipeline(), functools.partial(stage_of, bank)) as plain:
            close(drawn(pipe, prompt), drawn(plain, prompt))


@torch.no_grad()
def test_in_other_stages_the_word_is_what_its_table_has():
    pipe, bank = surgery(acts=(0,))
    table = pipe.text_encoder.get_input_embeddings().weight[54]
    with by_hand(pipeline(), lambda time: stage_of(bank, time) if time >= 1000 * 2 / 3 else table) as plain:
        close(drawn(pipe, steps=6), drawn(plain, steps=6))


@torch.no_grad()
def test_a_lora_on_the_text_encoder_is_read_too():
    pipe, bank = surgery()
    plain = pipeline()
    for one in (pipe, plain):
        torch.manual_seed(7)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inject_adapter_in_model(lora, one.text_encoder).double()
    with by_hand(plain, functools.partial(stage_of, bank)):
        want = drawn(plain)
    close(drawn(pipe), want)
    assert not torch.allclose(want, drawn(pipeline()))


@torch.no_grad()
@pytest.mark.parametrize("kind", WIDTHS)
def test_it_is_saved_loaded_and_taken_out(kind, tmp_path):
    pipe, _ = surgery(kind)
    want, before = drawn(pipe), drawn(pipeline(kind))
    save_adapter(pipe, tmp_path)
    twin = load(tmp_path, pipeline(kind))
    all_equal([drawn(twin)], [want], "loaded")
    all_equal([drawn(copy.deepcopy(twin))], [want], "a copy")
    for encoder in (twin.text_encoder, *([twin.text_encoder_2] if kind == "xl" else [])):
        assert "forward" in vars(encoder)
    unload(twin)
    all_equal([drawn(twin)], [before], "taken out")
    assert "forward" not in vars(twin.text_encoder) and not twin.text_encoder.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("name", ENCODERS)
def test_each_pipeline_has_the_encoders_that_its_row_tells(name):
    cls = getattr(diffusers, name)
    parts, source = set(inspect.signature(cls).parameters), inspect.getsource(cls.encode_prompt)
    assert {part for part in parts if part.startswith(("text_encoder", "tokenizer"))} == {
        part for row in ENCODERS[name] for part in (row.encoder, row.tokenizer)
    }
    assert not any(re.search("controlnet|adapter", part) for part in parts), "nothing else reads the prompt"
    assert all(("hidden_states[-2]" in source) == (row.layer == -2) for row in ENCODERS[name])
    assert any(row.pooled for row in ENCODERS[name]) == ("pooled_prompt_embeds" in source)


def neti(kind="sd", **knobs):
    torch.manual_seed(5)
    pipe = get_token_model(pipeline(kind), NeTIConfig(word=WORD, **SIZES, **knobs))
    banks = sorted((module for module in pipe.unet.modules() if isinstance(module, NeTI)), key=lambda bank: bank.dims.place)
    return pipe, [bank.eval() for bank in banks]


def states_of(model, ids, vector, beside):
    """The last states of an encoder that reads a vector for the word, and these with something added in front of the last norm."""
    model, last = with_rows(model, vector), []
    model.final_layer_norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    keys = model(ids).last_hidden_state
    states, here = last[0].clone(), ids[0] == 54
    states[0, here] = states[0, here] + states[0, here].norm(dim=-1, keepdim=True) * beside
    model.final_layer_norm._forward_pre_hooks.clear()
    return keys, model.final_layer_norm(states)


@torch.no_grad()
@pytest.mark.parametrize("pictures", (False, True))
@pytest.mark.parametrize("alpha", (0.0, 0.2))
def test_each_block_reads_its_own_keys_and_values(alpha, pictures):
    pipe, banks = neti(alpha=alpha)
    unet, text, more = denoiser("unet"), pipeline().text_encoder, {}
    if pictures:
        _, more = [with_pictures(one) for one in (pipe.unet, unet)][0]
        more["added_cond_kwargs"]["image_embeds"][0] = more["added_cond_kwargs"]["image_embeds"][0][:1]
    ids = torch.tensor([[0, 28, 54, 29, *[1] * 8]])
    prompt = pipe.text_encoder(ids)[0]
    call = dict(sample=torch.randn(1, 4, 8, 8).double(), timestep=torch.tensor([321]), encoder_hidden_states=prompt, **more)
    own = text.get_input_embeddings().weight[54].view(1, 1, -1)
    got, handles = pipe.unet(**call).sample, []
    for block, bank in zip(blocks(unet), banks, strict=True):
        vector, beside = bank.tokens(time=torch.tensor([321.0]), hidden=own, mask=torch.ones(1, 1, dtype=torch.bool))
        keys, values = states_of(text, ids, vector[0, 0], beside[0, 0])
        for name, states in (("to_k", keys), ("to_v", values)):
            projection = block.attn2.get_submodule(name)
            handles.append(projection.register_forward_pre_hook(lambda module, args, states=states: (states,)))
    close(got, unet(**call).sample)
    unload(pipe)
    assert not torch.allclose(got, pipe.unet(**call).sample)


@pytest.mark.parametrize("checkpointing", (False, True))
def test_a_training_step_of_textual_inversion_as_it_is(checkpointing):
    """Samples at timesteps of their own; one prompt without the word."""
    pipe, _ = neti(nested_dropout=0.0)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()
    ids = pipe.tokenizer([f"a {WORD} b", "a dog", f"{WORD}"], padding="max_length", return_tensors="pt").input_ids
    times, latents = torch.tensor([900, 500, 20]), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    prediction = pipe.unet(latents, times, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
    prediction.square().sum().backward()
    trained = {name: p.grad for name, p in pipe.unet.named_parameters() if p.requires_grad}
    assert trained and all("mapper" in name and grad is not None and bool(grad.any()) for name, grad in trained.items())
    with torch.no_grad():
        for i in range(3):
            states = pipe.text_encoder(ids[i : i + 1])[0]
            close(prediction[i : i + 1].detach(), pipe.unet(latents[i : i + 1], times[i : i + 1], encoder_hidden_states=states).sample)


def test_a_batch_without_the_word_is_said_once():
    pipe, _ = neti()
    pipe.unet.train()
    ids = pipe.tokenizer(["a dog"], padding="max_length", return_tensors="pt").input_ids
    step = lambda: pipe.unet(torch.randn(1, 4, 8, 8).double(), 10, encoder_hidden_states=pipe.text_encoder(ids)[0])
    with pytest.warns(UserWarning, match="no prompt of this batch holds '<cat>', so NeTI learns nothing from it"):
        step()
    step()


@torch.no_grad()
def test_two_concepts_stand_in_one_prompt():
    pipe = pipeline()
    torch.manual_seed(5)
    pipe = get_token_model(pipe, [ProSpectConfig(stages=1, word=WORD, init_std=1.0), ProSpectConfig(stages=1, word="q", init_std=1.0)])
    banks = [module.bank[0, 0] for module in pipe.unet.modules() if isinstance(module, ProSpect)]
    hand = pipeline()
    hand.text_encoder.get_input_embeddings().weight.data[[54, 44]] = torch.stack(banks)
    close(drawn(pipe, f"a {WORD} on q"), drawn(hand, f"a {WORD} on q"))


@torch.no_grad()
def test_a_word_of_all_blocks_and_one_of_each_stand_in_one_prompt():
    """The second reads as if the first stood in the table."""
    pipe, alone = pipeline(), pipeline()
    torch.manual_seed(5)
    get_token_model(pipe, [NeTIConfig(word=WORD, **SIZES), ProSpectConfig(stages=1, word="q", init_std=1.0)])
    row = next(module for module in pipe.unet.modules() if isinstance(module, ProSpect)).bank[0, 0]
    alone.text_encoder.get_input_embeddings().weight.data[44] = row
    torch.manual_seed(5)
    get_token_model(alone, NeTIConfig(word=WORD, **SIZES))
    close(drawn(pipe, f"a {WORD} on q", guidance_scale=1.0), drawn(alone, f"a {WORD} on q", guidance_scale=1.0))


@torch.no_grad()
def test_prompts_with_masks_are_read_with_their_own():
    pipe, bank = surgery()
    ids = pipe.tokenizer([f"a {WORD} b", f"{WORD}"], padding="max_length", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    made = torch.cat([pipe.text_encoder(ids[i : i + 1], attention_mask=mask[i : i + 1])[0] for i in (1, 0)])
    sample = torch.randn(1, 4, 8, 8).double().expand(2, -1, -1, -1)
    twin = with_rows(pipe.text_encoder, stage_of(bank, 500))
    want = denoiser("unet")(sample, 500, encoder_hidden_states=twin(ids.flip(0), attention_mask=mask)[0]).sample
    close(pipe.unet(sample, 500, encoder_hidden_states=made).sample, want)
    made = torch.cat([pipe.text_encoder(ids[:1])[0], made[:1]])
    with pytest.raises(UnsupportedError, match=r"calls with \[\] and with \['attention_mask'\]"):
        pipe.unet(sample, 500, encoder_hidden_states=made)


def spoilt_embeds(pipe):
    return dict(prompt=None, prompt_embeds=torch.randn(1, 12, 6).double(), negative_prompt_embeds=torch.randn(1, 12, 6).double())


# what is refused in a call: what is done with a pipeline, and the words
REFUSED = {
    "embeddings from elsewhere": (lambda pipe: drawn(pipe, **spoilt_embeds(pipe)), "got 2 of 2 that are none of `text_encoder`. Encode"),
    "clip_skip": (
        lambda pipe: drawn(surgery("xl")[0], clip_skip=1),
        "got 1 of 2 that are none of `text_encoder`. Encode .* without `clip_skip`",
    ),
    "fused projections": (
        lambda pipe: [pipe.unet.fuse_qkv_projections(), drawn(pipe)],
        "a projection of the prompt's values alone, got none that was called",
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("case", REFUSED)
def test_a_prompt_that_the_encoders_did_not_make_is_refused(case):
    spoil, words = REFUSED[case]
    pipe, _ = neti()
    with pytest.raises(UnsupportedError, match=words):
        spoil(pipe)


@torch.no_grad()
def test_embeddings_that_the_pipeline_itself_made_are_served():
    pipe, _ = surgery()
    made = pipe.encode_prompt(f"a {WORD} b", "cpu", 1, True)
    close(drawn(pipe, None, prompt_embeds=made[0], negative_prompt_embeds=made[1]), drawn(pipe))


@torch.no_grad()
def test_a_word_that_reads_like_another_one_is_refused_where_both_are_read():
    pipe, _ = surgery()
    table = pipe.text_encoder.get_input_embeddings().weight.data
    table[54] = table[28]
    with pytest.raises(UnsupportedError, match="two prompts of other ids that `text_encoder` makes the same of. Give the row of the word"):
        drawn(pipe, f"see {WORD}", negative_prompt="see a")
    with pytest.raises(UnsupportedError, match="two prompts of other ids"):
        drawn(pipe, [f"see {WORD}", "see a"])
    table[54] *= 1.01
    drawn(pipe, f"see {WORD}", negative_prompt="see a")


def test_what_no_encoder_can_read_is_refused_before_anything_changes():
    pipe = pipeline()
    with pytest.raises(UnsupportedError, match="a row of data, got StableDiffusionControlNetPipeline. There is one for StableDiffusionPi"):
        beside = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        get_token_model(StableDiffusionControlNetPipeline(**beside, controlnet=None, **SAFE_ALONE), NeTIConfig(word=WORD))
    with pytest.raises(UnsupportedError, match=r"none as \['text_encoder'\]. Load the pipeline with them"):
        get_token_model(StableDiffusionPipeline(**{**pipe.components, "text_encoder": None}, **SAFE_ALONE), NeTIConfig(word=WORD))
    pipe.tokenizer.add_tokens("<dog>")
    with pytest.raises(UnsupportedError, match=r"'<dog>' with the ids \[55\] of 55. Call `pipe.text_encoder.resize_token_embeddings"):
        get_token_model(pipe, NeTIConfig(word="<dog>"))
    assert "forward" not in vars(pipe.text_encoder) and "peft_config" not in vars(pipe.unet)
    with pytest.raises(ConfigError, match="is for tokens behind the prompt, got a word. Write it into the negative prompt"):
        get_token_model(pipe, ProSpectConfig(word=WORD, negative=True))


@torch.no_grad()
@pytest.mark.parametrize("config", [ProSpectConfig, NeTIConfig])
def test_a_network_beside_the_denoiser_that_has_read_the_word_as_its_table_has_it_is_refused(config):
    pipe = pipeline()
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4,)).double()
    get_token_model(pipe, config(word=WORD))
    beside = StableDiffusionControlNetPipeline.from_pipe(pipe, controlnet=controlnet).to(torch.double)
    picture = dict(image=torch.rand(1, 3, 8, 8).double())
    with pytest.raises(UnsupportedError, match="nothing but the denoiser reads it, got `mid_block_additional_residual` of another network"):
        drawn(beside, **picture)
    without = drawn(beside, "a dog", **picture)  # no prompt holds the word
    unload(pipe)
    assert torch.equal(without, drawn(beside, "a dog", **picture))


def test_every_pipeline_gives_what_a_controlnet_made_of_the_prompt_by_a_name_that_is_known():
    sources = [path.read_text() for path in Path(diffusers.__file__).parent.glob("pipelines/**/pipeline_*.py")]
    beside = [source for source in sources if "self.controlnet(" in source and "self.unet(" in source]
    assert len(beside) > 9 and all(any(f"{name}=" in source for name in READ_BESIDE) for source in beside)


SAFE_ALONE = dict(requires_safety_checker=False)


@torch.no_grad()
def test_what_a_call_cannot_read_is_refused():
    with pytest.raises(UnsupportedError, match="got a denoiser that no pipeline was passed with. Pass the pipeline to `get_token_model`"):
        call = dict(sample=torch.randn(1, 4, 8, 8).double(), timestep=5, encoder_hidden_states=torch.randn(1, 12, 6).double())
        get_token_model(denoiser("unet"), NeTIConfig(word=WORD))(**call)
    pipe = get_token_model(pipeline(), ProSpectConfig(word="ab"))
    with pytest.raises(UnsupportedError, match=r"is as many tokens as it has vectors, 1, got 'ab' of \[2, 29\]. Choose another word"):
        drawn(pipe, "ab")
    set_method(pipe, ProSpectConfig(word=WORD))
    drawn(pipe)
    pipe = get_token_model(pipeline(), [NeTIConfig(word=WORD, **SIZES), ProSpectConfig()])
    with pytest.raises(UnsupportedError, match=r"nothing is added behind the prompt, got \['ProSpect'\]. Give each a word"):
        drawn(pipe)


@torch.no_grad()
def test_an_encoder_that_peft_wraps_is_read_with_its_adapter():
    pipe, bank = surgery()
    torch.manual_seed(7)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    want, pipe.text_encoder = drawn(pipe), get_peft_model(pipe.text_encoder, lora).double()
    plain = pipeline()
    plain.text_encoder = copy.deepcopy(pipe.text_encoder.get_base_model())
    vars(plain.text_encoder).pop("forward")
    with by_hand(plain, functools.partial(stage_of, bank)):
        close(drawn(pipe), drawn(plain))
    pipe.text_encoder = pipe.text_encoder.unload()
    all_equal([drawn(pipe)], [want], "unwrapped")
