"""Sublayers on merged tokens, and whole blocks that are reused, in blocks of many kinds."""

from dataclasses import dataclass

import pytest
import torch
from denoisers import blocks, calls, denoiser, sampled, with_pictures
from peft import LoraConfig, get_peft_model
from tolerances import all_close, close, differs

from hf_tokens import (
    FeatureCache,
    MethodConfig,
    ProfilingDiTConfig,
    ToCaConfig,
    TokenMap,
    TokenReducer,
    UnsupportedError,
    calibrate,
    get_token_model,
    measure,
    option,
    register,
)
from hf_tokens.testing import zoo


@dataclass(frozen=True)
class ShuffleConfig(MethodConfig):
    seed: int = option(0, ge=0, help="Seed of the order.")
    keep: float = option(1.0, gt=0, le=1, zero=1.0, help="Share of the tokens that stay.")
    mlp: bool = option(False, help="Whether the MLP gets it too.")
    uneven: bool = option(False, help="Whether samples keep different numbers.")


@register("shuffle", ShuffleConfig)
class Shuffle(TokenReducer):
    """The tokens in another order, one for each sample: a sublayer that is told their places returns what it did."""

    site, kinds = "sublayer", ("denoiser",)

    @property
    def parts(self):
        return ("attention", "cross_attention", *["mlp"] * self.config.mlp)

    def assign(self, hidden):
        b, n = hidden.shape[:2]
        order = torch.rand(b, n, generator=torch.Generator().manual_seed(self.config.seed)).argsort(dim=1)
        if self.config.uneven:
            return TokenMap.select(order > torch.arange(b)[:, None])
        source = order[:, : max(1, int(self.config.keep * n))]
        slot = torch.full_like(order, -1).scatter(1, source, torch.arange(source.shape[1]).expand_as(source))
        return TokenMap(slot, source)


@dataclass(frozen=True)
class HalfBlockConfig(MethodConfig):
    share: float = option(0.5, ge=0, le=1, zero=0.0, help="Share of the tokens.")


@register("half-block", HalfBlockConfig)
class HalfBlock(FeatureCache):
    """Asks for a part of a whole block, which there is not."""

    site = "block"

    def reuse(self, hidden):
        return torch.zeros(len(hidden), 1, dtype=torch.long)


# families whose attentions are told the places of their tokens in ways of their own, or get those of a second sequence
FAMILIES = """UNet2DConditionModel PixArtTransformer2DModel SD3Transformer2DModel FluxTransformer2DModel Flux2Transformer2DModel
CogVideoXTransformer3DModel CogView4Transformer2DModel HunyuanVideoTransformer3DModel HunyuanDiT2DModel QwenImageTransformer2DModel
WanTransformer3DModel LTXVideoTransformer3DModel Lumina2Transformer2DModel LuminaNextDiT2DModel ZImageTransformer2DModel
AuraFlowTransformer2DModel StableAudioDiTModel UNetMotionModel MochiTransformer3DModel""".split()


@pytest.mark.filterwarnings("ignore")  # what some models say of a CPU
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_in_another_order_give_the_same(family):
    specimen = zoo.build(f"diffusers/{family}")
    base = specimen.run()
    model = get_token_model(specimen.model, ShuffleConfig())
    with torch.no_grad():
        for ours, theirs in zip(zoo.tensors(model(**specimen.inputs)), base, strict=True):
            close(ours, theirs, family)
        dropped = zoo.tensors(get_token_model(model.unload(), ShuffleConfig(keep=0.5))(**specimen.inputs))
    assert all(t.isfinite().all() for t in dropped) and any(not torch.allclose(a, b) for a, b in zip(dropped, base, strict=True))


def test_tokens_that_vanish_get_nothing():
    run, model = calls("dit", 1), denoiser("dit")
    for block in model.transformer_blocks:
        block.ff.net[2].weight.zero_()
        block.ff.net[2].bias.zero_()
    surgery, heard = get_token_model(model, ShuffleConfig(keep=0.25)), []
    model.transformer_blocks[0].attn1.register_forward_hook(lambda module, args, output: heard.append(output))
    sampled(surgery, run)
    assert (heard[0] == 0).all(dim=-1).sum(dim=1).tolist() == [12, 12]


REFUSED = {
    "UNetSpatioTemporalConditionModel": "gets those of its block",
    "MiniMaxMusic3RVQDepthDecoder": "where each token sees all",
}


@pytest.mark.parametrize("family", REFUSED)
def test_blocks_in_which_no_tokens_are_merged(family):
    specimen = zoo.build(f"diffusers/{family}")
    with pytest.raises(UnsupportedError, match=REFUSED[family]), torch.no_grad():
        get_token_model(specimen.model, ShuffleConfig())(**specimen.inputs)


