"""What any set of versions must bear, with nothing installed but what hf-tokens runs with: everything imports, and one adapter lives."""

import importlib
from pathlib import Path

import hf_tokens_adapters
import hf_tokens_kernels
import pytest
import torch
from tolerances import all_equal, differs
from transformers import Trainer, TrainingArguments

import hf_tokens
from hf_tokens import FTPConfig, PrefixKVConfig, get_token_model
from hf_tokens.testing import zoo


def modules():
    """The name of every module that is installed."""
    for package in (hf_tokens, hf_tokens_adapters, hf_tokens_kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("name", [*modules()])
def test_it_imports(name):
    importlib.import_module(name)


def test_an_adapter_is_trained_generates_is_saved_loaded_and_taken_out(tmp_path):
    specimen = zoo.build("llama")
    off = specimen.run()
    model = get_token_model(specimen.model, [FTPConfig(sparsity=0.3), PrefixKVConfig(budget=0.4)], task_type="CAUSAL_LM")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [{"input_ids": row, "labels": row} for row in specimen.inputs["input_ids"]]
    arguments = TrainingArguments(str(tmp_path / "trainer"), max_steps=2, learning_rate=0.1, report_to="none", save_strategy="no")
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad)

    model.eval()
    text = model.generate(**specimen.inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape[1] > specimen.inputs["input_ids"].shape[1]
    on = specimen.run()
    model.save_pretrained(tmp_path)
    again = zoo.build("llama")
    hf_tokens.load(tmp_path, again.model).eval()
    all_equal(again.run(), on, "loaded")
    assert differs(on, off)
    model.unload()
    all_equal(specimen.run(), off, "unloaded")


def test_a_denoiser_takes_an_adapter(tmp_path):
    specimen = zoo.build("diffusers/DiTTransformer2DModel")
    off = specimen.run()
    model = get_token_model(specimen.model, "importance-token-merge").eval()
    assert differs(specimen.run(), off)
    model.unload()
    all_equal(specimen.run(), off, "unloaded")
