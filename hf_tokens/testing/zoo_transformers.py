"""A row for each family of Transformers that the zoo's rules do not fit, and those of both libraries that it cannot build."""

from __future__ import annotations

import torch
from torch import nn

from .zoo_inputs import noise, noises, ones, patch_numel, random_ids, setting, tiles
from .zoo_rules import BATCH, NO_CLASS, SIDE, TOKENS, VOCAB, Row

_WAVE = {"input_values": noise(BATCH, 1, 4000)}
_TILES = {"pixel_values": tiles, "pixel_attention_mask": ones(BATCH, 1, SIDE, SIDE)}
_ONE_TILE = {"image_grid_pinpoints": [[SIDE, SIDE]]}
_TWO_TILES = {"pixel_values": noise(BATCH, 2, 3, SIDE, SIDE), "image_sizes": ones(BATCH, 2)}
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_DEFORMABLE = {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1}
_TIMM = "its image tower is a timm model, and timm is not installed"
_SCIPY = "its class builds a loss that needs scipy, which is not installed"
_ROPES = {name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("sliding_attention", "full_attention")}
_HGNETS = ("d_fine", "deimv2", "pp_doclayout_v3", "pp_doclayout_v4")
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}
_CLAP = {"spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "window_size": 2}
_CLAP |= {"depths": [2, 2], "num_attention_heads": [2, 4], "hidden_size": 64}
_PROMPTS = {"image_embedding_size": 4}
_FOUR_IN_FRONT = {"image_embeds_position_mask": lambda model, inputs: (torch.arange(TOKENS) < 4).long().expand(BATCH, -1)}
_MLLAMA_VISION = {"intermediate_layers_indices": [0, 2], "vision_output_dim": 96}
_ASPECTS = {
    "pixel_values": lambda model, inputs: torch.randn(BATCH, 1, setting(model, "max_num_tiles"), 3, SIDE, SIDE),
    "aspect_ratio_ids": ones(BATCH, 1),
    "aspect_ratio_mask": lambda model, inputs: torch.ones(BATCH, 1, setting(model, "max_num_tiles")).long(),
}
_SESSION = "its forward takes a video inference session, not tensors"
_DRAFTS = "it drafts for another model, whose hidden states it needs"
_PASTS = {**noises(past_values=(19,), past_time_features=(19, 1)), "past_observed_mask": ones(BATCH, 19)}
_PASTS |= noises(future_values=(8,), future_time_features=(8, 1))


def _flat_patches(model: nn.Module, inputs: dict) -> torch.Tensor:
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).float()  # each patch begins with its row and its column
    return torch.cat([places.expand(BATCH, -1, -1), torch.randn(BATCH, 16, setting(model, "patch_embed_hidden_size"))], dim=-1)


def _grid(model: nn.Module, inputs: dict) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


