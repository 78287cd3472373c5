"""The zoo: tiny, repeatable, alive, and honest about what it cannot build."""

import sys
from pathlib import Path

import pytest
import torch

from hf_tokens.testing import zoo

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import sweep  # noqa: E402

SAMPLE = """
llama gpt2 bert t5 vit dinov2 clip llava qwen2_vl gemma3 mixtral whisper deepseek_v3 falcon bloom gptj opt modernbert bart mbart deit swin
siglip blip-2 idefics3 qwen2_5_vl internvl wav2vec2 detr jamba mllama xlnet paligemma
diffusers/UNet2DConditionModel diffusers/DiTTransformer2DModel diffusers/SD3Transformer2DModel diffusers/FluxTransformer2DModel
diffusers/PixArtTransformer2DModel diffusers/WanTransformer3DModel diffusers/CogVideoXTransformer3DModel
diffusers/HunyuanVideoTransformer3DModel
diffusers/LTXVideoTransformer3DModel diffusers/SanaTransformer2DModel diffusers/ZImageTransformer2DModel
""".split()


# blocks that think of their tokens as a grid, or number them, do not run on some of them
GRIDS = {"swin", "xlnet", "diffusers/SanaTransformer2DModel"}


@pytest.mark.parametrize("family", SAMPLE)
def test_family_is_built_run_read_and_operated_on(family):
    row = sweep.sweep(family)
    assert row["why"] == "" and row["run"] == "ok"
    assert row["streams"]
    for stream in row["streams"]:
        assert (stream["calls"], stream["alive"]) == ("ok", "ok"), stream
    assert row["identity"] == "ok"
    assert (row["drop"] == "ok") == (family not in GRIDS), row["drop"]


def test_the_same_seed_gives_the_same_specimen_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b, c = zoo.build("llama"), zoo.build("llama"), zoo.build("llama", seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(a.run(), b.run(), strict=True))
    assert not torch.equal(a.run()[0], c.run()[0])


def test_models_are_tiny_and_take_a_dtype():
    specimen = zoo.build("llama", dtype=torch.bfloat16)
    assert sum(p.numel() for p in specimen.model.parameters()) < 200_000
    assert specimen.run()[0].dtype == torch.bfloat16 and not specimen.model.training


def test_images_reach_the_text_of_a_vision_language_model():
    specimen = zoo.build("llava")
    before, after = specimen.run()[0], specimen.run(pixel_values=specimen.inputs["pixel_values"] + 1)[0]
    assert not torch.allclose(before, after)


def test_gates_that_start_at_zero_are_open():
    specimen = zoo.build("diffusers/DiTTransformer2DModel")
    zeros = [name for name, p in specimen.model.named_parameters() if not p.any()]
    assert zeros == []


def test_families_are_listed_by_library_and_none_is_left_out():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    assert set(CONFIG_MAPPING_NAMES) == set(zoo.families("transformers"))
    assert "diffusers/FluxTransformer2DModel" in zoo.families("diffusers")
    assert len(zoo.families()) == len(zoo.families("transformers")) + len(zoo.families("diffusers"))
    with pytest.raises(ValueError, match="library must be one of"):
        zoo.families("timm")


def test_what_cannot_be_built_says_why():
    reasons = zoo.unbuildable()
    assert set(reasons) <= set(zoo.families()) and all(reasons.values())
    family, reason = next(iter(reasons.items()))
    with pytest.raises(ValueError, match=f"{family} has no specimen: {reason}"):
        zoo.build(family)
