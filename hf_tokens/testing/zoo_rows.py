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
NO_CLASS = "it has no model class of its own, only a part of another family's config"


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
    (r"^insert_layer_id$", "layer", 1),
    (r"^pos_emb_(height|width)$", "kept", 10**9),
    (r"(hidden_size|d_model|n_embd|embedding_size|projection_size|width|hidden_channels)$", "width", 32),
    (r"pooler_output_size$", "width", 32),
    (r"upsample_groups$", "width", 32),
    (r"(mel_bins|num_mel_bins)$", "mel bins", 16),
    (r"(num_queries|num_query_tokens)$", "queries", 8),
    (r"(num_conv_pos_embedding_groups|num_conv_pos_embeddings)$", "conv", 4),
    (r"(sliding_window|attention_window)$", "window", 8),
    (r"window_size$", "window", SIDE),
    (r"mm_tokens_per_image$", "placeholders", 4),
    (r"^num_labels$", "labels", 3),
    (r"(out_features|output_dim|out_dim|_dim|channels)$", "width", 32),
)
# lists with an entry for every layer: one layer of each kind in turn
LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types")
LISTS = _rules(
    (r"^(depths|num_blocks_repeats)$", "depths", (2, 2, 2, 2)),
    (r"^(num_heads|num_attention_heads)$", "heads", (2, 4, 8, 8)),
    (r"^(image_size|img_size|input_size|sample_size)$", "image", (SIDE, SIDE)),
    (r"^(patch_size)$", "patch", (PATCH, PATCH)),
    (r"^(hidden_sizes|embed_dims|neck_hidden_sizes|embed_dim)$", "widths", (16, 32, 64, 64, 64, 64, 64)),
    (r"^(conv_dim)$", "conv", (32,)),
    (r"^encoder_in_channels$", "widths", (32, 64, 64)),
    (r"^vision_feature_layers?$", "layers", (-1, -2, -3)),
)
DIFFUSERS = _rules(
    (r"^(num_layers|num_single_layers|num_hidden_layers|n_layers|depth|num_mmdit_layers|num_single_dit_layers|mmdit_layers)$", "layers", 4),
    (r"layers$", "some layers", 2),
    (r"(kv_heads|key_value_heads)$", "kv heads", 2),
    (r"(num_attention_heads|n_heads|num_heads)$", "heads", 4),
    (r"(attention_head_dim|head_dim)$", "head dim", 8),
    (r"^(in_channels|out_channels|latent_channels?)$", "channels", 4),
    (r"(axes_dims?|rope_dim|axes_dims_rope|rope_axes_dim|rope_dim_list)$", "rope", (4, 2, 2)),
    (r"(axes_lens)$", "rope", (64, 64, 64)),
    (r"(vocab_size)$", "vocab", VOCAB),
    (r"(ffn_dim|intermediate_size|ffn_hidden_size)$", "mlp", 64),
    (r"(norm_num_groups|groups)$", "groups", 4),
    (r"(block_out_channels)$", "widths", (32, 32, 32, 32)),
    (r"^(sample_size|sample_width|sample_height)$", "sample", 8),
    (r"(pos_embed_max_size)$", "positions", 16),
    (r"(_dim|_size|^dim|channels)$", "width", 32),
)


