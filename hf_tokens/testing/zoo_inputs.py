"""What the zoo passes to a model: an input for each name of an argument."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from .zoo_rules import BATCH, PATCH, SIDE, TOKENS, VOCAB


def noise(*shape: int) -> Any:
    return lambda model, inputs: torch.randn(shape)


def noises(**shapes: tuple[int, ...]) -> dict[str, Any]:
    """Noise for arguments by name, each of its shape behind the batch."""
    return {name: noise(BATCH, *shape) for name, shape in shapes.items()}


def random_ids(length: int = TOKENS, rows: int = BATCH) -> Any:
    return lambda model, inputs: torch.randint(5, 60, (rows, length))


def ones(*shape: int) -> Any:
    return lambda model, inputs: torch.ones(shape).long()


def _configs(config: Any) -> list[Any]:
    from transformers import PreTrainedConfig

    return [config] + [c for v in vars(config).values() if isinstance(v, PreTrainedConfig) for c in _configs(v)]


def setting(model: nn.Module, *names: str, default: Any = None) -> Any:
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


def _tokens(model: nn.Module) -> torch.Tensor:
    return torch.randint(5, min(setting(model, "vocab_size", default=VOCAB), 80), (BATCH, TOKENS))


def _pixels(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    if names & {"image_grid_thw", "grid_thw"}:
        return _packed_pixels(model, names)
    height, width = _pair(setting(model, "image_size", "img_size", "input_size", default=SIDE))
    channels = getattr(_vision(model), "num_channels", None) or setting(model, "num_channels", "in_channels", default=3)
    shape = (BATCH, channels, height, width)
    if _takes_video(model):
        shape = (BATCH, setting(model, "num_frames", "frames_per_clip", default=4), *shape[1:])
    if "spatial_shapes" in names:
        patches = (height // PATCH) * (width // PATCH)
        side = torch.tensor([[height // PATCH, width // PATCH]] * BATCH)
        pixels = torch.randn(BATCH, patches, patch_numel(model))
        return {"pixel_values": pixels, "spatial_shapes": side, "pixel_attention_mask": torch.ones(BATCH, patches).long()}
    made = {"pixel_values": torch.randn(shape)}
    getter = getattr(model, "get_image_features", None)
    sizes = inspect.signature(getter).parameters.get("image_sizes") if getter is not None else None
    if sizes is not None and sizes.default is sizes.empty:
        made["image_sizes"] = torch.tensor([[height, width]] * BATCH)
    return made


def _takes_video(model: nn.Module) -> bool:
    named = re.search(r"video|vivit|timesformer|xclip", type(model).__name__, re.IGNORECASE)
    return named is not None and setting(model, "num_frames") is not None


def _packed_pixels(model: nn.Module, names: set[str]) -> dict[str, Any]:
    """Qwen2-VL's form: the patches of all images in one row, and how they lie."""
    merge = setting(model, "spatial_merge_size", "merge_size", default=2)
    merge = merge if isinstance(merge, int) else merge[0]
    side = 2 * merge
    grid = torch.tensor([[1, side, side]] * BATCH)
    pixels = torch.randn(int(grid.prod(-1).sum()), patch_numel(model))
    grid_name = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
    return {"pixel_values" if "pixel_values" in names else "hidden_states": pixels, grid_name: grid}


def patch_numel(model: nn.Module) -> int:
    """The numbers in one patch: what a filter of the patch embedding reads."""
    named = [(name, p[0].numel()) for name, p in model.named_parameters() if p.ndim > 1 and "pos" not in name]
    return next(numel for part in ("patch", "vis") for name, numel in named if part in name)


def tiles(model: nn.Module, inputs: dict) -> torch.Tensor:
    """Images as stacks of tiles: b t c h w."""
    height, width = _pair(setting(model, "image_size", default=SIDE))
    return torch.randn(BATCH, 1, 3, height, width)


