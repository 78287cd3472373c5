"""TRL's trainers as they are: they check for a PeftModel, and copy the reference adapter by its name."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from tolerances import ROUNDING
from trainers import QUIET, STACK, data, model, trained

from hf_tokens import DeepPromptConfig, FTPConfig, SSDUnlearnConfig, TokenPrependingConfig, edit
from hf_tokens.peft.doors import COPIED, COPIERS
from hf_tokens.testing import zoo

trl = pytest.importorskip("trl", reason="un-skip when the extra `dev` is installed")
datasets = pytest.importorskip("datasets", reason="un-skip when the extra `dev` is installed")

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentence(i, length=6):
    return " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(length))


ARGUMENTS = {**QUIET, "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.1, "bf16": False, "max_length": 24}


PACKING = {"packing": True, "eval_packing": False, "per_device_train_batch_size": 1}


@pytest.mark.parametrize(("more", "config"), [({}, None), (PACKING, "deep-prompt")], ids=["plain", "packed"])
def test_sft(tokenizer, tmp_path, more, config):
    rows = datasets.Dataset.from_dict({"text": [sentence(i, 5 + i % 3) for i in range(8)]})
    surgery = model() if config is None else model(config)
    before = trained(surgery)
    run = trl.SFTTrainer(
        model=surgery,
        args=trl.SFTConfig(output_dir=str(tmp_path), **{**ARGUMENTS, **more}),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    run.train()
    after = trained(run.model)
    assert run.model is surgery and before.keys() == after.keys()
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in after)
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


def test_a_method_s_config_is_a_peft_config(tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict({"text": [sentence(i) for i in range(4)]})
    args = trl.SFTConfig(output_dir=str(tmp_path), **ARGUMENTS)
    run = trl.SFTTrainer(
        model=zoo.build("llama").model, peft_config=FTPConfig(sparsity=0.3), args=args, train_dataset=rows, processing_class=tokenizer
    )
    before = trained(run.model)
    run.train()
    assert run.model.peft_config["default"].stack() == [FTPConfig(sparsity=0.3)]
    assert any(not torch.equal(before[name], after) for name, after in trained(run.model).items())


def first_loss(tokenizer, folder, config):
    rows = datasets.Dataset.from_dict({"text": [sentence(i) for i in range(4)]})
    run = trl.SFTTrainer(
        model=model(config), args=trl.SFTConfig(output_dir=str(folder), **ARGUMENTS), train_dataset=rows, processing_class=tokenizer
    )
    run.train()
    return next(row["loss"] for row in run.state.log_history if "loss" in row)


def test_the_methods_losses_are_in_trl_s_loss(tokenizer, tmp_path):
    weights = {"guide_weight": 0.0, "sparsity_weight": 0.0, "distillation_weight": 0.0}
    without, with_them = (first_loss(tokenizer, tmp_path, FTPConfig(sparsity=0.3, **given)) for given in (weights, {}))
    assert with_them > without + ROUNDING[torch.float32]


def test_dpo_copies_the_reference(tokenizer, tmp_path):
    rows = datasets.Dataset.from_dict(
        {
            "prompt": [sentence(i) for i in range(4)],
            "chosen": [" " + sentence(i + 9, 4) for i in range(4)],
            "rejected": [" " + sentence(i + 20, 4) for i in range(4)],
        }
    )
    surgery = model(STACK[1:])
    assert all(".default." in name for name in trained(surgery)), "TRL finds what to copy by this name"
    start = trained(surgery)
    run = trl.DPOTrainer(
        model=surgery, args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS), train_dataset=rows, processing_class=tokenizer
    )
    copies = {name: p.detach().clone() for name, p in run.model.named_parameters() if ".ref." in name}
    assert {name.replace(".ref.", ".default.") for name in copies} == start.keys()
    for name, value in copies.items():
        assert torch.equal(value, start[name.replace(".ref.", ".default.")]), name
    run.train()
    first = next(row["loss"] for row in run.state.log_history if "loss" in row)
    assert abs(first - math.log(2)) < ROUNDING[torch.float32], "before the first step the policy is the reference"
    after = dict(run.model.named_parameters())
    for name, value in copies.items():
        assert torch.equal(after[name], value), "the reference moved"
        assert not torch.equal(after[name.replace(".ref.", ".default.")], value), "the policy did not move"


# -- a reference holds what the policy holds beside its parameters ---------------------------------------------------
def drawn():
    surgery = model([TokenPrependingConfig(start=2, end=2, exit=4), DeepPromptConfig(tokens=2)])
    for name, value in surgery.named_buffers():
        if name.endswith(".pst"):
            value.neg_()  # a trainer may set the seed that it was drawn with
    return surgery


def solved_for():
    surgery = model([SSDUnlearnConfig(alpha=0.5), DeepPromptConfig(tokens=2)])
    batches = [{name: value[None] for name, value in row.items()} for row in data(4)]
    edit(surgery, {"forget": batches[:2], "retain": batches[2:]})
    return surgery


HOLDING = {"drawn": drawn, "solved for": solved_for}
PROMPTS = [sentence(i) for i in range(4)]
ROWS = {
    "DPO": {
        "prompt": PROMPTS,
        "chosen": [f" {sentence(i + 9, 4)}" for i in range(4)],
        "rejected": [f" {sentence(i + 20, 4)}" for i in range(4)],
    },
    "KTO": {"prompt": PROMPTS, "completion": [f" {sentence(i + 9, 4)}" for i in range(4)], "label": [True, False] * 2},
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
}
ONLINE = dict(beta=0.1, num_generations=2, max_completion_length=4)


def with_reference(kind, surgery, tokenizer, folder):
    """A trainer of TRL's, which has put its reference into the model."""
    online = kind in ("GRPO", "RLOO")
    more = {key: value for key, value in ARGUMENTS.items() if key != "max_length" or not online} | (ONLINE if online else {})
    rewards = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]} if online else {}
    return getattr(trl, f"{kind}Trainer")(
        model=surgery,
        args=getattr(trl, f"{kind}Config")(output_dir=str(folder), **more),
        train_dataset=datasets.Dataset.from_dict(ROWS[kind]),
        processing_class=tokenizer,
        **rewards,
    )


