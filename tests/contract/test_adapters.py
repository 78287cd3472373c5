"""An adapter's life: saved and loaded, stacked with others and with a LoRA, switched, deleted, and taken out without a trace."""

import copy

import pytest
import torch
from contract.pairs import PARTNER, adapter_parameters, attached_run, base_run, base_snapshot, difference, lora, snapshot, start_run, stir
from peft import PeftModel, get_peft_model
from tolerances import all_equal, differs

import hf_tokens
from hf_tokens import HFTokensConfig
from hf_tokens.engine.block import BlockSurgery


def nothing_left(pair, base):
    assert not any(isinstance(module, BlockSurgery) for module in base.modules())
    all_equal(pair.run(base), base_run(pair), "unloaded")
    assert not difference(base_snapshot(pair), snapshot(base))


def test_save_and_load(pair, tmp_path):
    model = pair.attach().requires_grad_(False)  # as it is when it is loaded
    want = pair.run(model)
    model.save_pretrained(tmp_path)
    changed = sum(t.nbytes for t in pair.base().parameters()) if pair.info.role == "WeightEdit" else 0  # it may change all of them
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 200_000 + changed
    all_equal(pair.run(PeftModel.from_pretrained(pair.base(), tmp_path).eval()), want, "PeftModel.from_pretrained")
    again = hf_tokens.load(tmp_path, pair.base(), adapter_name="other")
    all_equal(pair.run(again.eval()), want, "hf_tokens.load")
    assert set(adapter_parameters(again)) == {name.replace(".default.", ".other.") for name in adapter_parameters(model)}


def test_disabled_is_the_base_to_the_bit(pair):
    model = pair.attach()
    on = pair.run(model)
    with model.disable_adapter():
        all_equal(pair.run(model), base_run(pair), "disabled")
    all_equal(pair.run(model), on, "enabled again")


def test_unload_leaves_nothing(pair):
    model = pair.attach()
    pair.run(model)
    nothing_left(pair, model.unload())


def test_a_deepcopy_lives_its_own_life(pair):
    model = pair.attach()
    want = pair.run(model)
    twin = copy.deepcopy(model)
    all_equal(pair.run(twin), want, "copy")
    base = model.unload()
    all_equal(pair.run(twin), want, "copy after the original was unloaded")
    nothing_left(pair, base)
    nothing_left(pair, twin.unload())


def test_two_adapters_switch_and_delete(pair):
    model = pair.attach()
    first = pair.run(model)
    model.add_adapter("second", HFTokensConfig(methods=[PARTNER]))
    all_equal(pair.run(model), first, "with a second adapter beside it")
    model.set_adapter("second")
    stir(model)
    second = pair.run(model)
    assert differs(second, first)
    other = pair.attach(adapter_name="only", config=PARTNER, stirred=False)
    other.load_state_dict({k.replace(".second.", ".only."): v for k, v in model.state_dict().items() if ".default." not in k}, strict=True)
    all_equal(second, pair.run(other), "second")
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not any(".second." in name for name in model.state_dict())
    model.delete_adapter("default")
    all_equal(pair.run(model.base_model.model), base_run(pair), "deleted")
    nothing_left(pair, model.unload())


def test_a_stack_of_two_methods_and_a_lora(pair, tmp_path):
    alone = attached_run(pair)
    model = pair.stack(lora(pair.streams()[0])).requires_grad_(False)  # as it is when it is loaded
    want = pair.run(model)
    assert differs(want, alone) and all(t.isfinite().all() for t in want)
    names = list(adapter_parameters(model))
    assert any("lora_A" in name for name in names)
    assert set(names) >= set(adapter_parameters(pair.attach()))
    model.save_pretrained(tmp_path)
    all_equal(pair.run(PeftModel.from_pretrained(pair.base(), tmp_path).eval()), want, "loaded")
    with model.disable_adapter():
        all_equal(pair.run(model), base_run(pair), "disabled")
    all_equal(pair.run(model.requires_grad_(False)), want, "enabled again")
    nothing_left(pair, model.unload())


def nested(pair, surgery_outside):
    """The surgery around a LoRA, or in it."""
    tuning, surgery, base = lora(pair.streams()[0]), pair.config, pair.base()
    if surgery_outside:
        inner = get_peft_model(base, tuning, adapter_name="tuning")
        torch.manual_seed(0)
        return pair.surgery(inner, surgery, "surgery")
    torch.manual_seed(0)
    inner = pair.surgery(base, surgery, "surgery")
    return get_peft_model(inner, tuning, adapter_name="tuning")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")  # so it is
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("surgery_outside", [True, False], ids=["outside", "inside"])
def test_a_lora_nested_in_both_orders(pair, surgery_outside, tmp_path):
    model = nested(pair, surgery_outside).eval()
    all_equal(pair.run(model), start_run(pair), "a LoRA at its start changes nothing")
    stir(model)
    want = pair.run(model)
    assert differs(want, attached_run(pair))
    model.save_pretrained(tmp_path)
    again = nested(pair, surgery_outside)
    again.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k or ".hf_tokens." in k}, strict=False)
    all_equal(pair.run(again.eval()), want, "state dict")
    if surgery_outside:
        inner = model.unload()  # the LoRA model without the surgery around it
        assert not any(isinstance(module, BlockSurgery) for module in inner.modules())
        all_equal(pair.run(PeftModel.from_pretrained(inner, tmp_path / "surgery").eval()), want, "file")