def _clip_of_frames(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    if "pixel_values" in inputs:
        return {}
    height, width = _pair(setting(model, "image_size", "crop_size", default=SIDE))
    return {"pixel_values_videos": torch.randn(BATCH, setting(model, "num_frames", "frames_per_clip", default=4), 3, height, width)}


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
        marker = setting(model, *token)
        if count and isinstance(marker, int):
            ids = torch.cat([ids[:, :2], torch.full((BATCH, count), marker), ids[:, 2:]], dim=1)
            kinds = torch.cat([kinds[:, :2], torch.full((BATCH, count), 1 + 2 * kind), kinds[:, 2:]], dim=1)
    return {"input_ids": ids} | ({"mm_token_type_ids": kinds} if "mm_token_type_ids" in names else {})


def _placeholders(model: nn.Module, inputs: dict, getter: str) -> int:
    """How many positions of the text one image or sound takes, by the model itself."""
    get = next((method for module in model.modules() if (method := getattr(module, getter, None)) is not None), None)
    accepted = inspect.signature(get).parameters if get is not None else {}
    image = ("pixel", "image", "spatial", "qformer", "target", "high_res")
    prefixes = image if "image" in getter else ("input_features", "feature", "input_values", "audio", "pad")
    known = {*accepted, "image_merge_sizes", "padding_mask"}  # the last two pass through keyword arguments
    fits = {name for name in inputs if name.startswith(prefixes) and (name in known or "args" in accepted)}
    arguments = {name: inputs[name] for name in fits if inputs[name] is not None}
    if not arguments:
        return 0
    with torch.no_grad():
        out = get(**arguments)
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(out, name, None) is not None:
            out = getattr(out, name)
            break
    parts = list(out) if isinstance(out, (tuple, list)) else [out]
    return sum(part.shape[:-1].numel() for part in parts) // BATCH


def _ones_like_text(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    return {"attention_mask": torch.ones_like(inputs["input_ids"])} if inputs.get("input_ids") is not None else {}


def _boxes(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    low = torch.randint(0, 40, (BATCH, TOKENS, 2))
    return {"bbox": torch.cat([low, low + 20], dim=-1)}


def _mel(model: nn.Module, inputs: dict, names: set[str]) -> dict[str, Any]:
    bins = setting(model, "num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "feature_size", "mel_bins", default=16)
    frames = 2 * min(setting(model, "max_source_positions", default=32), 128)
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


# inputs of Transformers' models: argument name -> what to pass, in this order
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
    ("decoder_input_ids", lambda model, inputs, names: {"decoder_input_ids": _tokens(model)} if model.config.is_encoder_decoder else {}),
)


# what configs of Diffusers call the width of the text
TEXT_WIDTHS = (
    *("caption_channels", "joint_attention_dim", "cross_attention_dim", "text_embed_dim", "text_dim"),
    *("cap_feat_dim", "encoder_hidden_size"),
)


def diffusers_inputs(model: nn.Module) -> dict[str, Any]:
    """The inputs of a model of Diffusers, by the names of its arguments."""
    parameters, config, side = inspect.signature(model.forward).parameters, model.config, 8
    channels = config.get("in_channels") or 4
    text = next((width for name in TEXT_WIDTHS if (width := config.get(name))), 32)
    packed = "img_ids" in parameters
    video = "3D" in type(model).__name__ or "Video" in type(model).__name__
    latent = torch.randn(BATCH, side * side, channels) if packed else torch.randn(BATCH, channels, *((4,) if video else ()), side, side)
    inputs: dict[str, Any] = {
        next(iter(parameters)): latent,
        "timestep": torch.tensor([0.3, 0.6]) if packed else torch.tensor([10.0, 20.0]),
        "encoder_hidden_states": torch.randn(BATCH, TOKENS, text if isinstance(text, int) else text[0]),
        "pooled_projections": torch.randn(BATCH, config.get("pooled_projection_dim") or 32),
        **dict.fromkeys(("pooled_embeds", "proj_embedding", "pooled_text_emb"), torch.randn(BATCH, 32)),
        "t": torch.tensor([0.3, 0.6]),
        "r_timestep": torch.tensor([1, 2]),
        "timestep_r": torch.tensor([0.1, 0.2]),
        "encoder_attention_mask": torch.ones(BATCH, TOKENS).bool(),
        "encoder_hidden_states_mask": torch.ones(BATCH, TOKENS).long(),
        "mask": torch.ones(BATCH, TOKENS).long(),
        "original_size": torch.tensor([[8, 8]] * BATCH),
        "target_size": torch.tensor([[8, 8]] * BATCH),
        "crop_coords": torch.tensor([[0, 0]] * BATCH),
        "fps": torch.tensor([4, 4]),
    }
    if config.get("num_embeds_ada_norm"):
        inputs["class_labels"] = torch.tensor([1, 2])
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.ones(BATCH)
    if packed:
        axes = len(config.get("axes_dims_rope") or (0, 0, 0))
        grid = torch.zeros(side, side, axes)
        grid[..., -2], grid[..., -1] = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        inputs |= {"img_ids": grid.flatten(0, 1), "txt_ids": torch.zeros(TOKENS, axes)}
    optional = ("encoder_attention_mask", "timestep_r", "mask")
    wanted = {name for name, p in parameters.items() if p.default is p.empty or name not in optional}
    return {name: value for name, value in inputs.items() if name in wanted}
