"""Tiny denoisers of five kinds in float64, and the calls of a run of theirs."""

import contextlib
import functools

import torch
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    DDIMScheduler,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from hf_tokens import anatomy

LETTERS = "abcdefghijklmnopqrstuvwxyz"

KINDS = ("unet", "dit", "pixart", "sd3", "flux")
HEADS = dict(num_attention_heads=2, attention_head_dim=4)
LATENTS = dict(in_channels=4, sample_size=8, patch_size=2)


def build(kind, layers):
    if kind == "dit":
        return DiTTransformer2DModel(num_layers=layers, out_channels=8, num_embeds_ada_norm=1000, norm_num_groups=4, **HEADS, **LATENTS)
    if kind == "pixart":
        options = dict(caption_channels=6, cross_attention_dim=8, num_embeds_ada_norm=1000, use_additional_conditions=False)
        return PixArtTransformer2DModel(num_layers=layers, out_channels=8, norm_num_groups=4, **options, **HEADS, **LATENTS)
    if kind == "sd3":
        options = dict(joint_attention_dim=6, caption_projection_dim=8, pooled_projection_dim=6, pos_embed_max_size=8)
        return SD3Transformer2DModel(num_layers=layers, out_channels=4, qk_norm="rms_norm", **options, **HEADS, **LATENTS)
    if kind == "flux":
        options = dict(joint_attention_dim=6, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4))
        heads = dict(num_attention_heads=2, attention_head_dim=8)
        return FluxTransformer2DModel(in_channels=4, patch_size=1, num_layers=layers, num_single_layers=layers, **options, **heads)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip


def denoiser(kind, dtype=torch.float64, layers=3):
    torch.manual_seed(0)
    model = build(kind, layers)
    for name, parameter in model.named_parameters():
        if "conv" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def with_pictures(unet, dtype=torch.float64):
    """A UNet with an IP-Adapter of random weights, and what its calls are given for that: pictures for two samples."""
    generator = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=generator) * 0.3
    crosses = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    weights = {f"{2 * i + 1}.to_{letter}_ip.weight": draw(8, 6) for i in range(len(crosses)) for letter in "kv"}
    projection = {"proj.weight": draw(24, 8), "proj.bias": draw(24), "norm.weight": torch.ones(6), "norm.bias": torch.zeros(6)}
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    return unet.to(dtype), {"added_cond_kwargs": {"image_embeds": [draw(2, 1, 8).to(dtype)]}}


def calls(kind, steps, size=(8, 8), seed=1, batch=2, guided=False, dtype=torch.float64):
    """The arguments of every step: a batch of different pictures; guided: each twice, with another condition."""
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)
    shape = (size[0] * size[1], 4) if kind == "flux" else (4, *size)
    picture, noise = draw(batch, *shape), draw(steps, batch, *shape)
    twice = lambda x: torch.cat([x, x]) if guided else x
    rows = batch * (2 if guided else 1)
    more = {"class_labels": torch.arange(3, 3 + rows)} if kind == "dit" else {"encoder_hidden_states": draw(rows, 5, 6)}
    more |= {"pooled_projections": draw(rows, 6)} if kind in ("sd3", "flux") else {}
    more |= {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if kind == "pixart" else {}
    if kind == "flux":
        place = torch.arange(size[0] * size[1])
        ids = torch.stack([0 * place, place // size[1], place % size[1]], dim=1).to(dtype)
        more |= {"img_ids": ids, "txt_ids": ids.new_zeros(5, 3)}
    name = "sample" if kind == "unet" else "hidden_states"
    times = [1 - step / (steps + 1) if kind == "flux" else 990 - 900 * step // (steps + 1) for step in range(steps)]
    return [{name: twice(picture + 0.3 * noise[i]), "timestep": torch.tensor([times[i]] * rows), **more} for i in range(steps)]


def within(model, name="cond_uncond"):
    """A cache context around a PeftModel's denoiser, which says whose prompt its calls are given."""
    return CacheMixin.cache_context(model.base_model.model, name)


def half(call, which):
    """One condition of a guided call, as a call of its own."""
    cut = lambda name, x: x.chunk(2)[which] if torch.is_tensor(x) and name not in ("img_ids", "txt_ids") else x
    return {name: cut(name, value) for name, value in call.items()}


def alone(call, i, rows=2):
    """One sample of a call."""
    cut = lambda name, x: x.chunk(rows)[i] if torch.is_tensor(x) and name not in ("img_ids", "txt_ids") else x
    return {name: cut(name, value) for name, value in call.items()}


def sampled(model, run):
    """What the model puts out at every step."""
    with torch.no_grad():
        return torch.stack([model(**call, return_dict=False)[0] for call in run])


def blocks(model):
    """All blocks, stream by stream."""
    return [block for stream in anatomy(model).streams for block in stream.blocks]


@contextlib.contextmanager
def own_prompts(model, kind, tokens):
    """A denoiser each block of which reads tokens (k d) of its own behind the prompt, and drops what it made of them."""
    project = {"pixart": "caption_projection", "sd3": "context_embedder", "flux": "context_embedder"}
    project = getattr(model, project[kind]) if kind in project else lambda x: x

    def before(module, args, kwargs, own):
        given = kwargs["encoder_hidden_states"]
        context, *pictures = given if isinstance(given, tuple) else (given,)
        longer = torch.cat([context, project(own[None]).expand(len(context), -1, -1)], dim=1)
        given = {**kwargs, "encoder_hidden_states": (longer, *pictures) if pictures else longer}
        if kind == "flux":  # a token of the prompt stands at place 0 of all axes, like the first
            tables = [torch.cat([table[:1].expand(len(own), -1), table]) for table in kwargs["image_rotary_emb"]]
            given["image_rotary_emb"] = tuple(tables)
        return args, given

    def behind(module, args, output, k):
        return (None if output[0] is None else output[0][:, : output[0].shape[1] - k], *output[1:])

    handles = []
    for block, own in zip(blocks(model), tokens, strict=True):
        handles.append(block.register_forward_pre_hook(functools.partial(before, own=own), with_kwargs=True))
        if kind in ("sd3", "flux"):
            handles.append(block.register_forward_hook(functools.partial(behind, k=len(own))))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def stable_diffusion():
    """A pipeline of Stable Diffusion whose tokenizer knows letters."""
    torch.manual_seed(0)
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=24)
    text = dict(hidden_size=6, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=24)
    encoder = CLIPTextModel(CLIPTextConfig(**text, vocab_size=55, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    parts = dict(
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=denoiser("unet", torch.float32),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=16)
    return StableDiffusionPipeline(vae=vae, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