# inputs of Transformers' models: argument name -> what to pass, in this order


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
        if getattr(config, "patch_size", None) is not None and getattr(config, "vocab_size", None) is None:
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
    if "spatial_shapes" in names:
        patches = (height // PATCH) * (width // PATCH)
        side = torch.tensor([[height // PATCH, width // PATCH]] * BATCH)
        pixels = torch.randn(BATCH, patches, _patch_numel(model))
        return {"pixel_values": pixels, "spatial_shapes": side, "pixel_attention_mask": torch.ones(BATCH, patches).long()}
    made = {"pixel_values": torch.randn(shape)}
    getter = getattr(model, "get_image_features", None)
    sizes = inspect.signature(getter).parameters.get("image_sizes") if getter is not None else None
    if sizes is not None and sizes.default is sizes.empty:
        made["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    return made


def _takes_video(model: nn.Module) -> bool:
    return bool(re.search(r"video|vivit|timesformer|xclip", type(model).__name__, re.IGNORECASE)) and _find(model, "num_frames") is not None


def _packed_pixels(model: nn.Module, names: set[str]) -> dict[str, Any]:
    """Qwen2-VL's form: the patches of all images in one row, and how they lie."""
    merge = _find(model, "spatial_merge_size", "merge_size", default=2)
    merge = merge if isinstance(merge, int) else merge[0]
    side = 2 * merge
    grid = torch.tensor([[1, side, side]] * BATCH)
    pixels = torch.randn(int(grid.prod(-1).sum()), _patch_numel(model))
    grid_name = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
    return {"pixel_values" if "pixel_values" in names else "hidden_states": pixels, grid_name: grid}


def _patch_numel(model: nn.Module) -> int:
    """The numbers in one patch: what a filter of the patch embedding reads."""
    named = [(name, p[0].numel()) for name, p in model.named_parameters() if p.ndim > 1 and "pos" not in name]
    return next(numel for part in ("patch", "vis") for name, numel in named if part in name)


def _tiles(model: nn.Module, inputs: dict) -> torch.Tensor:
    """Images as stacks of tiles: b t c h w."""
    height, width = _pair(_find(model, "image_size", default=SIDE))
    return torch.randn(BATCH, 1, 3, height, width)


def _clip_of_frames(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    if "pixel_values" in inputs:
        return {}
    height, width = _pair(_find(model, "image_size", "crop_size", default=SIDE))
    return {"pixel_values_videos": torch.randn(BATCH, _find(model, "num_frames", "frames_per_clip", default=4), 3, height, width)}


def _text(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    ids = _tokens(model)
    kinds = torch.zeros_like(ids)
    for kind, (token, getter) in enumerate(
        (
            (("image_token_id", "image_token_index", "media_token_id", "image_patch_id"), "get_image_features"),
            (("audio_token_id", "audio_token_index"), "get_audio_features"),
        )
    ):
        count = _placeholders(model, inputs, getter)
        marker = _find(model, *token)
        if count and isinstance(marker, int):
            ids = torch.cat([ids[:, :2], torch.full((BATCH, count), marker), ids[:, 2:]], dim=1)
            kinds = torch.cat([kinds[:, :2], torch.full((BATCH, count), 1 + 2 * kind), kinds[:, 2:]], dim=1)
    return {"input_ids": ids} | ({"mm_token_type_ids": kinds} if "mm_token_type_ids" in names else {})


def _placeholders(model: nn.Module, inputs: dict, getter: str) -> int:
    """How many positions of the text one image or sound takes: asked of the model itself."""
    get = next((found for module in model.modules() if (found := getattr(module, getter, None)) is not None), None)
    accepted = inspect.signature(get).parameters if get is not None else {}
    image = ("pixel", "image", "spatial", "qformer", "target", "high_res")
    mine = image if "image" in getter else ("input_features", "feature", "input_values", "audio", "pad")
    known = {*accepted, "image_merge_sizes", "padding_mask"}  # the last two pass through keyword arguments
    fits = {name for name in inputs if name.startswith(mine) and (name in known or "args" in accepted)}
    given = {name: inputs[name] for name in fits if inputs[name] is not None}
    if not given:
        return 0
    with torch.no_grad():
        out = get(**given)
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            out = getattr(out, name)
            break
    parts = list(out) if isinstance(out, (tuple, list)) else [out]
    return sum(part.shape[:-1].numel() for part in parts) // BATCH


def _ones_like_text(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(inputs["input_ids"])} if inputs.get("input_ids") is not None else {}


def _decoder_ids(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    return {"decoder_input_ids": _tokens(model)} if model.config.is_encoder_decoder else {}


def _boxes(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    low = torch.randint(0, 40, (BATCH, TOKENS, 2))
    return {"bbox": torch.cat([low, low + 20], dim=-1)}


def _mel(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    bins = _find(model, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "mel_bins", default=16)
    frames = 2 * min(_find(model, "max_source_positions", default=32), 128)
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv1d, nn.Conv2d))), None)
    conv_is_inside = re.search(r"^(Speech2Text|Wav2Vec2Bert|Seamless)", type(model).__name__)
    reads_rows = isinstance(first, nn.Conv1d) and first.in_channels == bins and not conv_is_inside
    made = {"input_features": torch.randn(BATCH, bins, frames) if reads_rows else torch.randn(BATCH, frames, bins)}
    for name in ("input_features_mask", "feature_attention_mask"):
        if name in names:
            made[name] = torch.ones(BATCH, frames).long()
    return made


def _wave(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 4000)} if inputs.get("input_features") is None else {}


INPUTS = (
    ("pixel_values", _pixels),
    ("grid_thw", _pixels),
    ("pixel_values_videos", _clip_of_frames),
    ("input_features", _mel),
    ("input_values", _wave),
    ("qformer_input_ids", lambda model, inputs, names: {"qformer_input_ids": _tokens(model)}),
    ("input_ids", _text),
    ("bbox", _boxes),
    ("attention_mask", _ones_like_text),
    ("decoder_input_ids", _decoder_ids),
)


# inputs of Diffusers' models


def diffusers_inputs(model: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    signature = inspect.signature(model.forward).parameters.values()
    needed = {p.name for p in signature if p.default is p.empty}
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
        "timestep": torch.tensor([0.3, 0.6]) if packed else torch.tensor([10.0, 20.0]),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, text if isinstance(text, int) else text[0]),
        "class_labels": torch.tensor([1, 2]),
        "pooled_projections": torch.randn(BATCH, config.get("pooled_projection_dim") or 32),
    }
    shared = torch.randn(BATCH, 32)
    made |= {
        "t": torch.tensor([0.3, 0.6]),
        "r_timestep": torch.tensor([1, 2]),
        "timestep_r": torch.tensor([0.1, 0.2]),
        "encoder_attention_mask": torch.ones(BATCH, TOKENS).bool(),
        "encoder_hidden_states_mask": torch.ones(BATCH, TOKENS).long(),
        "mask": torch.ones(BATCH, TOKENS).long(),
        "pooled_embeds": shared,
        "proj_embedding": shared,
        "pooled_text_emb": shared,
        "original_size": torch.tensor([[8, 8]] * BATCH),
        "target_size": torch.tensor([[8, 8]] * BATCH),
        "crop_coords": torch.tensor([[0, 0]] * BATCH),
        "fps": torch.tensor([4, 4]),
    }
    if config.get("guidance_embeds"):
        made["guidance"] = torch.ones(BATCH)
    if packed:
        axes = len(config.get("axes_dims_rope") or (0, 0, 0))
        grid = torch.zeros(side, side, axes)
        grid[..., -2], grid[..., -1] = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        made |= {"img_ids": grid.flatten(0, 1), "txt_ids": torch.zeros(TOKENS, axes)}
    if "class_labels" in names and not config.get("num_embeds_ada_norm"):
        made.pop("class_labels")
    optional = ("encoder_attention_mask", "timestep_r", "mask")
    wanted = set(names) - (set(optional) - needed)
    return {name: value for name, value in made.items() if name in wanted}


# the families that the rules do not fit


def _noise(*shape: int) -> Any:
    return lambda model, inputs: torch.randn(shape)


def _ids(length: int = TOKENS, rows: int = BATCH) -> Any:
    return lambda model, inputs: torch.randint(5, 60, (rows, length))


def _ones(*shape: int) -> Any:
    return lambda model, inputs: torch.ones(shape).long()


_WAVE = {"input_values": _noise(BATCH, 1, 4000)}
_TILES = {"pixel_values": _tiles, "pixel_attention_mask": _ones(BATCH, 1, SIDE, SIDE)}
_ONE_TILE = {"image_grid_pinpoints": [[SIDE, SIDE]]}
_TWO_TILES = {"pixel_values": _noise(BATCH, 2, 3, SIDE, SIDE), "image_sizes": _ones(BATCH, 2)}
_RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
_DETR = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone_config": {**_RESNET, "out_features": ["stage4"]}}
_DEFORMABLE = {**_DETR, "backbone_config": {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}}
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2, 3], "num_time_features": 1}
_TIMM = "its image tower is a timm model, and timm is not installed"
_SCIPY = "its class builds a loss that needs scipy, which is not installed"
_ROPES = {name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("sliding_attention", "full_attention")}
_HGNETS = ("d_fine", "deimv2", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4")
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
_CLAP = {
    "spec_size": 32,
    "num_mel_bins": 8,
    "patch_size": 4,
    "patch_stride": [4, 4],
    "window_size": 2,
    "depths": [2, 2],
    "num_attention_heads": [2, 4],
    "hidden_size": 64,
}
_HIERA = {
    "embed_dim_per_stage": [32, 64, 64, 64],
    "blocks_per_stage": [1, 2, 2, 2],
    "global_attention_blocks": [4],
    "window_size_per_stage": [4, 2, 2, 1],
    "window_positional_embedding_background_size": [4, 4],
}
_SAM2 = {
    "backbone_config": _HIERA,
    "backbone_channel_list": [64, 64, 64, 32],
    "backbone_feature_sizes": [[8, 8], [4, 4], [2, 2]],
}
_PROMPTS = {"image_embedding_size": 4}
_SESSION = "its forward takes a video inference session, not tensors"
_DRAFTS = "it drafts for another model, whose hidden states it needs"
_PASTS = {
    "past_values": _noise(BATCH, 19),
    "past_time_features": _noise(BATCH, 19, 1),
    "past_observed_mask": _ones(BATCH, 19),
    "future_values": _noise(BATCH, 8),
    "future_time_features": _noise(BATCH, 8, 1),
}


def _flat_patches(model: nn.Module, inputs: dict) -> torch.Tensor:
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).float()  # each patch begins with its row and its column
    return torch.cat([places.expand(BATCH, -1, -1), torch.randn(BATCH, 16, _find(model, "patch_embed_hidden_size"))], dim=-1)


def _grid(model: nn.Module, inputs: dict) -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


ROWS: dict[str, Row] = {
    **{name: Row(inputs=_TILES) for name in ("idefics2", "idefics3", "smolvlm", "modernvbert", "ultravbert", "colmodernvbert")},
    **{name: Row(config={"num_key_value_heads": 2}) for name in ("llama", "qwen2", "qwen2_moe", "olmo2", "phi3", "starcoder2")},
    "llava": Row(config={"text_config": {"num_key_value_heads": 2}}),
    "qwen2_vl": Row(config={"text_config": {"num_key_value_heads": 2}}),
    **{name: Row(config={"image_token_id": 98}) for name in ("blip-2", "instructblip")},
    "instructblipvideo": Row(config={"video_token_id": 98}, inputs={"pixel_values": _noise(BATCH, 4, 3, SIDE, SIDE)}),
    "voxtral": Row(config={"audio_token_id": 98}),
    "colqwen2": Row(inputs={"pixel_values": lambda model, inputs: torch.randn(BATCH, 16, _patch_numel(model)), "image_grid_thw": _grid}),
    "nemotron_h": Row(config={"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1}),
    "nemo_speechlm": Row(config={"text_config": {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1}}),
    "glm4v_moe": Row(config={"text_config": {"rope_parameters": {"partial_rotary_factor": 1.0}}}),
    "glm4v_moe_text": Row(config={"rope_parameters": {"partial_rotary_factor": 1.0}}),
    "levit": Row(config={"patch_size": 16, "image_size": 64}),
    "clvp": Row(config={name: {"hidden_size": 128} for name in ("text_config", "speech_config", "decoder_config")}),
    "clvp_encoder": Row(config={"hidden_size": 128}),
    "audio-spectrogram-transformer": Row(config={"max_length": 32}, inputs={"input_values": _noise(BATCH, 32, 16)}),
    "musicgen_decoder": Row(inputs={"input_ids": _ids(rows=8), "attention_mask": _ones(BATCH, TOKENS)}),
    "musicgen_melody_decoder": Row(inputs={"input_ids": _ids(rows=8), "attention_mask": _ones(BATCH, TOKENS)}),
    "dia": Row(inputs={"decoder_input_ids": lambda model, inputs: torch.randint(5, 60, (BATCH, TOKENS, 9))}),
    "bros": Row(
        config={"hidden_size": 64, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
        inputs={"bbox": lambda model, inputs: torch.rand(BATCH, TOKENS, 8)},
    ),
    "lw_detr_vit": Row(config={"num_windows": 4}),
    "llama4": Row(config={"vision_config": {"intermediate_size": 128}}),
    "llama4_vision_model": Row(config={"intermediate_size": 128}),
    "paddleocr_vl": Row(inputs={"pixel_values": _noise(32, 3, 8, 8), "image_grid_thw": _grid}),
    "idefics": Row(inputs={"pixel_values": _noise(BATCH, 1, 3, SIDE, SIDE), "image_attention_mask": _ones(BATCH, TOKENS, 1)}),
    "qwen3_asr": Row(inputs={"input_features": _noise(BATCH, 16, 200), "input_features_mask": _ones(BATCH, 200)}),
    "qwen3_asr_encoder": Row(inputs={"input_features": _noise(BATCH, 16, 200), "input_features_mask": _ones(BATCH, 200)}),
    "qwen2_5_omni_thinker": Row(config={"vision_start_token_id": 93}, inputs={"input_features": None}),
    "fuyu": Row(inputs={"pixel_values": None}),
    "mllama_vision_model": Row(
        config={"intermediate_layers_indices": [0, 2], "vision_output_dim": 96},
        inputs={
            "pixel_values": lambda model, inputs: torch.randn(BATCH, 1, model.config.max_num_tiles, 3, SIDE, SIDE),
            "aspect_ratio_ids": _ones(BATCH, 1),
            "aspect_ratio_mask": lambda model, inputs: torch.ones(BATCH, 1, model.config.max_num_tiles).long(),
        },
    ),
    **{name: Row(config=_SERIES, inputs=_PASTS) for name in ("autoformer", "informer", "time_series_transformer")},
    **{name: Row(inputs=_WAVE) for name in ("mimi_encoder", "pocket_tts_audio_tokenizer_encoder", "pe_audio", "pe_audio_encoder")},
    **{name: Row(config=_DETR) for name in ("conditional_detr", "detr", "table-transformer", "dab-detr")},
    "granitemoehybrid": Row(config={"layer_types": ["linear_attention", "full_attention"] * 2}),
    "bamba": Row(config={"attn_layer_indices": [1, 3]}),
    "jamba": Row(config={"attn_layer_period": 2, "attn_layer_offset": 1}),
    "llava_next": Row(config=_ONE_TILE, inputs=_TWO_TILES),
    "llava_next_video": Row(config=_ONE_TILE, inputs=_TWO_TILES),
    "llava_onevision": Row(config=_ONE_TILE, inputs=_TWO_TILES),
    "xmod": Row(config={"default_language": "en_XX"}),
    "lxmert": Row(inputs={"visual_feats": _noise(BATCH, 9, 32), "visual_pos": _noise(BATCH, 9, 4)}),
    "decision_transformer": Row(
        inputs={
            "states": _noise(BATCH, 5, 17),
            "actions": _noise(BATCH, 5, 4),
            "rewards": _noise(BATCH, 5, 1),
            "returns_to_go": _noise(BATCH, 5, 1),
            "timesteps": _ones(BATCH, 5),
        }
    ),
    "mobilebert": Row(config={"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32}),
    **{name: Row(config={"encoder_in_channels": [32] * 3, "backbone_config": {"hidden_sizes": [32] * 4}}) for name in _HGNETS},
    "granite_speech": Row(inputs={"input_features": _noise(BATCH, 60, 32), "input_features_mask": None}),
    "granite_speech_plus": Row(inputs={"input_features": _noise(BATCH, 60, 32), "input_features_mask": None}),
    **{name: Row(config={"vision_config": {"num_pos_feats": 16}, "prompt_encoder_config": _PROMPTS}) for name in ("sam", "sam_hq")},
    "kimi_k25": Row(inputs={"pixel_values": _noise(32, 3, 8, 8), "image_grid_thw": _grid}),
    "kimi_k25_vision": Row(inputs={"pixel_values": _noise(32, 3, 8, 8), "grid_thw": _grid}),
    "mimi": Row(config={"vector_quantization_hidden_dimension": 32}, inputs=_WAVE),
    "kosmos-2": Row(
        config={"latent_query_num": 4},
        inputs={"image_embeds_position_mask": lambda model, inputs: (torch.arange(TOKENS) < 4).long().expand(BATCH, -1)},
    ),
    "kosmos-2.5": Row(
        config={"latent_query_num": 4},
        inputs={
            "flattened_patches": _flat_patches,
            "image_embeds_position_mask": lambda model, inputs: (torch.arange(TOKENS) < 4).long().expand(BATCH, -1),
        },
    ),
    "pix2struct": Row(inputs={"flattened_patches": _flat_patches}),
    "kosmos_2_5_vision_model": Row(inputs={"flattened_patches": _flat_patches}),
    "pix2struct_vision_model": Row(inputs={"flattened_patches": _flat_patches}),
    "pop2piano": Row(inputs={"input_features": _noise(BATCH, 16, 32), "input_ids": None}),
    "dots1": Row(config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    "bit": Row(config={"num_groups": 4}),
    "gemma4_audio": Row(inputs={"input_features": _noise(BATCH, 64, 32)}),
    "gemma4_vision": Row(
        inputs={
            "pixel_values": _noise(BATCH, 9, 192),
            "pixel_position_ids": lambda model, inputs: torch.cartesian_prod(torch.arange(3), torch.arange(3)).expand(BATCH, -1, -1),
        }
    ),
    "gemma3n_audio": Row(
        inputs={"audio_mel": _noise(BATCH, 64, 128), "audio_mel_mask": lambda model, inputs: torch.zeros(BATCH, 64).bool()}
    ),
    "video_llama_3": Row(inputs={"image_merge_sizes": lambda model, inputs: torch.tensor([2, 2])}),
    "video_llama_3_vision": Row(inputs={"merge_sizes": lambda model, inputs: torch.tensor([2, 2])}),
    "deepseek_vl_hybrid": Row(inputs={"high_res_pixel_values": _noise(BATCH, 3, SIDE, SIDE)}),
    "blip_2_qformer": Row(inputs={"query_embeds": _noise(BATCH, 8, 32), "encoder_hidden_states": _noise(BATCH, 5, 32)}),
    "granite_speech5_ctc": Row(inputs={"input_features": _noise(BATCH, 64, 64)}),
    "granite_speech5_encoder": Row(inputs={"input_features": _noise(BATCH, 64, 64)}),
    "fun_asr_nano": Row(
        config={"adaptor_config": {"intermediate_size": 8}},
        inputs={"input_features": _noise(BATCH, 64, 112), "input_features_mask": _ones(BATCH, 64)},
    ),
    "fun_asr_nano_encoder": Row(inputs={"input_features": _noise(BATCH, 64, 112), "input_features_mask": _ones(BATCH, 64)}),
    "dbrx": Row(config={"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}),
    **{name: Row(inputs={"latents": _noise(BATCH, 32, 8)}) for name in ("mimi_decoder", "pocket_tts_audio_tokenizer_decoder")},
    "pocket_tts_audio_tokenizer": Row(inputs=_WAVE),
    **{name: Row(inputs={**_WAVE, "input_features": _noise(BATCH, 12, 32)}) for name in ("xcodec2", "neucodec")},
    "xcodec": Row(config={"codebook_dim": 64}, inputs=_WAVE),
    "nemotron3_5_transcribe_word_timestamp": Row(inputs={"inputs_embeds": _noise(BATCH, TOKENS, 32)}),
    **{name: Row(inputs={"padding_mask": _ones(BATCH, 4000)}) for name in ("vibevoice", "moss_transcribe_diarize")},
    "clap": Row(config={"audio_config": _CLAP}, inputs={"input_features": _noise(BATCH, 1, 128, 8)}),
    "clap_audio_model": Row(config=_CLAP, inputs={"input_features": _noise(BATCH, 1, 128, 8)}),
    "sam3_tracker": Row(
        config={
            "prompt_encoder_config": {"image_size": SIDE},
            "vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
        }
    ),
    **{name: Row(config={"vision_config": {"out_hidden_size": 128}}) for name in ("muse_spark", "muse_glimmer")},
    "voxtral_realtime_text": Row(inputs={"t_cond": _noise(1, 32)}),
    "idefics2_perceiver": Row(inputs={"context": _noise(BATCH, 9, 32), "attention_mask": _ones(BATCH, 9)}),
    "blt_global_transformer": Row(inputs={"inputs_embeds": _noise(BATCH, TOKENS, 32)}),
    "flava_multimodal_model": Row(inputs={"hidden_states": _noise(BATCH, TOKENS, 32)}),
    "granite_speech_encoder": Row(inputs={"hidden_states": _noise(BATCH, 60, 32)}),
    "granite_speech_plus_encoder": Row(inputs={"hidden_states": _noise(BATCH, 60, 32)}),
    "diffusers/LTX2VideoTransformer3DModel": Row(
        config={"audio_in_channels": 4, "audio_out_channels": 4, "audio_cross_attention_dim": 32, "caption_channels": 32},
        inputs={
            "hidden_states": _noise(BATCH, 64, 4),
            "audio_hidden_states": _noise(BATCH, 16, 4),
            "audio_encoder_hidden_states": _noise(BATCH, TOKENS, 32),
            "num_frames": 4,
            "height": 4,
            "width": 4,
            "audio_num_frames": 16,
            "timestep": _noise(BATCH),
        },
    ),
    "diffusers/QwenImage21Transformer2DModel": Row(
        config={"in_channels": 16, "out_channels": 16},
        inputs={
            "hidden_states": _noise(BATCH, 16, 16),
            "img_shapes": lambda model, inputs: [[(1, 4, 4)]] * BATCH,
            "img_mask": lambda model, inputs: (torch.arange(TOKENS + 4) >= TOKENS).expand(BATCH, -1),
            "timestep": _noise(BATCH),
            "encoder_hidden_states_mask": _ones(BATCH, TOKENS),
        },
    ),
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
    "glm_image": Row(inputs={"pixel_values": None}),
    "zamba2": Row(
        config={"mamba_headdim": 8, "n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16, "hybrid_layer_ids": [1, 3]}
    ),
    "patchtst": Row(inputs={"past_values": _noise(BATCH, 32, 1)}),
    "patchtsmixer": Row(inputs={"past_values": _noise(BATCH, 32, 1)}),
    "mistral4": Row(config={"rope_parameters": {"partial_rotary_factor": 1.0}}),
    "ernie4_5_vl_moe": Row(config={"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2]}}}),
    "ernie4_5_vl_moe_text": Row(config={"rope_parameters": {"mrope_section": [1, 1, 2]}}),
    "swin": Row(config={"window_size": 2, "image_size": 64}),
    "donut-swin": Row(config={"window_size": 2, "image_size": 64}),
    "seggpt": Row(
        config={"image_size": (32, 16), "pretrain_image_size": 32, "intermediate_hidden_state_indices": (1, 2, 3), "merge_index": 0},
        inputs={name: _noise(BATCH, 3, 16, 16) for name in ("pixel_values", "prompt_pixel_values", "prompt_masks")},
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
    "musicgen": Row(model="MusicgenForConditionalGeneration", inputs={"input_values": None, "decoder_input_ids": _ids(rows=8)}),
    "musicgen_melody": Row(
        model="MusicgenMelodyForConditionalGeneration", inputs={"input_features": None, "decoder_input_ids": _ids(rows=8)}
    ),
    "align": Row(config={"projection_dim": 64}),
    "bridgetower": Row(config={"hidden_size": 64, "vision_config": {"hidden_size": 64}, "text_config": {"hidden_size": 64}}),
    "reformer": Row(config={"axial_pos_shape": (4, 4), "axial_pos_embds_dim": (16, 16)}),
    "swin2sr": Row(config={"num_heads": [4, 4, 4, 4], "depths": [2, 2, 2, 2], "embed_dim": 32}),
    "wav2vec2-bert": Row(config={"vocab_size": VOCAB}),
    "wav2vec2-conformer": Row(config={"vocab_size": VOCAB}),
    "aria": Row(config={"projector_patch_to_query_dict": {16: 4}}),
    "chameleon": Row(config={"vocabulary_map": {"<image>": 98}}, inputs={"pixel_values": None}),
    "emu3": Row(config={"vocabulary_map": {"<image>": 98, "<|extra_200|>": 97}}, inputs={"pixel_values": None}),
    "dpt": Row(config={"backbone_out_indices": [0, 1, 2, 3], "num_hidden_layers": 4}),
    "step3p5": Row(config={"sliding_window": 8}),
    "step3p7": Row(config={"text_config": {"sliding_window": 8}}),
    "lilt": Row(config={"hidden_size": 48, "max_2d_position_embeddings": 128}),
    "layoutlmv3": Row(config={"coordinate_size": 4, "shape_size": 8, "hidden_size": 32}),
    "moonshine": Row(
        config={
            "rope_parameters": {"partial_rotary_factor": 1.0},
            "encoder_num_key_value_heads": 4,
            "decoder_num_key_value_heads": 4,
        }
    ),
    "zamba": Row(config={"attention_hidden_size": 64, "attention_head_dim": 16}),
    "mllama": Row(
        config={"vision_config": {"intermediate_layers_indices": [0, 2], "vision_output_dim": 96}},
        inputs={
            "pixel_values": lambda model, inputs: torch.randn(BATCH, 1, model.config.vision_config.max_num_tiles, 3, SIDE, SIDE),
            "aspect_ratio_ids": _ones(BATCH, 1),
            "aspect_ratio_mask": lambda model, inputs: torch.ones(BATCH, 1, model.config.vision_config.max_num_tiles).long(),
            "cross_attention_mask": lambda model, inputs: torch.ones(BATCH, TOKENS, 1, model.config.vision_config.max_num_tiles).long(),
        },
    ),
    "timesfm": Row(inputs={"past_values": _noise(BATCH, 64)}),
    "timesfm2_5": Row(inputs={"past_values": _noise(BATCH, 64)}),
    "speech-encoder-decoder": Row(inputs={"input_features": None}),
    "vjepa2": Row(config={"frames_per_clip": 4, "crop_size": 32}),
    "diffusers/AceStepTransformer1DModel": Row(
        config={"in_channels": 12, "audio_acoustic_hidden_dim": 4, "encoder_hidden_size": 32},
        inputs={
            "hidden_states": _noise(BATCH, 16, 4),
            "context_latents": _noise(BATCH, 16, 8),
            "timestep": _noise(BATCH),
            "timestep_r": _noise(BATCH),
        },
    ),
    "diffusers/BriaFiboTransformer2DModel": Row(
        config={"text_encoder_dim": 16},
        inputs={"text_encoder_layers": lambda model, inputs: [torch.randn(BATCH, TOKENS, 16)] * 8},
    ),
    **{
        f"diffusers/{name}": Row(
            config={"sample_width": 8, "sample_height": 8, "sample_frames": 13, "max_text_seq_length": TOKENS, "attention_head_dim": 16},
            inputs={"hidden_states": _noise(BATCH, 4, 4, 8, 8)},
        )
        for name in ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    },
    "diffusers/CosmosTransformer3DModel": Row(
        config={"attention_head_dim": 24, "max_size": (4, 8, 8), "text_embed_dim": 32, "concat_padding_mask": False},
        inputs={"timestep": _noise(BATCH), "fps": None},
    ),
    "diffusers/DreamLiteTransformer2DModel": Row(
        config={"in_channels": 32, "num_layers": 4, "cross_attention_dim": 32}, inputs={"hidden_states": _noise(BATCH, 32, 8, 8)}
    ),
    "diffusers/Transformer2DModel": Row(
        config={"in_channels": 32, "num_layers": 4, "cross_attention_dim": 32}, inputs={"hidden_states": _noise(BATCH, 32, 8, 8)}
    ),
    "diffusers/TransformerTemporalModel": Row(
        config={"in_channels": 32, "num_layers": 4},
        inputs={"hidden_states": _noise(8, 32, 4, 4), "num_frames": 4, "encoder_hidden_states": None},
    ),
    "diffusers/EasyAnimateTransformer3DModel": Row(config={"in_channels": 4, "out_channels": 4, "patch_size": 2, "attention_head_dim": 16}),
    "diffusers/ErnieImageTransformer2DModel": Row(
        inputs={"text_bth": _noise(BATCH, TOKENS, 32), "text_lens": lambda model, inputs: torch.tensor([TOKENS] * BATCH)}
    ),
    "diffusers/GlmImageTransformer2DModel": Row(
        inputs={"prior_token_id": _ones(BATCH, 16), "prior_token_drop": lambda model, inputs: torch.zeros(BATCH, 16).bool()}
    ),
    "diffusers/HiDreamImageTransformer2DModel": Row(
        config={
            "patch_size": 2,
            "caption_channels": [32, 32],
            "axes_dims_rope": (4, 2, 2),
            "llama_layers": list(range(8)),
            "max_resolution": (16, 16),
        },
        inputs={
            "hidden_states": _noise(BATCH, 4, 8, 8),
            "timesteps": lambda model, inputs: torch.tensor([10, 20]),
            "encoder_hidden_states_t5": _noise(BATCH, TOKENS, 32),
            "encoder_hidden_states_llama3": _noise(8, BATCH, TOKENS, 32),
            "img_ids": None,
        },
    ),
    "diffusers/HunyuanDiT2DModel": Row(
        config={"in_channels": 4, "patch_size": 2, "text_len": TOKENS, "text_len_t5": 8, "cross_attention_dim_t5": 32},
        inputs={
            "encoder_hidden_states_t5": _noise(BATCH, 8, 32),
            "text_embedding_mask": _ones(BATCH, TOKENS),
            "text_embedding_mask_t5": _ones(BATCH, 8),
            "image_meta_size": _ones(BATCH, 6),
            "style": lambda model, inputs: torch.zeros(BATCH).long(),
            "image_rotary_emb": lambda model, inputs: (torch.ones(16, 8), torch.zeros(16, 8)),
        },
    ),
    "diffusers/LatteTransformer3DModel": Row(config={"patch_size": 2, "in_channels": 4, "caption_channels": 32, "video_length": 4}),
    "diffusers/LuminaNextDiT2DModel": Row(
        config={"num_kv_heads": 2},
        inputs={
            "encoder_mask": _ones(BATCH, TOKENS),
            "image_rotary_emb": lambda model, inputs: torch.polar(torch.ones(16, 16, 4), torch.rand(16, 16, 4)),
            "cross_attention_kwargs": lambda model, inputs: {},
        },
    ),
    "diffusers/Lumina2Transformer2DModel": Row(config={"axes_dim_rope": (4, 2, 2)}),
    "diffusers/AnyFlowTransformer3DModel": Row(inputs={"timestep": _noise(BATCH, 4), "r_timestep": _noise(BATCH, 4)}),
    "diffusers/LTXVideoTransformer3DModel": Row(
        inputs={"hidden_states": _noise(BATCH, 64, 4), "num_frames": 4, "height": 4, "width": 4, "timestep": _noise(BATCH)}
    ),
    "diffusers/LongCatAudioDiTTransformer": Row(
        config={"dit_dim": 32, "dit_depth": 4, "dit_heads": 4, "dit_text_dim": 32, "latent_dim": 8},
        inputs={"hidden_states": _noise(BATCH, 16, 8), "latent_cond": _noise(BATCH, 16, 8), "timestep": _noise(BATCH)},
    ),
    "diffusers/MiniMaxMusic3RVQDepthDecoder": Row(inputs={"inputs_embeds": _noise(BATCH, 8, 32)}),
    "diffusers/MiniMaxMusic3Transformer1DModel": Row(
        config={"rotary_dim": 8}, inputs={"hidden_states": _noise(BATCH, 4, 16), "encoder_hidden_states": _noise(BATCH, 16, 32)}
    ),
    "diffusers/NucleusMoEImageTransformer2DModel": Row(
        config={"in_channels": 16, "out_channels": 4, "num_experts": 4},
        inputs={"hidden_states": _noise(BATCH, 16, 16), "img_shapes": lambda model, inputs: [(1, 4, 4)] * BATCH, "timestep": _noise(BATCH)},
    ),
    "diffusers/Krea2Transformer2DModel": Row(
        inputs={
            "hidden_states": _noise(BATCH, 16, 4),
            "encoder_hidden_states": lambda model, inputs: torch.randn(BATCH, TOKENS, model.config.num_text_layers, 32),
            "position_ids": lambda model, inputs: torch.zeros(TOKENS + 16, 3),
        }
    ),
    "diffusers/PRXTransformer2DModel": Row(config={"axes_dim": [4, 4]}),
    "diffusers/PriorTransformer": Row(config={"num_embeddings": TOKENS}, inputs={"hidden_states": _noise(BATCH, 32)}),
    "diffusers/QwenImageTransformer2DModel": Row(
        config={"in_channels": 16, "out_channels": 4},
        inputs={
            "hidden_states": _noise(BATCH, 16, 16),
            "img_shapes": lambda model, inputs: [[(1, 4, 4)]] * BATCH,
            "timestep": _noise(BATCH),
        },
    ),
    "diffusers/StableAudioDiTModel": Row(
        config={"num_key_value_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8, "out_channels": 8},
        inputs={
            "hidden_states": _noise(BATCH, 8, 16),
            "encoder_hidden_states": _noise(BATCH, TOKENS, 32),
            "global_hidden_states": _noise(BATCH, 1, 32),
            "rotary_embedding": lambda model, inputs: (torch.ones(17, 8), torch.zeros(17, 8)),
        },
    ),
    "diffusers/StableAudio3DiTModel": Row(inputs={"hidden_states": _noise(BATCH, 32, 16), "global_hidden_states": _noise(BATCH, 32)}),
    "diffusers/UNet1DModel": Row(config={"extra_in_channels": 64}, inputs={"sample": _noise(BATCH, 2, 64)}),
    "diffusers/UNetMotionModel": Row(
        config={"num_attention_heads": 4, "motion_num_attention_heads": 4},
        inputs={"sample": _noise(BATCH, 4, 4, 8, 8), "encoder_hidden_states": _noise(BATCH * 4, TOKENS, 32)},
    ),
    "diffusers/UNetSpatioTemporalConditionModel": Row(
        config={"projection_class_embeddings_input_dim": 96, "num_attention_heads": (4, 4, 4, 4), "block_out_channels": (32, 32, 32, 32)},
        inputs={
            "sample": _noise(BATCH, 4, 4, 8, 8),
            "encoder_hidden_states": _noise(BATCH, 1, 32),
            "added_time_ids": _noise(BATCH, 3),
        },
    ),
    "diffusers/I2VGenXLUNet": Row(
        inputs={
            "sample": _noise(BATCH, 4, 4, 8, 8),
            "image_latents": _noise(BATCH, 4, 4, 8, 8),
            "image_embeddings": _noise(BATCH, 32),
        }
    ),
    "diffusers/UVit2DModel": Row(
        config={"sample_size": 8, "block_num_heads": 4, "cond_embed_dim": 32, "micro_cond_encode_dim": 32, "micro_cond_embed_dim": 160},
        inputs={"input_ids": lambda model, inputs: torch.randint(0, 60, (BATCH, 8, 8)), "micro_conds": _noise(BATCH, 5)},
    ),
    "diffusers/WanVACETransformer3DModel": Row(
        config={"vace_layers": [0, 2], "vace_in_channels": 8}, inputs={"control_hidden_states": _noise(BATCH, 8, 4, 8, 8)}
    ),
    "diffusers/ZImageTransformer2DModel": Row(
        inputs={
            "x": lambda model, inputs: [torch.randn(4, 1, 8, 8) for _ in range(BATCH)],
            "cap_feats": lambda model, inputs: [torch.randn(TOKENS, 32) for _ in range(BATCH)],
        }
    ),
    "diffusers/Kandinsky3UNet": Row(inputs={"encoder_attention_mask": _ones(BATCH, TOKENS)}),
    "diffusers/Kandinsky5Transformer3DModel": Row(
        inputs={
            "hidden_states": _noise(1, 2, 8, 8, 4),
            "encoder_hidden_states": _noise(1, TOKENS, 32),
            "pooled_projections": _noise(1, 768),
            "timestep": _noise(1),
            "visual_rope_pos": lambda model, inputs: [torch.arange(2), torch.arange(4), torch.arange(4)],
            "text_rope_pos": lambda model, inputs: torch.arange(TOKENS),
        }
    ),
    "diffusers/T5FilmDecoder": Row(
        config={"targets_length": 16, "input_dims": 32, "d_model": 32, "d_kv": 8, "d_ff": 64},
        inputs={
            "encodings_and_masks": lambda model, inputs: [(torch.randn(BATCH, TOKENS, 32), torch.ones(BATCH, TOKENS))],
            "decoder_input_tokens": _noise(BATCH, 16, 32),
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
        inputs={"timestep_ratio": _noise(BATCH), "clip_text_pooled": _noise(BATCH, 1, 32)},
    ),
    "diffusers/HunyuanImageTransformer2DModel": Row(config={"rope_axes_dim": (4, 4), "patch_size": (2, 2)}),
    "diffusers/HunyuanVideo15Transformer3DModel": Row(
        inputs={
            "encoder_hidden_states_2": _noise(BATCH, TOKENS, 32),
            "encoder_attention_mask_2": lambda model, inputs: torch.ones(BATCH, TOKENS).bool(),
            "image_embeds": _noise(BATCH, 4, 32),
        }
    ),
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
