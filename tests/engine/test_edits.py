"""Edits of weights: what they leave alone, what they are told, how they stack, and what is refused."""

import copy
import inspect
from dataclasses import dataclass

import pytest
import torch
from denoisers import stable_diffusion
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from tolerances import all_close, all_equal, differs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from hf_tokens import (
    HFTokensConfig,
    MethodConfig,
    SSDUnlearnConfig,
    UnsupportedError,
    WeightEdit,
    closest_map,
    edit,
    get_token_model,
    load,
    option,
    register,
    save_adapter,
    unload,
)
from hf_tokens.model.parts import block_weights
from hf_tokens.roles.registry import METHODS
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.architectures import built


@dataclass(frozen=True)
class DoubleConfig(MethodConfig):
    by: float = option(2.0, ge=0, zero=1.0, help="Factor.")


@dataclass(frozen=True)
class ReadsConfig(MethodConfig):
    share: float = option(1.0, ge=0, zero=0.0, help="Share.")


@pytest.fixture
def double():
    @register("test-double", DoubleConfig)
    class Double(WeightEdit):
        """Paper: none, arXiv:0000.00000"""

        groups = ("any",)
        heard: dict = {}

        def edit(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
            Double.heard = weights
            return {name: w * self.config.by for name, w in weights.items() if name.endswith("down_proj.weight")}

    yield Double
    del METHODS["test-double"]


@pytest.fixture
def reads():
    @register("test-reads", ReadsConfig)
    class Reads(WeightEdit):
        """Paper: none, arXiv:0000.00000"""

        site = "context"
        groups, maybe = ("a",), ("b",)
        heard: dict = {}

        def edit(self, context: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
            Reads.heard = context
            return {}

    yield Reads
    del METHODS["test-reads"]


def llama():
    specimen = zoo.build("llama")
    return specimen.model.requires_grad_(False), specimen.inputs


def logits(model, inputs):
    with torch.no_grad():
        return [model(**inputs).logits]


def by_hand(base, factor, layers=range(4)):
    twin = copy.deepcopy(base)
    for i in layers:
        twin.model.layers[i].mlp.down_proj.weight.data *= factor
    return twin


def test_the_base_never_looks_edited(double):
    base, inputs = llama()
    before, tensors = logits(base, inputs), {name: (p, p.data_ptr(), p.clone()) for name, p in base.named_parameters()}
    model = get_token_model(base, DoubleConfig())
    edit(model, {"any": [inputs]})
    all_close(logits(model, inputs), logits(by_hand(load_plain(), 2), inputs), "edited")
    now = dict(base.named_parameters())
    assert all(now[name] is p and p.data_ptr() == place and torch.equal(p, bits) for name, (p, place, bits) in tensors.items())
    assert {k: v for k, v in base.state_dict().items() if ".hf_tokens." not in k}.keys() == tensors.keys()
    with model.disable_adapter():
        all_equal(logits(model, inputs), before)
    all_equal(logits(model.unload(), inputs), before)


def load_plain():
    return llama()[0]


def test_an_edit_that_is_not_made_warns_and_changes_nothing(double):
    base, inputs = llama()
    before = logits(base, inputs)
    model = get_token_model(base, DoubleConfig())
    with pytest.warns(UserWarning, match="the edit 'default.0' is not made and changes nothing; call `hf_tokens.edit`"):
        all_equal(logits(model, inputs), before)
    all_equal(logits(model, inputs), before)  # said once


def test_edits_stack_in_order_and_are_found_anew(double):
    base, inputs = llama()
    model = get_token_model(base, [DoubleConfig(), DoubleConfig(by=3.0)])
    for _ in range(2):
        edit(model, {"any": [inputs]})
        name = "model.layers.0.mlp.down_proj.weight"
        torch.testing.assert_close(double.heard[name], 2 * load_plain().get_parameter(name))  # what the second edit was given
        all_close(logits(model, inputs), logits(by_hand(load_plain(), 6), inputs), "both")


def test_two_adapters_add_up_and_each_stands_alone(double):
    base, inputs = llama()
    model = get_token_model(base, DoubleConfig())
    edit(model, {"any": [inputs]})
    model = get_token_model(model, DoubleConfig(by=0.5), adapter_name="other")
    edit(model, {"any": [inputs]}, "other")
    all_close(logits(model, inputs), logits(by_hand(load_plain(), 0.5), inputs), "half alone")
    model.base_model.set_adapter(["default", "other"])
    all_close(logits(model, inputs), logits(by_hand(load_plain(), 1.5), inputs), "2 w + (0.5 - 1) w")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")  # so it is
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_lora_beside_it_merges_and_unmerges(double):
    base, inputs = llama()
    model = get_token_model(base, DoubleConfig())
    edit(model, {"any": [inputs]})
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False), adapter_name="tuning").eval()
    apart = logits(tuned, inputs)
    tuned.merge_adapter()
    all_close(logits(tuned, inputs), apart, "merged")
    tuned.unmerge_adapter()
    all_close(logits(tuned, inputs), apart, "unmerged")


