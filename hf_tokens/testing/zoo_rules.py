"""How the zoo makes a config small: the sizes of its attributes, by their names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

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
_TASKS = """
IMAGE_TEXT_TO_TEXT MULTIMODAL_LM SEQ_TO_SEQ_CAUSAL_LM SPEECH_SEQ_2_SEQ MASKED_LM CAUSAL_LM ZERO_SHOT_IMAGE_CLASSIFICATION
IMAGE_CLASSIFICATION VIDEO_CLASSIFICATION OBJECT_DETECTION ZERO_SHOT_OBJECT_DETECTION UNIVERSAL_SEGMENTATION SEMANTIC_SEGMENTATION
DEPTH_ESTIMATION CTC TDT RNNT TEXT_TO_SPECTROGRAM TEXT_TO_WAVEFORM TIME_SERIES_PREDICTION VISUAL_QUESTION_ANSWERING
-
KEYPOINT_MATCHING KEYPOINT_DETECTION POSE_ESTIMATION IMAGE_MATTING AUDIO_CLASSIFICATION BACKBONE MASK_GENERATION TEXT_RECOGNITION
TABLE_RECOGNITION RETRIEVAL TEXT_ENCODING PRETRAINING
""".split()  # "-" is the model without a head
PREFERRED = tuple(f"MODEL_FOR_{task}_MAPPING_NAMES" if task != "-" else "MODEL_MAPPING_NAMES" for task in _TASKS)


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
