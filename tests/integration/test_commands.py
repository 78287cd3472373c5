"""Commands that work with a model, on tiny ones in folders: what each prints and leaves, as text and as JSON, and what a user may mend."""

import io
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from PIL import Image
from tiny import save_llama, save_pictures, save_vit
from transformers import AutoModelForCausalLM

import hf_tokens
from hf_tokens.testing import zoo

TEXT = "The quick brown fox jumps over the lazy dog. " * 40


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a language model, a classifier of pictures, pictures and a text."""
    folder = tmp_path_factory.mktemp("here")
    save_llama(folder / "llama")
    save_vit(folder / "vit")
    save_pictures(folder / "pictures")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def ask(cli, here, monkeypatch):
    """Run a command where the models are; what it prints as JSON is read."""
    monkeypatch.chdir(here)

    def call(*arguments):
        code, out, err = cli(*map(str, arguments))
        assert code == 0, err
        return json.loads(out) if "--json" in arguments else out

    return call


# -- list and doctor -------------------------------------------------------------------------------------------------
def test_list_keeps_what_is_asked_for(ask):
    names = lambda *filters: {card["name"] for card in ask("list", "--json", *filters)}
    cards = {info.name: info for info in hf_tokens.list_methods() if info.cls.__module__.startswith("hf_tokens_adapters.")}
    of = lambda takes: {name for name, info in cards.items() if takes(info)}
    assert names() == cards.keys()
    assert names("--modality", "image") == of(lambda info: {"image", "any"} & {*info.modality})
    assert names("--needs-training") == of(lambda info: info.need == "training")
    assert names("--no-needs-training", "--role", "TokenBank") == {"token-prepending"}
    (line,) = [line for line in ask("list").splitlines() if line.startswith("ftp ")]
    assert line.split()[1:4] == ["TokenRouter", "text", "training"]


def test_list_of_a_model_keeps_what_goes_into_it(ask, here):
    names = {card["name"] for card in ask("list", "--json", "--model", "vit")}
    assert {"tome", "vqt", "apt"} <= names and not {"snapkv", "toca", "caft", "omp-transplant"} & names
    model = AutoModelForCausalLM.from_pretrained(here / "llama")
    for card in ask("list", "--json", "--model", "llama", "--role", "TokenRouter"):
        hf_tokens.get_token_model(model, hf_tokens.method_info(card["name"]).config.example()).unload()


def test_doctor_says_what_is_here_and_what_to_install(ask, cli, monkeypatch):
    found = ask("doctor", "--json")
    assert {row["name"]: row["version"] for row in found["versions"]}["torch"] == version("torch")
    assert found["devices"][0]["device"] == "cpu" and found["methods"]["count"] == len(hf_tokens.list_methods())
    assert "torch" in ask("doctor")
    from hf_tokens.commands import doctor

    gone = lambda name: None if name in ("diffusers", "peft") else "1"
    monkeypatch.setattr(doctor, "version_of", gone)
    code, out, _ = cli("doctor")
    assert code == 1 and "missing" in out and 'pip install "hf-tokens[diffusers]"' in out


def test_doctor_says_where_a_package_of_methods_is_broken(cli, monkeypatch):
    from hf_tokens.commands import doctor

    def broken():
        raise hf_tokens.ConfigError("What an entry point of 'hf_tokens.methods' names must import, got 'x'. Repair or uninstall it.")

    monkeypatch.setattr(doctor, "list_methods", broken)
    code, out, _ = cli("doctor")
    assert code == 1 and "Repair or uninstall it" in out


# -- apply -----------------------------------------------------------------------------------------------------------
def test_apply_says_where_methods_go_and_reads_no_weight(ask, here, tmp_path):
    (tmp_path / "config.json").write_text((here / "llama" / "config.json").read_text())
    found = ask("apply", tmp_path, "snapkv:budget=0.25", "deep-prompt:tokens=2,layers=[0,1]", "--json")
    rows = {row["method"]: row for row in found["methods"]}
    assert rows["snapkv"]["layers"] == [0, 1, 2, 3] and rows["deep-prompt"]["layers"] == [0, 1] and found["saved"] is None
    assert rows["deep-prompt"]["needs"] == "training" and rows["snapkv"]["config"]["budget"] == 0.25
    assert "blocks 0-1 of 4" in ask("apply", tmp_path, "deep-prompt:layers=[0,1]")


def test_apply_saves_an_adapter_that_loads(ask, here, tmp_path):
    found = ask("apply", "llama", "deep-prompt:tokens=2", "--output", tmp_path / "adapter", "--json")
    model = hf_tokens.load(tmp_path / "adapter")
    assert found["saved"]["trainable"] == sum(p.numel() for name, p in model.named_parameters() if "hf_tokens" in name) > 0
    assert "2 numbers" not in ask("apply", "llama", "snapkv", "--output", tmp_path / "other")
    assert (tmp_path / "other" / "adapter_config.json").is_file()


def test_apply_puts_a_recipe_of_a_job_into_a_pipeline_s_denoiser(ask, cli, tmp_path):
    from diffusers import DDIMScheduler, DDPMPipeline

    DDPMPipeline(zoo.build("diffusers/UNet2DConditionModel").model, DDIMScheduler()).save_pretrained(tmp_path / "denoiser")
    (tmp_path / "fast.yaml").write_text(ask("recipe", "fast-dit", tmp_path / "denoiser", "--keep", "0.8"))
    rows = ask("apply", tmp_path / "fast.yaml", "--json")["methods"]
    assert {(row["method"], row["part"]) for row in rows} == {("first-block-cache", "unet")}
    ask("apply", tmp_path / "fast.yaml", "--output", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_recipe_as_json_holds_the_stack_and_what_was_measured(ask):
    found = ask("recipe", "fast-vit", "vit", "--json")
    assert found["methods"][0]["method"] == "atc" and found["measured"]["rows"]


def test_inspect_and_show_as_json_hold_what_they_print(ask):
    (part,) = ask("inspect", "llama", "--json")
    (stream,) = part["streams"]
    assert part["class"] == "LlamaForCausalLM" and stream["kind"] == "text" and len(stream["paths"]) == 4
    assert ask("show", "ftp", "--json")["need"] == "training"


# -- measure and compress-prompt ---------------------------------------------------------------------------------------
def test_measure_counts_a_text_with_and_without(ask):
    found = ask("measure", "llama", "snapkv:budget=0.25", "--text", "text.txt", "--tokens", "200", "--json")
    assert found["base"]["tokens"] == found["with"]["tokens"] == 4 * 200
    assert found["with"]["kv_bytes"] == 0.25 * found["base"]["kv_bytes"] > 0
    assert "0.25" in ask("measure", "llama", "snapkv:budget=0.25", "--prompt", TEXT[:400])


def test_measure_counts_a_picture(ask):
    found = ask("measure", "vit", "tome:r=2", "--image", "pictures/dark/0.png", "--json")
    assert found["with"]["flops"] < found["base"]["flops"] and found["base"]["kv_bytes"] == 0


def test_measure_takes_an_adapter(ask, tmp_path):
    ask("apply", "llama", "ftp:sparsity=0.5,router=static,strict=true", "--output", tmp_path / "adapter")
    found = ask("measure", tmp_path / "adapter", "--prompt", TEXT[:200], "--json")
    assert found["model"] == "llama" and found["with"]["tokens"] < found["base"]["tokens"]


def test_compress_prompt_prints_the_text_that_is_left(cli, ask, tmp_path, monkeypatch):
    ask("apply", "llama", "selection-p:keep=0.5", "--output", tmp_path)
    found = ask("compress-prompt", tmp_path, "--text", "text.txt", "--json")
    assert found["tokens"] < found["tokens_before"] and len(found["text"]) < len(TEXT)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    code, out, err = cli("compress-prompt", str(tmp_path))
    assert code == 0 and out == found["text"] + "\n" and f"{found['tokens']} are left" in err


# -- bench -----------------------------------------------------------------------------------------------------------
BENCH = ("--rounds", "1", "--json")


def test_bench_of_a_text_goes_through_the_strengths(ask, tmp_path):
    given = ("--text", "text.txt", "--length", "100", "--most", "2", "--vary", "budget=0.2,0.6")
    found = ask("bench", "llama", "snapkv:window=4,kernel=3", *given, "--output", tmp_path, *BENCH)
    trials = {trial["setting"]: trial for trial in found["trials"]}
    assert list(trials) == ["base", "budget=0.2", "budget=0.6"]
    assert trials["budget=0.2"]["kv"] < trials["budget=0.6"]["kv"] < trials["base"]["kv"] == 1
    assert "kv" in trials["budget=0.2"]["best_in"], "none holds fewer bytes"
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["trials"] == found["trials"]
    with Image.open(tmp_path / "bench.png") as picture:
        assert picture.width > 1000


def test_bench_of_pictures_compares_labels(ask, tmp_path):
    found = ask("bench", "vit", "tome", "--images", "pictures", "--vary", "r=1,4", "--no-picture", "--output", tmp_path, *BENCH)
    assert found["quality"] == "accuracy" and [trial["setting"] for trial in found["trials"]] == ["base", "r=1", "r=4"]
    assert found["trials"][2]["flops"] < found["trials"][1]["flops"] < 1 and not (tmp_path / "bench.png").exists()
    save_pictures(tmp_path, names=("other",))
    more = ("--vary", "r=2", "--no-picture", "--rounds", "1", "--output", tmp_path)
    assert "answers as the base's" in ask("bench", "vit", "tome", "--images", tmp_path, *more)


# -- what a user may mend ----------------------------------------------------------------------------------------------
MISTAKES = [
    (("apply", "llama"), "compares a model with methods in it to itself, got llama alone. Name methods"),
    (("apply", "llama", "snapkvv"), "got 'snapkvv'. Did you mean 'snapkv'?"),
    (("apply", "llama", "snapkv:budgt=0.2"), "got 'budgt'. Did you mean 'budget'?"),
    (("apply", "llama", "snapkv:budget"), "A method is its name, and behind a colon its knobs, got 'snapkv:budget'"),
    (("apply", "llama", "snapkv:budget=[0.2"), "A value is a number, a word, or a list in brackets"),
    (("apply", "llama", "snapkv:budget=2"), "SnapKVConfig.budget must be in (0, 1], got 2"),
    (("apply", "llama", "toca"), "needs a stream of kind denoiser"),
    (("apply", "nowhere.yaml"), "A recipe is a YAML file, got 'nowhere.yaml'"),
    (("apply", "/no/such/folder", "snapkv"), "folder or a Hub id"),
    (("measure", "llama", "snapkv"), "A forward is counted of a text or a picture, got neither"),
    (("measure", "llama", "snapkv", "--text", "text.txt", "--prompt", "a"), "got `--text` and `--prompt`"),
    (("measure", "llama", "snapkv", "--text", "nowhere.txt"), "got 'nowhere.txt'. There is no such file"),
    (("measure", "llama", "snapkv", "--text", "pictures/dark/0.png"), "A text is a file in UTF-8"),
    (
        ("measure", "llama", "snapkv", "--image", "pictures/dark/0.png"),
        "A picture goes to a model that takes `pixel_values`, got Llama",
    ),
    (("measure", "vit", "tome", "--prompt", "a"), "A text goes to a model that takes `input_ids`, got ViTForImageClassification"),
    (("measure", "vit", "tome", "--image", "text.txt"), "A picture is a file that Pillow reads, got text.txt"),
    (("measure", "vit", "tome", "--image", "nowhere.png"), "A picture is a file, got 'nowhere.png'"),
    (("measure", "llama", "snapkv", "--prompt", "a", "--device", "gpu9"), "A device is one that is here, got 'gpu9'"),
    (("bench", "llama", "snapkv"), "A bench reads a text or pictures, got neither"),
    (("bench", "llama", "snapkv", "--text", "text.txt", "--images", "pictures"), "got both"),
    (("bench", "llama", "--text", "text.txt"), "A bench puts methods into a base model, got llama alone"),
    (("bench", "llama", "snapkv", "--text", "text.txt", "--vary", "budgt=0.1"), "got 'budgt', which none has. Did you mean 'budget'?"),
    (("bench", "llama", "snapkv", "--text", "text.txt", "--vary", "budget"), "`--vary` is a knob and its values, got 'budget'"),
    (("bench", "llama", "snapkv", "--text", "text.txt", "--vary", "budget=3"), "SnapKVConfig.budget must be in (0, 1], got 3"),
    (("bench", "vit", "tome", "--images", "pictures"), "A bench varies a knob that has a value which changes nothing"),
    (
        ("bench", "llama", "snapkv", "--text", "text.txt", "--length", "9000"),
        "A bench reads a text of one piece of 9000 tokens",
    ),
    (("bench", "llama", "snapkv", "--images", "pictures"), "A bench of pictures needs a model that reads them alone"),
    (("bench", "vit", "tome", "--images", "nowhere", "--vary", "r=1"), "Pictures are in a folder, got 'nowhere'"),
    (("bench", "vit", "tome", "--images", "llama", "--vary", "r=1"), "got llama without one"),
    (("compress-prompt", "llama", "--text", "text.txt"), "Name methods behind it"),
    (("compress-prompt", "llama", "snapkv", "--text", "text.txt"), "in which a TokenReducer acts on the text, or a TokenScorer"),
    (("compress-prompt", "llama", "selection-p", "--text", "text.txt", "--question", "a"), "Pass one text, or use a scorer."),
    (("list", "--modality", "txt"), "got 'txt'. Did you mean 'text'?"),
    (("list", "--model", "/no/such/folder"), "folder or a Hub id"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_with_its_remedy(cli, here, monkeypatch, arguments, words):
    monkeypatch.chdir(here)
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "") and words in err
    assert err.startswith("hf-tokens: ") and err.count("\n") == 1


def test_what_draws_is_named_where_it_is_missing(cli, here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = cli("bench", "llama", "snapkv", "--text", "text.txt")
    assert code == 2 and 'Run `pip install "hf-tokens[plot]"`, or pass `--no-picture`.' in err


def test_an_adapter_takes_no_more_methods(cli, ask, tmp_path):
    ask("apply", "llama", "snapkv", "--output", tmp_path / "adapter")
    for command, words in (("measure", "Methods go into a base model"), ("apply", "Methods go into a base model")):
        code, _, err = cli(command, str(tmp_path / "adapter"), "snapkv")
        assert code == 2 and words in err
    code, _, err = cli("apply", str(tmp_path / "adapter"))
    assert code == 2 and "`apply` puts methods into a base model" in err


# -- the shell -----------------------------------------------------------------------------------------------------------
COMPLETED = """
import atexit, sys
atexit.register(lambda: print(*{"torch", "transformers", "peft", "hf_tokens"} & set(sys.modules), file=sys.stderr))
import hf_tokens_cli
hf_tokens_cli.main()
"""


@pytest.mark.parametrize(("words", "found"), [("hf-tokens show snap", "snapkv"), ("hf-tokens list --role TokenB", "TokenBank")])
def test_a_shell_completes_names_and_loads_no_engine(words, found):
    path = os.pathsep.join(path for path in sys.path if path)
    asked = {"_HF_TOKENS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1), "PYTHONPATH": path}
    code = COMPLETED.replace("import atexit, sys", "import atexit, sys; sys.argv = ['hf-tokens']")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **asked}, timeout=60)
    assert done.stdout.split() == [found] and done.stderr.strip() == ""
