"""The zoo's data: how attributes shrink, what each input is called, and a row for every family that the rules do not fit."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BATCH, TOKENS, VOCAB = 2, 16, 99
SIDE, PATCH = 32, 8


@dataclass(frozen=True)
class Row:
    """What a family needs beyond the rules: changes to its config, another class, other inputs.

    An input is a value, a function of the model and the inputs so far, or None where the rules must not make it."""

    config: Any = field(default_factory=dict)
    model: str | None = None
    inputs: Any = field(default_factory=dict)


# The auto mappings, the class that shows a family best first.
PREFERRED = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_TDT_MAPPING_NAMES",
    "MODEL_FOR_RNNT_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_SPECTROGRAM_MAPPING_NAMES",
    "MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING_NAMES",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
    "MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_KEYPOINT_MATCHING_MAPPING_NAMES",
    "MODEL_FOR_KEYPOINT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_POSE_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_MATTING_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
    "MODEL_FOR_MASK_GENERATION_MAPPING_NAMES",
    "MODEL_FOR_TEXT_RECOGNITION_MAPPING_NAMES",
    "MODEL_FOR_TABLE_RECOGNITION_MAPPING_NAMES",
    "MODEL_FOR_RETRIEVAL_MAPPING_NAMES",
    "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
)


def _rules(*rows: tuple[str, str, Any]) -> tuple[tuple[re.Pattern, str, Any], ...]:
    return tuple((re.compile(pattern), label, value) for pattern, label, value in rows)


# attribute name -> label, size; the first row that matches wins. A size only ever shrinks, but for the number of layers.
NUMBERS = _rules(
    (r"^(text_|vision_|encoder_|decoder_|num_)*(hidden_layers|encoder_layers|decoder_layers|attention_layers|layers)$", "layers", 4),
    (r"^(n_layers?|depth|encoder_depth|num_blocks|n_blocks|encoder_num_layers|decoder_num_layers)$", "layers", 4),
    (r"^(num_feat_extract_layers|encode_proj_layers)$", "kept", 10**9),
    (r"layers$", "some layers", 2),
    (r"depth$", "some layers", 2),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|kv_heads|key_value_heads)$", "kv heads", 2),
    (r"(heads|n_head)$", "heads", 4),
    (r"qk_head_dim$", "head dim", 16),
    (r"(qk_nope_head_dim|qk_rope_head_dim|v_head_dim|head_dim|d_kv|attention_head_size|key_head_dim|dim_head)$", "head dim", 8),
    (r"(lora_rank|_rank)$", "rank", 16),
    (r"rotary_dim$", "rotary", 8),
    (r"(intermediate_size|intermediate_dim|ffn_dim|d_ff|n_inner|mlp_dim|dim_feedforward|ffn_hidden_size|ffn_size)$", "mlp", 64),
    (r"(type_vocab_size)$", "types", 2),
    (r"codebook_size$", "codes", 64),
    (r"(vocab_size|vocab_size_per_layer_input)$", "vocab", VOCAB),
    (r"(n_positions|n_ctx|position_embeddings|source_positions|target_positions|max_seq_len|max_sequence_length)$", "positions", 128),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts)$", "experts", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k)$", "top k", 2),
    (r"(n_group|topk_group|num_expert_group)$", "groups", 1),
    (r"(image_size|img_size|input_size)$", "image", SIDE),
    (r"(patch_size)$", "patch", PATCH),
    (r"(hidden_size|d_model|n_embd|embedding_size|width|hidden_channels)$", "width", 32),
    (r"(mel_bins|num_mel_bins)$", "mel bins", 16),
    (r"(num_queries|num_query_tokens)$", "queries", 8),
    (r"(num_conv_pos_embedding_groups|num_conv_pos_embeddings)$", "conv", 4),
    (r"(sliding_window|attention_window)$", "window", 8),
    (r"window_size$", "window", SIDE),
    (r"mm_tokens_per_image$", "placeholders", 4),
    (r"^num_labels$", "labels", 3),
    (r"(out_features|output_dim|out_dim|_dim|channels)$", "width", 32),
)
LISTS = _rules(
    (r"^(depths|num_blocks_repeats)$", "depths", (2, 2, 2, 2)),
    (r"^(num_heads|num_attention_heads)$", "heads", (2, 4, 8, 8)),
    (r"^(image_size|img_size|input_size|sample_size)$", "image", (SIDE, SIDE)),
    (r"^(patch_size)$", "patch", (PATCH, PATCH)),
    (r"^(hidden_sizes|embed_dims|neck_hidden_sizes|embed_dim)$", "widths", (16, 32, 64, 64, 64, 64, 64)),
    (r"^(conv_dim)$", "conv", (32,)),
    (r"^vision_feature_layers?$", "layers", (-1, -2, -3)),
)
DIFFUSERS = _rules(
    (r"^(num_layers|num_single_layers|num_hidden_layers|n_layers|depth|num_mmdit_layers|num_single_dit_layers|mmdit_layers)$", "layers", 4),
    (r"layers$", "some layers", 2),
    (r"(kv_heads|key_value_heads)$", "kv heads", 2),
    (r"(num_attention_heads|n_heads|num_heads)$", "heads", 4),
    (r"(attention_head_dim|head_dim)$", "head dim", 8),
    (r"^(in_channels|out_channels|latent_channels?)$", "channels", 4),
    (r"(axes_dims?|rope_dim|axes_dims_rope|rope_axes_dim)$", "rope", (4, 2, 2)),
    (r"(axes_lens)$", "rope", (64, 64, 64)),
    (r"(vocab_size)$", "vocab", VOCAB),
    (r"(ffn_dim|intermediate_size|ffn_hidden_size)$", "mlp", 64),
    (r"(norm_num_groups|groups)$", "groups", 4),
    (r"(block_out_channels)$", "widths", (32, 32, 32, 32)),
    (r"^(sample_size|sample_width|sample_height)$", "sample", 8),
    (r"(pos_embed_max_size)$", "positions", 16),
    (r"(_dim|_size|^dim|channels)$", "width", 32),
)


# ---- inputs of Transformers' models: argument name -> what to pass, in this order


def _configs(config: Any) -> list[Any]:
    from transformers import PreTrainedConfig

    return [config] + [c for v in vars(config).values() if isinstance(v, PreTrainedConfig) for c in _configs(v)]


def _find(model: nn.Module, *names: str, default: Any = None) -> Any:
    for config in _configs(model.config):
        for name in names:
            value = getattr(config, name, None)
            if value is not None:
                return value
    return default


def _vision(model: nn.Module) -> Any:
    for config in _configs(model.config):
        if getattr(config, "patch_size", None) is not None and not hasattr(config, "vocab_size"):
            return config
    return model.config


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)[-2:]


def _tokens(model: nn.Module, length: int = TOKENS, name: str = "vocab_size") -> torch.Tensor:
    vocab = _find(model, name, "vocab_size", default=VOCAB)
    return torch.randint(5, min(vocab, 80), (BATCH, length))


def _pixels(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    if names & {"image_grid_thw", "grid_thw"}:
        return _packed_pixels(model, names)
    height, width = _pair(_find(model, "image_size", "img_size", "input_size", default=SIDE))
    channels = getattr(_vision(model), "num_channels", None) or _find(model, "num_channels", "in_channels", default=3)
    shape = (BATCH, channels, height, width)
    if _takes_video(model):
        shape = (BATCH, _find(model, "num_frames", "frames_per_clip", default=4), *shape[1:])
    return {"pixel_values": torch.randn(shape)}


def _takes_video(model: nn.Module) -> bool:
    return bool(re.search(r"video|vivit|timesformer", type(model).__name__, re.IGNORECASE)) and _find(model, "num_frames") is not None


def _packed_pixels(model: nn.Module, names: set[str]) -> dict[str, Any]:
    """Qwen2-VL's form: the patches of all images in one row, and how they lie."""
    merge = _find(model, "spatial_merge_size", "merge_size", default=2)
    merge = merge if isinstance(merge, int) else merge[0]
    side = 2 * merge
    grid = torch.tensor([[1, side, side]] * BATCH)
    pixels = torch.randn(int(grid.prod(-1).sum()), _patch_numel(model))
    if "pixel_values" in names:
        return {"pixel_values": pixels, "image_grid_thw": grid}
    return {"hidden_states": pixels, "grid_thw": grid}


