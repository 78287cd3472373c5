"""Adapters on the Hub: pushed with PEFT's own call, pulled by PEFT and by hf_tokens.load, by revision and token."""

import copy

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from tolerances import all_equal, differs

import hf_tokens
from hf_tokens import AdapterError, DeepPromptConfig, get_token_model
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.parameters import stir
from hf_tokens.testing.probe import ProbeDropConfig

REPO = "alice/surgery"
FILES = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "use_it.py"}


@pytest.fixture
def specimen():
    return zoo.build("llama")


@pytest.fixture
def surgery(specimen):
    return stir(get_token_model(copy.deepcopy(specimen.model), [DeepPromptConfig(tokens=3), ProbeDropConfig()]).eval())


def run(model, specimen):
    with torch.no_grad():
        return [model.eval()(**specimen.inputs).logits]


def test_push_and_pull(hub, specimen, surgery):
    surgery.push_to_hub(REPO)
    assert set(HfApi().list_repo_files(REPO)) == FILES
    want = run(surgery, specimen)
    all_equal(run(hf_tokens.load(REPO, copy.deepcopy(specimen.model)), specimen), want, "hf_tokens.load")
    all_equal(run(PeftModel.from_pretrained(specimen.model, REPO), specimen), want, "PeftModel.from_pretrained")


def test_a_revision_is_what_it_was(hub, specimen, surgery):
    surgery.push_to_hub(REPO)
    HfApi().create_tag(REPO, tag="v1")
    old = run(surgery, specimen)
    stir(surgery)
    surgery.push_to_hub(REPO)
    new = run(surgery, specimen)
    assert differs(new, old)
    all_equal(run(hf_tokens.load(REPO, copy.deepcopy(specimen.model), revision="v1"), specimen), old, "v1")
    all_equal(run(hf_tokens.load(REPO, copy.deepcopy(specimen.model)), specimen), new, "main")


def test_a_private_adapter_needs_its_token(hub, specimen, surgery, monkeypatch):
    surgery.push_to_hub(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        hf_tokens.load(REPO, copy.deepcopy(specimen.model), token=False)
    again = hf_tokens.load(REPO, copy.deepcopy(specimen.model), token="hf_alice")
    all_equal(run(again, specimen), run(surgery, specimen), "with the token")


def test_the_base_is_found_by_the_adapter(hub, specimen, surgery, tmp_path):
    specimen.model.push_to_hub("alice/base")
    base = type(specimen.model).from_pretrained("alice/base")
    surgery = stir(get_token_model(base, DeepPromptConfig(tokens=3), task_type="CAUSAL_LM").eval())
    surgery.push_to_hub(REPO)
    all_equal(run(hf_tokens.load(REPO), specimen), run(surgery, specimen), "base and adapter")


def test_the_token_opens_a_private_base_too(hub, specimen, monkeypatch):
    specimen.model.push_to_hub("alice/base", private=True)
    base = copy.deepcopy(specimen.model)
    base.name_or_path = "alice/base"
    surgery = stir(get_token_model(base, DeepPromptConfig(tokens=3), task_type="CAUSAL_LM").eval())
    surgery.push_to_hub(REPO, private=True)
    monkeypatch.delenv("HF_TOKEN")
    all_equal(run(hf_tokens.load(REPO, token="hf_alice"), specimen), run(surgery, specimen), "base and adapter")


def test_a_second_adapter_beside_the_first(hub, specimen, surgery):
    surgery.push_to_hub(REPO)
    want = run(surgery, specimen)
    model = get_token_model(copy.deepcopy(specimen.model), "probe-insert")
    again = hf_tokens.load(REPO, model, adapter_name="pulled")
    assert again is model and model.active_adapters == ["pulled"]
    all_equal(run(again, specimen), want, "pulled")


def test_a_repository_without_an_adapter(hub, specimen):
    HfApi().create_repo("alice/empty")
    with pytest.raises(AdapterError, match="An adapter has a file adapter_config.json, got alice/empty without it"):
        hf_tokens.load("alice/empty", specimen.model)