@pytest.mark.parametrize("holding", HOLDING.values(), ids=HOLDING)
@pytest.mark.parametrize("kind", ROWS)
def test_a_reference_is_the_policy_at_its_start(tokenizer, tmp_path, kind, holding):
    surgery = holding()
    run = with_reference(kind, surgery, tokenizer, tmp_path)
    assert set(surgery.peft_config) == {"default", "ref"}
    held = surgery.state_dict()
    copies = {name: value for name, value in held.items() if ".ref." in name}
    assert copies.keys() - dict(surgery.named_parameters()).keys(), "nothing is held beside parameters"
    for name, value in copies.items():
        own = held[name.replace(".ref.", ".default.")]
        assert torch.equal(value, own) and value.data_ptr() != own.data_ptr(), name
    surgery.eval()
    batch = torch.stack([row["input_ids"] for row in data(2)])
    with torch.no_grad():
        policy, base = surgery(input_ids=batch, use_cache=False).logits, surgery.get_base_model()
        surgery.set_adapter("ref")
        reference = surgery(input_ids=batch, use_cache=False).logits
        surgery.set_adapter("default")
        with surgery.disable_adapter():
            assert not torch.equal(base(input_ids=batch, use_cache=False).logits, policy)
    assert torch.equal(policy, reference)
    if kind == "DPO":
        run.train()
        assert abs(next(row["loss"] for row in run.state.log_history if "loss" in row) - math.log(2)) < ROUNDING[torch.float32]


def test_a_second_adapter_of_one_config_is_its_own():
    surgery = solved_for()
    surgery.add_adapter("second", surgery.peft_config["default"])
    made = {name: value for name, value in surgery.state_dict().items() if name.endswith(".made")}
    assert {bool(value) for name, value in made.items() if ".default." in name} == {True}
    assert {bool(value) for name, value in made.items() if ".second." in name} == {False}


def test_every_trainer_that_copies_parameters_is_known():
    root = Path(importlib.util.find_spec("trl").submodule_search_locations[0])
    texts = {".".join(path.relative_to(root.parent).with_suffix("").parts): path.read_text() for path in root.rglob("*.py")}
    copying = {name for name, text in texts.items() if "ref_param.data.copy_(param.data)" in text}
    assert copying == set(COPIERS) and all(f'add_adapter("ref", {COPIED})' in texts[name] for name in copying)