def _patch_numel(model: nn.Module) -> int:
    """The numbers in one patch: what a filter of the patch embedding reads."""
    return next(p[0].numel() for name, p in model.named_parameters() if "patch" in name and p.ndim > 1)


def _text(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    ids = _tokens(model)
    for token, getter in (
        (("image_token_id", "image_token_index", "media_token_id"), "get_image_features"),
        (("audio_token_id", "audio_token_index"), "get_audio_features"),
    ):
        count = _placeholders(model, inputs, getter)
        marker = _find(model, *token)
        if count and isinstance(marker, int):
            ids = torch.cat([ids[:, :2], torch.full((BATCH, count), marker), ids[:, 2:]], dim=1)
    made = {"input_ids": ids}
    if "mm_token_type_ids" in names:
        made["mm_token_type_ids"] = (ids == _find(model, "image_token_id", "image_token_index", default=-1)).long()
    return made


def _placeholders(model: nn.Module, inputs: dict, getter: str) -> int:
    """How many positions of the text one image or sound takes: asked of the model itself."""
    get = getattr(model, getter, None) or getattr(getattr(model, "model", None), getter, None)
    if get is None or not inputs:
        return 0
    accepted = inspect.signature(get).parameters
    given = {name: value for name, value in inputs.items() if name in accepted}
    if not given:
        return 0
    with torch.no_grad():
        out = get(**given)
    out = getattr(out, "pooler_output", out) if getattr(out, "pooler_output", None) is not None else getattr(out, "last_hidden_state", out)
    parts = list(out) if isinstance(out, (tuple, list)) else [out]
    rows = sum(part.shape[:-1].numel() for part in parts)
    return rows // BATCH


def _ones_like_text(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(inputs["input_ids"])} if "input_ids" in inputs else {}


def _decoder_ids(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    if not model.config.is_encoder_decoder:
        return {}
    return {"decoder_input_ids": _tokens(model)}


def _mel(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    bins = _find(model, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_bins", default=16)
    frames = 2 * _find(model, "max_source_positions", default=32)
    return {"input_features": torch.randn(BATCH, bins, frames)}


def _wave(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 4000)}


INPUTS = (
    ("pixel_values", _pixels),
    ("grid_thw", _pixels),
    ("input_features", _mel),
    ("input_values", _wave),
    ("input_ids", _text),
    ("attention_mask", _ones_like_text),
    ("decoder_input_ids", _decoder_ids),
)


# ---- inputs of Diffusers' models


def diffusers_inputs(model: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    config = model.config
    side = 8
    channels = config.get("in_channels") or 4
    text = config.get("joint_attention_dim") or config.get("cross_attention_dim") or config.get("text_embed_dim") or config.get("text_dim")
    text = text or config.get("cap_feat_dim") or config.get("caption_channels") or config.get("encoder_hidden_size") or 32
    text = config.get("caption_channels") or text
    packed = "img_ids" in names
    video = "3D" in type(model).__name__ or "Video" in type(model).__name__
    latent = torch.randn(BATCH, side * side, channels) if packed else torch.randn(BATCH, channels, *((4,) if video else ()), side, side)
    made: dict[str, Any] = {
        names[0]: latent,
        "timestep": torch.tensor([10, 20]) if not packed else torch.tensor([0.3, 0.6]),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, text if isinstance(text, int) else text[0]),
        "class_labels": torch.tensor([1, 2]),
        "pooled_projections": torch.randn(BATCH, config.get("pooled_projection_dim") or 32),
    }
    if packed:
        axes = len(config.get("axes_dims_rope") or (0, 0, 0))
        grid = torch.zeros(side, side, axes)
        grid[..., -2], grid[..., -1] = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        made |= {"img_ids": grid.flatten(0, 1), "txt_ids": torch.zeros(TOKENS, axes)}
        if config.get("guidance_embeds"):
            made["guidance"] = torch.ones(BATCH)
    if "class_labels" in names and not config.get("num_embeds_ada_norm"):
        made.pop("class_labels")
    return {name: value for name, value in made.items() if name in names}


ROWS: dict[str, Row] = {}
UNBUILDABLE: dict[str, str] = {}
