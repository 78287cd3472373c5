"""Rows of data for what structure alone does not show. A row names classes of the libraries, never a method."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

# A module of such a class is an attention; what merely holds, feeds or pools one is left out by the second pattern.
ATTENTION = re.compile(r"(attention|attn|mha)(v?\d+d?)?$", re.IGNORECASE)
NOT_ATTENTION = re.compile(r"(pool|linear|lightning|delta|mamba)\w*(attention|attn)", re.IGNORECASE)
# Child names under which an attention reads other tokens than its own stream's.
CROSS_PATH = re.compile(r"(^|[._])(cross|enc_?dec|encoder_attn|crossattention|multihead_attn|attn_?2$|text_attn|src_attn)", re.IGNORECASE)
CROSS_CLASS = re.compile(r"cross", re.IGNORECASE)
# Projections of a cross-attention that read the other tokens.
CONTEXT = re.compile(r"(^|[._])(to_k|to_v|to_kv|k|v|kv|k_proj|v_proj|kv_proj|k_lin|v_lin|key|value|key_value)$", re.IGNORECASE)
QUERY = re.compile(r"(^|[._])(q|q_proj|q_lin|query|to_q|q_a_proj|qkv|wqkv|c_attn|attn_qkv|query_key_value|in_proj)$", re.IGNORECASE)
NORM = re.compile(r"norm", re.IGNORECASE)
# child name -> kind of stream, tried on every ancestor of the blocks, the nearest first
KINDS = (
    ("video", re.compile(r"(^|_)video|video(encoder|model)", re.IGNORECASE)),
    ("audio", re.compile(r"audio|speech|sound|acoustic", re.IGNORECASE)),
    ("vision", re.compile(r"vision|visual|image|pixel|(^|_)vit($|_)", re.IGNORECASE)),
    ("text", re.compile(r"text|language|(^|_)llm?($|_)|(^|_)lm($|_)", re.IGNORECASE)),
)
MAIN_INPUTS = {
    "input_ids": "text",
    "pixel_values": "vision",
    "pixel_values_videos": "video",
    "input_features": "audio",
    "input_values": "audio",
    "audio_values": "audio",
}
# How a model's config calls the ids that stand for pictures and videos in its text.
IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
# Models that read pictures by attention across: the tokens in their text only say that there is one.
READS_ACROSS = re.compile(r"^Mllama")
# Parts of the names of what a model is given where it is given pictures or videos.
PICTURES = ("pixel_values", "image_patches")


def _pooled(config: Any) -> int:
    """Patches along a side of what Gemma's projector pools into a token: it makes a square of `mm_tokens_per_image`."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side // math.isqrt(config.mm_tokens_per_image)


