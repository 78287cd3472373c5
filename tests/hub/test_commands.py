"""`hf-tokens push` and `pull`: an adapter's files to the Hub and back, and what a user may mend on the way."""

import json

import pytest
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig
from transformers import LlamaForCausalLM

import hf_tokens
from hf_tokens import DeepPromptConfig, SnapKVConfig, get_token_model
from hf_tokens.testing import zoo

REPO = "alice/adapter"


@pytest.fixture
def adapter(tmp_path):
    stack = [DeepPromptConfig(tokens=3), SnapKVConfig(budget=0.5), LoraConfig(r=2, target_modules=["q_proj"])]
    hf_tokens.save_adapter(get_token_model(zoo.build("llama").model, stack), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_push_and_pull_bring_an_adapter_there_and_back(hub, cli, adapter, tmp_path):
    (adapter / "optimizer.pt").write_text("of the training")
    code, out, err = cli("push", str(adapter), REPO, "--private", "--json")
    assert code == 0, err
    pushed = json.loads(out)
    assert pushed["repository"] == REPO and pushed["url"].endswith(pushed["commit"])
    assert {"README.md", "adapter_config.json"} <= {*HfApi().list_repo_files(REPO)} and HfApi().repo_info(REPO).private
    assert "optimizer.pt" not in HfApi().list_repo_files(REPO)
    code, out, err = cli("pull", REPO, "--output", str(tmp_path / "there"), "--json")
    assert code == 0, err
    pulled = json.loads(out)
    assert [method["method"] for method in pulled["methods"]] == ["deep-prompt", "snapkv", "LORA"]
    assert hf_tokens.load(pulled["folder"], zoo.build("llama").model)
    assert (tmp_path / "there" / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_the_card_of_an_adapter_is_printed_and_written(hub, cli, adapter, tmp_path):
    zoo.build("llama").model.save_pretrained(tmp_path / "base")
    stack = [DeepPromptConfig(tokens=3), SnapKVConfig(budget=0.5)]
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    get_token_model(base, stack).save_pretrained(tmp_path / "own")
    code, out, err = cli("card", str(tmp_path / "own"))
    assert code == 0 and out.startswith("---") and "import hf_tokens" in out and "budget" in out, err
    code, out, _ = cli("card", str(tmp_path / "own"), "--json", "--output", str(tmp_path / "card.md"))
    told = json.loads(out)
    assert code == 0 and "snapkv" in told["data"]["tags"] and ModelCard.load(tmp_path / "card.md").data.to_dict() == told["data"]
    assert cli("card", "nowhere")[0] == 2


def test_push_and_pull_say_what_they_did(hub, cli, adapter):
    assert f"{REPO}" in cli("push", str(adapter), REPO)[1]
    HfApi().create_tag(REPO, tag="v1")
    code, out, _ = cli("pull", REPO, "--revision", "v1")
    assert code == 0 and "budget=0.5" in out and f"model = hf_tokens.load('{REPO}')" in out
    code, out, _ = cli("pull", str(adapter), "--json")
    assert code == 0 and json.loads(out)["folder"] == str(adapter)


def test_the_mistakes_of_push_and_pull_are_one_line_each(hub, cli, adapter, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert cli("push", str(adapter), REPO, "--private")[0] == 0
    mistakes = [
        (("push", "nowhere", REPO), "What is pushed is the folder of an adapter, got 'nowhere'"),
        (("push", str(tmp_path / "empty"), REPO), "An adapter has a file adapter_config.json"),
        (("push", str(adapter), "a/b/c"), "A repository is named like owner/name, got 'a/b/c'"),
        (("push", str(adapter), "bob/adapter"), "The Hub must take what is pushed, got 'bob/adapter'"),
        (("pull", "alice/nothing"), "An adapter is a repository that is there and open to you, got 'alice/nothing'"),
        (("pull", REPO, "--revision", "v9"), f"A revision is a branch, a tag or a commit of the repository, got 'v9' of {REPO}"),
        (("pull", "a/b/c"), "An adapter is a folder or a Hub id like owner/name, got 'a/b/c'"),
    ]
    for arguments, words in mistakes:
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, (arguments, err)
    monkeypatch.delenv("HF_TOKEN")
    assert "Log in with `hf auth login`" in cli("pull", REPO)[2]


def test_commands_take_an_adapter_and_its_base_from_the_hub(hub, cli, tmp_path):
    from tiny import save_llama

    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=save_llama(tmp_path / "base"))
    assert cli("apply", "alice/base", "snapkv:budget=0.5", "--output", str(tmp_path / "made"))[0] == 0
    assert cli("push", str(tmp_path / "made"), REPO)[0] == 0
    code, out, err = cli("measure", REPO, "--prompt", "one two three four " * 8, "--json")
    assert code == 0, err
    assert json.loads(out)["model"] == "alice/base"
    assert json.loads(cli("list", "--model", "alice/base", "--role", "CacheCompressor", "--json")[1])


def test_a_model_that_was_loaded_once_is_there_without_the_hub(hub, cli, tmp_path, monkeypatch):
    from huggingface_hub import constants, snapshot_download
    from tiny import save_llama

    HfApi().create_repo("alice/base")
    HfApi().upload_folder(repo_id="alice/base", folder_path=save_llama(tmp_path / "base"))
    snapshot_download("alice/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, out, err = cli("inspect", "alice/base")
    assert code == 0 and "LlamaForCausalLM" in out, err
    code, out, err = cli("measure", "alice/base", "snapkv:budget=0.5", "--prompt", "one two three", "--json")
    assert code == 0, err
    code, _, err = cli("inspect", "alice/other")
    assert code == 2 and "cannot find the requested files in the local cache" in err
