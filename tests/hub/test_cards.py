"""The card of an adapter: what a stranger finds on the Hub, whoever pushed it, and that nobody's own words are written over."""

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import gates
import pytest
import torch
from datasets import Dataset
from denoisers import denoiser
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from tolerances import all_equal
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import hf_tokens
from hf_tokens import ConfigError, DeepPromptConfig, FTPConfig, PrefixKVConfig, get_token_model, measure
from hf_tokens.peft.card import is_blank, is_ours
from hf_tokens.roles import registry
from hf_tokens.testing import zoo
from hf_tokens.testing.contract.parameters import stir

pytestmark = pytest.mark.filterwarnings("ignore:Cannot enable progress bars")  # the `hub` fixture switches them off
REPO = "alice/surgery"
EMPTY = "More Information Needed"
ROWS = [{"input_ids": list(range(3, 11)), "labels": list(range(3, 11)), "attention_mask": [1] * 8}] * 4


@pytest.fixture
def based(hub):
    """A model that lies on the Hub, with a card that names its licence."""
    specimen = zoo.build("llama")
    specimen.model.push_to_hub("alice/base")
    ModelCard("---\nlicense: apache-2.0\n---\n# Base\n").push_to_hub("alice/base")
    specimen.model.name_or_path = "alice/base"
    return specimen


def pushed(repo=REPO):
    return ModelCard.load(repo)


def trainer_of(model, folder, kind="Trainer", **arguments):
    told = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False)
    told |= dict(
        logging_steps=1, eval_strategy="steps", eval_steps=2, save_strategy="no", push_to_hub=True, hub_model_id=REPO, disable_tqdm=True
    )
    rows = Dataset.from_list(ROWS)
    if kind == "Trainer":
        return Trainer(model=model, args=TrainingArguments(**told | arguments), train_dataset=rows, eval_dataset=rows)
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    rows = Dataset.from_dict({"text": ["a b a", "b b a b"] * 2})
    return SFTTrainer(model, args=SFTConfig(**told | arguments), train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)


def test_a_pushed_model_says_what_a_stranger_needs(based):
    stack = [FTPConfig(sparsity=0.3), PrefixKVConfig(budget=0.4), LoraConfig(r=2, target_modules=["q_proj"])]
    model = stir(get_token_model(copy.deepcopy(based.model), stack, task_type="CAUSAL_LM").eval())
    model.push_to_hub(REPO)
    card = pushed()
    data = card.data.to_dict()
    assert data["library_name"] == "peft" and data["license"] == "apache-2.0" and data["pipeline_tag"] == "text-generation"
    assert data["base_model"] == "alice/base" and data["base_model_relation"] == "adapter"
    assert {"hf-tokens", "TokenRouter", "ftp", "CacheCompressor", "prefixkv", "lora", "base_model:adapter:alice/base"} <= {*data["tags"]}
    assert EMPTY not in card.content and is_ours(card.content)
    for info in map(hf_tokens.method_info, ("ftp", "prefixkv")):
        assert info.claim.partition(":")[2].strip()[1:].rstrip(".") in card.text and f"arxiv.org/abs/{info.arxiv}" in card.text
    for line in (
        'pip install "hf-tokens>=',
        "import hf_tokens",
        f"hf_tokens.load({REPO!r})",
        "| ftp | sparsity | `0.3` |",
        "| lora | r | `2` |",
    ):
        assert line in card.text, line


def test_the_card_s_two_lines_load_the_adapter_in_another_process(based, monkeypatch, tmp_path):
    """Nothing but what stands in the card, and nothing but what stands in `use_it.py`, which no load runs or even fetches."""
    model = stir(get_token_model(copy.deepcopy(based.model), DeepPromptConfig(tokens=3), task_type="CAUSAL_LM").eval())
    model.push_to_hub(REPO)
    with torch.no_grad():
        want = model(**based.inputs).logits.double().sum().item()
    lines = pushed().text.partition("```python\n")[2].partition("```")[0]
    script = Path(hf_hub_download(REPO, "use_it.py")).read_text()
    ask = f"""
        import torch
        for code in {[lines, script]!r}:
            told = {{"__file__": "use_it.py"}}
            exec(code, told)
            ids = torch.tensor({based.inputs["input_ids"].tolist()!r})
            mask = torch.tensor({based.inputs["attention_mask"].tolist()!r})
            with torch.no_grad():
                print(told["model"].eval()(input_ids=ids, attention_mask=mask).logits.double().sum().item())
    """
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(ask)], capture_output=True, text=True)
    assert [*map(float, done.stdout.split())] == pytest.approx([want, want]), done.stderr
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    again = hf_tokens.load(REPO, copy.deepcopy(based.model))
    assert not [*(tmp_path / "fresh").rglob("use_it.py")] and [*(tmp_path / "fresh").rglob("adapter_config.json")]
    with torch.no_grad():
        all_equal([again.eval()(**based.inputs).logits], [model(**based.inputs).logits], "loaded")


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_a_trainer_s_push_says_how_it_was_trained_and_what_came_of_it(based, kind, tmp_path):
    model = get_token_model(copy.deepcopy(based.model), DeepPromptConfig(tokens=2), task_type="CAUSAL_LM")
    trainer = trainer_of(model, tmp_path, kind)
    trainer.train()
    trainer.push_to_hub()
    card = pushed()
    data = card.data.to_dict()
    assert EMPTY.lower() not in card.content.lower() and data["license"] == "apache-2.0" and "deep-prompt" in data["tags"]
    found = trainer.state.log_history[-1] if "eval_loss" in trainer.state.log_history[-1] else trainer.state.log_history[-2]
    metrics = {m["name"]: m["value"] for result in data["model-index"][0]["results"] for m in result["metrics"]}
    assert metrics["eval_loss"] == found["eval_loss"]
    assert f"`{kind}` of " in card.text and "2 steps" in card.text and "| learning_rate |" in card.text and "| train_loss |" in card.text
    if kind == "SFTTrainer":
        assert {"trl", "sft"} <= {*data["tags"]}
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer.push_to_hub(commit_message="again")
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and pushed().content.endswith("# Mine\n")


