"""The command line: what it shows, what it loads, and that a user's mistake is one clear line and exit code 2."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
from transformers import LlamaConfig

import hf_tokens
from hf_tokens.commands.blueprint import blueprints
from hf_tokens.commands.recipes import JOBS
from hf_tokens.testing import probe, zoo
from hf_tokens_cli import catalogue


@pytest.fixture
def config_only(tmp_path):
    LlamaConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return str(tmp_path)


def test_inspect_needs_no_weights(cli, config_only):
    code, out, _ = cli("inspect", config_only)
    assert code == 0 and "LlamaForCausalLM" in out
    ((part, model),) = blueprints(config_only)
    assert part == "" and {p.device.type for p in model.parameters()} == {"meta"}
    assert str(hf_tokens.anatomy(model)) in out


def test_inspect_shows_every_model_of_a_pipeline(cli, tmp_path):
    from diffusers import DDIMScheduler, DDPMPipeline

    DDPMPipeline(zoo.build("diffusers/UNet2DConditionModel").model, DDIMScheduler()).save_pretrained(tmp_path)
    code, out, _ = cli("inspect", str(tmp_path))
    assert code == 0 and out.startswith("unet")


def test_a_part_of_a_pipeline_without_streams_does_not_end_it(cli, tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    unet = zoo.build("diffusers/UNet2DConditionModel").model
    LDMPipeline(vqvae=vae, unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    code, out, _ = cli("inspect", str(tmp_path))
    assert code == 0 and "AutoencoderKL: no stream of Transformer blocks" in out and "UNet2DConditionModel (UNet2DConditionModel)" in out


def test_every_method_is_listed_and_shows_its_knobs(cli):
    code, out, _ = cli("list")
    assert code == 0
    lines = out.splitlines()
    for info in hf_tokens.list_methods():
        if not info.cls.__module__.startswith(f"{catalogue.BUILT_IN}."):
            continue  # the probes, and what another test has registered
        assert any(line.startswith(f"{info.name} ") and info.role in line and info.arxiv in line for line in lines)
        code, card, _ = cli("show", info.name)
        assert code == 0 and all(field.name in card for field, _ in info.config.knobs())


def test_a_role_s_methods_are_listed_alone(cli):
    code, out, _ = cli("list", "--role", "Pooler")
    pooling = [info.name for info in hf_tokens.list_methods("Pooler")]
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:-1]] == pooling and out.endswith(f"{len(pooling)} methods\n")


def test_methods_of_third_parties_are_listed_and_shown(cli, monkeypatch):
    entries = [
        EntryPoint(name, value, "hf_tokens.methods") for name, value in (("builtin", catalogue.BUILT_IN), ("probes", probe.__name__))
    ]
    assert "probe-drop" not in cli("list")[1]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry for entry in entries if entry.group == group])
    code, out, _ = cli("list")
    assert code == 0 and "probe-drop" in out and "ftp" in out
    code, card, _ = cli("show", "probe-drop")
    assert code == 0 and "knobs of ProbeDropConfig" in card


def test_the_version_is_shown(cli):
    assert cli("--version") == (0, f"hf-tokens {hf_tokens.__version__}\n", "")


LOADED = """
import atexit, sys
atexit.register(lambda: print(*{"torch", "transformers", "peft", "diffusers", "hf_tokens"} & set(sys.modules), file=sys.stderr))
import hf_tokens_cli
hf_tokens_cli.main()
"""


READS = [["--help"], ["--version"], ["list"], ["list", "--role", "TokenBank"], ["show", "ftp"], ["recipe", "--help"]]


@pytest.mark.parametrize("arguments", READS, ids=" ".join)
def test_what_only_reads_loads_no_engine(arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and done.stdout and done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", "config.json must be JSON, got "),
        ("[]", "config.json must hold a JSON object, got "),
        ('{"_class_name": "Nonesuch"}', "must be a model of the installed diffusers, got 'Nonesuch'"),
        ('{"_class_name": "DDIMScheduler"}', "must be a model of the installed diffusers, got 'DDIMScheduler'"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(cli, tmp_path, text, words):
    (tmp_path / "config.json").write_text(text)
    code, _, err = cli("inspect", str(tmp_path))
    assert code == 2 and words in err and err.count("\n") == 1


def test_diffusers_is_named_where_it_is_missing(cli, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    code, _, err = cli("inspect", str(tmp_path))
    assert code == 2 and 'got UNet2DModel. Run `pip install "hf-tokens[diffusers]"`.' in err


def test_a_narrow_terminal_cuts_nothing(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = cli("list")
    told, shown = "".join(out.split()), lambda i: "".join((i.name + i.role + ", ".join(i.modality) + i.need + i.paper).split())
    assert code == 0 and all(shown(i) in told for i in hf_tokens.list_methods("Pooler"))
    assert max(map(len, out.splitlines())) < 110  # the names, the roles, what they are for and need, and 20 letters of the papers
    code, card, _ = cli("show", "ftp")
    assert code == 0 and "\N{HORIZONTAL ELLIPSIS}" not in card


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "/no/such/folder"), "folder or a Hub id"),
        (("inspect", "."), "config.json"),
        (("show", "nothing"), "must be one of"),
        (("show", "ftpp"), "got 'ftpp'. Did you mean 'ftp'? "),
        (("list", "--role", "nothing"), "role with methods is one of"),
        (("list", "--role", "tokenbank"), "got 'tokenbank'. Did you mean 'TokenBank'? "),
        (("quickstart", "--model", "/no/such/folder"), "folder or a Hub id"),
        (("quickstart", "--steps", "0"), "Invalid value for '--steps'"),
        (("nonsense",), "nonsense"),
    ],
)
def test_a_mistake_is_named_and_ends_with_2(cli, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(*arguments)
    assert code == 2 and words in err and "Traceback" not in err


def test_the_help_of_a_recipe_names_the_jobs_that_there_are(cli):
    code, out, _ = cli("recipe", "--help")
    assert code == 0 and all(job in out for job in JOBS) and catalogue.jobs() == [*JOBS]
