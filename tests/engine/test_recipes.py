"""Recipes: each is the stack of a job for a model, says what was measured, and refuses where nothing won."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import hf_tokens
from hf_tokens import ConfigError, UnsupportedError, get_token_model, measure, recipe
from hf_tokens.commands.recipes import JOBS, RECIPES_MEASURED, UNWON, as_yaml, recipe_as_text
from hf_tokens.testing import zoo

RESULTS = Path(hf_tokens.__file__).parents[1] / "benchmarks" / "results" / "quality"
MODELS = {
    "long-context": ("llama", 0.1),
    "fast-vit": ("vit", 0.5),
    "fast-vlm": ("llava", 0.5),
    "fast-dit": ("diffusers/DiTTransformer2DModel", 0.7),
    "sentence-embeddings": ("bert", 0.5),
}


@pytest.mark.parametrize("job", JOBS)
def test_a_recipe_is_a_stack_that_its_model_takes(job):
    family, keep = MODELS[job]
    base = zoo.build(family)
    part = base.model.bert if family == "bert" else base.model  # without the head that reads each token
    model = get_token_model(part, recipe(job, part, keep)).eval()
    with torch.no_grad():
        model(**base.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5])
def test_a_long_context_holds_no_more_than_its_share_and_the_newest(keep, dtype):
    sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1, vocab_size=99)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype).eval()
    ids = torch.randint(0, 90, (1, 1024), generator=torch.Generator().manual_seed(0))
    held = lambda: measure(model, input_ids=ids, use_cache=True).kv_bytes
    whole, stack = held(), recipe("long-context", model, keep)
    newest = stack[-1].residual / ids.shape[1]
    model = get_token_model(model, stack)
    assert 0.7 * min(keep, 0.25) <= held() / whole <= keep + newest


@pytest.mark.parametrize("job", JOBS)
def test_what_a_recipe_says_of_itself_are_rows_of_the_result_file(job):
    found = json.loads((RESULTS / f"{JOBS[job].result}.json").read_text())["rows"]
    assert RECIPES_MEASURED[job]["rows"]
    for row in RECIPES_MEASURED[job]["rows"]:
        assert any(row.items() <= other.items() for other in found)
        assert row["setting"] in recipe.__doc__


@pytest.mark.parametrize("job", UNWON)
def test_a_job_at_which_nothing_won_is_refused_with_the_reason(job):
    with pytest.raises(UnsupportedError, match="stack that won"):
        recipe(job, zoo.build("llama").model)


def test_what_was_measured_of_speech_is_what_the_refusal_says():
    rows = {(row["series"], row["setting"]): row for row in json.loads((RESULTS / "whisper.json").read_text())["rows"]}
    cost = "GFLOPs of the encoder"
    whole, tome, mean = (
        rows[key]
        for key in (
            ("no reduction", "1500 tokens"),
            ("tome in all blocks", "r = 188"),
            ("mean of neighbours", "2, in front of block 1"),
        )
    )
    spared = [f"{1 - row[cost] / whole[cost]:.0%}".replace("%", " %") for row in (tome, mean)]
    wrong = [f"{100 * row['word error rate']:.1f} %" for row in (tome, whole, mean)]
    seconds = f"{1 - tome['relative seconds of the encoder']:.0%}".replace("%", " %")
    assert all(figure in UNWON["fast-whisper"] for figure in (*spared, *wrong, seconds))
    assert 0.95 < tome["relative seconds of a transcript"] < 1.05


@pytest.mark.parametrize(
    ("job", "family", "keep", "error", "match"),
    [
        ("long-contxt", "llama", 0.5, ConfigError, "long-context"),
        ("long-context", "llama", 0.0, ConfigError, r"\(0, 1\]"),
        ("long-context", "llama", 1.5, ConfigError, r"\(0, 1\]"),
        ("fast-dit", "diffusers/DiTTransformer2DModel", 0.3, ConfigError, "fewer steps"),
        ("fast-vit", "llama", 0.5, UnsupportedError, "vision"),
    ],
)
def test_a_wrong_recipe_is_refused(job, family, keep, error, match):
    with pytest.raises(error, match=match):
        recipe(job, zoo.build(family).model, keep)


def test_as_yaml_a_recipe_can_be_read_and_put_in(tmp_path):
    base = zoo.build("llama").model
    stack = recipe("long-context", base, 0.1)
    told = yaml.safe_load(as_yaml("a/model", stack))
    assert told["model"] == "a/model"
    get_token_model(base, told["methods"])
    assert [hf_tokens.method_info(one["method"]).config.from_dict(one) for one in told["methods"]] == stack


def test_the_command_line_reads_the_config_alone(tmp_path):
    zoo.build("vit").model.config.save_pretrained(tmp_path)
    text = recipe_as_text("fast-vit", str(tmp_path), 0.5)
    assert text.startswith("# fast-vit") and yaml.safe_load(text)["methods"][0]["method"] == "atc"
