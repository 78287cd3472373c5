"""The name of the attention backend under a tap: the registries find ours by it, and code of the base that compares it finds its own."""

import ast
import contextlib
import copy
import gc
import importlib.util
import pickle
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_tokens import MethodConfig, RazorAttentionConfig, anatomy, get_token_model, option, register
from hf_tokens.attention.tap import BACKENDS, OPEN, tapped_name
from hf_tokens.errors import UnsupportedError
from hf_tokens.roles.registry import METHODS
from hf_tokens.roles.token_reducer import TokenReducer
from hf_tokens.testing import zoo

MODELS = Path(importlib.util.find_spec("transformers").origin).parent / "models"
SPARSE = {"index_topk": 4, "topk_blocks": 1, "local_blocks": 0, "block_size": 4}  # fewer keys than there are, for what chooses them
SPARSE_LAYERS = {"minimax_m3_vl_text": ["full_attention", "minimax_m3_sparse"] * 2}
REFUSED = ("hy_v4_vl", "hy_v4_vl_text")  # both methods: four residual streams lie side by side in the tokens
SILENT = re.compile("_(audio|vision|encoder|dit|bigvgan|talker)|token2wav|vision$")  # parts that compare nothing, or need their whole


def names_backend(node):
    """Whether a comparison reads the name of the backend."""
    return isinstance(node, ast.Compare) and any(isinstance(a, ast.Attribute) and a.attr == "_attn_implementation" for a in ast.walk(node))


@cache
def comparing():
    """The packages of models whose code compares the name."""
    sources = {path: path.read_text() for path in MODELS.glob("*/modeling_*.py")}
    read = {path: ast.parse(text) for path, text in sources.items() if "_attn_implementation" in text}
    return sorted({path.parent.name for path, tree in read.items() if any(map(names_backend, ast.walk(tree)))})


@cache
def specimens():
    """package -> its families of which there is a specimen."""
    out = {package: [] for package in comparing()}
    for family in set(zoo.families("transformers")) - set(zoo.unbuildable()):
        package = CONFIG_MAPPING[family].__module__.split(".")[2]
        if package in out and not SILENT.search(family):
            out[package].append(family)
    return out


@pytest.fixture
def watch(monkeypatch):
    """A method that reads the scores of each block, and changes nothing."""
    monkeypatch.setitem(METHODS, "watch", {})

    class WatchConfig(MethodConfig):
        sharp: float = option(1.0, ge=0, zero=0.0, help="Nothing.")

    @register("watch", WatchConfig)
    class Watch(TokenReducer):
        def assign(self, scores):
            scores.columns()

    return WatchConfig


def test_the_sweep_finds_those_whose_code_compares_the_name():
    assert {"falcon", "deepseek_v32", "gpt2", "gemma4"} <= {*comparing()} and "llama" not in comparing()
    assert {package for package, families in specimens().items() if not families} <= {"qwen2_5_omni", "timm_backbone", "timm_wrapper"}


def sparse(family, monkeypatch):
    """A specimen whose attention chooses fewer keys than there are, where it chooses."""
    if family in SPARSE_LAYERS:
        monkeypatch.setitem(zoo.ROWS, family, zoo.Row(config={"layer_types": SPARSE_LAYERS[family]}))
    specimen = zoo.build(family)
    dense, chosen = specimen.run(), False
    for module in specimen.model.modules():
        for name in SPARSE.keys() & vars(module).keys() if type(module).__name__.endswith("Indexer") else ():
            chosen = bool(setattr(module, name, SPARSE[name])) or True
    assert not chosen or not all(map(torch.equal, dense, specimen.run()))
    return specimen


@pytest.mark.parametrize("family", sorted(sum(specimens().values(), [])))
def test_a_tap_that_changes_nothing_leaves_the_base_its_masks(family, watch, monkeypatch):
    specimen = sparse(family, monkeypatch)

    def run():
        torch.manual_seed(0)  # some draw what they begin with
        return specimen.run()

    base, right = run(), set()
    for stream in anatomy(specimen.model).streams:
        layers = tuple(i for i in range(len(stream)) if stream.attention(i) is not None)
        for config in (watch(), RazorAttentionConfig(compression=1.0)):
            try:
                model = get_token_model(specimen.model, replace(config, stream=stream.name, layers=layers)).eval()
            except UnsupportedError:
                continue
            with contextlib.suppress(UnsupportedError):
                for output, expected in zip(run(), base, strict=True):
                    torch.testing.assert_close(output, expected, rtol=0, atol=0)
                right.add(type(config))
            model.unload()
    assert right or family in REFUSED


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tapped_name_is_the_backends_name_to_whoever_compares(backend):
    name, other = tapped_name(backend), next(other for other in BACKENDS if other != backend)
    assert name == backend and backend == name and not name != backend and name in ("flash_attention_2", backend)
    assert name != other and name not in (other, None) and name != 0
    assert ALL_ATTENTION_FUNCTIONS.get_interface(name, None) is ALL_ATTENTION_FUNCTIONS[str(name)]
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[backend]
    assert len({name, backend}) == 2
    for twin in (copy.deepcopy(name), pickle.loads(pickle.dumps(name))):
        assert type(twin) is str and str(twin) == backend


def ours():
    """Our names in the registries of Transformers."""
    return [name for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS) for name in table if "hf_tokens" in name]


def test_nothing_stays_in_the_registries():
    gc.collect()
    OPEN.clear()  # models of other tests, which nobody unloads
    first, second = (get_token_model(zoo.build("llama").model, RazorAttentionConfig()).eval() for _ in range(2))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = second(input_ids=ids).logits
        assert ours()
        copies = [copy.deepcopy(second), pickle.loads(pickle.dumps(second))]
        first.unload()
        assert torch.equal(second(input_ids=ids).logits, expected)
        base = second.unload()
        assert not ours() and type(base.config._attn_implementation) is str
        base(input_ids=ids)
        for twin in copies:
            assert torch.equal(twin(input_ids=ids).logits, expected)
            assert ours()
            twin.unload()
            assert not ours()
