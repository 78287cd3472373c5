"""TRL's trainers as they are: they check for a PeftModel, and copy the reference adapter by its name."""

import math

import pytest
import torch
from integration.test_training import QUIET, STACK, model, trained
from tolerances import ROUNDING

from hf_tokens import FTPConfig

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