def test_merge_and_unload_writes_edits_and_their_lora_into_the_base(double, tmp_path):
    base, inputs = llama()
    model = get_token_model(base, [DoubleConfig(), LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)]).eval()
    edit(model, {"any": [inputs]})
    want = logits(model, inputs)
    plain = model.merge_and_unload()
    assert type(plain) is type(load_plain()) and plain.state_dict().keys() == load_plain().state_dict().keys()
    all_close(logits(plain, inputs), want, "baked")


def test_layers_and_dtypes(double, tmp_path):
    base, inputs = llama()
    model = get_token_model(base, DoubleConfig(layers=(1, 3)))
    edit(model, {"any": [inputs]})
    want = by_hand(load_plain(), 2, (1, 3))
    all_close(logits(model, inputs), logits(want, inputs), "two layers")
    model.save_pretrained(tmp_path)
    all_equal(logits(load(tmp_path, load_plain()).eval(), inputs), logits(model, inputs), "loaded")
    all_close(logits(model.to(torch.bfloat16), inputs), logits(want.to(torch.bfloat16), inputs), "bfloat16")
    all_close(logits(load(tmp_path, load_plain().to(torch.bfloat16)), inputs), logits(want, inputs), "loaded into bfloat16")


def test_context_is_what_the_projections_read_of_the_real_tokens(reads):
    specimen = zoo.build("diffusers/PixArtTransformer2DModel")
    base, inputs = specimen.model, specimen.inputs
    mask = torch.ones(inputs["encoder_hidden_states"].shape[:2])
    mask[0, 3:] = 0
    model = get_token_model(base, ReadsConfig())
    assert edit(model, {"a": [{**inputs, "encoder_attention_mask": mask}, inputs], "b": [inputs]}) == {"default.0": {}}
    whole = inputs["encoder_hidden_states"]
    want = torch.cat([whole[mask.bool()], whole.flatten(0, 1)])
    assert set(reads.heard) == {"a", "b"} and len(reads.heard["a"]) == 2 * len(base.transformer_blocks)
    for name, read in reads.heard["a"].items():
        assert name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        torch.testing.assert_close(read, want)
    assert len({read.data_ptr() for read in reads.heard["a"].values()}) == 1  # one copy for all that read the same


def test_what_a_block_has_keeps_its_name_under_a_lora():
    base, _ = llama()
    names = list(block_weights(base.model.layers[0], "block"))
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    assert list(block_weights(tuned.base_model.model.model.layers[0], "block")) == names


def test_refusals(double, reads):
    base, inputs = llama()
    with pytest.raises(UnsupportedError, match="whose blocks have a cross-attention with linear projections of the context, got Llama"):
        get_token_model(base, ReadsConfig())
    half = copy.deepcopy(base)
    half.model.layers[2].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        UnsupportedError, match="is a plain floating-point parameter, got Parameter of torch.int8 at model.layers.2.mlp.up_"
    ):
        get_token_model(half, DoubleConfig())
    tied = copy.deepcopy(base)
    tied.model.layers[2].mlp.up_proj.weight = tied.model.layers[1].mlp.up_proj.weight
    with pytest.raises(UnsupportedError, match=r"belongs to one place of the model, got one tied as \['model.layers.1.mlp.up_proj.weight'"):
        get_token_model(tied, DoubleConfig())
    get_token_model(tied, DoubleConfig(layers=(0, 3)))
    model = get_token_model(base, DoubleConfig())
    with pytest.raises(UnsupportedError, match=r"need data for \['any'\], got \['all'\]. Name the groups so"):
        edit(model, {"all": [inputs]})
    with pytest.raises(UnsupportedError, match="with a method that edits weights, got 'other' without one"):
        edit(model, {"any": [inputs]}, "other")
    model.add_adapter("second", HFTokensConfig(methods=[DoubleConfig()]))
    with pytest.raises(UnsupportedError, match=r"an adapter that acts, one of \['default'\], got 'second'. Switch"):
        edit(model, {"any": [inputs]}, "second")
    with pytest.raises(UnsupportedError, match="with a method that edits weights, got 'default' without one. Put"):
        edit(get_token_model(load_plain(), "probe-drop"), {"any": [inputs]})