@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_what_is_pushed_at_a_checkpoint_has_its_card(based, kind, tmp_path):
    model = get_token_model(copy.deepcopy(based.model), DeepPromptConfig(tokens=2), task_type="CAUSAL_LM")
    trainer = trainer_of(model, tmp_path, kind, save_strategy="steps", save_steps=2, hub_always_push=True)
    trainer.train()
    trainer.push_in_progress.wait_until_done()
    assert is_ours(pushed().content) and "Trained" in pushed().text and f"hf_tokens.load({REPO!r})" in pushed().text


def test_a_pipeline_pushes_its_adapter(hub, tmp_path):
    autoencoder = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)
    DiTPipeline(denoiser("dit", torch.float32), autoencoder, DDIMScheduler()).push_to_hub("alice/pipes")
    pipe = DiTPipeline.from_pretrained("alice/pipes")
    theirs = pipe.push_to_hub
    get_token_model(pipe, "toca")
    pipe.push_to_hub(REPO, private=True)
    card = pushed()
    assert (
        card.data.base_model == "alice/pipes" and {"FeatureCache", "toca", "diffusers"} <= {*card.data.tags} and EMPTY not in card.content
    )
    told = {}
    exec(card.text.partition("```python\n")[2].partition("```")[0], told)
    assert type(told["pipe"]) is DiTPipeline and hf_tokens.card(told["pipe"]).data.tags == card.data.tags
    assert not [path for path in HfApi().list_repo_files(REPO) if "diffusion" in path], "the base is not pushed with it"
    hf_tokens.unload(pipe)
    assert pipe.push_to_hub == theirs


@pytest.mark.parametrize("edit", ["text", "header"])
def test_what_somebody_has_written_stays(hub, edit, tmp_path):
    model = get_token_model(zoo.build("llama").model, "deep-prompt")
    model.save_pretrained(tmp_path)
    for name, mine in (("README.md", "tags:\n- mine\n" if edit == "header" else "Mine.\n"), ("use_it.py", "print(1)\n")):
        path = tmp_path / name
        path.write_text(path.read_text().replace("tags:\n", mine) if edit == "header" and name == "README.md" else mine + path.read_text())
    before = [(tmp_path / name).read_bytes() for name in ("README.md", "use_it.py")]
    model.save_pretrained(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in ("README.md", "use_it.py")] == before
    model.push_to_hub(REPO)
    ModelCard("---\nlicense: mit\n---\n# Mine\n").push_to_hub(REPO)
    model.push_to_hub(REPO, tags=["more"])
    assert pushed().text.strip() == "# Mine" and pushed().data.license == "mit" and pushed().data.tags == ["more"]