TRANSFORMERS_ROWS: dict[str, Row] = {
    **{name: Row(inputs=_TILES) for name in ("idefics2", "idefics3", "smolvlm", "modernvbert", "ultravbert", "colmodernvbert")},
    **{name: Row(config={"num_key_value_heads": 2}) for name in ("llama", "qwen2", "qwen2_moe", "olmo2", "phi3", "starcoder2")},
    **{name: Row(config={"text_config": {"num_key_value_heads": 2}}) for name in ("llava", "qwen2_vl")},
    **{name: Row(config={"image_token_id": 98}) for name in ("blip-2", "instructblip")},
    "instructblipvideo": Row(config={"video_token_id": 98}, inputs={"pixel_values": noise(BATCH, 4, 3, SIDE, SIDE)}),
    "voxtral": Row(config={"audio_token_id": 98}),
    "colqwen2": Row(inputs={"pixel_values": lambda model, inputs: torch.randn(BATCH, 16, patch_numel(model)), "image_grid_thw": _grid}),
    "nemotron_h": Row(config={"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1}),
    "nemo_speechlm": Row(config={"text_config": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1}}),
    "glm4v_moe": Row(config={"text_config": {"rope_parameters": {"partial_rotary_factor": 1.0}}}),
    **{name: Row(config={"rope_parameters": {"partial_rotary_factor": 1.0}}) for name in ("glm4v_moe_text", "mistral4")},
    "levit": Row(config={"patch_size": 16, "image_size": 64}),
    "clvp": Row(config={name: {"hidden_size": 128} for name in ("text_config", "speech_config", "decoder_config")}),
    "clvp_encoder": Row(config={"hidden_size": 128}),
    "audio-spectrogram-transformer": Row(config={"max_length": 32}, inputs={"input_values": noise(BATCH, 32, 16)}),
    "musicgen_decoder": Row(inputs={"input_ids": random_ids(rows=8), "attention_mask": ones(BATCH, TOKENS)}),
    "musicgen_melody_decoder": Row(inputs={"input_ids": random_ids(rows=8), "attention_mask": ones(BATCH, TOKENS)}),
    "dia": Row(inputs={"decoder_input_ids": lambda model, inputs: torch.randint(5, 60, (BATCH, TOKENS, 9))}),
    "bros": Row(
        config={"hidden_size": 64, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
        inputs={"bbox": lambda model, inputs: torch.rand(BATCH, TOKENS, 8)},
    ),
    "lw_detr_vit": Row(config={"num_windows": 4}),
    "dory": Row(config={"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1}),
    **dict.fromkeys(("omniasr", "omniasr_audio", "omniasr_ctc"), Row(inputs=_WAVE)),
    "muse_spark_audio": Row(inputs={"input_values": noise(BATCH, 3840)}),
    "llama4": Row(config={"vision_config": {"intermediate_size": 128}}),
    "llama4_vision_model": Row(config={"intermediate_size": 128}),
    **{name: Row(inputs={"pixel_values": noise(32, 3, 8, 8), "image_grid_thw": _grid}) for name in ("paddleocr_vl", "kimi_k25")},
    "idefics": Row(inputs={"pixel_values": noise(BATCH, 1, 3, SIDE, SIDE), "image_attention_mask": ones(BATCH, TOKENS, 1)}),
    "qwen3_asr": Row(inputs={"input_features": noise(BATCH, 16, 200), "input_features_mask": ones(BATCH, 200)}),
    "qwen3_asr_encoder": Row(inputs={"input_features": noise(BATCH, 16, 200), "input_features_mask": ones(BATCH, 200)}),
    "qwen2_5_omni_thinker": Row(config={"vision_start_token_id": 93}, inputs={"input_features": None}),
    **{name: Row(inputs={"pixel_values": None}) for name in ("fuyu", "glm_image")},
    "mllama_vision_model": Row(config=_MLLAMA_VISION, inputs=_ASPECTS),
    **{name: Row(config=_SERIES, inputs=_PASTS) for name in ("autoformer", "informer", "time_series_transformer")},
    **{name: Row(inputs=_WAVE) for name in ("mimi_encoder", "pocket_tts_audio_tokenizer_encoder", "pe_audio", "pe_audio_encoder")},
    **{name: Row(config=_DETR) for name in ("conditional_detr", "detr", "table-transformer", "dab-detr")},
    "granitemoehybrid": Row(config={"layer_types": ["linear_attention", "full_attention"] * 2}),
    "bamba": Row(config={"attn_layer_indices": [1, 3]}),
    "jamba": Row(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    **{name: Row(config=_ONE_TILE, inputs=_TWO_TILES) for name in ("llava_next", "llava_next_video", "llava_onevision")},
    "xmod": Row(config={"default_language": "en_XX"}),
    "lxmert": Row(inputs={"visual_feats": noise(BATCH, 9, 32), "visual_pos": noise(BATCH, 9, 4)}),
    "decision_transformer": Row(
        inputs={**noises(states=(5, 17), actions=(5, 4), rewards=(5, 1), returns_to_go=(5, 1)), "timesteps": ones(BATCH, 5)}
    ),
    "mobilebert": Row(config={"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    **{name: Row(config={"encoder_in_channels": [32] * 3, "backbone_config": {"hidden_sizes": [32] * 4}}) for name in _HGNETS},
    "granite_speech": Row(inputs={"input_features": noise(BATCH, 60, 32), "input_features_mask": None}),
    "granite_speech_plus": Row(inputs={"input_features": noise(BATCH, 60, 32), "input_features_mask": None}),
    **{name: Row(config={"vision_config": {"num_pos_feats": 16}, "prompt_encoder_config": _PROMPTS}) for name in ("sam", "sam_hq")},
    "kimi_k25_vision": Row(inputs={"pixel_values": noise(32, 3, 8, 8), "grid_thw": _grid}),
    "mimi": Row(config={"vector_quantization_hidden_dimension": 32}, inputs=_WAVE),
    "kosmos-2": Row(config={"latent_query_num": 4}, inputs=_FOUR_IN_FRONT),
    "kosmos-2.5": Row(config={"latent_query_num": 4}, inputs={"flattened_patches": _flat_patches, **_FOUR_IN_FRONT}),
    "pix2struct": Row(inputs={"flattened_patches": _flat_patches}),
    "kosmos_2_5_vision_model": Row(inputs={"flattened_patches": _flat_patches}),
    "pix2struct_vision_model": Row(inputs={"flattened_patches": _flat_patches}),
    "pop2piano": Row(inputs={"input_features": noise(BATCH, 16, 32), "input_ids": None}),
    "dots1": Row(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "bit": Row(config={"num_groups": 4}),
    "gemma4_audio": Row(inputs={"input_features": noise(BATCH, 64, 32)}),
    "gemma4_vision": Row(
        inputs={
            "pixel_values": noise(BATCH, 9, 192),
            "pixel_position_ids": lambda model, inputs: torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(BATCH, -1, -1),
        }
    ),
    "gemma3n_audio": Row(
        inputs={"audio_mel": noise(BATCH, 64, 128), "audio_mel_mask": lambda model, inputs: torch.zeros(BATCH, 64).bool()}
    ),
    "video_llama_3": Row(inputs={"image_merge_sizes": lambda model, inputs: torch.tensor([2, 2])}),
    "video_llama_3_vision": Row(inputs={"merge_sizes": lambda model, inputs: torch.tensor([2, 2])}),
    "deepseek_vl_hybrid": Row(inputs={"high_res_pixel_values": noise(BATCH, 3, SIDE, SIDE)}),
    "blip_2_qformer": Row(inputs={"query_embeds": noise(BATCH, 8, 32), "encoder_hidden_states": noise(BATCH, 5, 32)}),
    **{name: Row(inputs={"input_features": noise(BATCH, 64, 64)}) for name in ("granite_speech5_ctc", "granite_speech5_encoder")},
    "fun_asr_nano": Row(
        config={"adaptor_config": {"intermediate_size": 8}},
        inputs={"input_features": noise(BATCH, 64, 112), "input_features_mask": ones(BATCH, 64)},
    ),
    "fun_asr_nano_encoder": Row(inputs={"input_features": noise(BATCH, 64, 112), "input_features_mask": ones(BATCH, 64)}),
    "dbrx": Row(config={"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}),
    **{name: Row(inputs={"latents": noise(BATCH, 32, 8)}) for name in ("mimi_decoder", "pocket_tts_audio_tokenizer_decoder")},
    "pocket_tts_audio_tokenizer": Row(inputs=_WAVE),
    "xcodec": Row(config={"codebook_dim": 64}, inputs=_WAVE),
    "nemotron3_5_transcribe_word_timestamp": Row(inputs={"inputs_embeds": noise(BATCH, TOKENS, 32)}),
    "moss_transcribe_diarize": Row(inputs={"padding_mask": ones(BATCH, 4000)}),
    "clap": Row(config={"audio_config": _CLAP}, inputs={"input_features": noise(BATCH, 1, 128, 8)}),
    "clap_audio_model": Row(config=_CLAP, inputs={"input_features": noise(BATCH, 1, 128, 8)}),
    "sam3_tracker": Row(
        config={"prompt_encoder_config": {"image_size": SIDE}, "vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}}
    ),
    "voxtral_realtime_text": Row(inputs={"t_cond": noise(1, 32)}),
    "idefics2_perceiver": Row(inputs={"context": noise(BATCH, 9, 32), "attention_mask": ones(BATCH, 9)}),
    "blt_global_transformer": Row(inputs={"inputs_embeds": noise(BATCH, TOKENS, 32)}),
    "flava_multimodal_model": Row(inputs={"hidden_states": noise(BATCH, TOKENS, 32)}),
    **{name: Row(inputs={"hidden_states": noise(BATCH, 60, 32)}) for name in ("granite_speech_encoder", "granite_speech_plus_encoder")},
    "qwen4_exp_text": Row(config=_INDEXER),
    "qwen4_exp": Row(config={"text_config": _INDEXER}),
    "qwen2_audio": Row(
        inputs={
            "input_ids": lambda model, inputs: torch.cat(
                [torch.full((BATCH, 1), model.config.audio_token_index), torch.randint(5, 60, (BATCH, 15))], dim=1
            )
        }
    ),
    "qwen3_omni_moe_thinker": Row(config={"vision_start_token_id": 93}, inputs={"input_features": None}),
    "zamba2": Row(
        config={"mamba_headdim": 8, "n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "hybrid_layer_ids": [1, 3]}
    ),
    **{name: Row(inputs={"past_values": noise(BATCH, 32, 1)}) for name in ("patchtst", "patchtsmixer")},
    "ernie4_5_vl_moe": Row(config={"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}}),
    "ernie4_5_vl_moe_text": Row(config={"rope_parameters": {"mrope_section": [1, 1, 2]}}),
    **{name: Row(config={"window_size": 2, "image_size": 64}) for name in ("swin", "donut-swin")},
    "seggpt": Row(
        config={"image_size": (32, 16), "pretrain_image_size": 32, "intermediate_hidden_state_indices": (1, 2, 3), "merge_index": 0},
        inputs={name: noise(BATCH, 3, 16, 16) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")},
    ),
    "deformable_detr": Row(config=_DEFORMABLE),
    "lfm2_moe": Row(config={"layer_types": ["conv", "full_attention"] * 2}),
    "deepseek_ocr2": Row(config={"text_config": {"mlp_layer_types": ["dense", "sparse"] * 2, "num_experts_per_tok": 2}}),
    "esm": Row(config={"vocab_size": VOCAB, "mask_token_id": 4, "pad_token_id": 0}),
    "diffusion_gemma_text": Row(config={"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}),
    "diffusion_gemma": Row(config={"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}}),
    "cohere_compass_text": Row(config={"rope_parameters": _ROPES}),
    "cohere_compass": Row(config={"text_config": {"rope_parameters": _ROPES}}),
    "gemma4": Row(inputs={"pixel_values": None, "input_features": None}),
    "gemma4_unified": Row(inputs={"pixel_values": None, "input_features": None}),
    "embedding_gemma2": Row(inputs={"pixel_values": None, "input_features": None}),
    "inkling2": Row(inputs={"pixel_values": None, "input_features": None}),
    "musicgen": Row(model="MusicgenForConditionalGeneration", inputs={"input_values": None, "decoder_input_ids": random_ids(rows=8)}),
    "musicgen_melody": Row(
        model="MusicgenMelodyForConditionalGeneration", inputs={"input_features": None, "decoder_input_ids": random_ids(rows=8)}
    ),
    "align": Row(config={"projection_dim": 64}),
    "bridgetower": Row(config={"hidden_size": 64, "vision_config": {"hidden_size": 64}, "text_config": {"hidden_size": 64}}),
    "reformer": Row(config={"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (16, 16)}),
    "swin2sr": Row(config={"num_heads": [4, 4, 4, 4], "depths": [2, 2, 2, 2], "embed_dim": 32}),
    **{name: Row(config={"vocab_size": VOCAB}) for name in ("wav2vec2-bert", "wav2vec2-conformer")},
    "aria": Row(config={"projector_patch_to_query_dict": {16: 4}}),
    "chameleon": Row(config={"vocabulary_map": {"<image>": 98}}, inputs={"pixel_values": None}),
    "emu3": Row(config={"vocabulary_map": {"<image>": 98, "<|extra_200|>": 97}}, inputs={"pixel_values": None}),
    "dpt": Row(config={"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4}),
    "step3p5": Row(config={"sliding_window": 8}),
    "step3p7": Row(config={"text_config": {"sliding_window": 8}}),
    "lilt": Row(config={"hidden_size": 48, "max_2d_position_embeddings": 128}),
    "layoutlmv3": Row(config={"coordinate_size": 4, "shape_size": 8, "hidden_size": 32}),
    "moonshine": Row(
        config={"rope_parameters": {"partial_rotary_factor": 1.0}, "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4}
    ),
    "zamba": Row(config={"attention_hidden_size": 64, "attention_head_dim": 16}),
    "mllama": Row(
        config={"vision_config": _MLLAMA_VISION},
        inputs={
            **_ASPECTS,
            "cross_attention_mask": lambda model, inputs: torch.ones(BATCH, TOKENS, 1, setting(model, "max_num_tiles")).long(),
        },
    ),
    **{name: Row(inputs={"past_values": noise(BATCH, 64)}) for name in ("timesfm", "timesfm2_5")},
    "speech-encoder-decoder": Row(inputs={"input_features": None}),
    "vjepa2": Row(config={"frames_per_clip": 4, "crop_size": 32}),
    "gpt_neo": Row(config={"attention_types": [[["global", "local"], 2]]}),
    "mamba2": Row(config={"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "maskformer": Row(model="MaskFormerModel"),
    "deepseek_v2": Row(config={"num_experts_per_tok": 2}),
}
_WITHOUT_INPUTS = """
blt_local_decoder csm deepseek_ocr2_encoder deepseek_ocr2_text dia_decoder diffusers/AnyFlowFARTransformer3DModel
diffusers/Cosmos3OmniTransformer diffusers/HunyuanVideoFramepackTransformer3DModel diffusers/Ideogram4Transformer2DModel
diffusers/JoyImageEditPlusTransformer3DModel diffusers/MiniMaxH3Transformer3DModel diffusers/RFD4ProteinaTransformer
diffusers/SanaWMLTX2RefinerTransformer3DModel diffusers/WanAnimate2Transformer3DModel
diffusers/WanAnimateTransformer3DModel dots3_note dots3_note_audio_encoder efficientloftr florence_vision
granite4_vision granite_docling jev kyutai_speech_to_text lightglue minicpm_ocr minicpm_ocr_vision minicpmv4_6
minicpmv4_6_vision minicpmv4_7 minicpmv4_7_vision molmo2 musicflamingo nemotron_h_omni neomme paddleocr_vl_vision
phi4_multimodal_audio pi0 pp_doclayout_v2 pp_ocrv5_server_det pp_ocrv6_medium_det qwen2_5_omni_audio_encoder
qwen2_5_omni_dit qwen2_5_omni_token2wav qwen3_omni_moe_audio_encoder qwen3_omni_moe_talker_code_predictor
sam3_detr_decoder sam3_detr_encoder sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder sapiens2 superglue
unlimited_ocr_vision_encoder voxtral_realtime xclip_vision_model
""".split()
_CONFIG_ONLY = """
edgetam_mask_decoder edgetam_prompt_encoder edgetam_video_mask_decoder edgetam_video_prompt_encoder gemma4_unified_audio
gemma4_unified_vision idefics_perciever idefics_vision layoutxlm nougat pp_chart2table_vision sam2_mask_decoder
sam2_prompt_encoder sam2_video_mask_decoder sam2_video_prompt_encoder sam3_geometry_encoder
sam3_lite_text_geometry_encoder sam3_tracker_mask_decoder sam3_tracker_prompt_encoder sam3_tracker_video_mask_decoder
sam3_tracker_video_prompt_encoder sam_hq_mask_decoder sam_hq_prompt_encoder sam_mask_decoder sam_prompt_encoder
sapiens2_head t5_gemma_module vibevoice_diffusion
""".split()
_UNSHRUNK = """
blt blt_local_encoder bridgetower_vision_model depth_pro diffusers/BriaFibo2Transformer2DModel
diffusers/Kandinsky6SRTransformer3DModel diffusers/Kandinsky6Transformer3DModel diffusers/OmniGenTransformer2DModel
diffusers/SanaWMTransformer3DModel esmfold2 fastspeech2_conformer_with_hifigan inkling2_vision lw_detr mask2former
minimax_m3_vl_vision mistral_large4 molmo2_vision moonshine_streaming moshi_depth muse_glimmer muse_spark neucodec
oneformer sam2 sam2_hiera_det_model sam2_vision_model tvp vibevoice vibevoice_asr vitmatte xcodec2 zoedepth
""".split()
_BROKEN = """
pix2struct_text_model qwen3_omni_moe qwen3_omni_moe_talker_text t5gemma2_decoder t5gemma2_encoder t5gemma2_text
""".split()

UNBUILDABLE: dict[str, str] = {
    **{name: _TIMM for name in ("omdet-turbo", "timm_backbone", "edgetam", "edgetam_vision_model", "fast_vlm", "gemma3n")},
    **{name: _TIMM for name in ("perception_lm", "pe_audio_video", "pe_audio_video_encoder", "pe_video", "pe_video_encoder")},
    **{name: _TIMM for name in ("timm_wrapper", "gemma3n_vision")},
    "higgs_audio_v2_tokenizer": "it needs torchaudio, which is not installed",
    **{name: _SCIPY for name in ("eomt", "eomt_dinov3", "videomt", "inkling_mm_model", "inkling_vision")},
    **dict.fromkeys(_WITHOUT_INPUTS, "the zoo makes no inputs for it"),
    **dict.fromkeys(_UNSHRUNK, "its config does not shrink by the zoo's rules"),
    **dict.fromkeys(_CONFIG_ONLY, NO_CLASS),
    **dict.fromkeys(_BROKEN, "its default config lacks what its model reads"),
    **{name: "it has no forward of its own" for name in ("bark", "qwen2_5_omni", "emu3_vqgan")},
    **{name: _SESSION for name in ("edgetam_video", "sam2_video", "sam3_video", "sam3_tracker_video")},
    **{name: _DRAFTS for name in ("gemma4_assistant", "gemma4_unified_assistant", "muse_glimmer_assistant")},
    "rag": "it needs a retriever",
    "diffusers/MotionAdapter": "it only carries the weights of another model's blocks",
    "dinat": "its attention needs natten, which is not installed",
    "layoutlmv2": "its image tower needs detectron2, which is not installed",
}