def test_gradients_need_a_loss_and_data():
    base, inputs = llama()
    model = get_token_model(base, SSDUnlearnConfig())
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    with pytest.raises(UnsupportedError, match="looks at gradients needs a loss, got .* without one. Put labels"):
        edit(model, {"forget": [plain], "retain": [plain]})
    labelled = {**plain, "labels": plain["input_ids"]}
    with pytest.raises(UnsupportedError, match="Each group of data has a batch, got none in 'retain'. Pass the inputs"):
        edit(model, {"forget": [labelled], "retain": []})
    assert not any(p.requires_grad for p in base.parameters())
    edit(model, {"forget": [labelled], "retain": [labelled]})
    all_equal(logits(model, plain), logits(load_plain(), plain), "what matters to both alike stays")
    edit(model, {"forget": iter([labelled]), "retain": (b for b in [{**labelled, "labels": labelled["labels"].flip(1)}])})
    assert differs(logits(model, plain), logits(load_plain(), plain))


def test_the_closest_map_is_a_minimum():
    now, start, x, y = (torch.randn(*size, dtype=torch.float64) for size in ((3, 4), (3, 4), (6, 4), (6, 4)))
    found = closest_map(now, start, x.T @ x, y.T @ x, 0.3).requires_grad_()
    loss = ((x @ found.T - y @ start.T) ** 2).sum() + 0.3 * ((found - now) ** 2).sum()
    assert float(torch.autograd.grad(loss, found)[0].abs().max()) < 1e-10


def test_a_pipeline_s_denoiser_is_edited(tmp_path):
    unet = copy.deepcopy(built("UNet2DConditionModel")[0])
    before, inputs = unet(**built("UNet2DConditionModel")[1]).sample, built("UNet2DConditionModel")[1]
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe = get_token_model(pipe, "rece")
    prompts = inputs["encoder_hidden_states"]
    moved = edit(pipe, {"erase": [inputs], "anchor": [{**inputs, "encoder_hidden_states": prompts.flip(0)}]})["default.0"]
    after = pipe.unet(**inputs).sample
    assert len(moved) == 8 and differs([after], [before])
    save_adapter(pipe, tmp_path)
    all_equal([unload(pipe).unet(**inputs).sample], [before])
    all_equal([load(tmp_path, pipe).unet(**inputs).sample], [after])


@dataclass(frozen=True)
class HalveConfig(MethodConfig):
    by: float = option(2.0, ge=0, zero=1.0, help="Divisor.")


@pytest.fixture
def halve():
    @register("test-halve", HalveConfig)
    class Halve(WeightEdit):
        """Paper: none, arXiv:0000.00000"""

        site = "model"
        groups = ("any",)

        def edit(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: w / self.config.by for name, w in weights.items()}

    yield Halve
    del METHODS["test-halve"]


def scaled(base, factor):
    twin = copy.deepcopy(base)
    for weight in twin.parameters():
        weight.data *= factor
    return twin


# models by what is outside of their blocks: a head, a tied one, weights of the root, of its parts, two streams, convolutions
WHOLE = ["llama", "gpt2", "t5", "clip", "vit", "mobilebert", "whisper", "llava"]
WHOLE += ["diffusers/PixArtTransformer2DModel", "diffusers/SD3Transformer2DModel", "diffusers/UNet2DConditionModel"]


