"""The local Hub, proven with the client that users have: nothing of huggingface_hub is replaced but the address."""

import json
from pathlib import Path

import gates
import pytest
import torch
from huggingface_hub import CommitOperationDelete, HfApi, ModelCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    (path / "deep" / "er").mkdir(parents=True)
    save_file({"prompt": torch.arange(12.0).reshape(3, 4)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "HF_TOKENS"}))
    (path / "deep" / "er" / "note.txt").write_text("ü")
    return path


@pytest.fixture
def repo(hub, folder):
    HfApi().create_repo("alice/adapter")
    HfApi().upload_folder(repo_id="alice/adapter", folder_path=folder)
    return "alice/adapter"


def test_what_goes_up_comes_back(hub, repo, tmp_path):
    weights = hf_hub_download(repo, "adapter_model.safetensors")
    assert torch.equal(load_file(weights)["prompt"], torch.arange(12.0).reshape(3, 4))
    assert weights.startswith(constants.HF_HUB_CACHE) and Path(constants.HF_HUB_CACHE).is_relative_to(tmp_path)
    assert set(HfApi().list_repo_files(repo)) == {".gitattributes", "adapter_config.json", "adapter_model.safetensors", "deep/er/note.txt"}


def test_weights_travel_as_lfs_and_text_does_not(hub, repo):
    files = {f.path: f for f in HfApi().list_repo_tree(repo, recursive=True) if "/" not in f.path and "." in f.path}
    assert files["adapter_model.safetensors"].lfs is not None
    assert files["adapter_config.json"].lfs is None
    assert any(method == "PUT" and path.startswith("/storage/") for method, path, _ in hub.log)


def test_a_second_download_asks_only_for_the_head(hub, repo):
    first = hf_hub_download(repo, "adapter_config.json")
    hub.log.clear()
    assert hf_hub_download(repo, "adapter_config.json") == first
    assert [method for method, path, _ in hub.log if "resolve" in path] == ["HEAD"]


def test_snapshot_with_patterns(hub, repo, tmp_path):
    path = snapshot_download(repo, local_dir=tmp_path / "copy", allow_patterns=["*.json", "deep/*"])
    assert (tmp_path / "copy" / "deep" / "er" / "note.txt").read_text() == "ü"
    assert not (tmp_path / "copy" / "adapter_model.safetensors").exists(), path


def test_folders_are_listed_one_level_at_a_time(hub, repo):
    assert {entry.path for entry in HfApi().list_repo_tree(repo)} >= {"deep", "adapter_config.json"}
    assert [entry.path for entry in HfApi().list_repo_tree(repo, "deep")] == ["deep/er"]


def test_tag_keeps_the_old_revision(hub, repo):
    api = HfApi()
    api.create_tag(repo, tag="v1")
    api.upload_file(repo_id=repo, path_in_repo="adapter_config.json", path_or_fileobj=b'{"new": true}')
    read = lambda **kw: json.loads(Path(hf_hub_download(repo, "adapter_config.json", **kw)).read_text())
    assert read() == {"new": True}
    assert read(revision="v1") == {"peft_type": "HF_TOKENS"}
    assert read(revision=api.model_info(repo, revision="v1").sha) == {"peft_type": "HF_TOKENS"}
    assert len(api.list_repo_commits(repo)) == 3


def test_branches_live_apart(hub, repo):
    api = HfApi()
    api.create_branch(repo, branch="trial/one")
    api.create_commit(repo, [CommitOperationDelete("adapter_config.json")], commit_message="less", revision="trial/one")
    assert api.file_exists(repo, "adapter_config.json")
    assert not api.file_exists(repo, "adapter_config.json", revision="trial/one")
    assert {b.name for b in api.list_repo_refs(repo).branches} == {"main", "trial/one"}
    api.delete_branch(repo, branch="trial/one")
    assert {b.name for b in api.list_repo_refs(repo).branches} == {"main"}