def test_a_card_of_ours_and_an_empty_template_are_written_anew(hub, tmp_path):
    model = get_token_model(zoo.build("llama").model, DeepPromptConfig(tokens=2))
    get_peft_model(zoo.build("llama").model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert is_blank((tmp_path / "README.md").read_text())
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_text()
    measure(model, **zoo.build("llama").inputs)
    model.save_pretrained(tmp_path)
    assert is_ours(first) and is_ours((tmp_path / "README.md").read_text()) and first != (tmp_path / "README.md").read_text()
    model.push_to_hub(REPO, tags=["mine"])
    model.push_to_hub(REPO, tags=["mine"])
    assert is_ours(pushed().content) and "mine" in pushed().data.tags and pushed().data.model_name


def test_what_was_measured_stands_beside_the_base(hub):
    specimen = zoo.build("llama")
    model = get_token_model(specimen.model, DeepPromptConfig(tokens=2)).eval()
    with model.disable_adapter():
        base = measure(model, **specimen.inputs)
    assert "model-index" not in hf_tokens.card(model).data.to_dict(), "what the base costs is no result of the adapter"
    cost = measure(model, **specimen.inputs)
    card = hf_tokens.card(model)
    metrics = {m["type"]: m["value"] for m in card.data.to_dict()["model-index"][0]["results"][0]["metrics"]}
    assert metrics == vars(cost) and f"| flops | {cost.flops:,} | {base.flops:,} |" in card.text
    assert "license" not in card.data.to_dict() and "base_model" not in card.data.to_dict(), "what nobody said is left out"


def test_the_folder_of_a_local_base_is_nobody_s_business(hub, tmp_path):
    zoo.build("llama").model.save_pretrained(tmp_path / "secret" / "base")
    base = type(zoo.build("llama").model).from_pretrained(tmp_path / "secret" / "base")
    (tmp_path / "secret" / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    card = hf_tokens.card(get_token_model(base, "deep-prompt"))
    assert "secret" not in card.content and "base_model" not in card.data.to_dict() and card.data.license == "mit"
    assert "LlamaForCausalLM.from_pretrained('path/to/base')" in card.text and "hf_tokens.load('path/to/this/folder', model)" in card.text


@gates.add_adapter
def test_transformers_own_adapters_get_the_card_too(based, tmp_path):
    model = copy.deepcopy(based.model)
    model.add_adapter(hf_tokens.HFTokensConfig(methods=["deep-prompt"]))
    model.push_to_hub(REPO)
    assert is_ours(pushed().content) and pushed().data.base_model == "alice/base"


def test_a_copied_or_pickled_model_writes_the_card_of_itself(hub, tmp_path):
    model = get_token_model(zoo.build("llama").model, "deep-prompt")
    again = copy.deepcopy(model)
    assert again.create_or_update_model_card.model is again
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    assert read.create_or_update_model_card.model is read


@pytest.mark.parametrize("change", [{"methods": [{"method": "nonesuch", "version": 1}]}, {"hf_tokens_version": 2}, {"version": 9}])
def test_an_adapter_of_a_newer_release_names_what_to_install(hub, change, tmp_path):
    get_token_model(zoo.build("llama").model, "deep-prompt").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    assert data["made_by"] == f"hf-tokens=={hf_tokens.__version__}" and data["packages"] is None
    if "version" in change:
        data["methods"][0]["version"] = 9
    path.write_text(json.dumps({**data, **{key: value for key, value in change.items() if key != "version"}, "made_by": "hf-tokens==9.1"}))
    with pytest.raises(ConfigError, match=r"It was saved with hf-tokens==9\.1: `pip install 'hf-tokens>=9\.1'`, if you trust"):
        hf_tokens.load(tmp_path, zoo.build("llama").model)


METHOD = """
from dataclasses import dataclass
from hf_tokens import MethodConfig, TokenMap, TokenReducer, register

@dataclass(frozen=True, kw_only=True)
class MineConfig(MethodConfig):
    pass

@register("mine", MineConfig)
class Mine(TokenReducer):
    def assign(self, hidden):
        return TokenMap.keep(hidden.shape[1])
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package with a method, as an installer leaves it; the function takes it away."""
    place = tmp_path / "site"
    for path, text in {
        "my_methods.py": METHOD,
        "my_methods-1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: my-methods\nVersion: 1.2\n",
        "my_methods-1.2.dist-info/entry_points.txt": "[hf_tokens.methods]\nmine = my_methods\n",
    }.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    for cached in (registry.discover, registry.distributions):
        cached.cache_clear()
    with monkeypatch.context() as patch:
        patch.syspath_prepend(place)
        yield lambda: (patch.undo(), registry.METHODS.pop("mine"), sys.modules.pop("my_methods"))
    for cached in (registry.discover, registry.distributions):
        cached.cache_clear()


def test_an_adapter_of_another_package_s_method_names_that_package(hub, package, tmp_path):
    model = get_token_model(zoo.build("llama").model, ["mine", "deep-prompt"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    data = json.loads(path.read_text())
    assert data["packages"] == {"mine": "my-methods==1.2"}
    assert 'pip install "hf-tokens>=0.1.0" "my-methods>=1.2"' in (tmp_path / "README.md").read_text()
    package()
    with pytest.raises(
        ConfigError, match="got 'mine'. It was saved with my-methods==1.2: `pip install 'my-methods>=1.2'`, if you trust that"
    ):
        hf_tokens.load(tmp_path, zoo.build("llama").model)
    for old in ({"mine": "x'; rm -rf ~ #"}, None):
        path.write_text(json.dumps({**data, "packages": old, "made_by": None}))
        with pytest.raises(ConfigError, match="got 'mine'.* Install the package that has it, or fix the name."):
            hf_tokens.load(tmp_path, zoo.build("llama").model)