def test_maps_and_sublayers_that_are_refused():
    run = calls("dit", 2)
    with pytest.raises(UnsupportedError, match="as many in each sample"):
        sampled(get_token_model(denoiser("dit"), ShuffleConfig(uneven=True)), run)
    sana = zoo.build("diffusers/SanaTransformer2DModel")
    with pytest.raises(UnsupportedError, match=r"an MLP among them is one of .*, got \['GLUMBConv'\]"), torch.no_grad():
        get_token_model(sana.model, ShuffleConfig(mlp=True))(**sana.inputs)
    with pytest.raises(UnsupportedError, match="all tokens of a block, or none, got 1 of 16"):
        sampled(get_token_model(denoiser("dit"), HalfBlockConfig()), run)


VIDEOS = ("WanTransformer3DModel", "HunyuanVideoTransformer3DModel", "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel")


@pytest.mark.parametrize("family", VIDEOS)
def test_blocks_of_videos_are_profiled_and_reused(family):
    specimen = zoo.build(f"diffusers/{family}")
    time = specimen.inputs["timestep"]
    run = [{**specimen.inputs, "timestep": torch.full_like(time, t)} for t in (900, 600, 500, 400)]
    model = get_token_model(specimen.model, ProfilingDiTConfig(start=0.0, intervals="steps"))
    found = calibrate(model, run)["default.0"]
    assert found["background"]
    base = zoo.build(f"diffusers/{family}").model
    with torch.no_grad():
        got = [zoo.tensors(model(**call))[0] for call in run]
        want = [zoo.tensors(base(**call))[0] for call in run]
    close(got[0], want[0], family)
    assert not torch.allclose(got[-1], want[-1]) and got[-1].isfinite().all()


@pytest.mark.parametrize(
    "config", [ProfilingDiTConfig(start=0.0, background=(0, 1), intervals="steps"), ToCaConfig()], ids=["blocks", "tokens"]
)
def test_a_model_in_train_mode_reuses_where_no_gradient_is_wanted(config):
    run = calls("pixart", 3)
    model = get_token_model(denoiser("pixart"), config)
    want = sampled(model.eval(), run)
    assert torch.equal(sampled(model.train(), run), want)
    assert differs([want], [sampled(denoiser("pixart"), run)])


@pytest.mark.parametrize(
    "config", [ProfilingDiTConfig(start=0.0, background=(0, 1), intervals="steps"), ToCaConfig()], ids=["blocks", "tokens"]
)
def test_where_a_gradient_is_wanted_nothing_is_reused(config):
    run, lora = calls("dit", 3), LoraConfig(r=2, target_modules=["to_q"])
    model = get_token_model(denoiser("dit"), [config, lora]).eval()
    for call in run:
        model(**call)[0].sum().backward()
    plain = get_peft_model(denoiser("dit"), lora).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" in k}, strict=False)
    for call in run:
        plain(**call)[0].sum().backward()
    grads = lambda model: [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert all(g is not None and g.any() for g in grads(model)) and len(grads(model)) == 3
    all_close(grads(model), grads(plain), "gradients")


def test_a_block_with_other_results_is_refused():
    specimen = zoo.build("diffusers/LTX2VideoTransformer3DModel")
    with pytest.raises(UnsupportedError, match="returns its tokens, and those of a second sequence, alone"), torch.no_grad():
        get_token_model(specimen.model, "profilingdit")(**specimen.inputs)


@torch.no_grad()
def test_a_cross_attention_beside_an_ip_adapter_computes_each_token_alone():
    """Its tokens may be chosen, but where masks lie over the picture."""
    base, pictures = with_pictures(denoiser("unet"))
    heard = {}
    attention = blocks(base)[0].attn2
    attention.register_forward_pre_hook(lambda module, args, kwargs: heard.update(hidden=args[0], **kwargs), with_kwargs=True)
    run = [{**call, **pictures} for call in calls("unet", 4)]
    sampled(base, run[:1])
    hidden, chosen, context = heard["hidden"], torch.tensor([5, 0, 9]), heard["encoder_hidden_states"]
    close(attention(hidden[:, chosen], encoder_hidden_states=context), attention(hidden, encoder_hidden_states=context)[:, chosen])

    model = get_token_model(base, ToCaConfig(cycle=4)).eval()
    first, second = (measure(model, **call).flops for call in run[:2])
    assert second < first
    masks = {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 8, 8, dtype=torch.float64)]}}
    with pytest.raises(UnsupportedError, match="has no mask over the picture, got `ip_adapter_masks`"):
        sampled(model, [{**call, **masks} for call in run])