# model type -> patches along a side of a visual token, by its config. The tokens of a picture, or of each tile of one, lie row by row.
# A model that is not here makes latents of a picture, or is not known.
TOKEN_SIDES: dict[str, Callable[[Any], int]] = {
    **dict.fromkeys(("llava", "vipllava", "video_llava", "paligemma", "janus", "deepseek_vl", "deepseek_vl_hybrid"), lambda config: 1),
    **dict.fromkeys(("llava_next", "llava_next_video", "llava_onevision"), lambda config: 1),
    **dict.fromkeys(("got_ocr2", "pp_chart2table", "step3p7"), lambda config: 4),
    **dict.fromkeys(("aya_vision", "cohere2_vision", "lfm2_vl"), lambda config: config.downsample_factor),
    **dict.fromkeys(("idefics3", "smolvlm"), lambda config: config.scale_factor),
    **dict.fromkeys(("modernvbert", "ultravbert"), lambda config: config.pixel_shuffle_factor),
    **dict.fromkeys(("internvl", "qianfan_ocr"), lambda config: round(1 / config.downsample_ratio)),
    **dict.fromkeys(("mistral3", "lighton_ocr"), lambda config: config.spatial_merge_size),
    **dict.fromkeys(("gemma3", "shieldgemma2"), _pooled),
    "t5gemma2": lambda config: _pooled(config.encoder),
    "llama4": lambda config: round(1 / config.vision_config.pixel_shuffle_ratio),
    "ovis2": lambda config: config.vision_config.hidden_stride,
    "kimi_k25": lambda config: config.vision_config.merge_kernel_size[0],
    **dict.fromkeys(
        (
            *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "cosmos3_edge", "cosmos3_omni"),
            *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "glm4v", "glm4v_moe", "glm46v", "glmga", "glm5_next", "glm_ocr"),
            *("cohere_compass", "ernie4_5_vl_moe", "exaone4_5", "hyperclovax_vision_v2", "lfm3_vl", "minimax_m3_vl", "paddleocr_vl"),
            *("hunyuan_vl", "hy_v4_vl"),
        ),
        lambda config: config.vision_config.spatial_merge_size,
    ),
}
# model type -> visual tokens that stand for no part of a picture: in front of its first row, at the end of each, behind the last
ROW_ENDS = {"hunyuan_vl": (1, 1, 1), "hy_v4_vl": (0, 1, 0)}
# model type -> methods of the module that holds the vision tower, which lay out what that has returned
LAYING = {
    "llava_next": ("pack_image_features",),
    **dict.fromkeys(("llava_next_video", "llava_onevision"), ("pack_image_features", "get_video_features")),
}
# model type -> tokens along a side of a video's frame, by its config and the patches, and tokens that stand behind the frames
SMALLER_FRAMES: dict[str, tuple[Callable[[Any, int], int], int]] = {
    "llava_next_video": (lambda config, side: side // config.spatial_pool_stride, 0),
    "llava_onevision": (lambda config, side: -(-side // 2), 1),
}
# Models whose projector reads every patch of one block of the tower, and its class token never: which of the tower's hidden states.
READ_STATES: dict[str, Callable[[Any], int | None]] = {
    "llava": lambda config: config.vision_feature_layer if config.vision_feature_select_strategy == "default" else None
}
# Names of a block's MLP and of the norm in front of it, the first that exists wins.
MLPS = (
    *("mlp", "feed_forward", "ffn", "ff", "moe", "block_sparse_moe", "feedforward"),
    *("sparse_mlp", "img_mlp", "mlp_block", "MLP", "shared_mlp"),
)
MLP_NORMS = (
    *("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_ff_layernorm", "ffn_norm1", "ffn_norm", "ff_norm", "ffn_layer_norm"),
    *("norm_mlp", "norm3", "layer_norm2", "layernorm_after", "ln_2", "norm2", "img_norm2", "norm_2", "rms_norm2"),
    *("pre_mlp_layer_norm", "post_attention_layernorm", "post_attention_norm", "ln2"),
)
# MLPs whose experts take only so many tokens: what one token gets depends on the others.
MIXING_MLPS = re.compile(r"^(Switch|Nllb)")
# A block with one of these children normalises after its MLP, so that a `post_attention_*` norm of it is no norm before the MLP.
POST_NORMS = ("post_feedforward_layernorm",)
# block class -> the norm of its MLP, where it keeps another one under a name of the list above that it never calls
MLP_NORM_OF = {"transformer_allegro.AllegroTransformerBlock": "norm2", "modeling_canary.CanaryDecoderLayer": "final_layernorm"}
# The norm behind the blocks: child names that are another norm, those that are it though registered in front of the blocks, and modules
# whose norm behind the blocks takes the pooled token alone.
NOT_FINAL = re.compile(r"embed|batch_norm", re.IGNORECASE)
FINAL_NORMS = ("norm", "final_layer_norm", "layernorm_post")
POOLED_NORM = re.compile(r"^((Alt|Chinese|X)?CLIP(Seg)?|MetaClip2|Kosmos2|MLCD|OwlViT|Owlv2)Vision")
POST_NORM_BLOCKS = re.compile(r"modeling_openai\.Block|FastSpeech2|RTDetr|Swin2SRLayer|Swinv2Layer")
# Names of the two modules that are a block's MLP where it is no module of its own, of the norm in front, and of what the second one
# computes last before it adds the residual, if it is given that.
TWO_PART_MLP, TWO_PART_NORM, RESIDUAL, BEFORE_RESIDUAL = ("intermediate", "output"), "layernorm_after", "input_tensor", "dropout"
# Names of the two projections of an MLP that stands in a block's own forward, and where what stands between them is from.
INLINE_MLP, ACTIVATIONS = ("fc1", "fc2"), ("transformers.activations", "torch.nn.modules.activation")
# An attention of these reads the hidden states and the embeddings side by side.
CONCATENATES = re.compile(r"^Zamba")
# A stage holds blocks and changes the resolution, with or without an attention of its own.
NOT_BLOCK = re.compile(r"Stage$")
# block class -> how its hidden states lie, where it is not "b n d": windows on a grid, parallel residual streams (c), tokens first,
# frames (t) that are split off the batch again because attention runs over them
BLOCK_LAYOUTS = (
    (re.compile(r"(Sam|SamHQ|GotOcr2|PPFormulaNet|SLANeXt|PPChart2Table)VisionLayer"), "b h w d"),
    (re.compile(r"Sam3ViTLayer|SegGptLayer|(Sam2|EdgeTam)\w*Block"), "b h w d"),
    (re.compile(r"VitDetLayer|Kandinsky3Attention|Florence2VisionBlock"), "b d h w"),
    (re.compile(r"PatchTST|TwoWayAttentionBlock"), "b c n d"),
    (re.compile(r"Lfm3VlVisionLayer"), "n d"),
    (re.compile(r"DeepseekV4Decoder|HYV4(VL)?Decoder|Glm5NextTextDecoder"), "b n c d"),
    (re.compile(r"Qwen4Exp\w*DecoderLayer"), "b n (c d)"),
    (re.compile(r"Gemma3nTextDecoder"), "c b n d"),
    (re.compile(r"XLNetLayer|modeling_fsmt|BridgeTowerResidualAttention|ErnieImageSharedAdaLNBlock"), "n b d"),
    (re.compile(r"SqueezeBertModule"), "b d n"),
    (re.compile(r"TemporalBasicTransformerBlock"), "(b t) n d"),
)
# Where the blocks of a denoiser are that prepare one of its sequences for those that read all.
REFINERS = re.compile(r"refiner")
# How blocks of a denoiser call what they are given of the timestep.
TIME_EMBEDDING = "temb"
# Blocks that put a second sequence behind their own tokens where they join the two, and not in front of them.
CONTEXT_BEHIND = re.compile(r"^(Hunyuan|Motif|HiDream|NucleusMoE|JoyImage|JointTransformer)")
# Blocks whose rotary tables, which all samples share, are of tokens and heads.
ROTARY_OF_HEADS = re.compile(r"^Mochi")
# Blocks of Diffusers that take a mask for bool, where others add it.
BOOL_MASKS = re.compile(r"^Lumina2")
# block class -> what no mask function shows
CAUSAL = {
    "modeling_fsmt.EncoderLayer": False,
    "modeling_fsmt.DecoderLayer": True,
    "modeling_openai.Block": True,
    "modeling_imagegpt.ImageGPTBlock": True,
    "minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthDecoderBlock": True,
    "modeling_blip_text.BlipTextLayer": True,
    "modeling_t5gemma2.T5Gemma2DecoderLayer": True,
    "modeling_prophetnet.ProphetNetDecoderLayer": True,
}
ATTRIBUTES = {
    "heads": ("num_heads", "num_attention_heads", "heads", "n_heads", "n_head", "num_q_heads", "attention_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "kv_heads", "n_kv_heads", "inner_kv_heads"),
    "head_dim": ("head_dim", "attention_head_size", "head_size", "dim_head", "key_value_proj_dim", "d_kv"),
    "width": ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "inner_dim", "emb_dim"),
    "prompt": (
        *("joint_attention_dim", "caption_channels", "text_embed_dim", "text_dim", "cap_feat_dim", "caption_feat_dim"),
        *("encoder_hid_dim", "cross_attention_dim"),
    ),
}
HEADS = ("lm_head", "classifier", "score", "cls", "qa_outputs", "head", "proj_out", "conv_out")
# What stands in a text config of factors, a divisor and a cap that a model puts on what its head returns.
LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
LOGIT_DIVISOR, LOGIT_CAP = "logits_scaling", "final_logit_softcapping"
CAUSAL_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_chunked_causal_mask", "create_masks_for_generate")
OPEN_MASKS = ("create_bidirectional_mask", "create_bidirectional_sliding_window_mask")
# Blocks of a causal stream that see all of it where the model hands down no mask, though no flag of their attention says so.
OPEN_UNMASKED = re.compile(r"^modeling_fsmt\.DecoderLayer$")
# Models whose head reads each token, whatever it is: those for another task than to judge a sample as a whole.
READS_EACH = re.compile(r"For(?!(Sequence|Image|Video|Audio)Classification|MultipleChoice|NextSentencePrediction|XVector)[A-Z]|Backbone$")
# Models whose head classifies each token.
CLASSIFIES_EACH = re.compile(r"ForTokenClassification$")
# Models for late interaction: what they return is the set of their tokens' vectors, under this name.
LATE_INTERACTION, VECTORS = re.compile(r"^Col(Pali|Qwen2|ModernVBert)ForRetrieval$"), "embeddings"
# Libraries that read the vectors of a text by the mask that they gave with it.
READS_BY_MASK = ("sentence_transformers",)
# Models whose towers are read apart from each other; in every other model of several streams an earlier one is read by a later one.
TOWERS = re.compile(r"^((Alt|Chinese)?CLIP(Seg)?|MetaClip2|Siglip2?|VisionTextDualEncoder|OwlViT|Owlv2)Model$")
# Where the order of registration is not the order of the calls.
CALLED_BEFORE = {"mid_block": "up_blocks"}
# Parameters that are special tokens in front of the patches of a picture.
PREFIX_TOKENS = re.compile(
    r"(^|\.)(cls_token|class_token|class_embedding|distillation_token|dist_token|register_tokens|reg_token|cls_register_token)$"
)
# Those that are special tokens behind them.
SUFFIX_TOKENS = re.compile(r"(^|\.)detection_tokens$")
# Modules of a block, by name or class, that look up the places or distances of its tokens by counting them: those that are unused where
# the block is given one of these arguments, and those that count whatever they are given.
TABLES = re.compile(r"(^|\.)(relative_attention_bias|rel_attn_embed)$")
PLACES = re.compile(r"position|relative")
MIXES_HEADS = re.compile(r"^Doge")  # attentions that read the cached values of all heads of a token together
COUNTS = re.compile(
    r"(^|\.)(rel_pos_emb|relative_position_embedding|rel_logits_proj|distance_embedding)$|"
    r"^(LongT5(Local|TransientGlobal)Attention|MptAttention|SinusoidalPositionalEmbedding)$"
)
# Attribute of an attention that takes a whole number of windows of twice this size; they are counted over the tokens that are left.
HALF_WINDOW = "one_sided_attn_window_size"
# block class -> the table that it looks up at its `position_ids`, and that must stay whole for it
INDEXED = {"ClvpEncoderLayer": "rotary_pos_emb"}
# block class -> arguments of this many axes, or of any number, that belong to another sequence or to a whole sample, under names by which
# other blocks are given something of each token
FOREIGN_OF = (
    (re.compile(r"(Detr|DabDetr|TableTransformer)DecoderLayer$"), re.compile(r"^(spatial_position_embeddings|object_queries)$"), None),
    (re.compile(r"^Sam3(LiteText)?DetrDecoderLayer$"), re.compile(r"^(query_pos|vision_pos_encoding)$"), None),
    (re.compile(r"TwoWayAttentionBlock$"), re.compile(r"^(keys|key_point_embedding)$"), None),
    (re.compile(r"^HunyuanVideo15Transformer"), re.compile(r"^attention_mask$"), None),
    (re.compile(r"^(AceStep|Wan|JoyImage|Chroma|Krea2)\w*Block$"), re.compile(r"^temb$"), 3),
    (re.compile(r"^LTX2Video"), re.compile(r"^temb_ca_"), 3),
)
# Blocks that lay their rotary tables (n d) over the heads of each sample (b h n d) as they are: they take (b 1 n d) as well.
LAID_OVER_HEADS = re.compile(r"^(DINOv3ViT|EomtDinov3|Sapiens2)Layer$")
# Models that multiply what they return by the mask of what they were called with: on a cache, with a mask of its entries too, they fail.
MASKS_OUTPUT = re.compile(r"^Col(Pali|Qwen2|ModernVBert)ForRetrieval$")
# Models of which several tokens behind a cache are not read as behind the text that it holds, and why.
RESUMES_BY_TOKEN = re.compile(r"^(Jamba|Mamba|FalconMamba|Zamba)(?!2)")
RESUMES_NOT = {
    RESUMES_BY_TOKEN: "goes on from its states by one token at a time",
    re.compile(r"^RecurrentGemma"): "keeps its states beside the cache",
}
# Models that number the tokens of a call from 0 where they are not told otherwise, whatever stands in the cache.
NUMBERS_FROM_ZERO = re.compile(r"^Bamba")
# Arguments by which a block gets what the one before returned for each token beside its hidden states; one of them holds places of
# keys, unread where the attention has an indexer of its own.
HANDED_ON = re.compile(r"^(prev_(router_hidden_states|topk_indices)|layout_inputs|control_hidden_states)$")
PLACES_OF_KEYS = "prev_topk_indices"
# What stands beside the prompt of a denoiser: its masks, tables of its places, and lengths that no longer hold once tokens are added.
PROMPT_MASKS = re.compile(r"^(encoder|text|txt|prompt|caption|context)_(\w+_)?mask$")
PROMPT_PLACES = ("txt_ids",)
PROMPT_LENGTHS = re.compile(r"seq_lens$")
# The setting of a UNet's config, and its value, in which its blocks get the prompt in front of the pictures of IP-Adapters.
PROMPT_AND_PICTURES = ("encoder_hid_dim_type", "ip_image_proj")
# Denoisers that count on the length of their prompt, or are given it a second time in other words.
FIXED_PROMPT = re.compile(r"^(CogVideoX|ConsisID|HunyuanDiT2D|BriaFibo)")
# Denoisers that read their prompt as a whole too, beside their blocks.
POOLED_PROMPT = re.compile(r"^Mochi")
# Arguments of a denoiser that all samples share.
SHARED_TABLES = re.compile(r"^(txt|img)_ids$|rotary|freqs")
# Models that generate with a cache of other tokens than those of their blocks, with masks that do not lie over it, or write into it.
OWN_CACHES = re.compile(r"^(CpmAnt|ProphetNet|XLMProphetNet|VibeVoiceForConditionalGeneration)")
# Models that cut the cache of what they have generated into plain rows, and the method that does; those whose beams share a cache that has
# rows for each of a question's documents.
ROWS_OF_CACHE = (re.compile(r"^WhisperForConditionalGeneration$"), "_postprocess_outputs")
ROWS_OF_DOCUMENTS = re.compile(r"^RagTokenForGeneration$")
# What an attention says that takes no mask but one of its full size.
MASK_OF_SIZE = "ttention mask should be of size"
# How a denoiser calls its timestep.
TIMESTEPS = ("timestep", "timesteps", "timestep_ratio", "t")
# Denoisers whose timestep is a share of 1, where others count to 1000; those whose timestep rises as the noise falls; and those whose
# pipelines give it in units of their own, so that only a pipeline's scheduler tells how much noise it means.
UNIT_TIME = re.compile(
    r"^(Flux|Chroma|QwenImage|OvisImage|LongCat|AuraFlow|Lumina2|LuminaNextDiT2D|ZImage|AceStep|BriaFibo2|Krea2|NucleusMoE|PRX|Ideogram4|"
    r"OmniGen)"
)
RISING_TIME = re.compile(r"^(Lumina2|LuminaNextDiT2D|ZImage|Ideogram4|OmniGen|Mochi)")
UNKNOWN_TIME = re.compile(r"^(Cosmos|StableAudio)")
# Schedulers whose timesteps are logarithms of how much noise lies over data of their `sigma_data`; they have that as `sigmas`, too.
LOGARITHMS = re.compile(r"^EDM(Euler|DPMSolverMultistep)Scheduler$")
# Schedulers whose timesteps are shares of `num_train_timesteps`, all of it at pure noise.
SCHEDULERS = re.compile(
    r"^(DDIM|DDPM|PNDM|LMS|Euler|Heun|KDPM2|DPMSolver|DEIS|UniPC|SASolver|LCM|TCD|CogVideoX|FlowMatch|FlowMap|Helios|Piflow|UnCLIP|RePaint)"
    r"(?!Wuerstchen)"
)
