"""Banks that act on the prompt of a denoiser: who takes their tokens, where these stand, and which block reads them."""

import copy
from dataclasses import dataclass

import pytest
import torch
from denoisers import alone, blocks, calls, denoiser, half, own_prompts, with_pictures, within
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from tolerances import all_equal, close
from torch import nn

from hf_tokens import (
    DiffusionDPOConfig,
    MethodConfig,
    ProSpectConfig,
    ToCaConfig,
    TokenBank,
    UnsupportedError,
    anatomy,
    get_token_model,
    objective_loss,
    option,
    register,
    unload,
)
from hf_tokens.errors import ConfigError
from hf_tokens.handlers.prompt import PromptInsert, extend_prompt, join_outputs, prompt_mask
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import zoo

PROMPTED = ("unet", "sd3", "flux", "pixart")
WORD = ProSpectConfig(stages=1, tokens=2, init_std=1.0)


@dataclass(frozen=True)
class OwnConfig(MethodConfig):
    tokens: int = option(2, ge=0, zero=0, help="Tokens of each block.")


@pytest.fixture
def own():
    """A deep bank: each block has tokens of its own."""

    class Own(TokenBank):
        site, moves_tokens, deep = "prompt", False, True
        kinds = ("denoiser",)

        def __init__(self, config, dims):
            super().__init__(config, dims)
            self.rows = nn.Parameter(torch.randn(config.tokens, dims.prompt))

        def tokens(self):
            return self.rows

    Own.__doc__ = "Own."
    register("toy-own", OwnConfig)(Own)
    yield OwnConfig
    del METHODS["toy-own"]


def surgery(kind, *configs, **more):
    torch.manual_seed(0)
    return get_token_model(denoiser(kind), [*configs] or WORD, **more).eval()


def rows_of(model):
    """The tokens of each block, in the order in which the blocks run."""
    inner = model.base_model.model
    return [block.hf_tokens.hf_tokens_methods["default"]["0"].rows.detach() for block in blocks(inner)]


def word_of(model):
    return next(p for name, p in model.named_parameters() if name.endswith("bank")).detach()[0]


def longer(call, tokens):
    return {
        **call,
        "encoder_hidden_states": torch.cat([call["encoder_hidden_states"], tokens.expand(len(call["timestep"]), -1, -1)], dim=1),
    }


# -- where the tokens stand ------------------------------------------------------------------------------------------


def gift(k, batch=2, place=None):
    return PromptInsert("a", place, -torch.ones(batch, k, 1), torch.ones(batch, dtype=torch.bool))


def prompt(n=4, batch=2):
    return torch.arange(1.0, n + 1).expand(batch, n)[..., None]


@pytest.mark.parametrize("form", ["bool", "long", "float", "bias", "bool bias"])
def test_they_stand_behind_the_last_real_token_of_each_prompt(form):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    given = {
        "bool": mask.bool(),
        "long": mask,
        "float": mask.float(),
        "bias": (mask[:, None] - 1.0) * 1e4,
        "bool bias": mask[:, None].bool(),
    }
    call, layout = extend_prompt({"encoder_hidden_states": prompt(), "encoder_attention_mask": given[form]}, [gift(2)])
    assert layout is None
    assert call["encoder_hidden_states"][..., 0].tolist() == [[1, 2, 3, 4, -1, -1], [1, 2, -1, -1, 3, 4]]
    assert prompt_mask(call).tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    assert call["encoder_attention_mask"].dtype == given[form].dtype


