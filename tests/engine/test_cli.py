"""The command line: what it shows, and that a user's mistake is one clear line and exit code 2."""

import sys

import pytest
from transformers import LlamaConfig

import hf_tokens
from hf_tokens.commands.blueprint import blueprints
from hf_tokens.commands.cli import main
from hf_tokens.testing import zoo


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-tokens", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    monkeypatch.setenv("COLUMNS", "200")
    return call


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
    for info in hf_tokens.list_methods():
        assert info.name in out
        code, card, _ = cli("show", info.name)
        assert code == 0 and all(field.name in card for field, _ in info.config.knobs())


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
    code, out, _ = cli("list")
    assert code == 0 and "\N{HORIZONTAL ELLIPSIS}" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("inspect", "/no/such/folder"), "folder or a Hub id"),
        (("inspect", "."), "config.json"),
        (("show", "nothing"), "must be one of"),
        (("list", "--role", "nothing"), "role must be one of"),
        (("quickstart", "--model", "/no/such/folder"), "folder or a Hub id"),
        (("quickstart", "--steps", "0"), "Invalid value for '--steps'"),
        (("nonsense",), "nonsense"),
    ],
)
def test_a_mistake_is_named_and_ends_with_2(cli, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = cli(*arguments)
    assert code == 2 and words in err and "Traceback" not in err
