"""Sublayers on merged tokens, and whole blocks that are reused, in blocks of many kinds."""

from dataclasses import dataclass

import pytest
import torch
from denoisers import KINDS, blocks, calls, denoiser, sampled, with_pictures
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


@dataclass(frozen=True)
class EveryOtherConfig(MethodConfig):
    asks: int = option(0, ge=0, le=1, zero=0, help="How many tokens it asks for.")


class EveryOther(FeatureCache):
    """Reuses the stack at every other step, and notes what it is given."""

    site = "stack"
    heard = []

    def due(self, hidden, step):
        return torch.zeros(len(hidden), self.config.asks, dtype=torch.long) if step % 2 else None


@register("every-other", EveryOtherConfig)
class InFront(EveryOther):
    def reuse(self, hidden, step):
        self.heard.append(hidden)
        return self.due(hidden, step)


@dataclass(frozen=True)
class InsideConfig(EveryOtherConfig):
    pass


@register("every-other-inside", InsideConfig)
class Inside(EveryOther):
    def reuse(self, hidden, attention_input, step):
        self.heard.append((hidden, attention_input))
        return self.due(hidden, step)


@dataclass(frozen=True)
class BehindConfig(EveryOtherConfig):
    pass


@register("every-other-behind", BehindConfig)
class Behind(EveryOther):
    leads = True

    def reuse(self, hidden, entered, step):
        self.heard.append((entered, hidden))
        return self.due(hidden, step)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["every-other", "every-other-inside", "every-other-behind"])
def test_a_stack_adds_what_its_blocks_added_together(kind, name):
    """Equal to blocks that are reused one by one, each with what it added, and what the method is told is what the model computed."""
    EveryOther.heard.clear()
    run, base = calls(kind, 4), denoiser(kind)
    model = get_token_model(denoiser(kind), name)
    got, told = sampled(model, run), [*EveryOther.heard]
    lead = name == "every-other-behind"
    background = tuple(range(int(lead), len(blocks(base))))
    blocked = ProfilingDiTConfig(background=background, start=0.0, max_interval=2, min_interval=2, intervals="steps")
    torch.testing.assert_close(got, sampled(get_token_model(denoiser(kind), blocked), run), rtol=1e-9, atol=1e-9)
    noted, first = [], blocks(base)[0]
    module = first.attn1 if hasattr(first, "attn1") else first.attn
    note = lambda module, args, kwargs: noted.append(args[0] if args else kwargs["hidden_states"])
    first.register_forward_pre_hook(note, with_kwargs=True)
    module.register_forward_pre_hook(note, with_kwargs=True)
    sampled(base, run)
    assert len(told) == 4
    for step, given in enumerate(told):
        given = given if isinstance(given, tuple) else (given,)
        assert torch.equal(given[0], noted[2 * step])
        assert name != "every-other-inside" or torch.equal(given[1], noted[2 * step + 1])


def test_a_stack_costs_what_runs_of_it():
    run = calls("flux", 2)
    model = get_token_model(denoiser("flux"), "every-other-inside")
    first, second = (measure(model, **call) for call in run)
    assert second.tokens == 0 < first.tokens and second.flops < first.flops / 4


def test_training_computes_a_stack():
    run, model = calls("sd3", 2), denoiser("sd3").requires_grad_()
    want = torch.autograd.grad(sum(model(**call).sample.square().sum() for call in run), list(model.parameters()), allow_unused=True)
    surgery = get_token_model(denoiser("sd3"), "every-other")
    inner = surgery.base_model.model.requires_grad_()
    inner.enable_gradient_checkpointing()
    surgery.train()
    got = torch.autograd.grad(sum(surgery(**call).sample.square().sum() for call in run), list(inner.parameters()), allow_unused=True)
    torch.testing.assert_close([g for g in got if g is not None], [g for g in want if g is not None])


def test_stacks_that_are_refused():
    with pytest.raises(UnsupportedError, match=r"acts from one block to another, in all blocks between them, got layers=\(0, 2\)"):
        get_token_model(denoiser("dit"), EveryOtherConfig(layers=(0, 2)))
    run = calls("dit", 2)
    with pytest.raises(UnsupportedError, match="computes all of it, or nothing, got 1 of 16"):
        sampled(get_token_model(denoiser("dit"), EveryOtherConfig(asks=1)), run)
    model = denoiser("sd3")
    states = [torch.ones(2, 16, 8, dtype=torch.float64)] * 3
    surgery = get_token_model(model, "every-other")
    with pytest.raises(UnsupportedError, match="Between blocks that are reused together nothing changes the tokens"):
        sampled(surgery, [{**call, "block_controlnet_hidden_states": states} for call in calls("sd3", 1)])
    with pytest.raises(UnsupportedError, match="stands alone"):
        get_token_model(denoiser("dit"), ["every-other", "toca"])


@pytest.mark.parametrize("family", ["HunyuanVideoTransformer3DModel", "Lumina2Transformer2DModel", "ZImageTransformer2DModel"])
def test_a_stack_begins_where_all_tokens_are_together(family):
    model = get_token_model(zoo.build(f"diffusers/{family}").model, "every-other")
    placed = [name for name, _ in model.named_modules() if name.endswith(".hf_tokens")]
    assert placed and not any("refiner" in name for name in placed)
