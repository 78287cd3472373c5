"""Adapters in folders, what can be wrong with their files, and saves that are killed."""

import copy
import json
import os
import signal
import sys

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import hf_tokens
from hf_tokens import AdapterError, DeepPromptConfig, HFTokensConfig, get_token_model
from hf_tokens.testing import zoo
from hf_tokens.testing.probe import ProbeDropConfig, ProbeInsertConfig

ADAPTERS = {
    "no parameters": lambda: get_token_model(zoo.build("llama").model, ProbeDropConfig()),
    "a bank": lambda: get_token_model(zoo.build("llama").model, ProbeInsertConfig()),
    "a stack": lambda: get_token_model(
        zoo.build("llama").model,
        [DeepPromptConfig(tokens=3), LoraConfig(r=2, target_modules=["q_proj"])],
        modules_to_save=["lm_head"],
    ),
}
FIRST = {
    "renamed": lambda key, value: {f"{key}x": value},
    "without the prefix": lambda key, value: {key.removeprefix("base_model.model."): value},
    "missing": lambda key, value: {},
    "longer": lambda key, value: {key: torch.cat([value, value])},
    "flat": lambda key, value: {key: value.flatten()},
    "empty": lambda key, value: {key: value[:0]},
    "NaN": lambda key, value: {key: torch.full_like(value, torch.nan)},
    "infinite": lambda key, value: {key: torch.full_like(value, -torch.inf)},
    **{
        str(kind): lambda key, value, kind=kind: {key: value.to(kind)}
        for kind in (torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
    },
}
MORE = {
    "of the base": {"base_model.model.lm_head.weight": torch.zeros(99, 32)},
    "inside the base": {"base_model.model.model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)},
    "of the base under its own name": {"model.norm.weight": torch.zeros(32)},
    "of nothing": {"more": torch.zeros(3)},
}


def without_digest(folder, to):
    """A copy of an adapter's config as earlier releases wrote it, and as it is left by who changes the tensors by hand."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config.pop("digest").startswith("sha256:")
    (to / "adapter_config.json").write_text(json.dumps(config))


def change(folder, to, change):
    """A copy of an adapter with another first tensor, or with more of them."""
    tensors = load_file(folder / "adapter_model.safetensors")
    if isinstance(change, dict):
        tensors |= change
    else:
        key = sorted(tensors)[-1]
        tensors |= (parts := change(key, tensors.pop(key)))
        assert all(part.numel() or part.shape[0] == 0 for part in parts.values())
    save_file({key: value.contiguous() for key, value in tensors.items()}, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    return to


# -- configs ---------------------------------------------------------------------------------------------------------
def leaves(tree, path=()):
    yield path
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in parts:
        yield from leaves(value, (*path, key))


def planted(tree, path, value):
    """A copy of a tree with another value at a path."""
    if not path:
        return value
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


def deep(n):
    return 1 if n == 0 else [deep(n - 1)]


ODD = [
    *(
        None,
        True,
        -1,
        0,
        1,
        10**9,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 10_000,
        "\u202e\x00",
        "../../etc/passwd",
        "deep-prompt",
    ),
    *([], {}, deep(50), {"a": {"b": []}}, [None], ["x", 1, None], [[1]], {"method": "ftp"}, "LORA", "all-linear", ["q_proj"]),
]


# -- saves -----------------------------------------------------------------------------------------------------------
def filled(make, value):
    """A surgery whose every parameter has one value."""
    model = make()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.fill_(value)
    return model


def stack(share):
    return [ProbeDropConfig(share=share / 10), DeepPromptConfig(tokens=3), LoraConfig(r=2, target_modules=["q_proj"])]


def bare(share):
    """A model of transformers' with an adapter in it, and no PeftModel around it."""
    model = zoo.build("llama").model.requires_grad_(False)
    model.add_adapter(HFTokensConfig(methods=stack(share)))
    return model


def around(share):
    return get_token_model(zoo.build("llama").model, stack(share))


MAKERS = {
    "PEFT": (around, lambda model, folder: model.save_pretrained(folder)),
    "save_adapter": (around, hf_tokens.save_adapter),
    "save_adapter of a model by itself": (lambda n: around(n).base_model.model, hf_tokens.save_adapter),
    "transformers": (bare, lambda model, folder: model.save_pretrained(folder)),
    "Trainer": (
        around,
        lambda model, folder: Trainer(model, TrainingArguments(str(folder), report_to=[])).save_model(),
    ),
}


WHOLE = [maker for maker in MAKERS if maker != "transformers"]  # that writes its config first, and then in the tensors' file
STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "tempfile.mkdtemp", "shutil.rmtree")


def killed_in(step, save, model, folder):
    """Save in another process, which is killed in this step of those that touch the folder; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        left = iter(range(step))
        here = lambda event, args: event in STEPS and str(args[0]).startswith(str(folder))
        sys.addaudithook(lambda event, args: here(event, args) and next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL))
        try:
            save(model, folder)
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def held(folder, load=hf_tokens.load):
    """What a folder says of its tensors and its config, if it can be loaded."""
    try:
        model = load(folder, zoo.build("llama").model)
    except AdapterError as error:
        assert "have the digest that it names" in str(error)
        return "refused"
    values = {float(value) for tensor in get_peft_model_state_dict(model).values() for value in tensor.unique()}
    assert len(values) == 1
    return (*values, model.peft_config["default"].methods[0]["share"] * 10)
