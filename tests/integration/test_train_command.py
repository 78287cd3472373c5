"""`hf-tokens train`: from a recipe's file to an adapter, and what is said of all that can be wrong with it before anything is loaded."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import save_llama, save_vit
from transformers import TrainingArguments

import hf_tokens
from hf_tokens.commands import train
from hf_tokens.commands.recipe_file import DataConfig, read_training
from hf_tokens.commands.sources import base_of

TEXT = "The quick brown fox jumps over the lazy dog. " * 30


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    save_llama(folder / "llama")
    save_vit(folder / "vit")
    (folder / "text.txt").write_text(TEXT)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": TEXT, "n": 1}) + "\n" for _ in range(2)))
    (folder / "rows.json").write_text(json.dumps([{"said": TEXT}]))
    (folder / "rows.csv").write_text(f'n,text\n1,"{TEXT}"\n')
    (folder / "set").mkdir()
    (folder / "set" / "train.csv").write_text(f'n,text\n1,"{TEXT}"\n')
    (folder / "broken.json").write_text("[{")
    return folder


def recipe_of(**changes):
    """The keys of a small recipe; None takes one out."""
    training = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "disable_tqdm": True}
    whole = {"model": "llama", "methods": [{"method": "deep-prompt", "tokens": 2}], "data": {"train": "text.txt", "length": 64}}
    whole |= {"training": {**training, **changes.pop("training", {})}} if isinstance(changes.get("training", {}), dict) else {}
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


@pytest.fixture
def train_with(cli, here, tmp_path, monkeypatch):
    monkeypatch.chdir(here)

    def call(recipe, *arguments):
        path = tmp_path / "recipe.yaml"
        path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
        return cli("train", str(path), *arguments)

    return call


def test_a_recipe_becomes_an_adapter(train_with, here, tmp_path):
    lora = {"method": "peft", "config": {"peft_type": "LORA", "r": 2}}
    methods = [{"method": "deep-prompt", "tokens": 2}, "snapkv", lora]
    data = {"train": "text.txt", "eval": "rows.csv", "length": 64}
    told = yaml.safe_dump(recipe_of(methods=methods, training={"output_dir": str(tmp_path / "out")}, data=data))
    code, out, err = train_with(told.replace("max_steps: 2", "max_steps: 2\n  learning_rate: 1e-2"), "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["steps"] == len(found["losses"]) == 2 and found["losses"][1] < found["losses"][0]
    assert found["eval_loss"] < found["eval_loss_of_base"] and found["processes"] == 1
    model = hf_tokens.load(tmp_path / "out")
    assert [method["method"] for method in model.peft_config["default"].methods] == ["deep-prompt", "snapkv", "peft"]


def test_the_recipe_of_the_examples_is_right(train_with):
    text = (Path(__file__).parents[2] / "examples" / "recipe.yaml").read_text()
    code, out, err = train_with(text.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "llama"), "--check", "--json")
    assert code == 0 and [row["method"] for row in json.loads(out)["methods"]] == ["deep-prompt", "snapkv"], err


def test_a_table_is_printed_and_logs_go_to_stderr(train_with, tmp_path):
    code, out, err = train_with(recipe_of(training={"output_dir": str(tmp_path / "out")}))
    assert code == 0 and "last loss" in out and "train_runtime" not in out and "train_runtime" in err


def test_a_check_trains_nothing_and_reads_no_weight(train_with, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "base_of", None)
    code, out, err = train_with(recipe_of(training={"output_dir": str(tmp_path / "out")}), "--check", "--json")
    assert code == 0 and json.loads(out)["methods"][0]["layers"] == [0, 1, 2, 3]
    assert not (tmp_path / "out").exists() and "deep-prompt" in train_with(recipe_of(), "--check")[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.7 leaves files to the garbage collector
@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ({"train": "text.txt"}, 1),
        ({"train": ["text.txt", "rows.jsonl"]}, 3),
        ({"train": "rows.json", "column": "said"}, 1),
        ({"train": "rows.csv"}, 1),
        ({"train": "set"}, 1),
    ],
    ids=str,
)
def test_texts_come_from_files_and_datasets(here, monkeypatch, tmp_path, data, texts):
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    config = DataConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    assert [text.strip() for text in train.texts_of(config.train, config, config.split)] == [TEXT.strip()] * texts


MISTAKES = [
    ("[a", "A recipe is YAML, got "),
    ("model: a\nmodel: b", "model twice"),
    ("- a", "A recipe is a mapping of keys and values, got "),
    ({"modl": "llama"}, "got 'modl'. Did you mean 'model'?"),
    ({"model": None}, "A recipe names its model, got None"),
    ({"model": "/no/such/folder"}, "folder or a Hub id"),
    ({"model": "vit", "methods": ["snapkv"]}, "needs a causal stream"),
    ({"model": "vit", "methods": "vqt"}, "trains a decoder-only language model with its head, got ViTForImageClassification"),
    ({"methods": None}, "A recipe names its methods, got None"),
    ({"methods": ["deep-promt"]}, "got 'deep-promt'. Did you mean 'deep-prompt'?"),
    ({"methods": [{"method": "deep-prompt", "tokns": 2}]}, "got 'tokns'. Did you mean 'tokens'?"),
    ({"methods": [{"method": "deep-prompt", "tokens": -1}]}, "DeepPromptConfig.tokens must be in [0, inf), got -1"),
    ({"methods": [{"method": "peft", "config": {"peft_type": "LORA", "rank": 2}}]}, "LoraConfig takes the keys those that"),
    ({"methods": [{"method": "peft", "config": {"peft_type": "LORE"}}]}, "A 'peft' method is one of PEFT's"),
    ({"methods": [3]}, "A method is a name, a MethodConfig, or a dict with the key 'method', got 3"),
    ({"methods": ["toca"]}, "needs a stream of kind denoiser"),
    ({"data": None}, "A recipe that trains names its data"),
    ({"data": "text.txt"}, "data is a mapping of keys and values, got 'text.txt'"),
    ({"data": {"length": 8}}, "`data` names what to train on"),
    ({"data": {"trian": "text.txt"}}, "got 'trian'. Did you mean 'train'?"),
    ({"data": {"train": "text.txt", "length": "long"}}, "data.length must be of type int, got 'long'"),
    ({"data": {"train": "text.txt", "length": 1}}, "data.length must be in [2, inf), got 1"),
    ({"data": {"train": "nowhere.txt"}}, "`data` names files that are there, got 'nowhere.txt'"),
    ({"data": {"train": "text.txt", "length": 100000}}, "`data.train` has one piece of 100000 tokens at least"),
    ({"data": {"train": "rows.jsonl", "column": "txt"}}, "Each row has the column 'txt', got rows.jsonl with 'text', 'n'"),
    ({"data": {"train": "rows.jsonl", "column": "n"}}, "The column 'n' holds texts, got int in rows.jsonl"),
    ({"data": {"train": "broken.json"}}, "A file that ends in .json is one, got broken.json"),
    ({"data": {"train": "set", "split": "trian"}}, "A dataset is a file, a folder or a name on the Hub, with the split"),
    ({"training": {"max_step": 2}}, "got 'max_step'. Did you mean 'max_steps'?"),
    ({"training": {"max_steps": "two"}}, "training.max_steps must be of type int, got 'two'"),
    ({"training": {"lr_scheduler_type": "cosinus"}}, "`training` is what TrainingArguments take together, got "),
    ({"training": 3}, "training is a mapping of keys and values, got 3"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=[str(changes) for changes, _ in MISTAKES])
def test_a_mistake_is_one_line_with_its_remedy_and_no_weight_is_read(train_with, monkeypatch, tmp_path, changes, words):
    monkeypatch.setattr(train, "with_methods", None)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    code, out, err = train_with(changes if isinstance(changes, str) else recipe_of(**changes))
    assert (code, out) == (2, "") and words in err, err
    err = re.sub(r"\r[^\n]*\n", "", err)  # the bars of datasets
    assert err.startswith("hf-tokens: ") and err.count("\n") == 1


def test_datasets_is_named_where_it_is_missing(train_with, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = train_with(recipe_of(data={"train": "some/set"}))
    assert code == 2 and "got 'some/set'. Run `pip install \"hf-tokens[train]\"`, or name a file." in err


def test_every_default_of_training_arguments_keeps_its_type():
    plain = {f.name: f.default for f in dataclasses.fields(TrainingArguments) if f.init and isinstance(f.default, (int, float, str, bool))}
    skipped = {"bf16", "fp16", "tf32", "use_cpu", "torch_compile", "push_to_hub"}
    assert read_training({name: value for name, value in plain.items() if name not in skipped})


def process(rank, arguments, output, **environment):
    """`python -m hf_tokens` with these arguments in a process of its own, as the launchers start it."""
    path = os.pathsep.join(path for path in sys.path if path)
    world = {**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
    with open(output, "w") as file:
        return subprocess.Popen([sys.executable, "-m", "hf_tokens", *arguments], env=world, stdout=file, stderr=subprocess.STDOUT)


def in_two_processes(folder, recipe):
    """How two processes of one training end, and what they print."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    outputs = [folder / f"{rank}.txt" for rank in range(2)]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    arguments = ["train", str(folder / "recipe.yaml"), "--json"]
    children = [process(rank, arguments, output, **world) for rank, output in enumerate(outputs)]
    codes = [child.wait(timeout=300) for child in children]
    return codes, [output.read_text() for output in outputs]


def recipe_in(here, folder):
    data = {"train": str(here / "text.txt"), "length": 64}
    return recipe_of(model=str(here / "llama"), data=data, training={"output_dir": str(folder / "out")})


def test_two_processes_that_a_launcher_starts_train_together(here, tmp_path):
    codes, (first, other) = in_two_processes(tmp_path, recipe_in(here, tmp_path))
    assert codes == [0, 0], first[-2000:] + other[-2000:]
    found = json.loads(re.search(r"^{\n.*^}$", first, re.DOTALL | re.MULTILINE).group())
    assert found["processes"] == 2 and found["steps"] == 2 and "processes" not in other
    assert hf_tokens.load(tmp_path / "out", base_of(str(here / "llama")))


def test_processes_that_do_not_join_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    train.check_processes(2)
    with pytest.raises(hf_tokens.UnsupportedError, match=r"got 2 of them and 1 that joined\. On CPUs set `use_cpu: true` in `training`\."):
        train.check_processes(1)
