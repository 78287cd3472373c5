"""What the anatomy says of models of every kind, held against their structure and, where it matters, against their calls."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_tokens.model.anatomy import anatomy
from hf_tokens.model.signatures import hidden_index
from hf_tokens.testing import zoo

# family: name of a stream -> (kind, number of blocks, class of a block, causal, self-attention of the first block, its MLP, the MLP's norm)
EXPECTED = {
    "llama": {"text": ("text", 4, "LlamaDecoderLayer", True, "self_attn", "mlp", "post_attention_layernorm")},
    "mixtral": {"text": ("text", 4, "MixtralDecoderLayer", True, "self_attn", "mlp", "post_attention_layernorm")},
    "gpt2": {"text": ("text", 4, "GPT2Block", True, "attn", "mlp", "ln_2")},
    "gpt_neox": {"text": ("text", 4, "GPTNeoXLayer", True, "attention", "mlp", None)},
    "olmo2": {"text": ("text", 4, "Olmo2DecoderLayer", True, "self_attn", "mlp", None)},
    "bert": {"text": ("text", 4, "BertLayer", False, "attention.self", None, None)},
    "t5": {
        "encoder": ("text", 4, "T5Block", False, "layer.0.SelfAttention", "layer.1.DenseReluDense", "layer.1.layer_norm"),
        "decoder": ("text", 4, "T5Block", True, "layer.0.SelfAttention", "layer.2.DenseReluDense", "layer.2.layer_norm"),
    },
    "whisper": {
        "encoder": ("audio", 4, "WhisperEncoderLayer", False, "self_attn", None, None),
        "decoder": ("text", 4, "WhisperDecoderLayer", True, "self_attn", None, None),
    },
    "vit": {"vision": ("vision", 4, "ViTLayer", False, "attention", "mlp", "layernorm_after")},
    "dinov2": {"vision": ("vision", 4, "Dinov2Layer", False, "attention", "mlp", "norm2")},
    "clip": {
        "text": ("text", 4, "CLIPEncoderLayer", True, "self_attn", "mlp", "layer_norm2"),
        "vision": ("vision", 4, "CLIPEncoderLayer", False, "self_attn", "mlp", "layer_norm2"),
    },
    "llava": {
        "vision": ("vision", 4, "CLIPEncoderLayer", False, "self_attn", "mlp", "layer_norm2"),
        "text": ("text", 4, "LlamaDecoderLayer", True, "self_attn", "mlp", "post_attention_layernorm"),
    },
    "qwen2_vl": {
        "vision": ("vision", 4, "Qwen2VLVisionBlock", False, "attn", "mlp", "norm2"),
        "text": ("text", 4, "Qwen2VLDecoderLayer", True, "self_attn", "mlp", "post_attention_layernorm"),
    },
    "gemma3": {
        "vision": ("vision", 4, "SiglipEncoderLayer", False, "self_attn", "mlp", "layer_norm2"),
        "text": ("text", 4, "Gemma3DecoderLayer", True, "self_attn", "mlp", "pre_feedforward_layernorm"),
    },
    "diffusers/DiTTransformer2DModel": {"denoiser": ("denoiser", 4, "BasicTransformerBlock", False, "attn1", "ff", "norm3")},
    "diffusers/PixArtTransformer2DModel": {"denoiser": ("denoiser", 4, "BasicTransformerBlock", False, "attn1", "ff", "norm2")},
    "diffusers/SD3Transformer2DModel": {"denoiser": ("denoiser", 4, "JointTransformerBlock", False, "attn", "ff", "norm2")},
    "diffusers/FluxTransformer2DModel": {
        "denoiser.1": ("denoiser", 4, "FluxTransformerBlock", False, "attn", "ff", "norm2"),
        "denoiser.2": ("denoiser", 4, "FluxSingleTransformerBlock", False, "attn", None, None),
    },
}


def path_in(block: nn.Module, part: nn.Module | None) -> str | None:
    return next((path for path, module in block.named_modules() if module is part), None)


@pytest.mark.parametrize("family", EXPECTED)
def test_streams_are_named_and_read(family):
    body = anatomy(zoo.build(family).model)
    found = {}
    for s in body.streams:
        parts = [path_in(s.blocks[0], part) if part is not None else None for part in (s.attention(0), s.mlp(0), s.mlp_norm(0))]
        found[s.name] = (s.kind, len(s), type(s.blocks[0]).__name__, s.causal, *parts)
    assert found == EXPECTED[family]


@pytest.mark.parametrize("family", EXPECTED)
def test_paths_lead_to_the_blocks_and_numbers_fit(family):
    body = anatomy(zoo.build(family).model)
    for s in body.streams:
        assert [body.model.get_submodule(path) for path in s.paths] == list(s.blocks)
        assert all(path.startswith(s.owner) for path in s.paths)
        assert (s.width, s.heads, s.head_dim) == (32, 4, 8)
        assert s.mixers == ("attention",) * len(s)
    assert body.head is None or body.model.get_submodule(body.head) is not None
    assert str(body).startswith(f"{type(body.model).__name__} ({body.model_type})")


@pytest.mark.parametrize("family", ["llama", "t5", "qwen2_vl", "diffusers/FluxTransformer2DModel", "diffusers/SD3Transformer2DModel"])
def test_blocks_take_and_give_hidden_states_where_it_says(family):
    specimen = zoo.build(family)
    base = specimen.run()
    for s in anatomy(specimen.model).streams:
        seen = []

        def hook(i, s=s, seen=seen):
            def record(module, args, kwargs, output):
                hidden = s.bind(i, args, kwargs)
                seen.append(i)
                assert s.read(i, output).shape == hidden.shape and hidden.shape[-1] == s.width
                return s.write(i, output, s.read(i, output).clone())

            return record

        handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(s.blocks)]
        assert all(torch.equal(a, b) for a, b in zip(base, specimen.run(), strict=True))
        assert seen == list(range(len(s)))
        for handle in handles:
            handle.remove()


def test_grouped_heads_head_and_embeddings():
    body = anatomy(zoo.build("llama").model)
    assert body.stream("text").kv_heads == 2
    assert (body.head, body.embeddings, body.model_type) == ("lm_head", "model.embed_tokens", "llama")
    assert body.stream("text").config is body.model.config


def test_hybrid_blocks_stay_in_one_stream_and_are_flagged():
    body = anatomy(zoo.build("jamba").model)
    assert body.stream("text").mixers == ("other", "attention", "other", "attention")
    assert body.stream("text").attention(0) is None


def test_a_block_that_only_attends_to_another_sequence_is_cross():
    assert "cross" in anatomy(zoo.build("mllama").model).stream("text").mixers


def test_joint_blocks_carry_a_second_sequence():
    flux, llama = (anatomy(zoo.build(f).model).streams[0] for f in ("diffusers/FluxTransformer2DModel", "llama"))
    assert (flux.context_index().name, flux.context_index().returned, flux.hidden_index().returned) == ("encoder_hidden_states", 0, 1)
    assert llama.context_index() is None


def test_the_source_wins_over_a_wrong_note_of_diffusers():
    from diffusers.models.transformers.transformer_bria import BriaTransformerBlock

    assert hidden_index(BriaTransformerBlock).returned == 1


def test_unet_streams_come_in_the_order_of_their_calls():
    specimen = zoo.build("diffusers/UNet2DConditionModel")
    body = anatomy(specimen.model)
    order = []
    handles = [s.blocks[0].register_forward_hook(lambda m, a, o, name=s.name: order.append(name)) for s in body.streams]
    specimen.run()
    for handle in handles:
        handle.remove()
    assert order == [s.name for s in body.streams]


def test_layouts_that_are_not_b_n_d():
    layouts = {family: anatomy(zoo.build(family).model).streams[0].layout for family in ("qwen2_vl", "xlnet", "sam_vision_model", "vit")}
    assert layouts == {"qwen2_vl": "n d", "xlnet": "n b d", "sam_vision_model": "b h w d", "vit": "b n d"}


@pytest.mark.parametrize("family", ["mamba", "convnext", "fnet"])
def test_a_model_without_blocks_is_refused(family):
    model = zoo.build(family).model
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no stream of Transformer blocks.*attention of their own"):
        anatomy(model)


def test_other_things_are_refused_with_their_name():
    with pytest.raises(TypeError, match="must be a torch.nn.Module or a Diffusers pipeline. Got str"):
        anatomy("gpt2")
    with pytest.raises(ValueError, match="has no stream 'vision'. Its streams: text"):
        anatomy(zoo.build("llama").model).stream("vision")


def test_lora_and_our_own_modules_do_not_show():
    from peft import LoraConfig, get_peft_model

    plain = anatomy(zoo.build("llama").model)
    model = zoo.build("llama").model
    model.model.layers[0].add_module("hf_tokens", nn.ModuleList([zoo.build("llama").model.model.layers[0]]))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"]))
    body = anatomy(wrapped)
    assert body.model is model
    assert str(body) == str(plain)
    assert body.streams[0].paths == plain.streams[0].paths


def test_a_pipeline_gives_its_denoiser():
    from diffusers import DiTPipeline

    transformer = zoo.build("diffusers/DiTTransformer2DModel").model
    assert anatomy(DiTPipeline(transformer=transformer, vae=None, scheduler=None)).model is transformer


def test_import_leaves_diffusers_alone():
    code = "import sys, hf_tokens; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
