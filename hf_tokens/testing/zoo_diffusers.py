"""A row for each family of Diffusers that the zoo's rules do not fit."""

from __future__ import annotations

import torch

from .zoo_inputs import noise, noises, ones
from .zoo_rules import BATCH, TOKENS, Row

DIFFUSERS_ROWS: dict[str, Row] = {
    "diffusers/LTX2VideoTransformer3DModel": Row(
        config={"audio_in_channels": 4, "audio_out_channels": 4, "audio_cross_attention_dim": 32, "caption_channels": 32},
        inputs={
            **noises(hidden_states=(64, 4), audio_hidden_states=(16, 4), audio_encoder_hidden_states=(TOKENS, 32)),
            **{"num_frames": 4, "height": 4, "width": 4, "audio_num_frames": 16},
            "timestep": noise(BATCH),
        },
    ),
    "diffusers/QwenImage21Transformer2DModel": Row(
        config={"in_channels": 16, "out_channels": 16},
        inputs={
            "hidden_states": noise(BATCH, 16, 16),
            "img_shapes": lambda model, inputs: [[(1, 4, 4)]] * BATCH,
            "img_mask": lambda model, inputs: (torch.arange(TOKENS + 4) >= TOKENS).expand(BATCH, -1),
            "timestep": noise(BATCH),
            "encoder_hidden_states_mask": ones(BATCH, TOKENS),
        },
    ),
    "diffusers/AceStepTransformer1DModel": Row(
        config={"in_channels": 12, "audio_acoustic_hidden_dim": 4, "encoder_hidden_size": 32},
        inputs=noises(hidden_states=(16, 4), context_latents=(16, 8), timestep=(), timestep_r=()),
    ),
    "diffusers/BriaFiboTransformer2DModel": Row(
        config={"text_encoder_dim": 16}, inputs={"text_encoder_layers": lambda model, inputs: [torch.randn(BATCH, TOKENS, 16)] * 8}
    ),
    **{
        f"diffusers/{name}": Row(
            config={"sample_width": 8, "sample_height": 8, "sample_frames": 13, "max_text_seq_length": TOKENS, "attention_head_dim": 16},
            inputs={"hidden_states": noise(BATCH, 4, 4, 8, 8)},
        )
        for name in ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    },
    "diffusers/CosmosTransformer3DModel": Row(
        config={"attention_head_dim": 24, "max_size": (4, 8, 8), "text_embed_dim": 32, "concat_padding_mask": False},
        inputs={"timestep": noise(BATCH), "fps": None},
    ),
    **{
        f"diffusers/{name}": Row(
            config={"in_channels": 32, "num_layers": 4, "cross_attention_dim": 32}, inputs={"hidden_states": noise(BATCH, 32, 8, 8)}
        )
        for name in ("DreamLiteTransformer2DModel", "Transformer2DModel")
    },
    "diffusers/TransformerTemporalModel": Row(
        config={"in_channels": 32, "num_layers": 4},
        inputs={"hidden_states": noise(8, 32, 4, 4), "num_frames": 4, "encoder_hidden_states": None},
    ),
    "diffusers/EasyAnimateTransformer3DModel": Row(config={"in_channels": 4, "out_channels": 4, "patch_size": 2, "attention_head_dim": 16}),
    "diffusers/ErnieImageTransformer2DModel": Row(
        inputs={"text_bth": noise(BATCH, TOKENS, 32), "text_lens": lambda model, inputs: torch.tensor([TOKENS] * BATCH)}
    ),
    "diffusers/GlmImageTransformer2DModel": Row(
        inputs={"prior_token_id": ones(BATCH, 16), "prior_token_drop": lambda model, inputs: torch.zeros(BATCH, 16).bool()}
    ),
    "diffusers/HiDreamImageTransformer2DModel": Row(
        config={
            **{"patch_size": 2, "caption_channels": [32, 32], "axes_dims_rope": (4, 2, 2)},
            **{"llama_layers": list(range(8)), "max_resolution": (16, 16)},
        },
        inputs={
            "hidden_states": noise(BATCH, 4, 8, 8),
            "timesteps": lambda model, inputs: torch.tensor([10, 20]),
            "encoder_hidden_states_t5": noise(BATCH, TOKENS, 32),
            "encoder_hidden_states_llama3": noise(8, BATCH, TOKENS, 32),
            "img_ids": None,
        },
    ),
    "diffusers/HunyuanDiT2DModel": Row(
        config={"in_channels": 4, "patch_size": 2, "text_len": TOKENS, "text_len_t5": 8, "cross_attention_dim_t5": 32},
        inputs={
            "encoder_hidden_states_t5": noise(BATCH, 8, 32),
            "text_embedding_mask": ones(BATCH, TOKENS),
            "text_embedding_mask_t5": ones(BATCH, 8),
            "image_meta_size": ones(BATCH, 6),
            "style": lambda model, inputs: torch.zeros(BATCH).long(),
            "image_rotary_emb": lambda model, inputs: (torch.ones(16, 8), torch.zeros(16, 8)),
        },
    ),
    "diffusers/LatteTransformer3DModel": Row(config={"patch_size": 2, "in_channels": 4, "caption_channels": 32, "video_length": 4}),
    "diffusers/LuminaNextDiT2DModel": Row(
        config={"num_kv_heads": 2},
        inputs={
            "encoder_mask": ones(BATCH, TOKENS),
            "image_rotary_emb": lambda model, inputs: torch.polar(torch.ones(16, 16, 4), torch.rand(16, 16, 4)),
            "cross_attention_kwargs": lambda model, inputs: {},
        },
    ),
    "diffusers/Lumina2Transformer2DModel": Row(config={"axes_dim_rope": (4, 2, 2)}),
    "diffusers/AnyFlowTransformer3DModel": Row(inputs={"timestep": noise(BATCH, 4), "r_timestep": noise(BATCH, 4)}),
    "diffusers/LTXVideoTransformer3DModel": Row(
        inputs={"hidden_states": noise(BATCH, 64, 4), "num_frames": 4, "height": 4, "width": 4, "timestep": noise(BATCH)}
    ),
    "diffusers/LongCatAudioDiTTransformer": Row(
        config={"dit_dim": 32, "dit_depth": 4, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8},
        inputs={"hidden_states": noise(BATCH, 16, 8), "latent_cond": noise(BATCH, 16, 8), "timestep": noise(BATCH)},
    ),
    "diffusers/MiniMaxMusic3RVQDepthDecoder": Row(inputs={"inputs_embeds": noise(BATCH, 8, 32)}),
    "diffusers/MiniMaxMusic3Transformer1DModel": Row(
        config={"rotary_dim": 8}, inputs=noises(hidden_states=(4, 16), encoder_hidden_states=(16, 32))
    ),
    "diffusers/NucleusMoEImageTransformer2DModel": Row(
        config={"in_channels": 16, "out_channels": 4, "num_experts": 4},
        inputs={"hidden_states": noise(BATCH, 16, 16), "img_shapes": lambda model, inputs: [(1, 4, 4)] * BATCH, "timestep": noise(BATCH)},
    ),
    "diffusers/Krea2Transformer2DModel": Row(
        inputs={
            "hidden_states": noise(BATCH, 16, 4),
            "encoder_hidden_states": lambda model, inputs: torch.randn(BATCH, TOKENS, model.config.num_text_layers, 32),
            "position_ids": lambda model, inputs: torch.zeros(TOKENS + 16, 3),
        }
    ),
    "diffusers/PRXTransformer2DModel": Row(config={"axes_dim": [4, 4]}),
    "diffusers/PriorTransformer": Row(config={"num_embeddings": TOKENS}, inputs={"hidden_states": noise(BATCH, 32)}),
    "diffusers/QwenImageTransformer2DModel": Row(
        config={"in_channels": 16, "out_channels": 4},
        inputs={"hidden_states": noise(BATCH, 16, 16), "img_shapes": lambda model, inputs: [[(1, 4, 4)]] * BATCH, "timestep": noise(BATCH)},
    ),
    "diffusers/StableAudioDiTModel": Row(
        config={"num_key_value_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "out_channels": 8},
        inputs={
            **noises(hidden_states=(8, 16), encoder_hidden_states=(TOKENS, 32), global_hidden_states=(1, 32)),
            "rotary_embedding": lambda model, inputs: (torch.ones(17, 8), torch.zeros(17, 8)),
        },
    ),
    "diffusers/StableAudio3DiTModel": Row(inputs={"hidden_states": noise(BATCH, 32, 16), "global_hidden_states": noise(BATCH, 32)}),
    "diffusers/UNet1DModel": Row(config={"extra_in_channels": 64}, inputs={"sample": noise(BATCH, 2, 64)}),
    "diffusers/UNetMotionModel": Row(
        config={"num_attention_heads": 4, "motion_num_attention_heads": 4},
        inputs={"sample": noise(BATCH, 4, 4, 8, 8), "encoder_hidden_states": noise(BATCH * 4, TOKENS, 32)},
    ),
    "diffusers/UNetSpatioTemporalConditionModel": Row(
        config={"projection_class_embeddings_input_dim": 96, "num_attention_heads": (4, 4, 4, 4), "block_out_channels": (32, 32, 32, 32)},
        inputs=noises(sample=(4, 4, 8, 8), encoder_hidden_states=(1, 32), added_time_ids=(3,)),
    ),
    "diffusers/I2VGenXLUNet": Row(inputs=noises(sample=(4, 4, 8, 8), image_latents=(4, 4, 8, 8), image_embeddings=(32,))),
    "diffusers/UVit2DModel": Row(
        config={"sample_size": 8, "block_num_heads": 4, "cond_embed_dim": 32, "micro_cond_encode_dim": 32, "micro_cond_embed_dim": 160},
        inputs={"input_ids": lambda model, inputs: torch.randint(0, 60, (BATCH, 8, 8)), "micro_conds": noise(BATCH, 5)},
    ),
    "diffusers/WanVACETransformer3DModel": Row(
        config={"vace_layers": [0, 2], "vace_in_channels": 8}, inputs={"control_hidden_states": noise(BATCH, 8, 4, 8, 8)}
    ),
    "diffusers/ZImageTransformer2DModel": Row(
        inputs={
            "x": lambda model, inputs: [torch.randn(4, 1, 8, 8) for _ in range(BATCH)],
            "cap_feats": lambda model, inputs: [torch.randn(TOKENS, 32) for _ in range(BATCH)],
        }
    ),
    "diffusers/Kandinsky3UNet": Row(inputs={"encoder_attention_mask": ones(BATCH, TOKENS)}),
    "diffusers/Kandinsky5Transformer3DModel": Row(
        inputs={
            "hidden_states": noise(1, 2, 8, 8, 4),
            "encoder_hidden_states": noise(1, TOKENS, 32),
            "pooled_projections": noise(1, 768),
            "timestep": noise(1),
            "visual_rope_pos": lambda model, inputs: [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": lambda model, inputs: torch.arange(TOKENS),
        }
    ),
    "diffusers/T5FilmDecoder": Row(
        config={"targets_length": 16, "input_dims": 32, "d_model": 32, "d_kv": 8, "d_ff": 64},
        inputs={
            "encodings_and_masks": lambda model, inputs: [(torch.randn(BATCH, TOKENS, 32), torch.ones(BATCH, TOKENS))],
            "decoder_input_tokens": noise(BATCH, 16, 32),
            "decoder_noise_time": lambda model, inputs: torch.tensor([0.3, 0.6]),
        },
    ),
    "diffusers/StableCascadeUNet": Row(
        config={
            "block_out_channels": (32, 32),
            "num_attention_heads": (4, 4),
            "down_num_layers_per_block": (2, 2),
            "up_num_layers_per_block": (2, 2),
            "clip_text_pooled_in_channels": 32,
        },
        inputs={"timestep_ratio": noise(BATCH), "clip_text_pooled": noise(BATCH, 1, 32)},
    ),
    "diffusers/HunyuanImageTransformer2DModel": Row(config={"rope_axes_dim": (4, 4), "patch_size": (2, 2)}),
    "diffusers/HunyuanVideo15Transformer3DModel": Row(
        inputs={
            "encoder_hidden_states_2": noise(BATCH, TOKENS, 32),
            "encoder_attention_mask_2": lambda model, inputs: torch.ones(BATCH, TOKENS).bool(),
            "image_embeds": noise(BATCH, 4, 32),
        }
    ),
}