def test_a_pipeline_takes_prompts_in_words():
    prompts = {"erase": ["a cat", "a big cat"], "anchor": ["a dog", "a big dog"], "preserve": ["a tree"]}
    moved = []
    for words in (True, False):
        pipe = stable_diffusion()
        pipe.set_progress_bar_config(disable=True)
        call = lambda text, pipe=pipe: {
            "sample": torch.zeros(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": pipe.encode_prompt(text, "cpu", 1, False)[0]
        }  # fmt: skip
        data = prompts if words else {group: [call(text) for text in texts] for group, texts in prompts.items()}
        moved.append(edit(get_token_model(pipe, "rece"), data)["default.0"])
    assert moved[0] == pytest.approx(moved[1], rel=1e-5) and all(moved[0].values())


@pytest.mark.parametrize(("batch", "got"), [("a cat", "'a cat' for PeftModel"), (torch.zeros(1), "Tensor")])
def test_what_is_no_batch_is_refused_in_words(batch, got):
    model = get_token_model(zoo.build("llama").model, SSDUnlearnConfig())
    with pytest.raises(UnsupportedError, match=f"or a prompt in words for a pipeline with one denoiser, got {got}. Pass dicts"):
        edit(model, {"forget": [batch], "retain": [batch]})


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # MobileBERT's
@pytest.mark.parametrize("name", WHOLE)
def test_the_site_model_is_every_weight(halve, name, tmp_path):
    specimen = zoo.build(name)
    base, inputs = specimen.model.eval().requires_grad_(False), specimen.inputs
    first = lambda model: [next(v for v in model(**inputs).values() if isinstance(v, Tensor) and v.is_floating_point())]
    before, plain = first(base), copy.deepcopy(base)
    want = first(scaled(plain, 0.5))
    tensors = {name: (p, p.clone()) for name, p in base.named_parameters()}
    model = get_token_model(base, HalveConfig()).eval()
    moved = edit(model, {"any": [inputs]})["default.0"]
    assert moved.keys() == tensors.keys()
    all_equal(first(model), want, "halved")
    assert all(dict(base.named_parameters())[name] is p and torch.equal(p, bits) for name, (p, bits) in tensors.items())
    save_adapter(model, tmp_path)
    all_equal(first(load(tmp_path, copy.deepcopy(plain)).eval()), want, "loaded")
    with model.disable_adapter():
        all_equal(first(model), before)
    all_equal(first(copy.deepcopy(model).merge_and_unload()), want, "baked")
    all_equal(first(model.unload()), before)
    assert not any("forward" in vars(module) for module in base.modules())


def test_what_is_called_beside_the_model_reads_the_edited_weights_too(halve):
    specimen = zoo.build("t5")
    base, inputs = specimen.model.eval(), specimen.inputs
    twin, ids = scaled(base, 0.5), inputs["input_ids"]
    signature = inspect.signature(base.encoder.forward)
    model = get_token_model(base, HalveConfig()).eval()
    edit(model, {"any": [inputs]})
    assert inspect.signature(base.encoder.forward) == signature and inspect.signature(base.shared.forward).parameters.keys() == {"input"}
    with torch.no_grad():
        all_equal([base.get_input_embeddings()(ids)], [twin.get_input_embeddings()(ids)])
        all_equal([base.encoder(input_ids=ids).last_hidden_state], [twin.encoder(input_ids=ids).last_hidden_state])
    sizes = {"max_new_tokens": 4, "do_sample": False, "decoder_start_token_id": 0}
    all_equal([model.generate(input_ids=ids, **sizes)], [twin.generate(input_ids=ids, **sizes)])


def test_named_blocks_are_all_that_changes_at_the_site_model(halve):
    base, inputs = llama()
    model = get_token_model(base, HalveConfig(layers=(1,)))
    assert {name.split(".")[2] for name in edit(model, {"any": [inputs]})["default.0"]} == {"1"}


def test_a_weight_outside_of_the_blocks_is_plain_too(halve):
    base, _ = llama()
    base.lm_head.weight = nn.Parameter(torch.zeros(base.lm_head.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="is a plain floating-point parameter, got Parameter of torch.int8 at lm_head.weight"):
        get_token_model(base, HalveConfig())


def test_a_call_that_raises_leaves_no_edited_weight_in_the_base(halve):
    base, inputs = llama()
    tensors = dict(base.named_parameters())
    model = get_token_model(base, HalveConfig())
    edit(model, {"any": [inputs]})
    with pytest.raises(IndexError):
        model(input_ids=inputs["input_ids"] + 10**6)
    assert all(p is tensors[name] for name, p in base.named_parameters())


@pytest.mark.parametrize(
    "moved", [parametrizations.weight_norm, lambda module: prune.l1_unstructured(module, "weight", 0.5)], ids=["norm", "prune"]
)
def test_a_weight_that_is_parametrized_behind_an_edit_is_refused_in_words(halve, moved):
    base, inputs = llama()
    model = get_token_model(base, HalveConfig(layers=(1,)))
    edit(model, {"any": [inputs]})
    moved(base.model.layers[1].mlp.up_proj)
    with pytest.raises(UnsupportedError, match="is a parameter of its module, got mlp.up_proj.weight.* before the adapter is attached"):
        model(**inputs)
    with model.disable_adapter():
        model(**inputs)


def test_a_part_that_is_called_alone_reads_edited_weights_that_it_takes_from_a_part_of_its_own(halve):
    specimen = zoo.build("siglip")  # its pooling head is torch's own attention, which never calls the projection in it
    base, pixels = specimen.model.eval().requires_grad_(False), specimen.inputs["pixel_values"]
    twin, model = scaled(base, 0.5), get_token_model(base, HalveConfig()).eval()
    edit(model, {"any": [specimen.inputs]})
    with torch.no_grad():
        all_equal(zoo.tensors(base.vision_model(pixel_values=pixels)), zoo.tensors(twin.vision_model(pixel_values=pixels)))
        all_equal(zoo.tensors(base.get_image_features(pixel_values=pixels)), zoo.tensors(twin.get_image_features(pixel_values=pixels)))