def test_pull_request_does_not_touch_main(hub, repo):
    info = HfApi().upload_file(repo_id=repo, path_in_repo="x.txt", path_or_fileobj=b"x", create_pr=True)
    assert info.pr_num == 1
    assert not HfApi().file_exists(repo, "x.txt")
    assert HfApi().file_exists(repo, "x.txt", revision="refs/pr/1")


def test_private_repo_exists_for_its_owner_only(hub, folder):
    api = HfApi()
    api.create_repo("alice/secret", private=True)
    api.upload_folder(repo_id="alice/secret", folder_path=folder)
    assert hf_hub_download("alice/secret", "adapter_config.json", token="hf_alice")
    for token in ("hf_bob", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).model_info("alice/secret")
    assert "alice/secret" not in [m.id for m in HfApi(token="hf_bob").list_models()]
    api.update_repo_settings("alice/secret", private=False)
    assert HfApi(token="hf_bob").model_info("alice/secret").id == "alice/secret"


def test_a_bad_token_is_refused(hub, repo):
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token="hf_wrong").whoami()
    assert refused.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError):
        HfApi(token="hf_wrong").upload_file(repo_id=repo, path_in_repo="x", path_or_fileobj=b"x")


def test_a_stranger_may_read_but_not_write(hub, repo):
    assert hf_hub_download(repo, "adapter_config.json", token="hf_bob")
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token="hf_bob").upload_file(repo_id=repo, path_in_repo="x", path_or_fileobj=b"x")
    assert refused.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError):
        HfApi(token="hf_bob").create_repo("hf-tokens/theirs")
    assert HfApi().create_repo("hf-tokens/ours").repo_id == "hf-tokens/ours"


def test_create_twice(hub, repo):
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi().create_repo(repo)
    assert refused.value.response.status_code == 409
    assert HfApi().create_repo(repo, exist_ok=True).repo_id == repo


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: hf_hub_download("alice/nothing", "x"), RepositoryNotFoundError),
        (lambda: hf_hub_download("alice/adapter", "nothing"), EntryNotFoundError),
        (lambda: hf_hub_download("alice/adapter", "adapter_config.json", revision="never"), RevisionNotFoundError),
    ],
)
def test_what_is_not_there_is_named(hub, repo, call, error):
    with pytest.raises(error):
        call()


def test_a_late_commit_is_refused(hub, repo):
    old = HfApi().model_info(repo).sha
    HfApi().upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"a", parent_commit=old)
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi().upload_file(repo_id=repo, path_in_repo="b", path_or_fileobj=b"b", parent_commit=old)
    assert refused.value.response.status_code == 412


def test_the_client_tries_again_after_503(hub, repo):
    hub.failures.append((r"HEAD .*/resolve/", 503))
    assert hf_hub_download(repo, "adapter_config.json")
    assert [status for method, path, status in hub.log if method == "HEAD"][:2] == [503, 200]


@gates.card_checks
def test_card_tags_are_found(hub, repo):
    ModelCard("---\ntags:\n- hf-tokens\nlibrary_name: peft\n---\n# x\n").push_to_hub(repo)
    assert [m.id for m in HfApi().list_models(filter="hf-tokens")] == [repo]
    assert ModelCard.load(repo).data.library_name == "peft"


def test_delete_and_move(hub, repo):
    HfApi().move_repo(repo, "alice/moved")
    assert HfApi().repo_exists("alice/moved") and not HfApi().repo_exists(repo)
    HfApi().delete_repo("alice/moved")
    assert not HfApi().repo_exists("alice/moved")


def test_transformers_pushes_and_pulls(hub):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlamaForCausalLM(config).eval()
    model.push_to_hub("alice/llama", private=True)
    ids = torch.arange(5)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained("alice/llama")(ids).logits, model(ids).logits)


def test_peft_pushes_and_pulls(hub):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    base = LlamaForCausalLM(config)
    base.push_to_hub("alice/base")
    base.name_or_path = "alice/base"
    model = get_peft_model(base, LoraConfig(init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    model.push_to_hub("alice/lora")
    ids = torch.arange(5)[None]
    again = AutoPeftModelForCausalLM.from_pretrained("alice/lora").eval()
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
