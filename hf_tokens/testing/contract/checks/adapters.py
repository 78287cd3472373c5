"""An adapter's life: saved and loaded, stacked with others and with a LoRA, switched, deleted, and taken out without a trace."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from hf_tokens.engine.block import BlockSurgery
from hf_tokens.peft.config import HFTokensConfig
from hf_tokens.testing.tolerances import all_equal, differs
from hf_tokens.tools.loading import load

from ..cases import drawn
from ..pairs import PARTNER, attached_run, base_run, base_snapshot, start_run
from ..parameters import adapter_parameters, lora, stir
from ..snapshots import difference, snapshot


def nothing_left(host, base):
    assert not any(isinstance(module, BlockSurgery) for module in base.modules())
    all_equal(host.run(base), base_run(host), "unloaded")
    assert not difference(base_snapshot(host), snapshot(base))


def test_save_and_load(host, tmp_path):
    model = host.attach().requires_grad_(False)  # as it is when it is loaded
    want = host.run(model)
    model.save_pretrained(tmp_path)
    changed = sum(t.nbytes for t in host.base().parameters()) if host.info.role == "WeightEdit" else 0  # it may change all of them
    buffers = [buffer for name, buffer in model.named_buffers() if ".hf_tokens." in name]
    own = sum(t.nbytes for t in (*adapter_parameters(model).values(), *buffers))
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000 + own + changed
    all_equal(host.run(PeftModel.from_pretrained(host.base(), tmp_path).eval()), want, "PeftModel.from_pretrained")
    again = load(tmp_path, host.base(), adapter_name="other")
    all_equal(host.run(again.eval()), want, "hf_tokens.load")
    assert set(adapter_parameters(again)) == {name.replace(".default.", ".other.") for name in adapter_parameters(model)}


def test_disabled_and_unloaded_it_is_the_base_to_the_bit(host):
    model = host.attach()
    on = host.run(model)
    with model.disable_adapter():
        all_equal(host.run(model), base_run(host), "disabled")
    all_equal(host.run(model), on, "enabled again")
    nothing_left(host, model.unload())


def test_a_deepcopy_lives_its_own_life(host):
    model = host.attach()
    want = host.run(model)
    twin = copy.deepcopy(model)
    all_equal(host.run(twin), want, "copy")
    base = model.unload()
    all_equal(host.run(twin), want, "copy after the original was unloaded")
    nothing_left(host, base)
    nothing_left(host, twin.unload())


def test_two_adapters_switch_and_delete(host):
    model = host.attach()
    first = host.run(model)
    model.add_adapter("second", HFTokensConfig(methods=[PARTNER]))
    all_equal(host.run(model), first, "with a second adapter beside it")
    model.set_adapter("second")
    stir(model)
    second = host.run(model)
    assert differs(second, first)
    other = host.attach(adapter_name="only", config=PARTNER, stirred=False)
    other.load_state_dict({k.replace(".second.", ".only."): v for k, v in model.state_dict().items() if ".default." not in k}, strict=True)
    all_equal(second, host.run(other), "second")
    model.set_adapter("default")
    model.delete_adapter("second")
    assert not any(".second." in name for name in model.state_dict())
    model.delete_adapter("default")
    all_equal(host.run(model.base_model.model), base_run(host), "deleted")
    nothing_left(host, model.unload())


def test_a_stack_of_two_methods_and_a_lora(host, tmp_path):
    alone = attached_run(host)
    model = host.stack(lora(host.streams()[0])).requires_grad_(False)  # as it is when it is loaded
    want = host.run(model)
    assert differs(want, alone) and all(t.isfinite().all() for t in want)
    names = list(adapter_parameters(model))
    assert any("lora_A" in name for name in names)
    assert set(names) >= set(adapter_parameters(host.attach()))
    model.save_pretrained(tmp_path)
    all_equal(host.run(PeftModel.from_pretrained(host.base(), tmp_path).eval()), want, "loaded")
    with model.disable_adapter():
        all_equal(host.run(model), base_run(host), "disabled")
    all_equal(host.run(model.requires_grad_(False)), want, "enabled again")
    nothing_left(host, model.unload())


def nested_lora(host, surgery_outside):
    """The surgery around a LoRA, or in it."""
    tuning, surgery, base = lora(host.streams()[0]), host.config, host.base()
    if surgery_outside:
        inner = get_peft_model(base, tuning, adapter_name="tuning")
        torch.manual_seed(0)
        return host.surgery(inner, surgery, "surgery")
    torch.manual_seed(0)
    inner = host.surgery(base, surgery, "surgery")
    return get_peft_model(inner, tuning, adapter_name="tuning")


@drawn
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")  # so it is
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("surgery_outside", [True, False], ids=["outside", "inside"])
def test_a_lora_nested_in_both_orders(host, surgery_outside, tmp_path):
    model = nested_lora(host, surgery_outside).eval()
    all_equal(host.run(model), start_run(host), "a LoRA at its start changes nothing")
    stir(model)
    want = host.run(model)
    assert differs(want, attached_run(host))
    model.save_pretrained(tmp_path)
    if surgery_outside:
        inner = model.unload()  # the LoRA model without the surgery around it
        assert not any(isinstance(module, BlockSurgery) for module in inner.modules())
        again = PeftModel.from_pretrained(inner, tmp_path / "surgery")
    else:
        again = nested_lora(host, surgery_outside)
        again.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k or ".hf_tokens." in k}, strict=False)
    all_equal(host.run(again.eval()), want, "loaded")