def test_their_places_are_those_of_the_token_in_front():
    table = torch.tensor([[0, 5], [0, 6], [0, 7], [0, 8]])
    call, _ = extend_prompt({"encoder_hidden_states": prompt(), "txt_ids": table}, [gift(2), gift(1)])
    assert call["txt_ids"].tolist() == [[0, 5], [0, 6], [0, 7], [0, 8], [0, 8], [0, 8], [0, 8]]
    uneven = {"encoder_hidden_states": prompt(), "text_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])}
    with pytest.raises(UnsupportedError, match="Samples that share `txt_ids` must have as many real tokens"):
        extend_prompt({**uneven, "txt_ids": table}, [gift(2)])
    call, _ = extend_prompt({**uneven, "txt_ids": table.expand(2, 4, 2)}, [gift(1)])
    assert call["txt_ids"][..., 1].tolist() == [[5, 6, 7, 8, 8], [5, 5, 6, 7, 8]]
    call, _ = extend_prompt({**uneven, "txt_ids": torch.zeros(4, 3)}, [gift(1)])
    assert call["txt_ids"].shape == (5, 3)


def test_those_of_single_blocks_stand_behind_the_end():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    single = [PromptInsert("b", place, -(place + 2) * torch.ones(2, place + 1, 1), gift(1).rows) for place in (0, 1)]
    gifts = [gift(2), *single]
    call, layout = extend_prompt({"encoder_hidden_states": prompt(), "encoder_attention_mask": mask}, gifts)
    assert call["encoder_hidden_states"][1, :, 0].tolist() == [1, -1, -1, 2, 3, 4, -2, -3, -3]
    assert (layout.length, layout.total) == (6, 9) and layout.own == {("b", 0): range(6, 7), ("b", 1): range(7, 9)}


@pytest.mark.parametrize("name", ["txt_seq_lens", "attention_mask"])
def test_a_prompt_described_in_other_words_is_refused(name):
    with pytest.raises(UnsupportedError, match=f"got `{name}`"):
        extend_prompt({"encoder_hidden_states": prompt(), name: torch.ones(2, 4)}, [gift(2)])
    extend_prompt({"encoder_hidden_states": prompt(), name: None}, [gift(2)])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["unet", "pixart"])
def test_a_padded_prompt_is_as_the_sample_alone(kind):
    model, base, call = surgery(kind), denoiser(kind), calls(kind, 1)[0]
    call["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    got, want = model(**call).sample, []
    for i, n in enumerate((5, 2)):
        one = alone({**call, "encoder_attention_mask": None}, i)
        want.append(base(**longer({**one, "encoder_hidden_states": one["encoder_hidden_states"][:, :n]}, word_of(model))).sample)
    torch.testing.assert_close(got, torch.cat(want))


# -- who takes them --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_call_of_the_negative_prompt_goes_without():
    model, base, call = surgery("flux"), denoiser("flux"), calls("flux", 1)[0]
    for name, changed in (("cond", True), ("uncond", False)):
        _set_cache_context(model.base_model.model, CacheContext(name))
        assert torch.equal(model(**call).sample, base(**call).sample) != changed
    _set_cache_context(model.base_model.model, None)


def samples(rows):
    """A call for these prompts, all with the same latents."""
    call = calls("sd3", 1, batch=6)[0]
    pick = lambda i: {**alone(call, i, rows=6), "hidden_states": call["hidden_states"][:1]}
    return {name: torch.cat([pick(i)[name] for i in rows]) for name in call}, [pick(i) for i in rows]


@torch.no_grad()
@pytest.mark.parametrize(("name", "rows", "negative"), [("cond_uncond", (0, 1), 1), ("cond_uncond", (0, 0), 1), ("cond", (0, 1), 0)])
def test_a_context_says_which_part_of_a_batch_is_negative(name, rows, negative):
    model, base = surgery("sd3"), denoiser("sd3")
    batch, each = samples(rows)
    want = [base(**(one if i < negative else longer(one, word_of(model)))).sample for i, one in enumerate(each)]
    with within(model, name):
        close(model(**batch).sample, torch.cat(want))


@torch.no_grad()
@pytest.mark.parametrize("rows", [(0, 1), (0, 1, 1), (0, 0, 1, 2)])
def test_one_sample_with_two_prompts_is_refused_where_nobody_tells_which_is_negative(rows):
    model = surgery("sd3")
    batch, each = samples(rows)
    with pytest.raises(UnsupportedError, match="Which prompt is the negative one .* Call the denoiser within `CacheMixin.cache_context"):
        model(**batch)
    model(**each[0])
    model(**each[0])
    with pytest.raises(UnsupportedError, match="one sample with two prompts"):
        model(**each[-1])
    model(**{**each[-1], "timestep": each[-1]["timestep"] - 1})


@torch.no_grad()
def test_samples_of_other_latents_are_no_guidance():
    model, base, call = surgery("sd3"), denoiser("sd3"), calls("sd3", 1, batch=4)[0]
    close(model(**call).sample, base(**longer(call, word_of(model))).sample)


def pipeline(unet):
    parts = dict(text_encoder=None, tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = StableDiffusionPipeline(AutoencoderKL(), unet=unet, scheduler=DDIMScheduler(steps_offset=1, clip_sample=False), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe):
    torch.manual_seed(3)
    prompts = dict(prompt_embeds=torch.randn(2, 5, 6), negative_prompt_embeds=torch.randn(2, 5, 6))
    given = dict(latents=torch.randn(2, 4, 8, 8), guidance_scale=4.0, output_type="latent")
    return pipe(height=8, width=8, num_inference_steps=4, **prompts, **given).images


def test_a_pipeline_under_guidance():
    """The same by a denoiser that is called for each half, with the words behind the prompt of the second."""
    torch.manual_seed(0)
    pipe = get_token_model(pipeline(denoiser("unet", torch.float32)), ProSpectConfig(stages=2, tokens=2, init_std=1.0))
    bank = next(p for name, p in pipe.unet.named_parameters() if name.endswith("bank")).detach()
    base = denoiser("unet", torch.float32)
    plain = base.forward

    def by_halves(sample, timestep, encoder_hidden_states, **more):
        negative, told = encoder_hidden_states.chunk(2)
        told = torch.cat([told, bank[0 if timestep >= 500 else 1].expand(2, -1, -1)], dim=1)
        outputs = [plain(half, timestep, text)[0] for half, text in zip(sample.chunk(2), (negative, told), strict=True)]
        return (torch.cat(outputs),)

    hand = pipeline(copy.deepcopy(base))
    unchanged = drawn(hand)
    hand.unet.forward = by_halves
    got = drawn(pipe)
    torch.testing.assert_close(got, drawn(hand), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, unchanged, atol=1e-2)
    unload(pipe)
    all_equal([drawn(pipe)], [unchanged], "unloaded")


@torch.no_grad()
def test_two_prompts_for_one_noise_are_no_guidance_where_the_pipeline_has_none():
    """Parts of a batch with the same latents and other prompts: the pipeline knows whether one of them is a negative prompt."""
    torch.manual_seed(0)
    pipe = get_token_model(pipeline(denoiser("unet", torch.float32)), WORD)
    prompts, noise = torch.randn(2, 5, 6), torch.randn(1, 4, 8, 8)
    given = dict(height=8, width=8, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    both = pipe(prompt_embeds=prompts, latents=noise.expand(2, -1, -1, -1), **given).images
    each = [pipe(prompt_embeds=prompt[None], latents=noise, **given).images for prompt in prompts]
    torch.testing.assert_close(both, torch.cat(each), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_beside_a_feature_cache_guidance_takes_two_calls():
    model = surgery("pixart", WORD, ToCaConfig(cycle=2))
    both = calls("pixart", 2, guided=True)
    refused = pytest.raises(UnsupportedError, match="nothing may be kept from call to call, got \\['ToCa'\\]")
    with within(model), refused:
        model(**both[0])
    for call in both:
        for name, which in (("cond", 1), ("uncond", 0)):
            _set_cache_context(model.base_model.model, CacheContext(name))
            assert bool(model(**half(call, which)).sample.isfinite().all())
    _set_cache_context(model.base_model.model, None)


def test_an_objective_s_reference_reads_the_prompt_as_it_came(own):
    model, lengths = surgery("pixart", WORD, own(), DiffusionDPOConfig()).train(), []
    model.base_model.model.caption_projection.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    call = calls("pixart", 1)[0]
    output = model(**call).sample
    objective_loss(model, torch.randn_like(output[:, :4])).backward()
    assert lengths == [5 + 2 + 3 * 2, 5]


# -- what a block reads ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", PROMPTED)
def test_each_block_reads_its_own(own, kind):
    model, base, call = surgery(kind, own()), denoiser(kind), calls(kind, 1)[0]
    with own_prompts(base, kind, rows_of(model)):
        want = base(**call).sample
    close(model(**call).sample, want)


@torch.no_grad()
@pytest.mark.parametrize("order", ["pictures first", "bank first"])
def test_each_block_reads_its_own_beside_the_pictures_of_an_ip_adapter(own, order):
    base, pictures = with_pictures(denoiser("unet"))
    if order == "bank first":
        model = surgery("unet", own())
        with_pictures(model.base_model.model)
    else:
        torch.manual_seed(0)
        model = get_token_model(with_pictures(denoiser("unet"))[0], own()).eval()
    call = {**calls("unet", 1)[0], **pictures}
    with own_prompts(base, "unet", rows_of(model)):
        want = base(**call).sample
    assert not torch.allclose(want, base(**call).sample)
    close(model(**call).sample, want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd3", "flux", "pixart"])
def test_blocks_that_the_bank_leaves_out_read_none(own, kind):
    model, base, call = surgery(kind, own(layers=(1,))), denoiser(kind), calls(kind, 1)[0]
    methods = [block.hf_tokens.hf_tokens_methods["default"] for block in blocks(model.base_model.model)]
    rows = [held["0"].rows.detach() if "0" in held else torch.zeros(0, 6, dtype=torch.float64) for held in methods]
    assert sorted({len(own) for own in rows}) == [0, 2]
    with own_prompts(base, kind, rows):
        want = base(**call).sample
    close(model(**call).sample, want)


READERS = "Allegro 3D,Bria 2D,CogView4 2D,LTXVideo 3D,QwenImage 2D,Sana 2D,Wan 3D".split(",")


@torch.no_grad()
@pytest.mark.parametrize("family", READERS)
def test_no_block_sees_what_stands_there_for_another(own, family):
    specimen = zoo.build(f"diffusers/{'Transformer'.join(family.split())}Model")
    torch.manual_seed(0)
    model, seen = get_token_model(specimen.model, own()).eval(), []
    mine = blocks(model.base_model.model)
    for stream in anatomy(model).streams:
        for block in stream.blocks:
            block.register_forward_hook(lambda module, args, output, stream=stream: seen.append(stream.read(0, output)))
    model(**specimen.inputs)
    before = seen.copy()
    for changed in (len(mine) - 1, len(mine) // 2, 0):
        rows = mine[changed].hf_tokens.hf_tokens_methods["default"]["0"].rows
        seen.clear()
        rows.add_(1)
        model(**specimen.inputs)
        rows.sub_(1)
        alike = [torch.equal(one, other) for one, other in zip(seen, before, strict=True)]
        assert alike[:changed] == [True] * changed and not alike[changed]


def test_a_prompt_that_is_pooled_too_is_refused(own):
    with pytest.raises(UnsupportedError, match="a pool of the prompt"):
        get_token_model(zoo.build("diffusers/MochiTransformer3DModel").model, own())


@pytest.mark.parametrize("family", ["CogVideoXTransformer3DModel", "HunyuanDiT2DModel", "DiTTransformer2DModel"])
def test_a_prompt_whose_length_is_fixed_is_refused(family):
    with pytest.raises(UnsupportedError, match="a denoiser that is given a prompt of any length"):
        get_token_model(zoo.build(f"diffusers/{family}").model, WORD)


@torch.no_grad()
def test_a_shared_prompt_beside_those_of_single_blocks(own):
    model, base, call = surgery("sd3", own(), WORD), denoiser("sd3"), calls("sd3", 1)[0]
    with own_prompts(base, "sd3", rows_of(model)):
        want = base(**longer(call, word_of(model))).sample
    close(model(**call).sample, want)


@pytest.mark.parametrize("kind", PROMPTED)
def test_checkpointed_blocks_read_what_they_read_before(own, kind):
    """Two calls of other lengths before the backward pass."""

    def gradients(checkpointed):
        model = surgery(kind, own()).train()
        if checkpointed:
            model.base_model.model.enable_gradient_checkpointing()
        short, long = calls(kind, 1)[0], calls(kind, 1, seed=4)[0]
        short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :2]
        if kind == "flux":
            short["txt_ids"] = short["txt_ids"][:2]
        sum(model(**call).sample.square().sum() for call in (short, long)).backward()
        return [p.grad for name, p in model.named_parameters() if name.endswith("rows")]

    for one, other in zip(gradients(True), gradients(False), strict=True):
        close(one, other)


def test_signals_that_are_not_known_at_the_prompt():
    class Asks(TokenBank):
        site = "prompt"

        def tokens(self, keys):
            return None

    with pytest.raises(ConfigError, match="Asks.tokens at the prompt may ask for"):
        register("toy-asks", OwnConfig)(Asks)


def test_join_puts_the_samples_in_order():
    one, other = torch.tensor([0, 3]), torch.tensor([1, 2])
    values = {"sample": torch.tensor([0.0, 3.0]), "more": [None]}, {"sample": torch.tensor([1.0, 2.0]), "more": [None]}
    out = join_outputs([*zip((one, other), values, strict=True)])
    assert out["sample"].tolist() == [0, 1, 2, 3] and out["more"] == [None]
